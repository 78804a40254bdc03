"""Odd values in every key of a configuration and every JSON file of a run and of a model.

What is damaged is refused in a message of its own, or does no harm; an "unexpected" error, which
asks for a report, is for faults of this program alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ppo_cli.config.schema import RunConfig
from ppo_cli.data.embedded import classifier_folder, policy_folder
from tests.conftest import SMALL_RUN
from tests.test_bad_input import run_here  # noqa: F401

Run = Callable[[list[str], Path], tuple[int, str, str]]
ODD: list[Any] = [
    None, True, "abc", "", -1, 0, 10**400, 1e308, float("inf"), float("nan"), [], {}, [1], {"a": 1},
    "\U0001f600" * 5,
]  # fmt: skip
RAW = [
    b"", b"{", b"[]", b"null", b"5", b'"x"', b"{}", b"\xff\xfe", b"1e999", b"\0" * 10,
    b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000,
]  # fmt: skip
SETTINGS = ["1e400", "9" * 400, "9" * 12, "true", "'x'", "[1]", "{a: 1}", "5e-324", "1e308", "'😀'"]
GONE = object()
SAMPLE = ["-n", "1", "--max-new-tokens", "2", "--prompt", "This movie"]


def places(data: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Keys and indices of a document, at most three levels deep."""
    keys: list[Any] = list(data) if isinstance(data, dict) else []
    if isinstance(data, list) and data:
        keys = [0]
    for key in keys:
        yield (*above, key)
        if len(above) < 2:
            yield from places(data[key], (*above, key))


