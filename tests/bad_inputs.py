"""Bad inputs: arguments, exit code, what the message must hold. `{...}` is a file of `make_world`.

`LIGHT` is refused before torch is imported, `HEAVY` after.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ppo_cli.config.loading import load_config
from tests.conftest import EOS, make_gpt2, make_seq2seq, make_seq2seq_tokenizer, make_tokenizer

T, G, C = "train", "generate", "compare"
Case = tuple[list[str], int, list[str]]


def setting(assignment: str, *wanted: str, code: int = 2) -> Case:
    """`train --set assignment` is refused with a message that holds `wanted`."""
    return [T, "--set", assignment], code, list(wanted)


def config(file: str, *wanted: str) -> Case:
    return [T, "--config", f"{{{file}}}"], 2, [file, *wanted]


COMMAND_LINE: list[Case] = [
    ([G, "{policy}", "--interactive", "--prompt", "Hi"], 2, ["--interactive", "leave out --prompt"]),
    ([G, "{policy}", "{policy}", "--interactive"], 2, ["--interactive", "leave out a second MODEL"]),
    (["trian"], 2, ["No such command 'trian'", "'train'"]),
    ([T, "--sentimant", "positive"], 2, ["--sentimant", "--sentiment"]),
    ([T, "extra"], 2, ["extra", "--help"]),
    ([T, "--steps", "0"], 2, ["--steps", "1"]),
    ([T, "--steps", "many"], 2, ["--steps", "valid integer"]),
    ([T, "--steps", "1e3"], 2, ["--steps", "valid integer"]),
    ([T, "--steps"], 2, ["--steps", "argument"]),
    ([T, "--kl", "0"], 2, ["option --kl: run.kl_budget", "greater than 0"]),
    ([T, "--kl", "nan"], 2, ["run.kl_budget", "finite"]),
    setting("run.kl_ceiling=0", "run.kl_ceiling", "greater than 0"),
    ([T, "--kl", "much"], 2, ["--kl", "valid "]),
    ([T, "--kl", "1000"], 2, ["--kl", "1000", "not below run.kl_limit (1000)", "raise run.kl_limit"]),
    ([T, "--seed", "-1"], 2, ["--seed", "0"]),
    ([T, "--seed", "4294967296"], 2, ["--seed", "4294967295"]),
    ([T, "--num-processes", "0"], 2, ["--num-processes", "1"]),
    ([T, "--num-processes", "2", "--dry-run"], 2, ["--dry-run measures one process", "--no-measure"]),
    ([T, "--num-processes", "2", "--kl", "0"], 2, ["option --kl", "greater than 0"]),
    ([T, "--resume", "--overwrite"], 2, ["--resume", "--overwrite"]),
    ([T, "--allow-changed-inputs"], 2, ["--allow-changed-inputs", "--resume"]),
    ([T, "--track", "tensorbord"], 2, ["option --track", "'tensorbord'", "'tensorboard'"]),
    ([T, "--track", "mlflow,"], 2, ["option --track", "no tracker ''", "wandb"]),
    ([T, "--track", "comet_ml"], 2, ["comet_ml", "pip install 'ppo-cli[comet_ml]'"]),
    ([T, "--set", "ppo.log_with=[none]"], 2, ["ppo.log_with", "no tracker 'none'"]),
    ([T, "--set", "run.report_to=wandb"], 2, ["report_to", "ppo.log_with (option --track)"]),
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
    (["push"], 2, ["RUN"]),
    (["push", "{run}"], 2, ["OWNER/NAME"]),
    (["push", "{run}", "name"], 2, ["'name'", "give OWNER/NAME"]),
    (["push", "{run}", "me/a--b", "--dry-run"], 2, ["'me/a--b'", "give OWNER/NAME"]),
    (["push", "nowhere", "me/model"], 2, ["nowhere: no such run directory"]),
    (["push", "{run}", "me/model", "--dry-run"], 2, ["holds no model yet", "--resume"]),
    ([G, "{policy}", "--temperature", "0"], 2, ["--temperature", "above 0"]),
    ([G, "{policy}", "--temperature", "-1"], 2, ["--temperature", "above 0"]),
    ([G, "{policy}", "--temperature", "nan"], 2, ["--temperature", "above 0"]),
    ([G, "{policy}", "--temperature", "inf"], 2, ["--temperature", "1e6"]),
    ([G, "{policy}", "--temperature", "1e-300"], 2, ["--temperature", "1e-6"]),
    ([G, "{policy}", "--temperature", "warm"], 2, ["--temperature", "valid"]),
    ([G, "{policy}", "--top-p", "1.5"], 2, ["--top-p", "at most 1"]),
    ([G, "{policy}", "--top-p", "nan"], 2, ["--top-p", "at most 1"]),
    ([G, "{policy}", "--top-k", "-1"], 2, ["--top-k", "0"]),
    ([G, "{policy}", "-n", "0"], 2, ["--num-samples", "1"]),
    ([G, "{policy}", "-n", "99999999999"], 2, ["--num-samples", "10000"]),
    ([G, "{policy}", "--max-new-tokens", "0"], 2, ["--max-new-tokens", "1"]),
    ([G, "{policy}", "--seed", "-3"], 2, ["--seed", "0"]),
    ([G, "{policy}", "--format", "xml"], 2, ["--format': 'xml'", "jsonl"]),
    ([C, "{run}", "--format", "xml"], 2, ["--format': 'xml'", "markdown"]),
    ([C, "{run}", "--samples", "0"], 2, ["--samples", "1"]),
    ([C, "{run}", "--samples", "99999999999"], 2, ["--samples", "1000000"]),
    ([C, "{run}", "--rows", "-1"], 2, ["--rows", "0"]),
    ([C, "{run}", "--min-gap", "nan"], 2, ["--min-gap", "number"]),
    ([C, "{run}", "--min-gap", "wide"], 2, ["--min-gap", "valid"]),
    (["plot", "{run}", "--frontier", "--smooth", "3"], 2, ["--frontier", "--smooth"]),
    ([C, "{run}", "--best-of-n", "0"], 2, ["--best-of-n '0'", "1,2,4,8,16"]),
    ([C, "{run}", "--best-of-n", "1,x"], 2, ["--best-of-n '1,x'", "1,2,4,8,16"]),
    (["plot", "{run}", "--smooth", "0"], 2, ["--smooth", "1"]),
    (["plot", "{run}", "--seeds", "mean"], 2, ["--seeds", "range", "each"]),
    (["plot", "{run}", "--labels", "a,b"], 2, ["--labels has 2 for 1 curve", "run"]),
    (["plot", "{run}", "--labels", " "], 2, ["--labels", "1 curve"]),
    (["plot", "{run}", "--terminal", "--output", "x.png"], 2, ["--terminal", "--output"]),
    (["stats", "{run}", "--step", "0"], 2, ["--step", "1"]),
    (["stats", "--step", "1"], 2, ["no RUN", "ppo-cli runs"]),
    (["stats", "--explain", "objectiv/kl"], 2, ["'objectiv/kl'", "'objective/kl'", "--explain all"]),
    (["stats", "--explain", "all", "--objective"], 2, ["--explain", "--no-objective"]),
    (["stats", "--explain", "all", "--step", "1"], 2, ["no RUN", "run directory"]),
    (["stats", "{run}", "--step", "last"], 2, ["--step", "valid integer"]),
    (["stats", "{run}", "--follow", "--step", "1"], 2, ["--step", "--follow", "leave one of them"]),
    (["stats", "{run}", "--follow", "--objective"], 2, ["--objective", "add --json"]),
    (["stats", "", "--follow"], 2, ["the name of the run directory is empty"]),
    (["stats", "{policy}", "--follow"], 2, ["no run directory"]),
    (["init", "my.txt"], 2, ["my.txt", ".yaml"]),
    (["init", "x.yaml", "--model", ""], 2, ["--model", "empty"]),
    (["init", "x.yaml", "--set", "run.stepps=1"], 2, ["'steps'"]),
    (["init", "x.yaml", "--from", "tyni"], 2, ["'tyni'", "'tiny'"]),
    (["config", "tyni"], 2, ["'tyni'", "'tiny'"]),
    (["config", "tiny", "--set", "run.steps"], 2, ["--set run.steps", "section.key=value"]),
    ([T, "--reward", "r.py"], 2, ["--reward r.py", "FILE.py:FUNCTION"]),
    ([T, "--reward", "r.py:f=much"], 2, ["--reward r.py:f=much", "'much' is no number"]),
    ([T, "--reward", "ftp://h/x"], 2, ["--reward ftp://h/x", "FILE.py:FUNCTION"]),
    ([T, "--reward", "r.py:f", "--set", "reward.model=x"], 2, ["reward.model=x", "--sentiment"]),
]  # fmt: skip
CONFIGURATIONS: list[Case] = [
    ([T, "--config", "tyni"], 2, ["'tyni'", "'tiny'"]),
    ([T, "--config", "absent.yaml"], 2, ["absent.yaml", "no such"]),
    ([T, "--config", "{folder}"], 2, ["folder", "no such configuration file"]),
    config("broken.yaml", "line 3, column 1", "YAML"),
    config("unknown.yaml", "line 3", "learning_rat", "'learning_rate'"),
    config("section.yaml", "line 1", "'ppo'"),
    config("scalar.yaml", "line 1", "reward", "object"),
    config("terms.yaml", "line 3", "reward.terms.0.wight", "'weight'"),
    setting("reward.terms=[{model: x, cost: length}]", "reward.terms.0", "has model and cost"),
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
    config("pipe.yaml", "device, pipe or socket"),
    setting("policy.model=https://me:word@host/x", "--set policy.model:", "password"),
    setting("reward.revision=hf_abcdefghijklmnopqrstuvwxyz", "reward.revision", "token"),
    setting("ppo.tracker_kwargs={wandb: {tags: [hf_abcdefghijklmnopqrstuvwxyz]}}", "tags.0", "token"),
    setting("ppo.tracker_kwargs={wandb: {settings: [{api-key: 1234}]}}", "settings.0.api-key"),
    setting("ppo.batch_size=100", "100", "16 x 1 = 16", "--set ppo.batch_size=100"),
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
    setting("ppo.score_scaling_samples=0", "score_scaling_samples", "greater than or equal to 1"),
    setting("run.patience=0", "run.patience", "greater than or equal to 1"),
    setting("run.stop_kl=0", "run.stop_kl", "greater than 0"),
    setting("run.weights=newest", "run.weights", "'best' or 'last'"),
    setting("run.steps.x=1", "'steps' is a value"),
    setting("prompts.input_max_text_length=2", "input_max_text_length (2)", "exceed"),
    setting("prompts.system=Hi", "prompts.system", "for conversations", "set chat to true"),
    setting("prompts.chat_template=absent.jinja", "'absent.jinja' is neither a file nor", "Jinja"),
    setting("prompts.chat_template={notes.txt}", "notes.txt is no chat template"),
    setting("prompts.chat_template={latin.txt}", "latin.txt cannot be read as UTF-8"),
    setting("prompts.chat_template='{{ 1 }}'", "for conversations", "set chat to true"),
    ([T, "--set", "prompts.streaming=true", "--set", "prompts.limit=null"], 2, ["set prompts.limit"]),
    setting("prompts.where={label: {a: 1}}", "prompts.where.label", "{'a': 1}"),
    setting("prompts.sources=[]", "prompts.sources", "at least 1"),
    setting("prompts.sources=[{weigth: 1}]", "prompts.sources.0.weigth", "'weight'"),
    setting("prompts.sources=[{weight: 0}]", "prompts.sources.0.weight", "greater than 0"),
    ([T, "--set", "prompts.sources=[{source: a.txt}]", "--set", "prompts.split=test"], 2,
     ["split stands beside sources", "in each source"]),
    ([T, "--set", "prompts.min_characters=9", "--set", "prompts.max_characters=9"], 2, ["max_characters (9) must exceed"]),
    setting("rollout.output_max_length=12", "--set rollout.output_max_length=12: output", "exceed"),
    setting("rollout.top_k=" + "9" * 400, "rollout.top_k", "less than or equal to 1000000000"),
    setting("rollout.stop=.", "valid array", "'.'"),
    setting("rollout.engine=vlm", "rollout.engine", "'transformers', 'paged' or 'vllm'"),
    setting("rollout.engine_kwargs={page_size: 8}", "engine_kwargs (page_size)", "paged or vllm"),
    ([T, "--set", "rollout.engine=paged", "--set", "rollout.top_k=5"], 2, ["top_k (5)", "paged draws"]),
    ([T, "--set", "rollout.engine=vllm", "--set", "rollout.top_p=0.9"], 2, ["top_p (0.9)", "vllm draws"]),
    setting('rollout.stop=[""]', "rollout.stop.0", "at least 1 character"),
    setting("reward.length_cost=-1", "greater than or equal to 0", "-1"),
    setting("policy.adapter.r=0", "policy.adapter.r", "greater"),
    setting("policy.adapter.dropout=1", "policy.adapter.dropout", "less than 1"),
    setting("policy.adapter.target_modules=q_proj", "target_modules", "valid array"),
    setting("policy.adapter.peft_type=lorra", "policy.adapter.peft_type", "'lorra'", "'LORA'"),
    setting("policy.adapter.peft_type=dora", "policy.adapter.peft_type", "use_dora: true"),
    setting("policy.adapter={alpha: 3, lora_alpha: 4}", "lora_alpha and alpha", "one of them"),
    setting("policy.adapter.save=all", "policy.adapter.save", "'both', 'merged' or 'adapter'"),
    setting("policy.dtype=float64", "policy.dtype", "'float32', 'bfloat16' or 'float16'"),
    setting("policy.freeze_layers=[-1]", "freeze_layers", "-1 is neither the number of a layer"),
    setting("policy.freeze_layers=[]", "freeze_layers", "at least 1"),
    ([T, "--set", "policy.freeze_layers=[0]", "--set", "policy.adapter.r=2"], 2, ["exclude each other"]),
    setting("policy.quantization.load_in_4bits=true", "policy.quantization", "'load_in_4bit'"),
    setting("policy.quantization.load_in_8bit=false", "one of load_in_4bit and load_in_8bit"),
    setting("policy.quantization={load_in_4bit: true, quant_method: torchao}", "torchao is for load_in_8bit"),
    setting("policy.quantization={load_in_8bit: true, bnb_4bit_quant_type: fp4}", "bnb_4bit_quant_type has no effect"),
    (["export"], 2, ["RUN"]),
    (["export", "nowhere", "x"], 2, ["nowhere", "no such run directory"]),
    (["export", "nowhere", "x", "--dtype", "int8"], 2, ["--dtype", "float32"]),
    setting("policy.adapter.target_modules=[c_atn]", "target_modules", "'c_atn'", "'c_attn'"),
    setting("policy.adapter.target_modules=[c_fc,x]", "target_modules", "no module 'x'", "c_attn"),
    setting("policy.adapter.target_modules=[ln_f]", "target_modules", "peft refuses", "c_attn"),
    setting("policy.adapter.target_modules=[]", "target_modules", "peft refuses", "c_attn"),
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
    ([T, "--output", "{workflow}"], 2, ["no run directory", "not overwritten"]),
    ([T, "--output", "{workflow}", "--overwrite"], 2, ["no run directory", "not overwritten"]),
    ([T, "--output", "{workflow}", "--resume"], 2, ["run.yaml", "another program's"]),
    ([T, "--output", "{visited}", "--overwrite"], 2, ["thesis.txt", "not overwritten"]),
    ([T, "--output", "{run}", "--overwrite", "--set", "policy.model={run}"], 2, ["policy.model", "--output"]),
    ([T, "--output", "{visited}", "--overwrite", "--set", "prompts.source={visited}/thesis.txt"], 2, ["prompts.source", "lies in"]),
    ([T, "--output", "{run}/checkpoints/run"], 2, ["run's checkpoints"]),
    ([T, "--output", "absent", "--resume"], 2, ["absent", "no such run directory"]),
    ([T, "--output", "{run}", "--resume"], 2, ["no checkpoint", "--overwrite"]),
    ([T, "--output", "{linked_run}", "--resume"], 2, ["metrics.jsonl", "is a link"]),
    ([G, "{policy}", "--output", "absent/out.txt"], 2, ["absent", "does not exist"]),
    ([G, "{policy}", "--output", "{folder}"], 2, ["folder", "give a file"]),
    ([G, "{policy}", "--output", "{linked.txt}"], 2, ["linked.txt", "is a link"]),
    ([G, "{policy}", "--output", "{pipe.txt}"], 2, ["pipe.txt", "standard output"]),
    ([G, "{policy}", "--output", "/dev/null"], 2, ["/dev/null", "device"]),
    ([G, "{policy}", "--output", "{run}/metrics.jsonl"], 2, ["file of the run", "not replaced"]),
    ([G, "{policy}", "--output", "{policy}/config.json"], 2, ["file of the model", "not replaced"]),
    ([G, "{policy}", "--prompts", "{few.txt}", "--output", "{few.txt}"], 2, ["same file", "not replaced"]),
    ([C, "{run}", "--output", "x", "--html", "./x"], 2, ["--output x", "--html ./x", "one file"]),
    ([C, "{run}", "--html", "{run}/run.yaml"], 2, ["file of the run", "not replaced"]),
    (["plot", "{run}", "--output", "{run}/frontier.png"], 2, ["file of the run", "not replaced"]),
    ([C, "{run}", "--html", "absent/page.html"], 2, ["absent", "does not exist"]),
    ([C, "{run}", "--html", "{linked.txt}"], 2, ["linked.txt", "is a link"]),
    ([C, "{run}", "--output", "{folder}"], 2, ["folder", "give a file"]),
    (["init", "absent/x.yaml"], 2, ["absent", "does not exist"]),
    (["init", "{linked.yaml}"], 2, ["linked.yaml", "is a link"]),
    (["init", "{run}/run.yaml", "--overwrite"], 2, ["file of the run", "not replaced"]),
    (["init", "{word.yaml}"], 2, ["exists", "--overwrite"]),
    (["plot", "{run}", "--output", "picture.gif"], 2, ["picture.gif", ".png"]),
    (["plot", "{run}", "--output", "picture"], 2, ["picture", ".png"]),
    (["plot", "{run}", "--output", "{linked.png}"], 2, ["linked.png", "is a link"]),
    (["plot", "{run}", "--output", "absent/x.png"], 2, ["absent", "does not exist"]),
]  # fmt: skip
RUNS: list[Case] = [
    (["plot", "absent"], 2, ["absent", "no such run directory"]),
    (["plot", "{folder}"], 2, ["folder", "run.yaml"]),
    (["plot", "{notes.txt}"], 2, ["notes.txt", "no run directory"]),
    (["plot", "{workflow}"], 2, ["no run directory", "another program's"]),
    (["stats", "{piped_run}"], 2, ["metrics.jsonl", "device, pipe or socket"]),
    (["plot", ""], 2, ["run directory is empty"]),
    (["plot", "x" * 300], 2, ["no such run directory"]),
    (["stats", "{run}", "--step", "9"], 2, ["no step 9", "1 to 2"]),
    (["plot", "{run}", "--metric", "ppo/loss/totl"], 2, ["ppo/loss/totl", "'ppo/loss/total'"]),
    (["plot", "{run}", "--metric", ""], 2, ["no metric ''", "ppo/loss/total"]),
    (["stats", "{damaged}"], 2, ["metrics.jsonl, line 1"]),
    (["stats", "{damaged}", "--follow"], 2, ["metrics.jsonl, line 1"]),
    (["stats", "{worded}", "--follow"], 2, ["metrics.jsonl, step 1", "'ppo/loss/total' is 'low'"]),
    (["stats", "{piped_run}", "--follow"], 2, ["metrics.jsonl", "device, pipe or socket"]),
    (["plot", "{damaged}"], 2, ["metrics.jsonl, line 1"]),
    (["stats", "{stepless}"], 2, ["metrics.jsonl, line 1", "damaged"]),
    (["stats", "{worded}"], 2, ["metrics.jsonl, step 1", "'ppo/loss/total' is 'low'"]),
    (["plot", "{worded}"], 2, ["metrics.jsonl, step 1", "'ppo/loss/total' is 'low'"]),
    (["stats", "{binary}"], 2, ["metrics.jsonl, line 1", "damaged"]),
    (["stats", "{nested}"], 2, ["metrics.jsonl, line 1", "damaged"]),
    (["runs", "absent"], 2, ["absent", "no such folder"]),
    (["runs", ""], 2, ["no such folder"]),
    (["runs", "{run}", "{folder}"], 2, ["folder", "run.yaml"]),
    (["runs", "{run}", "absent"], 2, ["absent", "no such run directory"]),
    (["stats", "{unstarted}"], 2, ["no steps", "metrics.jsonl"]),
    (["stats", "{blank}"], 2, ["no steps", "metrics.jsonl"]),
]  # fmt: skip
# The content of a sweep's file, and what the message must hold. P is a parameter that is right.
P = "parameters: {ppo.lam: [0.9, 1.0]}\n"
SWEEP_FILES: list[tuple[str, list[str]]] = [
    ("- 1\n", ["keys of a sweep", "not a list"]),
    ("trials: 3\n", ["parameters", "required"]),
    (P + "trails: 3\n", ["line 2: trails", "'trials'"]),
    (P + "trials: 0\n", ["line 2: trials", "greater than or equal to 1"]),
    (P + "config: tyni\n", ["'tyni'", "'tiny'"]),
    (P + "set: {run.stepz: 8}\n", ["line 2: run.stepz=8", "'steps'"]),
    (P + "set: {steps: 8}\n", ["line 2", "'steps' is no key: section.key"]),
    (P + "set: {ppo.lam: 1}\n", ["ppo.lam is in set and in parameters"]),
    (P + "set: {run.output: x}\n", ["run.output", "use output"]),
    (P + "set: {run.steps: 8}\n", ["run.eval_every is 32 of 8 steps", "pruner: none"]),
    (P + "seeds: 0\n", ["line 2: seeds", "1 to 100"]),
    (P + "seeds: [1, 1]\n", ["line 2: seeds", "twice"]),
    (P + "seeds: [a]\n", ["line 2: seeds", "list of seeds"]),
    (P + "max_kl: 0\n", ["line 2: max_kl", "greater than 0"]),
    (P + "objective: eval/kl\n", ["line 2: direction is missing", "minimize"]),
    (P + "objective: eval/scor\ndirection: maximize\n", ["'eval/scor'", "'eval/score'"]),
    (P + "sampler: cmaes\n", ["line 2: sampler", "'tpe', 'random' or 'grid'"]),
    (P + "pruner: wilcoxon\n", ["line 2: pruner", "'median', 'hyperband' or 'none'"]),
    (P + "keep: none\n", ["line 2: keep", "'models'"]),
    ("parameters: {}\n", ["line 1: parameters", "at least 1"]),
    ("parameters: {run.seed: [0, 1]}\n", ["run.seed", "use seeds"]),
    ("parameters: {ppo.lam: 3}\n", ["parameters.ppo.lam", "object"]),
    ("parameters: {ppo.lam: [1.0]}\n", ["ppo.lam", "two values or more"]),
    ("parameters: {ppo.lam: [1.0, 1.0]}\n", ["ppo.lam", "twice"]),
    ("parameters: {ppo.lam: [1.0, [1]]}\n", ["ppo.lam", "holds [1]"]),
    ("parameters: {ppo.lamb: [0.9, 1.0]}\n", ["line 1: ppo.lamb=0.9", "'lam'"]),
    ("parameters: {ppo.lam: {low: 0.9, high: 1.1}}\n", ["line 1: ppo.lam=1.1", "less than or equal to 1"]),
    ("parameters: {ppo.lam: {low: 0.9, hihg: 1}}\n", ["parameters.ppo.lam.hihg", "'high'"]),
    ("parameters: {ppo.lam: {low: 0.9}}\n", ["ppo.lam", "high is missing"]),
    ("parameters: {ppo.lam: {low: 1, high: 0.9}}\n", ["ppo.lam", "must exceed low"]),
    ("parameters: {ppo.lam: {low: a, high: 1}}\n", ["ppo.lam.low", 'is "a"', "a number"]),
    ("parameters: {ppo.lam: {low: 0, high: 1, log: true}}\n", ["low (0) must be above 0"]),
    ("parameters: {ppo.lam: {low: 0.1, high: 1, log: true, step: 0.1}}\n", ["step and log exclude"]),
    ("parameters: {ppo.lam: {low: 0, high: 1, step: 0.3}}\n", ["is not reached", "steps of 0.3"]),
    ("parameters: {ppo.lam: {low: 0, high: 1, step: 2}}\n", ["step (2)", "at most high - low"]),
    ("parameters: {ppo.lam: {choices: [0.9, 1.0], log: true}}\n", ["choices and log exclude"]),
    ("parameters: {ppo.ppo_epochs: {low: 1, high: 2.5}}\n", ["ppo.ppo_epochs=2.5", "valid integer"]),
    ("parameters: {ppo.ppo_epochs: {low: 1, high: 2, step: 0.5}}\n", ["step is 0.5", "whole numbers"]),
    ("parameters: {ppo.mini_batch_size: [24, 32]}\n", ["ppo.mini_batch_size=24", "must be a multiple"]),
    ("sampler: grid\nparameters: {ppo.lam: {low: 0.9, high: 1}}\n", ["grid", "ppo.lam", "step or a list"]),
]  # fmt: skip
SW = ["sweep", "{right-sweep.yaml}"]
SWEEPS: list[Case] = [
    *((["sweep", f"{{sweep-{i}.yaml}}"], 2, wanted) for i, (_, wanted) in enumerate(SWEEP_FILES)),
    (["sweep", "kl-and-learning-rat"], 2, ["'kl-and-learning-rat'", "'kl-and-learning-rate'"]),
    (["sweep", "absent.yaml"], 2, ["absent.yaml", "no such file of a sweep"]),
    (["sweep", "{folder}"], 2, ["folder", "no such file of a sweep"]),
    ([*SW, "--jobs", "0"], 2, ["--jobs", "1"]),
    ([*SW, "--trials", "0"], 2, ["--trials", "1"]),
    ([*SW, "--trials", "many"], 2, ["--trials", "valid integer"]),
    ([*SW, "--trials", "99999"], 2, ["option --trials", "10000"]),
    ([*SW, "--set", "run.stepz=1"], 2, ["--set run.stepz=1", "'steps'"]),
    ([*SW, "--set", "ppo.lam=1"], 2, ["--set ppo.lam", "the sweep itself"]),
    ([*SW, "--output", ""], 2, ["option --output", "empty"]),
    ([*SW, "--output", "{folder}"], 2, ["folder", "is no directory of a sweep"]),
    ([*SW, "--output", "{notes.txt}"], 2, ["notes.txt", "is a file"]),
    ([*SW, "--output", "x" * 300], 2, ["300 bytes", "too long"]),
    ([*SW, "--resume"], 2, ["holds no sweep to resume", "without --resume"]),
    ([*SW, "--resume", "--overwrite"], 2, ["--resume and --overwrite exclude"]),
    ([*SW, "--resume", "--dry-run"], 2, ["--resume and --dry-run exclude"]),
    ([*SW, "--dry-run", "--output", "{folder}"], 2, ["is no directory of a sweep"]),
    ([T, "--config", "{right-sweep.yaml}"], 2, ["right-sweep.yaml", "no such key"]),
]  # fmt: skip
LIGHT = [*COMMAND_LINE, *CONFIGURATIONS, *PLACES, *RUNS, *SWEEPS]

MODELS: list[Case] = [
    ([T, "--device", "tpu"], 2, ["'tpu'", "cuda"]),
    ([T, "--device", "cuda:7"], 2, ["'cuda:7'", "cpu"]),
    ([T, "--device", "cuda:x"], 2, ["'cuda:x'", "cuda:N"]),
    ([G, "{policy}", "--device", ""], 2, ["device ''", "cuda:N"]),
    ([T, "--sentiment", "joyful"], 2, ["'joyful'", "NEGATIVE, POSITIVE"]),
    ([T, "--sentiment", "2"], 2, ["'2'", "NEGATIVE, POSITIVE"]),
    ([T, "--sentiment", "😀"], 2, ["'😀'", "NEGATIVE, POSITIVE"]),
    ([T, "--set", "rollout.engine=vllm"], 2, ["rollout.engine=vllm", "pip install 'ppo-cli[vllm]'"]),
    ([T, "--set", "rollout.engine=paged", "--set", "rollout.engine_kwargs={page_sise: 8}"], 2,
     ["page_sise", "'page_size'"]),
    setting("policy.model=./absent", "./absent", "no such folder"),
    setting("policy.model={folder}", "folder", "no model", "config.json"),
    setting("policy.model={notes.txt}", "notes.txt", "is a file"),
    setting("policy.model={classifier}", "ForSequenceClassification", "causal"),
    setting("policy.model={piped}", "config.json", "device, pipe or socket"),
    setting("reward.model={piped}", "config.json", "device, pipe or socket"),
    setting("policy.model={outside}", "index.json names ../elsewhere/x", "outside of", code=1),
    setting("policy.model={speech}", "WhisperForConditionalGeneration", "causal"),
    setting("policy.model={startless}", "startless", "no decoder_start_token_id", code=1),
    setting("policy.model={unconfigured}", "unconfigured", "config.json", code=1),
    setting("policy.model={config_text}", "config_text", "config.json", code=1),
    setting("policy.model={config_list}", "config_list", "cannot be loaded", code=1),
    setting("policy.model={config_empty}", "config_empty", "model_type", code=1),
    setting("policy.model={config_strange}", "config_strange", "nonsense", code=1),
    setting("policy.model={garbled}", "garbled", "cannot be loaded", code=1),
    setting("policy.model={weightless}", "weightless", "model.safetensors", code=1),
    setting("policy.model={empty_weights}", "empty_weights", "cannot be loaded", code=1),
    setting("policy.model={lacking}", "lacking", "lack transformer.h.1.ln_1.bias", code=1),
    setting("policy.model={misshaped}", "misshaped", "wpe.weight is (3, 3), not (48, 16)", code=1),
    setting("policy.model={mismatched}", "mismatched", "80 tokens", "60", code=1),
    setting("policy.model={tokenless}", "tokenless", "no tokenizer", code=1),
    ([G, "{tokenless}", "--no-score"], 1, ["tokenless", "no tokenizer"]),
    setting("policy.model={pickled}", "pickled", "cannot be loaded", code=1),
    setting("policy.model={head_cut}", "head_cut", "cannot be loaded", code=1),
    setting("policy.model={head_wide}", "head_wide", "value head does not fit", code=1),
    setting("policy.model={coded}", "coded", "--trust-remote-code", code=1),
    setting("policy.model={adapter}", "adapter", "base model", "./absent: no such", code=1),
    setting("policy.model={judge_adapter}", "judge_adapter", "task_type SEQ_CLS", "CAUSAL_LM"),
    setting("policy.model={nan_weights}", "nan_weights", "wte.weight holds NaN", code=1),
    setting("policy.model={worded_length}", "worded_length", "model_max_length", "'abc'", code=1),
    setting("policy.model={odd_dropout}", "odd_dropout", "does not work as a model", code=1),
    setting("policy.model={adapter_coded}", "adapter_coded is an adapter of", "merge_and_unload", code=1),
    ([G, "{adapter_coded}", "--no-score", "--trust-remote-code", "{adapter_coded}"], 1, ["Merge the two"]),
    ([G, "{adapter_coded}", "--no-score"], 1, ["an adapter of", "which needs code"]),
    ([G, "{unended}"], 2, ["unended", "has not ended", "--resume"]),
    ([C, "{unended}"], 2, ["unended", "has not ended", "--resume"]),
    setting("policy.model={unended}", "unended", "has not ended", "--resume"),
    ([G, "{unended}/checkpoints/step-000001", "--no-score"], 2, ["is a checkpoint", "run directory"]),
    setting("policy.adapter.rank=3", "LORA has no key 'rank'", "'rank_pattern'"),
    setting("policy.freeze_layers=[9]", "policy.freeze_layers", "layers 0 to", "not 9"),
    setting("policy.freeze_layers=[wt]", "policy.freeze_layers", "no module 'wt'", "'wte'"),
    setting("policy.attn_implementation=spda", "policy.attn_implementation", "'sdpa'"),
    setting("policy.attn_implementation=owner/kernel", "policy.attn_implementation", "no 'owner/kernel'"),
    setting("policy.dtype=float16", "policy.dtype float16", "policy.adapter"),
    setting("policy.quantization.load_in_8bit=true", "policy.quantization needs an adapter"),
    setting("policy.adapter.target_modules=[nosuch]", "policy.adapter.target_modules", "c_attn"),
    setting("policy.adapter.target_modules=[]", "policy.adapter.target_modules", "c_attn"),
    setting("ppo.accelerator_kwargs={split_batchs: true}", "'split_batchs'", "'split_batches'"),
    setting("ppo.accelerator_kwargs={mixed_precision: [1]}", "precision [1]"),
    setting("ppo.accelerator_kwargs={dynamo_backend: 5}", "ppo.accelerator_kwargs"),
    setting("ppo.project_kwargs={nosuch: 1}", "ppo.project_kwargs", "'nosuch'", "logging_dir"),
    setting("policy.num_shared_layers=9", "num_shared_layers is 9", "4 layers"),
    setting("reward.model={policy}", "GPT2LMHeadModel", "sequence classifier", code=1),
    setting("reward.model=./absent", "./absent", "no such folder"),
    ([T, "--reward", "absent.py:f"], 2, ["absent.py", "no such file"]),
    ([T, "--reward", "{rewards.py}:gone"], 2, ["rewards.py", "no function 'gone'", "raising"]),
    ([T, "--reward", "{rewards.py}:raising"], 1, ["rewards.py, line 2", "raising", "ValueError", "oh \\x1b"]),
    ([T, "--reward", "{rewards.py}:raising", "--output", "{folder}/../rewards.py"], 2, ["is a file"]),
    ([C, "{run}", "--reward", "absent.py:f"], 2, ["absent.py", "no such file"]),
    ([C, "{run}", "--reward", "r.py"], 2, ["--reward", "FILE.py:FUNCTION"]),
    ([G, "{policy}", "--reward", "{rewards.py}:raising"], 1, ["rewards.py, line 2", "raising"]),
    ([C, "{run}", "--reward", "{rewards.py}:raising", "--output", "{rewards.py}"], 2, ["rewards.py", "is not replaced"]),
    setting("reward.model={folder}", "folder", "no model"),
    setting("reward.model={judge_lacking}", "judge_lacking", "lack classifier", code=1),
    setting("reward.model={judge_nan}", "judge_nan", "not finite", code=1),
    setting("reward.model={judge_misshaped}", "position_embeddings.weight is (128, 64), not (3, 64)", code=1),
    setting("reward.model={judge_headless}", "does not work as a classifier", "config.json", code=1),
    setting("reward.model={judge_coded}", "judge_coded", "--trust-remote-code", code=1),
    setting("reward.model={judge_blind}", "judge_blind", "does not tell sentiment apart"),
    ([T, "--sentiment", "negative", "--set", "reward.model={judge_single}"], 2,
     ["no label 'negative'", "single output is quality", "--sentiment quality"]),
    ([T, "--sentiment", "same", "--set", "reward.model={judge_twins}"], 2, ["2 labels", "index"]),
    setting("reward.model={judge_gap}", "judge_gap", "id2label", code=1),
    setting("reward.model={adapter}", "adapter", "task_type CAUSAL_LM", "SEQ_CLS", code=1),
    setting("reward.model={judge_adapter}", "judge_adapter", "./absent: no such", code=1),
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
    setting("prompts.source={hollow.txt}", "hollow.txt", "no data", "a file ending in"),
    ([T, "--set", "prompts.source={folder.txt}", "--set", "prompts.split=tests"], 2, ["no split 'tests'", "it has train"]),
    setting("prompts.source={folder.txt}/*.csv", "folder.txt/*.csv", "no file has a name like"),
    setting("prompts.source=~/absent.csv", "/absent.csv", "no such file"),
    setting("prompts.source=https://example.com/a.csv", "https://example.com/a.csv", "HF_HUB_OFFLINE"),
    setting("prompts.source=https://huggingface.co/datasets/a/b", "owner/name"),
    setting("prompts.source=s3://a/b.csv", "s3://a/b.csv", "https://"),
    setting("prompts.source={long.csv}", "long.csv", "row has 2 cells", "quotation marks"),
    setting("prompts.source={later.csv}", "later.csv", "line 3", "quotation marks"),
    setting("prompts.source={open.csv}", "open.csv", "row 1", "never closed"),
    setting("prompts.source={broken.json}", "broken.json, line 2", "not JSON (Expecting"),
    setting("prompts.source={numbers.json}", "numbers.json", "holds list, not text"),
    setting("prompts.source={mixed.json}", "mixed.json", "a list of objects or of strings"),
    setting("prompts.source={utf16.json}", "utf16.json", "UTF-16", "iconv"),
    setting("prompts.source={cut.csv.gz}", "cut.csv.gz", "cannot be read"),
    setting("prompts.source={text.zip}", "text.zip", "not a whole zip file"),
    setting("prompts.source={cut.arrow}", "cut.arrow", "not a whole Arrow file"),
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
    ([T, "--set", "prompts.cut=false", "--set", "rollout.output_max_length=120"], 2, ["context of 128", "prompts.max_tokens"]),
    ([T, "--set", "prompts.source={few.txt}", "--set", "prompts.max_tokens=1"], 2, ["at most 1 tokens", "prompts.max_tokens"]),
    setting("prompts.chat=true", "no chat template", "prompts.chat_template"),
    ([T, "--set", "prompts.source={few.txt}", "--set", "prompts.where={label: 1}"], 2, ["few.txt", "no column 'label'", "prompts.where"]),
    ([T, "--set", "prompts.source={few.txt}", "--set", "prompts.revision=v1"], 2, ["prompts.revision is for hub datasets"]),
    ([T, "--set", "prompts.source={few.txt}", "--set", "prompts.held_out_split=x"], 2, ["held_out_split is x", "held_out_source"]),
    ([T, "--set", "prompts.source={chats.jsonl}"], 2, ["chats.jsonl, text 1", "a conversation", "prompts.chat to true"]),
    ([G, "{policy}", "--prompts", "{chats.jsonl}"], 2, ["chats.jsonl, text 1", "a conversation", "--chat"]),
    ([G, "{policy}", "--chat"], 2, ["no chat template", "tuned for chat"]),
    ([G, "{policy}", "--system", "Hi"], 2, ["--system is for conversations", "--chat"]),
    ([G, "{policy}", "--prompt", ""], 2, ["prompt is empty", "give some text"]),
    ([G, "{policy}", "--prompt", " \t\n"], 2, ["prompt is empty", "give some text"]),
    ([G, "{policy}", "--prompt", "\udcff\udcfe"], 2, ["--prompt", "UTF-8"]),
    ([G, "{policy}", "--prompts", "absent.txt"], 2, ["absent.txt", "no such file"]),
    ([G, "{policy}", "--prompts", "{hollow.txt}"], 2, ["hollow.txt", "no data"]),
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
    from ppo_cli.data.embedded import classifier_folder, policy_folder

    for name, content in _files().items():
        (folder / name).write_bytes(content)
    _make_parquet(folder)
    for name in ("folder", "folder.txt"):
        (folder / name).mkdir()
        (folder / name / "something.txt").write_text("here\n")
    (folder / "hollow.txt").mkdir()
    _make_runs(folder)
    _make_models(folder)
    for name in ("pipe.txt", "pipe.yaml", "piped_run/metrics.jsonl", "piped/config.json"):
        os.mkfifo(folder / name)
    for name, target in (
        ("linked_folder", "folder"), ("linked.txt", "notes.txt"), ("dangling", "nowhere"),
        ("linked.png", "notes.txt"), ("linked.yaml", "notes.txt"), ("linked_run/metrics.jsonl", "../notes.txt"),
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
    sweeps = {f"sweep-{i}.yaml": text.encode() for i, (text, _) in enumerate(SWEEP_FILES)}
    return sweeps | {
        "right-sweep.yaml": P.encode(),
        "broken.yaml": b"run:\n  steps: [1, 2\n",
        "unknown.yaml": b"ppo:\n  gamma: 1.0\n  learning_rat: 1e-5\n",
        "section.yaml": b"pppo:\n  gamma: 1.0\n",
        "scalar.yaml": b"reward: 5\n",
        "terms.yaml": b"reward:\n- cost: length\n  wight: 2\n",
        "rewards.py": b"def raising(texts):\n    raise ValueError('oh \x1b[31mno')\n",
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
        "long.csv": b"text\nfine, really\n",
        "later.csv": b"text\nfine\nfine, really\n",
        "open.csv": b'text\n"fine\nfine\n',
        "broken.json": b'[{"text": "fine"},\n{"text": }]\n',
        "numbers.json": b"[[1, 2],\n[3]]\n",
        "mixed.json": b'[{"text": "fine"},\n"fine", 3]\n',
        "utf16.json": '["fine"]'.encode("utf-16"),
        "cut.csv.gz": gzip.compress(b"text\nfine\n" * 1000)[:-20],
        "text.zip": b"text\nfine\n",
        "cut.arrow": b"ARROW1\0\0fine",
        "chats.jsonl": b'{"messages": [{"role": "user", "content": "Hi"}]}\n' * 20,
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
    rows = [json.dumps({"step": i, "ppo/loss/total": 0.1, "env/reward_mean": 1.0}) for i in (1, 2)]
    whole = "\n".join(rows) + "\n"
    metrics: dict[str, bytes | None] = {
        "run": whole.encode(),
        "linked_run": None,
        "piped_run": None,
        "visited": whole.encode(),
        "damaged": b"{\n{}\n",
        "stepless": b'{"ppo/loss/total": 1}\n{}\n',
        "worded": b'{"step": 1, "ppo/loss/total": "low"}\n{"step": 2}\n',
        "binary": bytes(range(128, 256)) + b"\n{}\n",
        "nested": b"[" * 100_000 + b"\n{}\n",
        "unstarted": None,
        "blank": b"",
        "unended": whole.encode(),
        "listed": None,
        "bombed": None,
        "later": None,
    }
    for name, content in metrics.items():
        (folder / name).mkdir()
        (folder / name / "run.yaml").write_text(record)
        if content is not None:
            (folder / name / "metrics.jsonl").write_bytes(content)
    (folder / "unended" / "checkpoints" / "step-000001").mkdir(parents=True)
    (folder / "unended" / "checkpoints" / "step-000001" / "manifest.json").write_text("{}")
    (folder / "visited" / "thesis.txt").write_text("three years\n")
    (folder / "workflow").mkdir()
    (folder / "workflow" / "run.yaml").write_text("name: my workflow\nsteps: [build]\n")
    marker = json.dumps({"written_by": "ppo-cli", "files": ["run.yaml"]})
    for name in ("listed", "bombed"):  # which are runs, as their lists say, but damaged
        (folder / name / "ppo-cli.json").write_text(marker)
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
    model("piped").joinpath("config.json").unlink()
    index = {"weight_map": {"transformer.wte.weight": "../elsewhere/x.safetensors"}}
    (model("outside") / "model.safetensors.index.json").write_text(json.dumps(index))
    model("config_text", "{")
    model("config_list", "[]")
    model("config_empty", "{}")
    model("config_strange", '{"model_type": "nonsense"}')
    whisper = '["WhisperForConditionalGeneration"]'
    model("speech", f'{{"model_type": "whisper", "architectures": {whisper}}}')
    startless = make_seq2seq(decoder_start_token_id=None)
    startless.generation_config.decoder_start_token_id = None
    startless.save_pretrained(folder / "startless")
    make_seq2seq_tokenizer().save_pretrained(folder / "startless")
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
    weights = model("nan_weights") / "model.safetensors"
    state = load_file(weights)
    state["transformer.wte.weight"][3, 5] = float("nan")
    save_file(state, weights, {"format": "pt"})
    change_json(model("worded_length") / "tokenizer_config.json", model_max_length="abc")
    change_json(model("odd_dropout") / "config.json", summary_dropout_prob=[1])
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
    for name, base, task in (
        ("adapter", "./absent", "CAUSAL_LM"),
        ("judge_adapter", "./absent", "SEQ_CLS"),
        ("adapter_coded", str(folder / "coded"), "CAUSAL_LM"),
    ):
        (folder / name).mkdir()
        about = {"peft_type": "LORA", "base_model_name_or_path": base, "task_type": task}
        (folder / name / "adapter_config.json").write_text(json.dumps(about))
        make_tokenizer().save_pretrained(folder / name)
    save_file({}, folder / "judge_adapter" / "adapter_model.safetensors")
    _make_judges(folder)


def change_json(file: Path, **changes: Any) -> None:
    """Give keys of a JSON file other values."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _make_judges(folder: Path) -> None:
    from ppo_cli.data.embedded import classifier_folder

    for name, changes in (
        ("judge_misshaped", {"max_position_embeddings": 3}), ("judge_headless", {"n_heads": -1}),
    ):  # fmt: skip
        shutil.copytree(classifier_folder(), folder / name)
        change_json(folder / name / "config.json", **changes)
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
    labels = {
        "judge_single": {"0": "quality"},
        "judge_twins": {"0": "same", "1": "same"},
        "judge_gap": {"3": "bad", "9": "good"},
    }
    for name, names in labels.items():
        shutil.copytree(classifier_folder(), folder / name)
        file = folder / name / "config.json"
        config = json.loads(file.read_text()) | {"id2label": names, "label2id": {}}
        file.write_text(json.dumps(config))
    weights = folder / "judge_single" / "model.safetensors"
    state = load_file(weights)
    last = {key: value for key, value in state.items() if key.startswith("classifier.")}
    save_file(state | {key: value[:1] for key, value in last.items()}, weights, {"format": "pt"})


def make_endless_model(folder: Path) -> None:
    """A model whose tokenizer has no padding and no end-of-text token."""
    make_gpt2(eos_token_id=None, bos_token_id=None).save_pretrained(folder)
    words = {f"t{i}": i for i in range(EOS + 1)}
    raw = Tokenizer(WordLevel(words, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)
