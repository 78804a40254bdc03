"""A sweep of real runs that is killed in the middle, and resumed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from tests import forked
from tests.conftest import SMALL_RUN
from tests.package import SMALL

SPACE = f"""\
config: {SMALL_RUN}
parameters: {{ppo.init_kl_coef: {{low: 0.01, high: 0.2}}}}
trials: 2
pruner: none
"""
CHANGES = [*SMALL, "run.steps=2", "run.eval_every=1", "run.checkpoint_every=1"]


def forking() -> None:
    """What the sweep starts is forked, with all imported."""
    from ppo_cli.sweep import trial

    setattr(trial, "Popen", forked.Forked)  # noqa: B010


def steps(run: Path) -> list[int]:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [json.loads(line)["step"] for line in lines]


def test_a_killed_sweep_of_real_runs_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(SPACE)
    options = [part for change in CHANGES for part in ("--set", change)]
    arguments = ["sweep", "space.yaml", *options]
    running = forked.start(*arguments, cwd=tmp_path, fault=forking)
    first = tmp_path / "sweep-space" / "trial-000"
    while not any(first.glob("checkpoints/step-000001")):
        assert running.process.exitcode is None, running.wait().err
        time.sleep(0.01)
    os.kill(running.process.pid or 0, signal.SIGKILL)
    assert running.wait().code == -signal.SIGKILL
    resumed = forked.ppo_cli(*arguments, "--resume", "--json", cwd=tmp_path, fault=forking)
    assert resumed.code == 0, resumed.err
    found = json.loads(resumed.out.splitlines()[-1])
    assert (found["finished"], found["failed"], len(found["trials"])) == (2, 0, 2)
    for number in range(2):
        assert steps(tmp_path / "sweep-space" / f"trial-{number:03}") == [1, 2]
    begun = [line.split()[1] for line in resumed.err.splitlines() if " begins " in line]
    assert begun in (["0", "1"], ["1"])  # of a fast machine the first had ended
    assert begun == ["1"] or "going on from step" in resumed.err
    assert (tmp_path / "sweep-space" / "frontier.png").exists()
