"""A stand-in for the process of `ppo-cli train`: it makes a run directory, a step each look."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from ppo_cli.config.loading import load_config
from ppo_cli.config.schema import RunConfig
from ppo_cli.config.sweep_loading import load_sweep
from ppo_cli.reporting.sweep_tables import SweepSummary
from ppo_cli.sweep import directory as sweep_directory
from ppo_cli.sweep import run as sweep_run
from ppo_cli.sweep import trial as sweep_trial
from ppo_cli.sweep.run import Progress, Sweep, open_sweep
from ppo_cli.training import run_directory
from ppo_cli.training.run_directory import RunDirectory
from ppo_cli.utils import yaml_io
from tests.conftest import SMALL_RUN


class Fault(NamedTuple):
    """How a run fails: the step before which it does, its exit code and what it says."""

    step: int
    code: int
    message: str


class QuickLoader(yaml.CSafeLoader):
    """The program's loader, with the parser of libyaml: most of the time goes into `run.yaml`."""

    yaml_implicit_resolvers = yaml_io._Loader.yaml_implicit_resolvers


Outcome = Callable[[RunConfig, int], "tuple[float, float] | Fault"]
"""Score and KL of a run after a step, or a fault."""


class FakeTrain:
    """As much of `subprocess.Popen` as a trial uses.

    Attributes:
        started: all of them, in order.
        outcome: of their steps.
        trainings: run and step of each step that was made.
    """

    started: list[FakeTrain]
    outcome: Outcome
    trainings: list[tuple[str, int]]

    def __init__(
        self, arguments: Sequence[str], *, env: dict[str, str], stdout: Any, **_: Any
    ) -> None:
        assert arguments[:4] == [*sweep_run.COMMAND, "train"]
        given = dict(zip(arguments[4::2], arguments[5::2], strict=False))
        changes = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--set"]
        options = {("run", "seed"): int(given["--seed"]), ("run", "output"): given["--output"]}
        self.config = load_config(given["--config"], assignments=changes, overrides=options)
        self.arguments, self.env, self._log = list(arguments), env, stdout.name
        self.directory = RunDirectory(self.config.output)
        self.signals: list[int] = []
        self.step = 0
        if "--resume" in arguments:
            self.step = max(int(p.name[5:]) for p in self.directory.checkpoints.glob("step-*"))
            self.directory.lock.acquire()
        else:
            self.directory.create(self.config, "--overwrite" in arguments)
        FakeTrain.started.append(self)

    def poll(self) -> int | None:
        if self.signals:
            self._end("interrupted")
            return 128 + self.signals[0]
        result = FakeTrain.outcome(self.config, self.step + 1)
        if isinstance(result, Fault):
            if self.step + 1 < result.step:
                result = (0.0, 0.0)
            else:
                Path(self._log).write_text(f"step 1\nerror: {result.message}\n       more of it\n")
                self.directory.unlock()
                return result.code
        self.step += 1
        FakeTrain.trainings.append((str(self.directory.path), self.step))
        row = {"step": self.step, "time/step": 0.5, "eval/reference_score": -0.5}
        row |= {"eval/score": result[0], "eval/kl": result[1], "ppo/loss/total": -result[0]}
        self.directory.records.append("metrics.jsonl", [row])
        (self.directory.checkpoints / f"step-{self.step:06}").mkdir()
        if self.step < self.config.run.steps:
            return None
        self._end("finished")
        return 0

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    def _end(self, how: str) -> None:
        self.directory.inventory.add(["config.json", "model.safetensors"])
        (self.directory.path / "config.json").write_text("{}")
        (self.directory.path / "model.safetensors").write_text("weights")
        end = json.dumps({"step": self.step, "as": how, "why": None})
        record = self.directory.path / "run.yaml"
        text = "".join(x for x in record.open() if not x.startswith("ended: "))
        record.write_text(f"{text}ended: {end}\n")
        self.directory.unlock()


def by_kl_coef(config: RunConfig, step: int) -> tuple[float, float]:
    """A score that is best at a coefficient of 0.1, and rises from step to step."""
    coefficient = config.ppo.init_kl_coef
    return step - 10 * abs(coefficient - 0.1), 0.5 / coefficient


SPACE = """\
config: SMALL_RUN
set: {run.steps: 3, run.eval_every: 1}
parameters: {ppo.init_kl_coef: {low: 0.01, high: 0.2}}
trials: 3
startup_trials: 2
pruner: none
"""


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> type[FakeTrain]:
    """Runs are made by `FakeTrain`; the sweep looks after them at once, and draws nothing."""
    FakeTrain.started, FakeTrain.trainings = [], []
    FakeTrain.outcome = staticmethod(by_kl_coef)
    monkeypatch.setattr(sweep_trial, "Popen", FakeTrain)
    monkeypatch.setattr(sweep_run, "PAUSE", 0)
    for draw in ("plot_sweep_frontier", "plot_importance"):
        monkeypatch.setattr(sweep_run, draw, lambda *_: False)
    monkeypatch.setattr(yaml_io, "_Loader", QuickLoader)
    for module in (run_directory, sweep_directory):  # versions of packages: slow to ask for
        monkeypatch.setattr(module, "code", lambda: {"versions": {}})
    return FakeTrain


def make_sweep(
    folder: Path, text: str = "", *, jobs: int = 1, resume: bool = False, **options: Any
) -> Sweep:
    """A sweep in `folder`, whose file is `SPACE` with other lines put in the place of its own."""
    lines = {line.partition(":")[0]: line for line in SPACE.splitlines()}
    lines |= {line.partition(":")[0]: line for line in text.splitlines()}
    file = folder / "space.yaml"
    file.write_text("\n".join(lines.values()).replace("SMALL_RUN", SMALL_RUN) + "\n")
    settings = load_sweep(str(file), output=str(folder / "sweep"), **options)
    return open_sweep(settings, jobs=jobs, resume=resume)


def run(sweep: Sweep) -> SweepSummary:
    """Make all trials."""
    for _ in sweep.run():
        pass
    summary = sweep.finish()
    sweep.directory.unlock()
    return summary


def killed(sweep: Sweep, events: int) -> list[Progress]:
    """As if sweep and runs were killed after so many events; the generator must stay alive."""
    steps = sweep.run()
    seen = [progress for progress, _ in zip(steps, range(events), strict=False)]
    for fake in FakeTrain.started:
        fake.directory.unlock()
        fake.poll = lambda: -9  # type: ignore[method-assign]
    sweep.directory.unlock()
    KEPT.append(steps)
    return seen


KEPT: list[Any] = []
