"""Run directories are found, and their state is read, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ppo_cli.cli.runs import runs
from ppo_cli.config.loading import load_config
from ppo_cli.errors import UsageError
from ppo_cli.training.run_directory import RunDirectory
from ppo_cli.training.run_list import differences, find_runs, seed_groups, summarise
from tests.conftest import SMALL_RUN


def make_run(
    path: Path, steps: int = 2, *settings: str, evaluations: Any = (), ended: Any = None
) -> RunDirectory:
    """A run directory with `steps` lines of metrics; `evaluations` are (step, score, KL)."""
    directory = RunDirectory(path)
    asked = ["run.steps=4", "run.eval_every=1", f"run.output={path}", *settings]
    config = load_config(SMALL_RUN, assignments=asked)
    directory.create(config, False)
    if ended is not None:
        directory.record(config, {"ended": ended})
    scored = {step: {"eval/score": score, "eval/kl": kl} for step, score, kl in evaluations}
    rows = [
        {"step": step, "time/step": 1.5, **scored.get(step, {})} for step in range(1, steps + 1)
    ]
    directory.records.append("metrics.jsonl", rows)
    return directory


def state(directory: RunDirectory) -> tuple[str, str]:
    directory.unlock()
    found = summarise(directory.path)
    return found.state, found.note


def test_the_state_of_a_run(tmp_path: Path) -> None:
    assert state(make_run(tmp_path / "killed")) == ("interrupted", "")
    diverged = {"step": 2, "as": "diverged", "why": "step 3: too far"}
    assert state(make_run(tmp_path / "a", ended=diverged)) == ("diverged", "step 3: too far")
    # A run that was resumed and killed: how it had ended before is of no interest.
    stale = {"step": 1, "as": "diverged", "why": "step 2: too far"}
    assert state(make_run(tmp_path / "b", ended=stale)) == ("interrupted", "")
    whole = make_run(tmp_path / "c", 4)
    assert state(whole) == ("interrupted", "")  # killed before its model was written
    (whole.path / "config.json").write_text("{}")  # as runs of earlier releases have it
    assert state(whole) == ("finished", "")
    early = make_run(tmp_path / "d", 2, "run.stop_kl=3", evaluations=[(1, 0, 1), (2, 1, 4)])
    (early.path / "config.json").write_text("{}")
    assert state(early)[0] == "ended early"
    broken = make_run(tmp_path / "e")
    (broken.path / "run.yaml").write_text("config: {policy: {modle: x}}")
    name, note = state(broken)
    assert name == "damaged" and "'model'" in note
    worded = make_run(tmp_path / "f")
    worded.records.append("metrics.jsonl", [{"step": 3, "x": "low"}, {"step": 4}])
    assert state(worded)[0] == "damaged"
    running = make_run(tmp_path / "g")  # this process has its lock
    assert summarise(running.path).state == "running"
    running.unlock()


def test_results_are_those_of_the_weights_in_the_directory(tmp_path: Path) -> None:
    evaluations = [(1, 0.5, 1.0), (2, 2.0, 9.0), (3, 1.5, 3.0)]
    run = make_run(tmp_path / "best", 3, "run.kl_limit=5", evaluations=evaluations)
    run.unlock()
    found = summarise(run.path)
    assert (found.step, dict(found.results)) == (3, {"score": 1.5, "kl": 3.0})
    assert (found.steps, found.planned_steps, found.label) == (3, 4, "positive")
    assert found.seconds == 4.5
    last = make_run(tmp_path / "last", 2, "run.weights=last", evaluations=evaluations[:2])
    last.unlock()
    assert summarise(last.path).step == 2


def test_runs_are_found_below_a_folder_but_not_inside_of_runs(tmp_path: Path) -> None:
    for name in ("z", "a/b", "a/.hidden/c", "1/2/3/4", "1/2/3/4/5"):
        make_run(tmp_path / name).unlock()
    (tmp_path / "a/b/inner").mkdir()
    (tmp_path / "a/b/inner/ppo-cli.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/run.yaml").write_text("config: {}")  # of another program
    found = [str(path.relative_to(tmp_path)) for path in find_runs(tmp_path)]
    assert found == ["1/2/3/4", "a/b", "z"]
    assert find_runs(tmp_path / "z") == [tmp_path / "z"]
    with pytest.raises(UsageError, match="no such folder"):
        find_runs(tmp_path / "absent")


def test_differences_between_runs(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", 2, evaluations=[(2, 1.0, 2.0)])
    two = make_run(tmp_path / "two", 1, "ppo.lam=0.5", "policy.adapter.r=4")
    for run in (one, two):
        run.unlock()
    found = differences([one.path, two.path])
    assert found.settings["ppo.lam"] == [1.0, 0.5]
    assert found.settings["policy.adapter.r"] == [None, 4]
    assert not any(key.startswith(("run.", "reward.")) for key in found.settings)
    assert [run.results for run in found.runs] == [{"score": 1.0, "kl": 2.0}, {}]


def test_tables_and_json_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    why = "step 3: \x1b[31mred"
    make_run(Path("one"), 2, evaluations=[(2, 1.0, 2.0)]).unlock()
    ended = {"step": 1, "as": "diverged", "why": why}
    make_run(Path("two"), 1, "ppo.lam=0.5", ended=ended).unlock()
    runs(None, as_json=False)
    table = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in table.splitlines()]
    assert "one positive 2/4 1.00 2.00 interrupted at step 2" in lines
    assert "two positive 1/4 - - diverged at step 1" in lines
    assert r"two: step 3: \x1b[31mred" in lines
    assert "\x1b" not in table
    runs(["one", "two"], as_json=False)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "ppo.lam 1.0 0.5" in lines and "mean score 1.000 -" in lines
    runs(["one", "one"], as_json=False)
    assert "all settings are equal" in capsys.readouterr().out
    runs(None, as_json=True)
    listed = json.loads(capsys.readouterr().out)
    assert [(run["path"], run["state"]) for run in listed] == [
        ("one", "interrupted"), ("two", "diverged"),
    ]  # fmt: skip
    runs(["one", "two"], as_json=True)
    assert json.loads(capsys.readouterr().out)["settings"] == {"ppo.lam": [1.0, 0.5]}
    Path("empty").mkdir()
    runs(["empty"], as_json=False)
    assert "no run directories in empty" in capsys.readouterr().err


def test_runs_that_differ_in_the_seed_alone_are_one_group(tmp_path: Path) -> None:
    def named(*settings: str, seed: int, name: str, inputs: Any = None) -> RunDirectory:
        run = make_run(tmp_path / name, 1, f"run.seed={seed}", *settings)
        run.record(run.config(), {"inputs": inputs} if inputs else None)
        return run

    other = {"policy.model": {"name": "x", "files": {"model.safetensors": "sha256 0"}}}
    falling = "ppo.lr_scheduler_type=linear"
    runs = [
        named(seed=0, name="a0"),
        named("ppo.learning_rate=0.5", seed=1, name="b1"),
        named("run.device=cpu", "run.keep=7", "run.steps=9", seed=1, name="a1"),
        named(seed=0, name="a0-again"),
        named("ppo.learning_rate=0.5", seed=2, name="b2"),
        named(seed=3, name="a3-of-another-model", inputs=other),
        named(falling, seed=0, name="c0"),
        named(falling, "run.steps=9", seed=1, name="c1-longer"),
        named(falling, seed=2, name="c2"),
    ]
    found = [[run.path.name for run in group] for group in seed_groups(runs)]
    assert found == [
        ["a0", "a1"], ["b1", "b2"], ["a0-again"], ["a3-of-another-model"], ["c0", "c2"],
        ["c1-longer"],
    ]  # fmt: skip
