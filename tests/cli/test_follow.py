"""`stats --follow` of metrics that a script writes: one action of it between two looks."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ppo_cli.cli import follow
from ppo_cli.config.loading import load_config
from ppo_cli.training import follow as following
from ppo_cli.training.follow import FollowedRun
from ppo_cli.training.records import Records, row_of
from ppo_cli.training.run_directory import RunDirectory
from tests.conftest import SMALL_RUN
from tests.faults import no_reader
from tests.forked import Done, ppo_cli

RUN = Path("run")
Script = Callable[[], Iterator[Any]]
EVALUATION = {
    "eval/score": 1.5, "eval/kl": 3.0, "eval/probability": 0.75,
    "eval/distinct_2": 0.4, "eval/reference_distinct_2": 0.5,
    "eval/perplexity": 4.0, "eval/reference_perplexity": 2.0,
}  # fmt: skip


def row(step: int, score: float = 1.0, **extra: float) -> dict[str, float]:
    """The metrics of a step, which takes 2 seconds."""
    return {
        "step": step, "env/reward_mean": score, "objective/kl": 0.5, "objective/kl_coef": 0.05,
        "ppo/loss/total": -0.25, "perf/tokens_per_second": 100.0, "time/step": 2.0, **extra,
    }  # fmt: skip


def skipping(step: int) -> dict[str, float]:
    """A step that the diagnostics warn of."""
    return dict.fromkeys(following.REQUIRED, 1.0) | row(step, 3.0) | {"ppo/policy/skipped": 0.5}


def settings() -> Any:
    return load_config(SMALL_RUN, assignments=["run.steps=4", "run.output=run"])


def begun(steps: int = 0) -> RunDirectory:
    """A run that is locked as by `train`."""
    directory = RunDirectory(RUN)
    directory.create(settings(), True)
    directory.records.append("metrics.jsonl", map(row, range(1, steps + 1)))
    return directory


def append(text: str) -> None:
    with (RUN / "metrics.jsonl").open("a") as file:
        file.write(text)


def end(directory: RunDirectory, how: str, step: int = 4, why: str | None = None) -> None:
    directory.record(settings(), {"ended": {"step": step, "as": how, "why": why}})


class Clock:
    """Time as the script has it; each wait of the command is one action of the script."""

    def __init__(self, script: Script) -> None:
        self.now, self._actions = 1e9, script()

    def sleep(self, _: float) -> None:
        passed = next(self._actions, "ended")
        if passed == "ended":
            raise AssertionError("the command goes on after the script")
        self.now += passed or 0.0


def played(script: Script) -> None:
    """Let the command, and what it calls, have the time of `script`."""
    clock = Clock(script)
    setattr(follow, "time", SimpleNamespace(sleep=clock.sleep))  # noqa: B010
    here = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: os.stat(RUN).st_mtime)
    setattr(following, "time", here)  # noqa: B010


def followed(script: Script, cwd: Path, *options: str) -> Done:
    return ppo_cli("stats", "run", "--follow", *options, cwd=cwd, fault=partial(played, script))


def shown_steps(done: Done) -> list[str]:
    return [line[: line.index("  ")] for line in done.out.splitlines()]


def from_begin_to_end() -> Iterator[None]:
    yield None
    RUN.mkdir()
    yield None
    run = begun()
    yield None
    append(json.dumps(row(1))[:30])
    yield None
    append(json.dumps(row(1))[30:] + "\n" + json.dumps(row(2)) + "\n" + json.dumps(row(3)) + "\n")
    yield None
    yield None
    run.records.append("metrics.jsonl", [row(4)])
    yield None
    run.records.put_evaluation(4, EVALUATION)
    yield None
    end(run, "finished")
    yield None  # it has the lock still
    run.unlock()
    yield None


def test_a_run_is_followed_from_before_its_beginning_to_its_end(tmp_path: Path) -> None:
    done = followed(from_begin_to_end, tmp_path)
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        *(
            f"step {n}/4  score +1.00  kl 0.50  coef 0.050  loss -0.250  100 tok/s  0:0{left} left"
            for n, left in ((1, 6), (2, 4), (3, 2), (4, 0))
        ),
        "held-out 4: score +1.50  P 0.75  kl 3.00  distinct-2 0.80x  ppl 2.00x  best",
    ]
    assert done.err.splitlines() == [
        "waiting for run: there is no such run directory yet",
        "waiting for run: the run has not begun yet",
        "waiting for the first step of run",
        "run has finished, after 4 of 4 steps",
    ]


def cut_and_replaced() -> Iterator[None]:
    """A rollback that makes more steps than it took back, a resume, and `--overwrite`."""
    run = begun(3)
    yield None
    metrics = RUN / "metrics.jsonl"
    os.truncate(metrics, len(metrics.read_bytes().splitlines(keepends=True)[0]))
    run.records.append("metrics.jsonl", [row(2, 7.0), row(3, 7.0), row(4, 7.0)])
    yield None
    two = b"".join(metrics.read_bytes().splitlines(keepends=True)[:2])
    (RUN / "two").write_bytes(two)
    os.replace(RUN / "two", metrics)
    yield None
    run.records.append("metrics.jsonl", [row(3, 8.0)])
    yield None
    run.clear()
    yield None
    run.unlock()
    run = begun(1)
    yield None
    end(run, "interrupted", 1)
    run.unlock()
    yield None


def test_a_run_that_goes_back_is_shown_again_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    actions = cut_and_replaced()
    monkeypatch.setattr(follow, "time", SimpleNamespace(sleep=lambda _: next(actions)))
    follow.follow("run", as_json=True)
    done = capsys.readouterr()
    rows = [json.loads(line) for line in done.out.splitlines()]
    found = [(each["step"], each["env/reward_mean"]) for each in rows]
    assert found == [
        *((n, 1.0) for n in (1, 2, 3)),
        (2, 7.0),
        (3, 7.0),
        (4, 7.0),
        (3, 8.0),
        (1, 1.0),
    ]
    assert [line for line in done.err.splitlines() if "waiting" not in line] == [
        "the run went back to step 1",
        "the run went back to step 2",
        "a new run began",
        "run was interrupted, after 1 of 4 steps; go on with: ppo-cli train --output run --resume",
    ]


def killed_and_resumed() -> Iterator[float | None]:
    run = begun(2)
    yield 0.0
    yield 59.0
    yield 2.0  # quiet, as it may be in an evaluation
    run.lock._lock.release()  # type: ignore[union-attr]  # as at a kill: the holder's note stays
    for _ in range(20):
        yield 60.0
    run = RunDirectory(RUN)
    run.lock.acquire()
    run.records.append("metrics.jsonl", [row(3)])
    yield 1.0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    os.kill(os.getpid(), signal.SIGINT)
    yield None


def test_a_run_that_stands_still_is_said_to_and_how_long(tmp_path: Path) -> None:
    done = followed(killed_and_resumed, tmp_path)
    assert done.code == 130
    assert shown_steps(done) == ["step 1/4", "step 2/4", "step 3/4"]
    _, quiet, *dead = done.err.splitlines()
    assert quiet == (
        "nothing has changed for 61 s; a process holds the run's lock: it makes a long step, or it "
        "hangs"
    )
    lines = [re.sub(r"no process .* killed; go on with: .*--resume", "dead", text) for text in dead]
    ages = ("2 min", "4 min", "8 min", "16 min")  # each time twice as long, and no line each look
    assert lines == [f"nothing has changed for {age}; dead" for age in ages]


@pytest.mark.parametrize(
    ("how", "why", "wanted"),
    [
        ("ended early", "a KL of 9", "run ended early, after 2 of 4 steps: a KL of 9"),
        (
            "diverged",
            "step 3: \x1b[31mred",
            r"run diverged, after 2 of 4 steps: step 3: \x1b[31mred",
        ),
    ],
)
def test_how_a_run_has_ended(
    how: str, why: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    run = begun(2)
    end(run, how, 2, why)
    run.unlock()
    follow.follow("run", as_json=True, keys=["ppo/loss/"])
    streams = capsys.readouterr()
    assert json.loads(streams.out) == {"step": 2, "ppo/loss/total": -0.25}
    assert streams.err == f"{wanted}\n"


def unread() -> None:
    begun(1)
    played(lambda: iter(()))
    no_reader(1)


def test_it_ends_when_nobody_reads_it_any_more(tmp_path: Path) -> None:
    done = ppo_cli("stats", "run", "--follow", cwd=tmp_path, fault=unread)
    assert done.code == 0, done.err


def test_a_look_reads_what_is_new_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = begun(4)
    read: list[bytes] = []
    monkeypatch.setattr(
        following, "row_of", lambda path, n, line: read.append(line) or row_of(path, n, line)
    )
    found = FollowedRun("run")
    assert len(found.look().rows) == 4
    read.clear()
    assert not found.look().rows and not read
    run.records.append("metrics.jsonl", [skipping(5) | EVALUATION])
    assert [each["step"] for each in found.look().rows] == [5]
    assert len(read) == 1
    assert found.history.newest is not None and found.history.newest.step == 5
    assert "mini-batches were skipped" in found.warnings[-1]


def screen_of(run: FollowedRun, width: int, height: int) -> str:
    target = Console(file=io.StringIO(), force_terminal=True, width=width, height=height)
    with follow.LiveScreen(target) as screen:
        screen.show(run, run.look())
    text: str = target.file.getvalue()  # type: ignore[attr-defined]
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_the_live_screen_shows_what_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = begun()
    run.records.append("metrics.jsonl", [row(1), skipping(2) | EVALUATION])
    sample = {"step": 2, "query": "A film", "response": " \x1b[31mred", "score": 2.5}
    run.records.append("samples.jsonl", [sample | {"step": 1, "response": " old"}, sample])
    text = screen_of(FollowedRun("run"), 80, 40)
    for wanted in (
        "run: running", "step 2/4", "0:04 left", "+1.00 -> +3.00", "2 (best)", "+1.50", "0.80x",
        "PPO mean reward over time", "█", r"+2.50  A film \x1b[31mred",
        "50% of the mini-batches were skipped",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert " old" not in text
    low = screen_of(FollowedRun("run"), 80, 10)
    assert "step 2/4" in low and "skipped" in low
    assert "█" not in low and "A film" not in low
    narrow = screen_of(FollowedRun("run"), 50, 40)
    assert max(map(len, narrow.splitlines())) <= 50
    Records(RUN).put_evaluation(2, {})
    assert "2 (best)" not in screen_of(FollowedRun("run"), 80, 40)
    run.unlock()
