"""Runs of several processes: they are the run of one, and what happens to one happens to all."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ppo_cli.cli import train
from ppo_cli.errors import Interrupted
from tests import faults
from tests.forked import Fault, Running, forking, ppo_cli, start, start_together
from tests.stress.kill import contents
from tests.test_faults import QUICK, only_message, wait_for

TRAIN = ["train", "--quiet", "--seed", 5, "--output", "run", *QUICK, "--steps"]
SAME = ["--set", "run.eval_every=2", "--track", "tensorboard"]
LOST = "another process of this run died or does not answer"


def files(run: Path) -> dict[str, Any]:
    """What a run left behind, without numbers that differ in their last digits."""
    found = contents(run)
    names = {name.rsplit("events.out", 1)[0] for name in found["names"]}
    return {"samples": found["samples.jsonl"], "metrics": found["metrics.jsonl"], "names": names}


def assert_same(one: Path, other: Path) -> None:
    """Two runs are the same, apart from the order in which numbers were added."""
    a, b = files(one), files(other)
    assert a["names"] == b["names"]
    texts = [[(s["step"], s["query"], s["response"]) for s in run["samples"]] for run in (a, b)]
    assert texts[0] == texts[1]
    for left, right in zip(a["metrics"], b["metrics"], strict=True):
        assert left.keys() == right.keys()
        np.testing.assert_allclose([*left.values()], [*right.values()], rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    done = ppo_cli(*TRAIN, 5, *SAME, cwd=folder)
    assert done.code == 0, done.err
    return folder / "run"


def test_two_launchers_make_the_run_of_one_process(alone: Path, tmp_path: Path) -> None:
    node = ["--nnodes", 2, "--nproc-per-node", 1, "--master-addr", "127.0.0.1"]
    node += ["--master-port", faults.free_port(), "--node-rank"]
    train = ["-m", "ppo_cli", *TRAIN, 5, *SAME]
    nodes = [
        start(*node, i, *train, cwd=tmp_path, fault=forking, program="torchrun") for i in range(2)
    ]
    main, other = (node.wait() for node in nodes)
    assert main.code == other.code == 0, main.err + other.err
    assert "mean score" in main.out and not other.out
    assert not [line for line in other.err.splitlines() if "ppo-cli" in line or "error:" in line]
    assert_same(alone, tmp_path / "run")
    machine = yaml.safe_load((tmp_path / "run/run.yaml").read_text())["machine"]
    assert machine["processes"] == 2
    [events] = (tmp_path / "run").rglob("events.out*")
    assert events.parent.name == "tensorboard"
    read = EventAccumulator(str(events))
    read.Reload()
    assert [event.step for event in read.Scalars("env/reward_mean")] == [1, 2, 3, 4, 5]


def test_a_run_goes_on_with_other_numbers_of_processes_and_after_a_death(
    alone: Path, tmp_path: Path
) -> None:
    assert ppo_cli(*TRAIN, 2, *SAME, cwd=tmp_path).code == 0
    two = ["--num-processes", 2]
    dies = partial(faults.at_step, 3, partial(faults.signal_itself, signal.SIGKILL))
    dead = ppo_cli(*TRAIN, 5, *SAME, "--resume", *two, cwd=tmp_path, fault=partial(forking, dies))
    assert dead.code == 1
    assert LOST in only_message(dead)
    assert "checkpoint of step 4" in dead.err and "ppo-cli train --output run --resume" in dead.err
    done = ppo_cli(*TRAIN, 5, *SAME, "--resume", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "processes 2 (now 1)" in done.err
    assert_same(alone, tmp_path / "run")


def ends(members: list[Running]) -> tuple[int, str]:
    """The exit code of all processes, and the one message, which is the main one's."""
    main, *others = (member.wait() for member in members)
    for other in others:
        assert (other.code, other.out, other.err) == (main.code, "", "")
    return main.code, only_message(main)


def not_here(folder: Path) -> None:
    """A process in whose working folder nothing lies."""
    os.chdir(folder)


