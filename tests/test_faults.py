"""Faults during a run: message, exit code, and the files on the disk afterwards."""

from __future__ import annotations

import json
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from ppo_cli.training.checkpoint import find_damage
from ppo_cli.training.run_list import summarise
from tests import faults
from tests.conftest import SMALL_RUN
from tests.forked import Done, Fault, ppo_cli, start
from tests.stress.kill import RUN, SETTINGS, contents, differences, go_on

QUICK = [
    "--config", SMALL_RUN, "--set", "run.checkpoint_every=2",
    "--set", "rollout.output_min_length=4", "--set", "rollout.output_max_length=8",
]  # fmt: skip
LONG = ["--set", "rollout.output_max_length=24", "--set", "rollout.output_min_length=12"]
TRAIN = ["train", "--quiet", "--seed", 5, "--steps", 5, "--output", "run", *QUICK]


def checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints; checks that all are undamaged and no file is unfinished."""
    found = sorted(path for path in (folder / "run").glob("checkpoints/*") if path.is_dir())
    assert [path for path in found if find_damage(path)] == []
    return [int(path.name.removeprefix("step-")) for path in found]


def only_message(done: Done) -> str:
    """The one error message, its lines joined."""
    lines = done.err.splitlines()
    assert "Traceback" not in done.err
    assert sum(line.startswith("error: ") for line in lines) == 1, done.err
    return " ".join(line.strip() for line in lines)


EVALUATED = [
    *TRAIN, "--set", "run.eval_every=2",  # steps 2 and 4 are evaluated, and 5 at the end
    "--set", "ppo.lr_scheduler_type=adaptive", "--set", "reward.score_every=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = ppo_cli(*TRAIN, cwd=folder)
    assert done.code == 0, done.err
    return contents(folder / "run")


@pytest.mark.parametrize("write", [33, 70])
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(
    write: int, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    killed = ppo_cli(*TRAIN, cwd=tmp_path, fault=partial(faults.kill_at_write, write))
    assert killed.code == -signal.SIGKILL
    for name in ("metrics.jsonl", "samples.jsonl"):  # the kill fell into a line
        with (tmp_path / "run" / name).open("a") as record:
            record.write('{"step": 4, "ppo/lo')
    _, done = go_on(tmp_path, TRAIN)
    assert done.code == 0, done.err
    assert differences(uninterrupted, contents(tmp_path / "run")) == []
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").open()]
    assert steps == [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str]]:
    """What a run with evaluations leaves, and the files and folders that it changed, in turn."""
    folder = tmp_path_factory.mktemp("evaluated")
    done = ppo_cli(*EVALUATED, cwd=folder, fault=partial(faults.list_writes, "../writes"))
    assert done.code == 0, done.err
    return contents(folder / "run"), (folder / "../writes").read_text().splitlines()


@pytest.mark.parametrize(
    "place",
    [
        "run/.metrics.jsonl.tmp",
        "run/.model.tmp",
        "run/checkpoints/.step-000004.tmp",
    ],
)
def test_a_kill_does_not_change_evaluations_and_what_was_best(
    place: str, evaluated: tuple[dict[str, Any], list[str]], tmp_path: Path
) -> None:
    expected, writes = evaluated
    last = max(i for i, path in enumerate(writes, start=1) if path.startswith(place))
    killed = ppo_cli(*EVALUATED, cwd=tmp_path, fault=partial(faults.kill_at_write, last))
    assert killed.code == -signal.SIGKILL
    done = ppo_cli(*EVALUATED, "--resume", cwd=tmp_path)
    assert done.code == 0, done.err
    assert differences(expected, contents(tmp_path / "run")) == []
    found = ["eval/score" in row for row in expected["metrics.jsonl"]]
    assert found == [False, True, False, True, True]


def test_what_an_adapter_makes_a_run_remember_survives_a_kill(tmp_path: Path) -> None:
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    settings = [word for a in SETTINGS["adapter"].assignments for word in ("--set", a)]
    run = [*RUN, "--steps", 4, *settings]
    done = ppo_cli(*run, cwd=tmp_path / "whole", fault=partial(faults.list_writes, "../writes"))
    assert done.code == 0, done.err
    expected = contents(tmp_path / "whole" / "run")
    writes = (tmp_path / "writes").read_text().splitlines()
    place = "run/checkpoints/.step-000004.tmp"
    last = max(i for i, path in enumerate(writes, start=1) if path.startswith(place))
    fault = partial(faults.kill_at_write, last)
    assert ppo_cli(*run, cwd=tmp_path / "killed", fault=fault).code == -signal.SIGKILL
    done = ppo_cli(*run, "--resume", cwd=tmp_path / "killed")
    assert done.code == 0, done.err
    assert differences(expected, contents(tmp_path / "killed" / "run")) == []


def test_from_a_damaged_checkpoint_the_one_before_is_taken(
    uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    assert ppo_cli(*TRAIN, "--steps", 4, cwd=tmp_path).code == 0
    weights = tmp_path / "run/checkpoints/step-000004/weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 4
    weights.write_bytes(content)
    done = ppo_cli(*TRAIN, "--resume", cwd=tmp_path)
    assert done.code == 0, done.err
    for part in ("step-000004 is damaged", "weights.safetensors", "going on from step-000002"):
        assert part in done.err
    assert "run.steps 4 -> 5" in done.err
    assert differences(uninterrupted, contents(tmp_path / "run")) == []


Row = tuple[Fault | None, list[Any], list[str], list[int]]
# The fault, further options, what the message must hold, checkpoints afterwards.
ENDS: dict[str, Row] = {
    "infinite gradient": (
        partial(faults.infinite_gradient, 4 * 3 - 2),
        ["--set", "ppo.ppo_epochs=4"],
        ["step 3:", "norm of the weights", "ppo.learning_rate", "rollback"],
        [0, 2],
    ),
    "KL over its limit": (
        None,
        ["--set", "run.kl_limit=0.02", *LONG],
        ["step 2:", "objective/kl is 0.0", "run.kl_limit (0.02)", "ppo.init_kl_coef", "rollback"],
        [0],
    ),
    "loss not finite": (
        None,
        ["--set", "ppo.learning_rate=1e8", "--set", "ppo.max_grad_norm=null"],
        ["step 1:", "finite", "ppo.learning_rate"],
        [0],
    ),
    "text collapses": (
        partial(faults.collapsed_text, 4),
        [],
        ["step 4:", "16 of 16 responses are", "ppo.learning_rate", "run.collapse_limit"],
        [0, 2],
    ),
    "classifier raises": (
        partial(faults.failing_classifier, 3),
        [],
        ["step 3:", "classifier", "IndexError", "out of range", "reward.model"],
        [0, 2],
    ),
    "classifier gives NaN, also after rollbacks": (
        partial(faults.broken_classifier, 3),
        ["--set", "run.on_divergence=rollback"],
        ["step 3:", "not finite", "Back to step 2", "rollback 3 of at most 3", "after 3 rollbacks"],
        [0, 2],
    ),
    "no memory": (
        partial(faults.no_memory, 2 * 3),
        [],
        ["out of memory", "ppo.mini_batch_size", "gradient_checkpointing", "--resume", "step 2"],
        [0, 2],
    ),
    "no memory on the device": (
        partial(faults.no_device_memory, 2 * 3),
        [],
        ["out of memory", "ppo.mini_batch_size", "gradient_checkpointing", "--resume"],
        [0, 2],
    ),
    "disk full at the first file": (
        partial(faults.full_at, "run.yaml"),
        [],
        ["run", "No space left", "free some space"],
        [],
    ),
    "disk full at a checkpoint": (
        partial(faults.full_at, "step-000002"),
        [],
        ["run", "No space left", "free some space", "ppo-cli train --output run --resume"],
        [0],
    ),
    "disk full at the model": (
        partial(faults.full_at, ".model.tmp"),
        [],
        ["run", "No space left", "free some space", "go on from the checkpoint of step 5"],
        [4, 5],
    ),
    "disk full at the plot": (
        partial(faults.full_at, "training.png"),
        [],
        ["run/training.png", "No space left", "free some space", "checkpoint of step 5"],
        [4, 5],
    ),
    "disk full in the records": (
        partial(faults.full_at, "samples.jsonl"),
        [],
        ["run/samples.jsonl", "No space left", "free some space", "checkpoint of step 0"],
        [0],
    ),
    "disk full in the weights": (
        partial(faults.small_files, 2_000_000),
        [],
        ["step-000000", "File too large", "free some space"],
        [],
    ),
    "disk full in the optimizer's state": (
        partial(faults.small_files, 3_000_000),
        [],
        ["step-000002", "File too large", "free some space", "--resume"],
        [0],
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_fault_ends_the_run_with_one_message_and_whole_files(name: str, tmp_path: Path) -> None:
    fault, options, wanted, left = ENDS[name]
    done = ppo_cli(*TRAIN, *options, cwd=tmp_path, fault=fault)
    assert done.code == 1, done.err
    message = only_message(done)
    for part in wanted:
        assert part in message, message
    assert checkpoints(tmp_path) == left
    files = [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert {path.name for path in files} <= {".lock", ".lock.json"}
    if "step " in wanted[0]:  # then a model of the last good checkpoint lies there, too
        model = load_file(tmp_path / "run" / "model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in model.values())
        ended = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["ended"]
        assert ended["as"] == "diverged" and wanted[0] in ended["why"]
        assert summarise(tmp_path / "run").state == "diverged"


def test_after_a_rollback_training_goes_on_another_way(
    uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    options = ["--set", "run.on_divergence=rollback"]
    fault = partial(faults.failing_classifier, 3)
    done = ppo_cli(*TRAIN, *options, cwd=tmp_path, fault=fault)
    assert done.code == 0, done.err
    assert done.err.startswith("warning: step 3: the classifier")
    assert "Back to step 2, with a learning rate of 0.0005 " in done.err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["run/rollbacks"] for row in rows] == [0, 0, 1, 1, 1]
    assert [row["ppo/learning_rate"] for row in rows] == [1e-3, 1e-3, 5e-4, 5e-4, 5e-4]
    before, after = uninterrupted["samples.jsonl"], contents(tmp_path / "run")["samples.jsonl"]
    changed = {a["step"] for a, b in zip(before, after, strict=True) if a != b}
    assert changed == {3, 4, 5}  # other random numbers for the same prompts
    assert [row["query"] for row in before] == [row["query"] for row in after]


def test_after_a_rollback_a_schedule_goes_on_from_half_the_learning_rate(tmp_path: Path) -> None:
    options = ["--set", "run.on_divergence=rollback", "--set", "ppo.lr_scheduler_type=linear"]
    fault = partial(faults.failing_classifier, 3)
    done = ppo_cli(*TRAIN, *options, cwd=tmp_path, fault=fault)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    rates = [row["ppo/learning_rate"] for row in rows]
    assert rates == pytest.approx([1e-3, 0.8e-3, 0.3e-3, 0.2e-3, 0.1e-3])


def test_an_adaptive_learning_rate_is_resumed_after_a_rollback_as_it_was(tmp_path: Path) -> None:
    options = ["--set", "run.on_divergence=rollback", "--set", "ppo.lr_scheduler_type=adaptive"]
    options += ["--set", "ppo.min_lr_ratio=1"]  # a fall would depend on the number of steps
    train = [*TRAIN, *options, "--set", "run.checkpoint_every=1"]
    fault = partial(faults.failing_classifier, 2)
    found = []
    for name, steps in (("straight", 4), ("resumed", 3)):
        folder = tmp_path / name
        folder.mkdir()
        done = ppo_cli(*train, "--steps", steps, cwd=folder, fault=fault)
        assert done.code == 0, done.err
        if steps < 4:
            done = ppo_cli(*train, "--steps", 4, "--resume", cwd=folder)
            assert done.code == 0, done.err
        found.append(contents(folder / "run"))
    assert differences(*found) == []
    assert (
        found[1]["checkpoints/step-000004/state.json"]["trainer"]["adaptation"]["desired_kl"]
        == 0.015 / 4
    )
    first, second, *_ = [row["ppo/learning_rate"] for row in found[1]["metrics.jsonl"]]
    assert any(second / first == pytest.approx(f / 2) for f in (1.5, 1, 1 / 1.5))


def test_less_memory_is_asked_for_on_resuming_and_the_rest_stays(tmp_path: Path) -> None:
    assert ppo_cli(*TRAIN, "--steps", 1, cwd=tmp_path).code == 0
    smaller = ["--set", "ppo.mini_batch_size=2", "--set", "ppo.gradient_accumulation_steps=8"]
    resume = ["train", "--output", "run", "--resume", "--quiet", "--steps", 2]
    done = ppo_cli(*resume, *smaller, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "ppo.mini_batch_size 16 -> 2, ppo.gradient_accumulation_steps 1 -> 8" in done.err
    for change in ("ppo.mini_batch_size=1", "ppo.gamma=0.5"):
        refused = ppo_cli(*resume, "--set", change, cwd=tmp_path)
        assert refused.code == 2
        assert f"{change.replace('=', ' ').split()[0]} " in only_message(refused)
        assert "made with other settings" in refused.err


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.exists()


def test_a_second_process_is_refused_and_a_dead_one_s_lock_is_taken_over(tmp_path: Path) -> None:
    first = start(*TRAIN, "--steps", 5000, cwd=tmp_path)
    wait_for(tmp_path / "run/checkpoints/step-000002")
    for way in ([], ["--overwrite"], ["--resume", "--steps", 6000]):
        second = ppo_cli(*TRAIN, *way, cwd=tmp_path)
        assert second.code == 2, second.err
        assert f"in use by process {first.process.pid} on" in only_message(second)
    first.process.kill()
    first.wait()
    third = ppo_cli(*TRAIN, "--overwrite", "--steps", 1, cwd=tmp_path)
    assert third.code == 0, third.err
    assert not (tmp_path / "run/checkpoints/.lock.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(number: signal.Signals, tmp_path: Path) -> None:
    running = start(
        "train", "--output", "run", "--steps", 5, *QUICK, cwd=tmp_path,
        fault=partial(faults.slow_step, 4),
    )  # fmt: skip
    wait_for(tmp_path / "slow")
    pid = running.process.pid or 0
    signal_at = time.monotonic()
    for _ in range(2):
        faults.os.kill(pid, number)
        time.sleep(0.5)
    done = running.wait()
    assert time.monotonic() - signal_at < 10
    assert done.code == 128 + number, done.err
    assert "stopping after this step" in done.err
    message = only_message(done)
    assert "interrupted" in message
    assert "ppo-cli train --output run --resume" in message
    assert checkpoints(tmp_path) == [0, 2]
