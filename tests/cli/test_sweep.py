"""`ppo-cli sweep` with a stand-in for `train`: what each option prints and writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ppo_cli.cli import sweep as command
from ppo_cli.config.loading import load_config, shipped_configs
from ppo_cli.config.sweep import SweepConfig
from ppo_cli.config.sweep_loading import SWEEPS, load_sweep
from ppo_cli.sweep import estimate
from tests.conftest import SMALL_RUN
from tests.sweep.fake_train import SPACE, FakeTrain, fakes  # noqa: F401
from tests.test_bad_input import run_here  # noqa: F401

pytestmark = pytest.mark.usefixtures("fakes")


@pytest.fixture
def call(run_here: Any, tmp_path: Path) -> Any:  # noqa: F811
    (tmp_path / "space.yaml").write_text(SPACE.replace("SMALL_RUN", SMALL_RUN))

    def run(*arguments: str) -> tuple[int, str, str]:
        code, out, err = run_here(["sweep", *arguments], tmp_path)
        return code, out, err

    return run


def test_what_a_sweep_prints_and_writes(call: Any, tmp_path: Path) -> None:
    code, out, err = call("space.yaml", "--jobs", "2", "--trials", "2", "--set", "ppo.lam=0.5")
    assert code == 0
    assert [line.split()[-1] for line in out.splitlines()[-2:]] == ["finished", "finished"]
    assert "2 trials, 2 at a time -> sweep-space" in err
    for line in ("trial   0  begins  init_kl_coef 0.", "trial   0  step 3/3  eval/score ",
                 "trial   1  finished  eval/score ", "2 of 2 trials ended; best so far: trial",
                 "best: trial ", "ppo-cli train --config sweep-space/best.yaml"):  # fmt: skip
        assert line in err
    assert max(map(len, out.splitlines())) <= 80
    names = {path.name for path in (tmp_path / "sweep-space").iterdir()}
    assert names == {
        ".lock", "best.yaml", "logs", "study.journal", "sweep.yaml", "trial-000", "trial-001",
        "trials.csv",
    }  # fmt: skip
    assert all(fake.config.ppo.lam == 0.5 for fake in FakeTrain.started)
    assert load_config(str(tmp_path / "sweep-space" / "best.yaml")).ppo.lam == 0.5
    started = len(FakeTrain.started)
    again = ["--trials", "2", "--set", "ppo.lam=0.5"]
    code, out, err = call("space.yaml", "--resume", *again, "--json", "--quiet")
    found = json.loads(out)
    assert code == 0 and err == "" and len(FakeTrain.started) == started
    assert (found["finished"], found["planned"], found["interrupted"]) == (2, 2, False)
    assert found["trials"][0]["number"] == found["best"]
    code, _, _ = call("space.yaml", "--overwrite", "--quiet", *again)
    assert code == 0 and len(FakeTrain.started) == started + 2


def test_a_signal_ends_with_its_code_and_says_how_to_go_on(call: Any, tmp_path: Path) -> None:
    def outcome(config: Any, step: int) -> tuple[float, float]:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return 1.0, 1.0

    FakeTrain.outcome = staticmethod(outcome)
    code, _, err = call("space.yaml", "--output", "here", "--set", "ppo.lam=0.5")
    assert code == 143 and FakeTrain.started[0].signals == [signal.SIGTERM]
    wanted = "ppo-cli sweep space.yaml --output here --resume --trials 3 --set ppo.lam=0.5"
    assert wanted in err
    FakeTrain.outcome = staticmethod(lambda *_: (1.0, 1.0))
    code, out, _ = call(*wanted.split()[2:])
    assert code == 0 and out.count("finished") == 3
    assert FakeTrain.trainings == [
        (f"here/trial-{trial:03}", step) for trial in range(3) for step in (1, 2, 3)
    ]


def test_where_nothing_finishes_the_exit_code_says_so(call: Any) -> None:
    from tests.sweep.fake_train import Fault

    def outcome(config: Any, step: int) -> Fault:
        return Fault(1, 1, f"reason {'abc'[len(FakeTrain.started) - 1]}")

    FakeTrain.outcome = staticmethod(outcome)
    code, out, _ = call("space.yaml")
    assert code == 1 and out.count("failed") == 3 and "trial 1: reason b more of it" in out


def test_the_live_table_shows_trials_under_way_and_the_best(
    call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from ppo_cli.cli import sweep_display

    screen = Console(width=80, height=13, force_terminal=True, file=sys.stderr)
    plain = Console(width=80, color_system=None)
    monkeypatch.setattr(sweep_display, "is_plain", lambda _: False)
    monkeypatch.setattr(sweep_display, "console", lambda **_: screen)
    views: list[str] = []
    shown = sweep_display.LiveSweepDisplay.show

    def show(self: Any, progress: Any) -> None:
        shown(self, progress)
        with plain.capture() as text:
            plain.print(self._view())
        views.append(text.get())

    monkeypatch.setattr(sweep_display.LiveSweepDisplay, "show", show)
    assert call("space.yaml", "--trials", "7")[0] == 0
    assert "running" in views[1] and "0 of 7 trials ended" in views[0]
    assert "best so far: trial" in views[-1] and "more are not shown" in views[-1]
    assert max(view.count("\n") for view in views) <= 13


def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    found = {"times": {"total": 60.0}, "spaces": [{"kind": "disk", "needed": 2**20}]}

    def measured(arguments: list[str], **_: Any) -> Any:
        asked.append(arguments)
        return subprocess.CompletedProcess(arguments, 0, json.dumps(found), "")

    monkeypatch.setattr(estimate.subprocess, "run", measured)
    code, out, err = call("space.yaml", "--dry-run", "--jobs", "2", "--set", "ppo.lam=0.5")
    assert code == 0 and "ppo.init_kl_coef   0.01 to 0.2 (evenly)" in out
    assert "3 trials x 1 seed = 3 runs, 2 at a time" in err and "about 1 min 30 s" in err
    assert "about 1 MiB of disk a run" in err and "nothing was written" in err
    assert {"--dry-run", "--json", "ppo.lam=0.5"} <= {*asked[0]}
    code, out, _ = call("space.yaml", "--dry-run", "--json")
    assert (code, json.loads(out)["seconds"], json.loads(out)["runs"]) == (0, 180.0, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["space.yaml"]
    message = "a line\nerror: out of memory\n       less of it\n"
    failed = subprocess.CompletedProcess([], 1, "", message)
    monkeypatch.setattr(estimate.subprocess, "run", lambda *_, **__: failed)
    code, _, err = call("space.yaml", "--dry-run")
    assert code == 1 and "a run of the sweep is not possible: out of memory" in err


def test_what_ships_is_listed_by_name_and_valid(call: Any) -> None:
    code, out, _ = call()
    assert code == 0 and out.startswith("kl-and-learning-rate: KL coefficient")
    for name in shipped_configs(SWEEPS):
        settings = load_sweep(name)
        command.check_objective(settings)
        assert str(settings.output) == f"sweep-{name}"
    code, out, _ = call("--schema")
    schema = json.loads(out)
    assert code == 0 and {*schema["properties"]} == {*SweepConfig.model_fields}
    assert all(about.get("description") for about in schema["properties"].values())