# Name -> fault, the process that has it, further options, exit code, what the message holds.
ENDS: dict[str, tuple[Fault | None, int, list[Any], int, list[str]]] = {
    "reward": (
        partial(faults.failing_classifier, 3), 1, [], 1,
        ["step 3", "IndexError", "checkpoint and the model of step 2"],
    ),
    "full disk": (
        partial(faults.full_at, "step-000002"), 0, [], 1,
        ["step-000002: No space left", "checkpoint of step 0", "--resume"],
    ),
    "more processes than GPUs": (
        faults.one_gpu, 1, [], 2, ["2 processes or more", "1 GPUs"],
    ),
    "batch": (
        None, 0, ["--set", "ppo.batch_size=15", "--set", "ppo.mini_batch_size=15"], 2,
        ["ppo.batch_size is 15", "multiple of 2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_one_process_ends_all_with_one_message(name: str, tmp_path: Path) -> None:
    fault, of, options, code, wanted = ENDS[name]
    members = start_together(*TRAIN, 5, *options, cwd=tmp_path, fault=fault, of=of)
    found, message = ends(members)
    assert found == code, message
    for part in wanted:
        assert part in message


def test_a_file_that_one_process_lacks_is_told_by_the_main_process(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    (tmp_path / "elsewhere").mkdir()
    members = start_together(
        *TRAIN, 5, "--set", "prompts.source=prompts.txt", cwd=tmp_path,
        fault=partial(not_here, tmp_path / "elsewhere"),
    )  # fmt: skip
    code, message = ends(members)
    assert code == 2
    assert "prompts.txt" in message


def test_one_process_that_diverges_takes_all_back(tmp_path: Path) -> None:
    options = ["--set", "run.on_divergence=rollback"]
    fault = partial(faults.infinite_gradient, 6)
    main, other = (
        member.wait() for member in start_together(*TRAIN, 5, *options, cwd=tmp_path, fault=fault)
    )
    assert main.code == other.code == 0, main.err
    assert "Back to step 2, with a learning rate of 0.0005" in main.err and not other.err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert [row["run/rollbacks"] for row in rows] == [0, 0, 1, 1, 1]


def test_a_process_that_does_not_answer_is_waited_for_as_long_as_run_timeout_says(
    tmp_path: Path,
) -> None:
    stops = partial(faults.at_step, 3, partial(faults.signal_itself, signal.SIGSTOP))
    began = time.monotonic()
    done = ppo_cli(
        *TRAIN, 5, "--num-processes", 2, "--set", "run.timeout=4", cwd=tmp_path,
        fault=partial(forking_impatiently, stops),
    )  # fmt: skip
    assert time.monotonic() - began < 120  # not the ten minutes of the default
    assert done.code == 1
    assert LOST in only_message(done)


def forking_impatiently(fault: Fault) -> None:
    from ppo_cli.cli import launch

    launch.GRACE = 1.0
    forking(fault)


def test_of_a_main_process_that_is_killed_the_launcher_tells(tmp_path: Path) -> None:
    dies = partial(faults.at_step, 2, partial(faults.signal_itself, signal.SIGKILL))
    done = ppo_cli(*TRAIN, 5, "--num-processes", 2, cwd=tmp_path, fault=partial(forking, dies, 0))
    assert done.code == 128 + signal.SIGKILL
    assert "process 0 of this run was killed (SIGKILL)" in only_message(done)


def test_a_signal_to_one_process_stops_all_after_the_step(tmp_path: Path) -> None:
    """It comes while the process waits to hear whether others have one."""
    train = [arg for arg in TRAIN if arg != "--quiet"]
    members = start_together(*train, 50, cwd=tmp_path, fault=partial(faults.signal_at_stop, 3))
    main, other = (member.wait() for member in members)
    assert main.code == other.code == 128 + signal.SIGTERM, main.err
    assert "stopped after step 3; go on with:" in main.err and not other.err
    ended = yaml.safe_load((tmp_path / "run/run.yaml").read_text())["ended"]
    assert ended["as"] == "interrupted"


def test_the_launcher_passes_signals_on_and_a_second_one_stops_at_once(tmp_path: Path) -> None:
    fault = partial(forking, partial(faults.slow_step, 4), 0)
    running = start(*TRAIN, 5, "--num-processes", 2, cwd=tmp_path, fault=fault)
    wait_for(tmp_path / "slow")
    for _ in range(2):
        os.kill(running.process.pid or 0, signal.SIGINT)
        time.sleep(1.1)  # within a second it would be the same signal
    done = running.wait()
    assert done.code == 128 + signal.SIGINT
    assert "interrupted" in only_message(done)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "embedded"], "generate runs in one process"),
        (["train", "--set", "run.timeout=0"], "run.timeout"),
        (["train", "--num-processes", 2], "leave it out"),
        (["train", "--sentimant", "x"], "--sentimant"),
    ],
)
def test_a_mistake_is_told_once(command: list[Any], message: str, tmp_path: Path) -> None:
    members = start_together(*command, cwd=tmp_path)
    main, other = (member.wait() for member in members)
    assert main.code == 2
    assert message in only_message(main)
    assert other.err == other.out == ""


def test_a_signal_that_comes_twice_within_a_second_counts_once_under_a_launcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Run:
        stops = 0

        def request_stop(self) -> None:
            self.stops += 1

    monkeypatch.setenv("WORLD_SIZE", "2")
    with train.StopSignals(quiet=True) as stop:
        stop.training = run = Run()  # type: ignore[assignment]
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # of a batch system that signals all processes
        assert (stop.signal, run.stops) == (signal.SIGINT, 1)
        monkeypatch.setattr(train, "SAME_SIGNAL", 0)
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)


def test_the_recipe_for_ray_makes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    page = (Path(__file__).parent.parent / "docs" / "processes.md").read_text(encoding="utf-8")
    [recipe] = re.findall(r"```python\n(from ray.*?)```", page, re.DOTALL)
    recipe = recipe.replace("/shared/run", str(tmp_path / "run")).replace("100", "1")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        exec(recipe, {"__name__": "__main__"})
    finally:
        ray.shutdown()
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1
    assert yaml.safe_load((tmp_path / "run/run.yaml").read_text())["machine"]["processes"] == 2
