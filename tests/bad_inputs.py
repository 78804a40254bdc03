"""Bad inputs: arguments, exit code, what the message must hold. `{...}` is a file of `make_world`.

`LIGHT` is refused before torch is imported, `HEAVY` after.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from conftest import EOS, make_gpt2, make_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ppo_cli.config_source import load_config

T, G, C = "train", "generate", "compare"
Case = tuple[list[str], int, list[str]]


def setting(assignment: str, *wanted: str, code: int = 2) -> Case:
    """`train --set assignment` is refused with a message that holds `wanted`."""
    return [T, "--set", assignment], code, list(wanted)


def config(file: str, *wanted: str) -> Case:
    return [T, "--config", f"{{{file}}}"], 2, [file, *wanted]


COMMAND_LINE: list[Case] = [
    (["trian"], 2, ["No such command 'trian'", "'train'"]),
    ([T, "--sentimant", "positive"], 2, ["--sentimant", "--sentiment"]),
    ([T, "extra"], 2, ["extra", "--help"]),
    ([T, "--steps", "0"], 2, ["--steps", "greater than or equal to 1"]),
    ([T, "--steps", "many"], 2, ["--steps", "valid integer"]),
    ([T, "--steps", "1e3"], 2, ["--steps", "valid integer"]),
    ([T, "--steps"], 2, ["--steps", "argument"]),
    ([T, "--seed", "-1"], 2, ["--seed", "greater than or equal to 0"]),
    ([T, "--seed", "4294967296"], 2, ["--seed", "4294967295"]),
    ([T, "--resume", "--overwrite"], 2, ["--resume", "--overwrite"]),
    ([T, "--allow-changed-inputs"], 2, ["--allow-changed-inputs", "--resume"]),
    ([T, "--config", ""], 2, ["no configuration is named ''"]),
    ([T, "--sentiment", ""], 2, ["--sentiment", "empty"]),
    ([T, "--sentiment", "  "], 2, ["--sentiment", "empty"]),
    ([T, "--sentiment", "\udcff"], 2, ["UTF-8"]),
    ([T, "--output", ""], 2, ["--output", "empty"]),
    ([T, "--output", "x" * 300], 2, ["300 bytes", "too long", "--output"]),
    ([T, "--output", "a\nb"], 2, ["--output", "control character"]),
    (["generate"], 2, ["MODEL"]),
    (["compare"], 2, ["MODEL"]),
    (["plot"], 2, ["RUN"]),
    (["stats"], 2, ["RUN"]),
    ([G, "{policy}", "--temperature", "0"], 2, ["--temperature", "above 0"]),
    ([G, "{policy}", "--temperature", "-1"], 2, ["--temperature", "above 0"]),
    ([G, "{policy}", "--temperature", "nan"], 2, ["--temperature", "above 0"]),
    ([G, "{policy}", "--temperature", "inf"], 2, ["--temperature", "1e6"]),
    ([G, "{policy}", "--temperature", "1e-300"], 2, ["--temperature", "1e-6"]),
    ([G, "{policy}", "--temperature", "warm"], 2, ["--temperature", "valid number"]),
    ([G, "{policy}", "--top-p", "1.5"], 2, ["--top-p", "at most 1"]),
    ([G, "{policy}", "--top-p", "nan"], 2, ["--top-p", "at most 1"]),
    ([G, "{policy}", "--top-k", "-1"], 2, ["--top-k", "greater than or equal to 0"]),
    ([G, "{policy}", "-n", "0"], 2, ["--num-samples", "greater than or equal to 1"]),
    ([G, "{policy}", "-n", "99999999999"], 2, ["--num-samples", "10000"]),
    ([G, "{policy}", "--max-new-tokens", "0"], 2, ["--max-new-tokens", "1"]),
    ([G, "{policy}", "--seed", "-3"], 2, ["--seed", "0"]),
    ([G, "{policy}", "--format", "xml"], 2, ["--format': 'xml'", "jsonl"]),
    ([C, "{run}", "--format", "xml"], 2, ["--format': 'xml'", "markdown"]),
    ([C, "{run}", "--samples", "0"], 2, ["--samples", "1"]),
    ([C, "{run}", "--samples", "99999999999"], 2, ["--samples", "1000000"]),
    ([C, "{run}", "--rows", "-1"], 2, ["--rows", "0"]),
    ([C, "{run}", "--min-gap", "nan"], 2, ["--min-gap", "number"]),
    ([C, "{run}", "--min-gap", "wide"], 2, ["--min-gap", "valid number"]),
    (["plot", "{run}", "--frontier", "--smooth", "3"], 2, ["--frontier", "--smooth"]),
    ([C, "{run}", "--best-of-n", "0"], 2, ["--best-of-n '0'", "1,2,4,8,16"]),
    ([C, "{run}", "--best-of-n", "1,x"], 2, ["--best-of-n '1,x'", "1,2,4,8,16"]),
    (["plot", "{run}", "--smooth", "0"], 2, ["--smooth", "1"]),
    (["stats", "{run}", "--step", "0"], 2, ["--step", "1"]),
    (["stats", "{run}", "--step", "last"], 2, ["--step", "valid integer"]),
    (["config", "tyni"], 2, ["'tyni'", "'tiny'"]),
    (["config", "tiny", "--set", "run.steps"], 2, ["--set run.steps", "section.key=value"]),
]  # fmt: skip
CONFIGURATIONS: list[Case] = [
    ([T, "--config", "tyni"], 2, ["'tyni'", "'tiny'"]),
    ([T, "--config", "absent.yaml"], 2, ["absent.yaml", "no such"]),
    ([T, "--config", "{folder}"], 2, ["folder", "no such configuration file"]),
    config("broken.yaml", "line 3, column 1", "YAML"),
    config("unknown.yaml", "line 3", "learning_rat", "'learning_rate'"),
    config("section.yaml", "line 1", "'ppo'"),
    config("scalar.yaml", "line 1", "reward", "object"),
    config("twice.yaml", "line 3: 'run.steps' is given twice"),
    config("list.yaml", "sections"),
    config("word.yaml", "sections"),
    config("latin.yaml", "byte 18", "UTF-8"),
    config("binary.yaml", "UTF-8"),
    config("nul.yaml", "not YAML"),
    config("tab.yaml", "line 2", "YAML"),
    config("truncated.yaml", "line 2", "YAML"),
    config("null.yaml", "line 2", "ppo.gamma", "null"),
    config("bomb.yaml", "anchors", "10000"),
    config("merges.yaml", "anchors", "10000"),
    config("loop.yaml", "nested too deeply"),
    config("deep.yaml", "nested too deeply"),
    config("huge.yaml", "larger than 1024 KiB"),
    config("long.yaml", "line 2", "policy.model", "1000000 characters"),
    config("object.yaml", "line 1", "python/object"),
    config("date.yaml", "line 1", "2020-01-01", "quotes"),
    config("surrogate.yaml", "UTF-8"),
    config("secret.yaml", "line 3", "ppo.tracker_kwargs.wandb.api_key", "environment"),
    config("trust.yaml", "line 2", "trust_remote_code", "no such key"),
    setting("policy.model=https://me:word@host/x", "--set policy.model:", "password"),
    setting("reward.revision=hf_abcdefghijklmnopqrstuvwxyz", "reward.revision", "token"),
    setting("ppo.batch_size=100", "100", "16 x 1 = 16"),
    setting("ppo.kl_penalty=huge", "ppo.kl_penalty", "'k3', 'abs', 'mse' or 'full'"),
    setting("ppo.kl_penalty=кл", "ppo.kl_penalty", "'k3', 'abs', 'mse' or 'full'"),
    setting("learning_rate=1", "section.key=value"),
    setting("=1", "section.key=value"),
    setting("ppo..gamma=1", "section.key=value"),
    setting("ppo.gamma=[", "--set ppo.gamma=[", "not YAML"),
    setting("ppo.gamma=" + "[" * 2000, "nested too deeply"),
    setting("run.steps=" + "9" * 5000, "run.steps", "4300 digits"),
    setting("run.steps=999999999999999999999x", "run.steps", "integer"),
    setting("run.best_of_n=[1,0]", "run.best_of_n", "greater than or equal to 1"),
    setting("run.best_of_n=[]", "run.best_of_n", "at least 1"),
    *(
        ([T, "--set", "run.eval_every=0", "--set", f"run.{stop}"], 2, ["run.eval_every to 1", stop[:6]])
        for stop in ("target_score=1", "stop_kl=5", "patience=3")
    ),
    setting("run.patience=0", "run.patience", "greater than or equal to 1"),
    setting("run.stop_kl=0", "run.stop_kl", "greater than 0"),
    setting("run.weights=newest", "run.weights", "'best' or 'last'"),
    setting("run.steps.x=1", "'steps' is a value"),
    setting("prompts.input_max_text_length=2", "input_max_text_length (2)", "exceed"),
    setting("rollout.output_max_length=12", "output_max_length (12)", "exceed"),
    setting("rollout.stop=.", "valid array", "'.'"),
    setting('rollout.stop=[""]', "rollout.stop.0", "at least 1 character"),
    setting("reward.length_cost=-1", "greater than or equal to 0", "-1"),
    setting("policy.adapter.rank=3", "policy.adapter.rank", "r, alpha"),
    setting("policy.adapter.r=0", "policy.adapter.r", "greater"),
    setting("policy.adapter.dropout=1", "policy.adapter.dropout", "less than 1"),
    setting("policy.adapter.target_modules=q_proj", "target_modules", "valid array"),
]  # fmt: skip
PLACES: list[Case] = [
    ([C, "{run}", "--sentiment", ""], 2, ["no label ''"]),
    ([T, "--output", "{run}"], 2, ["exists", "--resume", "--overwrite"]),
    ([T, "--output", "{notes.txt}"], 2, ["is a file", "--output"]),
    ([T, "--output", "{folder}", "--overwrite"], 2, ["no run directory", "not overwritten"]),
    ([T, "--output", "{notes.txt}/run"], 2, ["notes.txt", "--output"]),
    ([T, "--output", "{linked_folder}"], 2, ["linked_folder", "is a link"]),
    ([T, "--output", "{linked_folder}", "--overwrite"], 2, ["linked_folder", "is a link"]),
    ([T, "--output", "{dangling}"], 2, ["dangling", "is a link"]),
    ([T, "--output", "{pipe.txt}"], 2, ["pipe.txt", "device, pipe or socket"]),
    ([T, "--output", "absent", "--resume"], 2, ["absent", "no such run directory"]),
    ([T, "--output", "{run}", "--resume"], 2, ["no checkpoint", "--overwrite"]),
    ([T, "--output", "{linked_run}", "--resume"], 2, ["metrics.jsonl", "is a link"]),
    ([G, "{policy}", "--output", "absent/out.txt"], 2, ["absent", "does not exist"]),
    ([G, "{policy}", "--output", "{folder}"], 2, ["folder", "give a file"]),
    ([G, "{policy}", "--output", "{linked.txt}"], 2, ["linked.txt", "is a link"]),
    ([G, "{policy}", "--output", "{pipe.txt}"], 2, ["pipe.txt", "standard output"]),
    ([G, "{policy}", "--output", "/dev/null"], 2, ["/dev/null", "device"]),
    ([C, "{run}", "--html", "absent/page.html"], 2, ["absent", "does not exist"]),
    ([C, "{run}", "--html", "{linked.txt}"], 2, ["linked.txt", "is a link"]),
    ([C, "{run}", "--output", "{folder}"], 2, ["folder", "give a file"]),
    (["plot", "{run}", "--output", "picture.gif"], 2, ["picture.gif", ".png"]),
    (["plot", "{run}", "--output", "picture"], 2, ["picture", ".png"]),
    (["plot", "{run}", "--output", "{linked.png}"], 2, ["linked.png", "is a link"]),
    (["plot", "{run}", "--output", "absent/x.png"], 2, ["absent", "does not exist"]),
]  # fmt: skip
RUNS: list[Case] = [
    (["plot", "absent"], 2, ["absent", "no such run directory"]),
    (["plot", "{folder}"], 2, ["folder", "run.yaml"]),
    (["plot", "{notes.txt}"], 2, ["notes.txt", "no run directory"]),
    (["plot", ""], 2, ["run directory is empty"]),
    (["plot", "x" * 300], 2, ["no such run directory"]),
    (["stats", "{run}", "--step", "9"], 2, ["no step 9", "1 to 2"]),
    (["plot", "{run}", "--metric", "ppo/loss/totl"], 2, ["ppo/loss/totl", "'ppo/loss/total'"]),
    (["plot", "{run}", "--metric", ""], 2, ["no metric ''", "ppo/loss/total"]),
    (["stats", "{damaged}"], 2, ["metrics.jsonl, line 1"]),
    (["plot", "{damaged}"], 2, ["metrics.jsonl, line 1"]),
    (["stats", "{stepless}"], 2, ["metrics.jsonl, line 1", "damaged"]),
    (["stats", "{worded}"], 2, ["metrics.jsonl, step 1", "'ppo/loss/total' is 'low'"]),
    (["plot", "{worded}"], 2, ["metrics.jsonl, step 1", "'ppo/loss/total' is 'low'"]),
    (["stats", "{binary}"], 2, ["metrics.jsonl, line 1", "damaged"]),
    (["stats", "{nested}"], 2, ["metrics.jsonl, line 1", "damaged"]),
    (["stats", "{unstarted}"], 2, ["no steps", "metrics.jsonl"]),
    (["stats", "{blank}"], 2, ["no steps", "metrics.jsonl"]),
]  # fmt: skip
LIGHT = [*COMMAND_LINE, *CONFIGURATIONS, *PLACES, *RUNS]

MODELS: list[Case] = [
    ([T, "--device", "tpu"], 2, ["'tpu'", "cuda"]),
    ([T, "--device", "cuda:7"], 2, ["'cuda:7'", "cpu"]),
    ([T, "--device", "cuda:x"], 2, ["'cuda:x'", "cuda:N"]),
    ([G, "{policy}", "--device", ""], 2, ["device ''", "cuda:N"]),
    ([T, "--sentiment", "joyful"], 2, ["'joyful'", "NEGATIVE, POSITIVE"]),
    ([T, "--sentiment", "2"], 2, ["'2'", "NEGATIVE, POSITIVE"]),
    ([T, "--sentiment", "😀"], 2, ["'😀'", "NEGATIVE, POSITIVE"]),
    setting("policy.model=./absent", "./absent", "no such folder"),
    setting("policy.model={folder}", "folder", "no model", "config.json"),
    setting("policy.model={notes.txt}", "notes.txt", "is a file"),
    setting("policy.model={classifier}", "ForSequenceClassification", "causal"),
    setting("policy.model={encoder}", "T5ForConditionalGeneration", "causal"),
    setting("policy.model={unconfigured}", "unconfigured", "config.json", code=1),
    setting("policy.model={config_text}", "config_text", "config.json", code=1),
    setting("policy.model={config_list}", "config_list", "cannot be loaded", code=1),
    setting("policy.model={config_empty}", "config_empty", "model_type", code=1),
    setting("policy.model={config_strange}", "config_strange", "nonsense", code=1),
    setting("policy.model={garbled}", "garbled", "cannot be loaded", code=1),
    setting("policy.model={weightless}", "weightless", "model.safetensors", code=1),
    setting("policy.model={empty_weights}", "empty_weights", "cannot be loaded", code=1),
    setting("policy.model={lacking}", "lacking", "lack transformer.h.1.ln_1.bias", code=1),
    setting("policy.model={misshaped}", "misshaped", "cannot be loaded", code=1),
    setting("policy.model={mismatched}", "mismatched", "80 tokens", "60", code=1),
    setting("policy.model={tokenless}", "tokenless", "no tokenizer", code=1),
    ([G, "{tokenless}", "--no-score"], 1, ["tokenless", "no tokenizer"]),
    setting("policy.model={pickled}", "pickled", "cannot be loaded", code=1),
    setting("policy.model={head_cut}", "head_cut", "cannot be loaded", code=1),
    setting("policy.model={head_wide}", "head_wide", "value head does not fit", code=1),
    setting("policy.model={coded}", "coded", "--trust-remote-code", code=1),
    setting("policy.model={adapter}", "adapter", "cannot be loaded", code=1),
    setting("policy.num_shared_layers=9", "num_shared_layers is 9", "4 layers"),
    setting("reward.model={policy}", "GPT2LMHeadModel", "sequence classifier", code=1),
    setting("reward.model=./absent", "./absent", "no such folder"),
    setting("reward.model={folder}", "folder", "no model"),
    setting("reward.model={judge_lacking}", "judge_lacking", "lack classifier", code=1),
    setting("reward.model={judge_nan}", "judge_nan", "not finite", code=1),
    setting("reward.model={judge_coded}", "judge_coded", "--trust-remote-code", code=1),
    setting("reward.model={judge_blind}", "judge_blind", "does not tell sentiment apart"),
    ([G, "no-such-org/no-such-model"], 1, ["no-such-org/no-such-model", "hub"]),
    ([G, ""], 2, ["model", "empty"]),
    ([G, "a\x07b"], 2, ["a\\x07b", "control character"]),
    ([G, "x" * 5000], 2, ["xxx", "5000 characters"]),
    ([G, "{lacking}", "--no-score"], 1, ["lacking", "lack transformer.h.1.ln_1.bias"]),
    ([G, "{coded}", "--no-score"], 1, ["coded", "--trust-remote-code"]),
    ([G, "{policy}", "--trust-remote-code", "gpt3"], 2, ["--trust-remote-code gpt3", "no such model"]),
    ([T, "--trust-remote-code", "all"], 2, ["--trust-remote-code all", "embedded"]),
    ([G, "{listed}"], 2, ["run.yaml", "no configuration"]),
    ([G, "{bombed}"], 2, ["run.yaml", "anchors"]),
    ([G, "{later}"], 2, ["run.yaml", "ppo.new_idea", "no such key"]),
    ([G, "{policy}", "--classifier", "./absent"], 2, ["./absent", "no such folder"]),
    ([G, "{policy}", "--classifier", ""], 2, ["--classifier", "empty"]),
    ([G, "{policy}", "--classifier", "embedded", "--sentiment", "fun"], 2, ["'fun'", "NEGATIVE"]),
    setting("policy.model=no-such-org/none", "no-such-org/none", "hub", code=1),
    setting("prompts.source=no-such-org/none", "no-such-org/none", "hub", code=1),
    ([C, "{policy}", "{policy}"], 2, ["no run directory", "--classifier"]),
    ([C, "{policy}", "--classifier", "embedded"], 2, ["two models"]),
    ([C, "{policy}", "{policy}", "--classifier", "embedded"], 2, ["--prompts FILE"]),
    ([C, "{policy}", "{policy}", "--classifier", "embedded", "--best-of-n", "2"], 2, ["--best-of-n", "run directory"]),
]  # fmt: skip
TEXTS: list[Case] = [
    setting("prompts.source=absent.csv", "absent.csv", "no such file"),
    setting("prompts.source={folder.txt}", "folder.txt", "a file ending in"),
    setting("prompts.source={pipe.txt}", "pipe.txt", "a file ending in"),
    setting("prompts.source={notes.text}", "notes.text", "a file ending in"),
    setting("prompts.source={reviews.csv}", "'text'", "review, stars", "text_column"),
    setting("prompts.source={empty.txt}", "empty.txt", "empty"),
    setting("prompts.source={empty.csv}", "empty.csv", "empty"),
    setting("prompts.source={header.csv}", "header.csv", "empty"),
    setting("prompts.source={empty.jsonl}", "empty.jsonl", "empty"),
    setting("prompts.source={spaces.txt}", "spaces.txt", "empty"),
    setting("prompts.source={latin.txt}", "latin.txt", "byte 3", "UTF-8"),
    setting("prompts.source={latin.csv}", "latin.csv", "byte 8", "UTF-8"),
    setting("prompts.source={binary.txt}", "binary.txt", "UTF-8"),
    setting("prompts.source={broken.jsonl}", "broken.jsonl, line 2", "not JSON (Expecting value)"),
    setting("prompts.source={nested.jsonl}", "nested.jsonl, line 1", "not JSON"),
    setting("prompts.source={digits.jsonl}", "digits.jsonl, line 1", "not JSON"),
    setting("prompts.source={number.jsonl}", "number.jsonl, line 1", "'text' is not a text"),
    setting("prompts.source={list.jsonl}", "list.jsonl, line 1", "an object or a string"),
    setting("prompts.source={column.jsonl}", "column.jsonl, line 1", "no column 'text'", "body"),
    setting("prompts.source={surrogate.jsonl}", "surrogate.jsonl, text 1", "UTF-8"),
    setting("prompts.source={empty.parquet}", "empty.parquet", "not a whole Parquet file"),
    setting("prompts.source={cut.parquet}", "cut.parquet", "not a whole Parquet file"),
    setting("prompts.source={numbers.parquet}", "numbers.parquet", "holds int, not text"),
    setting("prompts.source={few.txt}", "few.txt", "queries (16)"),
    ([T, "--set", "prompts.source={few.txt}", "--set", "prompts.min_characters=999"], 2, ["999", "min_characters"]),
    setting("rollout.output_max_length=500", "context of 128", "output_max_length"),
    ([G, "{policy}", "--prompt", ""], 2, ["prompt is empty", "give some text"]),
    ([G, "{policy}", "--prompt", " \t\n"], 2, ["prompt is empty", "give some text"]),
    ([G, "{policy}", "--prompt", "\udcff\udcfe"], 2, ["--prompt", "UTF-8"]),
    ([G, "{policy}", "--prompts", "absent.txt"], 2, ["absent.txt", "no such file"]),
    ([G, "{policy}", "--prompts", "{folder}"], 2, ["folder", "a file ending in"]),
    ([G, "{policy}", "--prompts", "{empty.txt}"], 2, ["empty.txt", "empty"]),
    ([G, "{policy}", "--prompts", "{reviews.csv}"], 2, ["reviews.csv", "'text'"]),
    ([G, "{policy}", "--prompts", "{reviews.csv}", "--column", "revew"], 2, ["'review'"]),
    ([G, "{policy}", "--prompts", "{million.txt}"], 2, ["context", "shorten it"]),
    ([G, "{policy}", "--prompts", "-"], 2, ["standard input"]),
    ([G, "{policy}", "--prompt", "{long}"], 2, ["context", "--max-new-tokens"]),
    ([G, "{policy}", "--max-new-tokens", "1000"], 2, ["context of", "--max-new-tokens"]),
    ([C, "{policy}", "{policy}", "--classifier", "embedded", "--prompts", "{spaces.txt}"], 2, ["spaces.txt", "empty"]),
]  # fmt: skip
HEAVY = [*MODELS, *TEXTS]


def make_world(folder: Path) -> dict[str, str]:
    """The files that the cases name: name -> path."""
    from ppo_cli.embedded import classifier_folder, policy_folder

    for name, content in _files().items():
        (folder / name).write_bytes(content)
    _make_parquet(folder)
    for name in ("folder", "folder.txt"):
        (folder / name).mkdir()
        (folder / name / "something.txt").write_text("here\n")
    os.mkfifo(folder / "pipe.txt")
    _make_runs(folder)
    _make_models(folder)
    for name, target in (
        ("linked_folder", "folder"), ("linked.txt", "notes.txt"), ("dangling", "nowhere"),
        ("linked.png", "notes.txt"), ("linked_run/metrics.jsonl", "../notes.txt"),
    ):  # fmt: skip
        (folder / name).symlink_to(target)
    names = {path.name: str(path) for path in folder.iterdir()}
    return names | {
        "policy": str(policy_folder()), "classifier": str(classifier_folder()),
        "long": "word " * 300,
    }  # fmt: skip


def _files() -> dict[str, bytes]:
    nines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    merged = [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 9)]
    return {
        "broken.yaml": b"run:\n  steps: [1, 2\n",
        "unknown.yaml": b"ppo:\n  gamma: 1.0\n  learning_rat: 1e-5\n",
        "section.yaml": b"pppo:\n  gamma: 1.0\n",
        "scalar.yaml": b"reward: 5\n",
        "twice.yaml": b"run:\n  steps: 1\n  steps: 2\n",
        "list.yaml": b"- 1\n- 2\n",
        "word.yaml": b"hello\n",
        "latin.yaml": "run:\n  output: caf\u00e9\n".encode("latin-1"),
        "binary.yaml": bytes(range(128, 256)) * 4,
        "nul.yaml": b"run:\n  output: a\0b\n",
        "tab.yaml": b"run:\n\tsteps: 1\n",
        "truncated.yaml": b'run:\n  output: "ppo-',
        "null.yaml": b"ppo:\n  gamma: null\n",
        "bomb.yaml": "\n".join(["a0: &a0 [x, x]", *nines]).encode(),
        "merges.yaml": "\n".join(["a0: &a0 {x: 1}", *merged]).encode(),
        "loop.yaml": b"run: &a\n  steps: *a\n",
        "deep.yaml": b"run: " + b"[" * 3000,
        "huge.yaml": b"# " + b"x" * 2_000_000,
        "long.yaml": b"policy:\n  model: " + b"x" * 1_000_000,
        "object.yaml": b"run: !!python/object/apply:os.system ['touch here']\n",
        "date.yaml": b"2020-01-01: 1\n",
        "surrogate.yaml": b'run:\n  output: "\\ud800"\n',
        "secret.yaml": b"ppo:\n  tracker_kwargs:\n    wandb: {api_key: abc}\n",
        "trust.yaml": b"policy:\n  trust_remote_code: true\n",
        "notes.txt": b"not a run\n",
        "notes.text": b"This film is fine.\n",
        "reviews.csv": b"review,stars\nfine film,4\n",
        "empty.txt": b"", "empty.csv": b"", "empty.jsonl": b"", "empty.parquet": b"",
        "header.csv": b"text\n",
        "spaces.txt": b"  \n\t\n \n",
        "latin.txt": "caf\u00e9\n".encode("latin-1") * 100,
        "latin.csv": "text\ncaf\u00e9\n".encode("latin-1") * 100,
        "binary.txt": bytes(range(256)) * 4,
        "million.txt": b"x" * 1_000_000,
        "broken.jsonl": b'{"text": "fine"}\n{"text": \n',
        "nested.jsonl": b"[" * 100_000,
        "digits.jsonl": b'{"text": ' + b"9" * 5000 + b"}\n",
        "number.jsonl": b'{"text": 5}\n',
        "list.jsonl": b"[1, 2]\n",
        "column.jsonl": b'{"body": "fine"}\n',
        "surrogate.jsonl": b'{"text": "half \\ud800 a pair"}\n',
        "few.txt": b"This film is fine.\n" * 20,
    }  # fmt: skip


def _make_parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [1, 2, 3]}), folder / "numbers.parquet")
    content = (folder / "numbers.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(content[: len(content) // 2])


def _make_runs(folder: Path) -> None:
    values = load_config("tiny").model_dump(mode="json")
    record = yaml.safe_dump({"config": values})
    rows = [json.dumps({"step": i, "ppo/loss/total": 0.1, "ppo/mean_scores": 1.0}) for i in (1, 2)]
    whole = "\n".join(rows) + "\n"
    metrics: dict[str, bytes | None] = {
        "run": whole.encode(),
        "linked_run": None,
        "damaged": b"{\n{}\n",
        "stepless": b'{"ppo/loss/total": 1}\n{}\n',
        "worded": b'{"step": 1, "ppo/loss/total": "low"}\n{"step": 2}\n',
        "binary": bytes(range(128, 256)) + b"\n{}\n",
        "nested": b"[" * 100_000 + b"\n{}\n",
        "unstarted": None,
        "blank": b"",
        "listed": None,
        "bombed": None,
        "later": None,
    }
    for name, content in metrics.items():
        (folder / name).mkdir()
        (folder / name / "run.yaml").write_text(record)
        if content is not None:
            (folder / name / "metrics.jsonl").write_bytes(content)
    (folder / "listed" / "run.yaml").write_text("- config\n")
    shutil.copy(folder / "bomb.yaml", folder / "bombed" / "run.yaml")
    values["ppo"]["new_idea"] = 1
    (folder / "later" / "run.yaml").write_text(yaml.safe_dump({"config": values}))


class Evil:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


def _make_models(folder: Path) -> None:
    def model(name: str, config: str | None = None, **changes: Any) -> Path:
        path = folder / name
        make_gpt2(**changes).save_pretrained(path)
        make_tokenizer().save_pretrained(path)
        if config is not None:
            (path / "config.json").write_text(config)
        return path

    model("unconfigured").joinpath("config.json").unlink()
    model("config_text", "{")
    model("config_list", "[]")
    model("config_empty", "{}")
    model("config_strange", '{"model_type": "nonsense"}')
    model("encoder", '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    model("mismatched", vocab_size=60)
    for name in ("garbled", "empty_weights"):
        weights = model(name) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[: 200 if name == "garbled" else 0])
    model("weightless").joinpath("model.safetensors").unlink()
    weights = model("lacking") / "model.safetensors"
    state = load_file(weights)
    del state["transformer.h.1.ln_1.bias"]
    save_file(state, weights, {"format": "pt"})
    weights = model("misshaped") / "model.safetensors"
    save_file(
        load_file(weights) | {"transformer.wpe.weight": torch.ones(3, 3)}, weights, {"format": "pt"}
    )
    for file in model("tokenless").glob("tokenizer*"):
        file.unlink()
    weights = model("pickled") / "model.safetensors"
    weights.unlink()
    torch.save({"transformer.wte.weight": Evil()}, weights.with_name("pytorch_model.bin"))
    (model("head_cut") / "value_head.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    head = {"v_head.summary.weight": torch.ones(1, 99), "v_head.summary.bias": torch.ones(1)}
    save_file(head, model("head_wide") / "value_head.safetensors")
    code = {
        "model_type": "own",
        "auto_map": {
            "AutoConfig": "own.Own",
            "AutoModelForCausalLM": "own.Own",
            "AutoModelForSequenceClassification": "own.Own",
        },
    }
    for name in ("coded", "judge_coded"):
        (model(name, json.dumps(code)) / "own.py").write_text("import os\nos.mkdir('executed')\n")
    (folder / "adapter").mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "./absent", "task_type": "CAUSAL_LM"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    make_tokenizer().save_pretrained(folder / "adapter")
    _make_judges(folder)


def _make_judges(folder: Path) -> None:
    from ppo_cli.embedded import classifier_folder

    for name in ("judge_lacking", "judge_nan", "judge_blind"):
        shutil.copytree(classifier_folder(), folder / name)
        weights = folder / name / "model.safetensors"
        state = load_file(weights)
        for key in [key for key in state if key.startswith("classifier.")]:
            if name == "judge_lacking":
                del state[key]
            else:
                state[key] = state[key] * (0 if name == "judge_blind" else float("nan"))
        save_file(state, weights, {"format": "pt"})


def make_endless_model(folder: Path) -> None:
    """A model whose tokenizer has no padding and no end-of-text token."""
    make_gpt2(eos_token_id=None, bos_token_id=None).save_pretrained(folder)
    words = {f"t{i}": i for i in range(EOS + 1)}
    raw = Tokenizer(WordLevel(words, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)