def damaged(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    """Copy a document with another value in one place, or without it."""
    data = json.loads(json.dumps(data))
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return data


def variants(data: Any, count: int, seed: int, extra: tuple[str, ...] = ()) -> Iterator[bytes]:
    """The document with odd values in `count` places, and files that are not JSON."""
    choice = random.Random(seed)
    found = list(places(data))
    for place in choice.sample(found, min(count, len(found))):
        yield json.dumps(damaged(data, place, choice.choice([*ODD, GONE]))).encode()
    for key in extra:
        for value in choice.sample(ODD, 1):
            yield json.dumps(damaged(data, (key,), value)).encode()
    yield from RAW


def check(run: Run, arguments: list[str], cwd: Path, about: object) -> str:
    code, stdout, stderr = run(arguments, cwd)
    told = f"{about!s:.200}: {stderr}"
    assert code in (0, 1, 2), told
    assert "unexpected " not in stderr.replace("unexpected behavior", ""), told
    assert "Traceback" not in stdout + stderr, told
    return stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    from ppo_cli.config.loading import load_config
    from ppo_cli.training.build import build_training

    folder = tmp_path_factory.mktemp("finished") / "run"
    changes = [f"run.output={folder}", "run.steps=2", "run.eval_every=0", "run.device=cpu"]
    training = build_training(load_config(SMALL_RUN, assignments=changes))
    list(training.steps())
    training.finish()
    training.directory.unlock()
    return folder


def test_odd_settings(tmp_path: Path, run_here: Run) -> None:  # noqa: F811
    """`config` answers for every key; `train` for a sample of what that let through."""
    accepted, choice = [], random.Random(0)
    for section, values in RunConfig().model_dump(mode="json").items():
        for key in values:
            for value in choice.sample(SETTINGS, 5):
                text = f"{section}.{key}={value}"
                error = check(run_here, ["config", "tiny", "--set", text], tmp_path, text)
                heavy = key in ("limit", "held_out", "output")
                accepted += [text] if not error and not heavy else []
    accepted += [f"policy.adapter.alpha={value}" for value in SETTINGS[1:3]]
    accepted += [
        f"ppo.{keywords}={{{key}: {value}}}"
        for keywords, key in (
            ("accelerator_kwargs", "mixed_precision"), ("accelerator_kwargs", "split_batches"),
            ("project_kwargs", "total_limit"), ("project_kwargs", "nosuch"),
        )
        for value in SETTINGS[3:6]
    ]  # fmt: skip
    for text in choice.sample(accepted, 8):
        arguments = ["train", "--dry-run", "--no-measure", "--config", SMALL_RUN, "--set", text]
        check(run_here, arguments, tmp_path, text)
    assert list(tmp_path.iterdir()) == []


def test_damaged_records(finished: Path, tmp_path: Path, run_here: Run) -> None:  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    metrics = run / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines()
    commands = [["stats", "run"], ["plot", "run", "--terminal"], ["stats", "run", "--json"]]
    commands += [["plot", "run", "--output", "x.svg"], ["plot", "run", "--frontier", "--terminal"]]
    keys = ("step", "ppo/loss/total", "objective/kl", "env/reward_mean", "eval/score", "time/step")
    cases = [
        json.dumps({**json.loads(lines[-1]), key: value}).encode() for key in keys for value in ODD
    ]
    for number, case in enumerate([*cases, *RAW]):
        for order in ([lines[0], case], [case, lines[1]]):
            metrics.write_bytes(b"\n".join(order) + b"\n")
            check(run_here, commands[number % len(commands)], tmp_path, case)
    metrics.write_bytes(b"\n".join(lines) + b"\n")
    for case in RAW:
        (run / "frontier.json").write_bytes(case)
        check(run_here, commands[-1], tmp_path, case)


def test_true_and_numbers_beyond_all_floats_are_no_metrics(
    finished: Path,
    tmp_path: Path,
    run_here: Run,  # noqa: F811
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines()
    for value in (True, 10**400, "1", None, [1]):
        row = {**json.loads(lines[0]), "objective/kl": value}
        metrics.write_bytes(json.dumps(row).encode() + b"\n" + lines[1] + b"\n")
        code, _, stderr = run_here(["stats", "run"], tmp_path)
        assert code == 2 and "'objective/kl' is" in stderr, stderr


def test_a_damaged_state_of_a_run(finished: Path, tmp_path: Path, run_here: Run) -> None:  # noqa: F811
    """`run.yaml`, and a checkpoint whose manifest fits, as another release would leave it."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    resume = ["train", "--output", "run", "--resume", "--steps", "2", "--dry-run", "--no-measure"]
    record = yaml.safe_load((run / "run.yaml").read_text())
    whole = (run / "run.yaml").read_bytes()
    for number, case in enumerate(variants(record, 20, 3)):
        (run / "run.yaml").write_bytes(case)
        check(
            run_here, resume if number % 8 == 0 else ["plot", "run", "--terminal"], tmp_path, case
        )
    (run / "run.yaml").write_bytes(whole)
    checkpoint = max((run / "checkpoints").glob("step-*"))
    state = checkpoint / "state.json"
    refused = 0
    for case in variants(json.loads(state.read_text()), 8, 4):
        state.write_bytes(case)
        files = [file for file in checkpoint.iterdir() if file.name != "manifest.json"]
        digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        (checkpoint / "manifest.json").write_text(json.dumps({"sha256": digests}))
        refused += "this release" in check(run_here, resume, tmp_path, case)
    assert refused > 5


NAMED = (  # besides the keys that are there
    "attn_implementation", "experts_implementation", "dtype", "text_config", "pad_token_id",
    "summary_dropout_prob", "model_max_length", "rope_scaling", "id2label", "problem_type",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["policy", "classifier", "adapter"])
def test_damaged_models(kind: str, tmp_path: Path, run_here: Run) -> None:  # noqa: F811
    model = tmp_path / "model"
    if kind == "adapter":
        make_adapter(model)
    else:
        shutil.copytree(policy_folder() if kind == "policy" else classifier_folder(), model)
    judged = ["--classifier", "model"] if kind == "classifier" else ["--no-score"]
    source = str(policy_folder()) if kind == "classifier" else "model"
    command = ["generate", source, *judged, *SAMPLE]
    assert check(run_here, command, tmp_path, "whole") == "loading torch and transformers\n"
    for file in sorted(model.glob("*.json")):
        if kind == "adapter" and file.name != "adapter_config.json":
            continue
        whole = file.read_bytes()
        extra = NAMED if "config" in file.name and file.name != "generation_config.json" else ()
        for case in variants(json.loads(whole), 6, 5, extra):
            file.write_bytes(case)
            check(run_here, command, tmp_path, f"{file.name} {case[:200]!r}")
        file.write_bytes(whole)


def make_adapter(folder: Path) -> None:
    """A new low-rank adapter of the embedded policy."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(policy_folder())
    about = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    get_peft_model(base, about).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(policy_folder(), name), folder)
