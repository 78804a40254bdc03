"""A sweep: its trials, several at a time, until all have ended or it is stopped."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ppo_cli.config.commented import commented_yaml
from ppo_cli.config.functions import is_file
from ppo_cli.config.loading import validate
from ppo_cli.config.sweep_loading import SweepSettings
from ppo_cli.errors import ConfigError, PPOCliError, UsageError
from ppo_cli.reporting.sweep_plots import plot_importance, plot_sweep_frontier
from ppo_cli.reporting.sweep_tables import (
    FAILED,
    FINISHED,
    SweepSummary,
    TrialResult,
    best_first,
    trials_csv,
)
from ppo_cli.sweep import search
from ppo_cli.sweep.directory import BEST, FRONTIER, IMPORTANCE, LOGS, TRIALS, SweepDirectory, thin
from ppo_cli.sweep.trial import WRONG_REQUEST, ActiveTrial
from ppo_cli.utils.files import write_text
from ppo_cli.utils.launcher import OURS, usable_cores
from ppo_cli.utils.yaml_io import load_yaml

if TYPE_CHECKING:
    from optuna import Study, Trial

PAUSE = 0.2  # seconds between two looks at the processes
SAME_FAILURES = 3  # first trials that fail for one reason, after which the sweep gives up
COMMAND = (sys.executable, "-m", "ppo_cli")
HEADING = """\
# Written by ppo-cli sweep: the best of {count} trials, trial {number}, with {objective} {value:.4g}
# at a KL of {kl:.3g} nats per response. It varied {keys}.
# Train with it: ppo-cli train --config {file}

"""


@dataclass(frozen=True)
class Progress:
    """What happened to a trial: begins, evaluated, ended, or waits (for another process)."""

    what: str
    trial: TrialResult


class Sweep:
    """A sweep whose directory is locked and whose study is open.

    Args:
        settings: the sweep's.
        directory: its directory.
        study: optuna's.
        jobs: trials at a time.
        command: what `train` is an argument of.

    Attributes:
        active: the trials under way.
    """

    def __init__(
        self,
        settings: SweepSettings,
        directory: SweepDirectory,
        study: Study,
        jobs: int,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.settings = settings
        self.directory = directory
        self.active: list[ActiveTrial] = []
        self.planned = search.planned_trials(settings.sweep)
        self._study = study
        self._jobs = jobs
        self._command = command
        self._surroundings = surroundings(jobs, settings.base.run.device)
        self._stopped_by: int | None = None

    def stop(self, number: int) -> None:
        """Pass a signal on to all runs, which end after their step; begin no further ones."""
        self._stopped_by = number
        for active in self.active:
            active.stop(number)

    def run(self) -> Iterator[Progress]:
        """Make the trials that are missing; first those that were under way when it ended.

        Raises:
            UsageError: the request of a run is wrong, or the base configuration has changed.
            PPOCliError: the first trials all failed for the same reason.
        """
        interrupted = search.unfinished(self._study, self.settings)
        self._thin()
        try:
            while True:
                yield from self._fill(interrupted)
                if not self.active:
                    break
                yield from self._look()
                time.sleep(PAUSE)
        finally:
            self._end_all()

    def results(self) -> list[TrialResult]:
        """All trials, by number; those under way as far as they are."""
        found = {active.trial.number: active.result for active in self.active}
        for trial in self._study.get_trials(deepcopy=False):
            if search.RESULT in trial.user_attrs and trial.state.is_finished():
                folder = str(self.directory.trial(trial.number))  # it may have been moved
                result = {**trial.user_attrs[search.RESULT], "folder": folder}
                found[trial.number] = TrialResult(**result)
        return [found[number] for number in sorted(found)]

    def finish(self) -> SweepSummary:
        """Write the table, the pictures and the best configuration; sum up."""
        folder, sweep = self.directory.path, self.settings.sweep
        summary = SweepSummary(
            folder=str(folder),
            sweep=sweep,
            planned=self.planned,
            trials=best_first(self.results(), sweep),
            importances=search.importances(self._study),
        )
        self._write_table()
        for name, draw in ((FRONTIER, plot_sweep_frontier), (IMPORTANCE, plot_importance)):
            if not draw(summary, folder / name):  # of an earlier, larger sweep there may be one
                (folder / name).unlink(missing_ok=True)
        if summary.best is not None:
            write_text(folder / BEST, self._best_configuration(summary.best, summary))
        else:
            (folder / BEST).unlink(missing_ok=True)
        self._thin()
        return summary

    def _fill(self, interrupted: list[Trial]) -> Iterator[Progress]:
        """Begin trials until all places are taken or none is missing."""
        while self._stopped_by is None and len(self.active) < self._jobs:
            if interrupted:
                trial = interrupted.pop(0)
            elif len(self._study.get_trials(deepcopy=False)) < self.planned or self._has_waiting():
                trial = search.ask(self._study, self.settings)
            else:
                return
            self._check_base()
            slot = min({*range(self._jobs)} - {active.slot for active in self.active})
            active = ActiveTrial(
                trial, self.settings, self.directory, self._command, self._surroundings[slot], slot
            )
            try:
                active.prepare()
            except ConfigError as error:  # each value is possible, but not with the others
                yield self._record(active, active.failed(str(error)))
                continue
            self.active.append(active)
            yield from self._go_on(active)

    def _go_on(self, active: ActiveTrial) -> Iterator[Progress]:
        """Start the next run of a trial, or record that all were made."""
        if active.begin():
            yield Progress("begins", active.result)
        elif active.is_waiting:
            yield Progress("waits", active.result)
        elif (result := active.whole()) is not None:
            self.active.remove(active)
            yield self._record(active, result)

    def _look(self) -> Iterator[Progress]:
        """See what became of the trials under way."""
        for active in list(self.active):
            if not active.is_running:
                if self._stopped_by is not None:
                    self.active.remove(active)
                elif not active.is_waiting:
                    yield from self._go_on(active)
                continue
            code = active.exit_code()  # first: all that it wrote is there to be read then
            for step, value in active.new_evaluations():
                is_worse = search.report(active.trial, step, value)
                yield Progress("evaluated", active.result)
                if is_worse and code is None and not active.is_at_its_end:
                    active.prune()
                    break
            if code is not None:
                yield from self._after(active, code)

    def _after(self, active: ActiveTrial, code: int) -> Iterator[Progress]:
        """A run has ended: the next one follows, or the trial has ended, too."""
        if code == WRONG_REQUEST and active.stopped_by is None:
            raise UsageError(
                f"trial {active.trial.number}: {active.failure(code)}\n"
                "nothing is lost: --resume goes on with this trial"
            )
        result = active.ended(code)
        if result is not None:
            self.active.remove(active)
            yield self._record(active, result)
        elif self._stopped_by is not None:
            self.active.remove(active)
        else:
            yield from self._go_on(active)

    def _record(self, active: ActiveTrial, result: TrialResult) -> Progress:
        """Record how a trial ended.

        Raises:
            PPOCliError: it failed like all before it.
        """
        limit = self.settings.sweep.max_kl
        excess = None if limit is None else (result.kl - limit if result.kl is not None else 0.0)
        values = {key: value for key, value in vars(result).items() if key != "state"}
        search.tell(self._study, active.trial, result.state, values, excess)
        self._write_table()
        self._thin()
        if result.state == FAILED:
            self._check_failures()
        return Progress("ended", result)

    def _check_failures(self) -> None:
        ended = [result for result in self.results() if result.state != "running"]
        reasons = {re.sub(r"[\d.]+", "#", result.why) for result in ended}
        count = min(SAME_FAILURES, self.planned)
        if len(ended) >= count and len(reasons) == 1 and all(r.state == FAILED for r in ended):
            raise PPOCliError(
                f"the first {len(ended)} trials failed, all for the same reason: {ended[-1].why}\n"
                f"{self.directory.path / LOGS} has what they printed; put that right, and begin "
                "anew with --overwrite"
            )

    def _check_base(self) -> None:
        """Raise `UsageError` where the file of the base configuration is another than before."""
        if self.settings.trial_config({}) != self.settings.base:
            raise UsageError(
                f"{self.settings.config} was changed while the sweep ran: put back what it was and "
                "--resume, or begin anew with --overwrite"
            )

    def _has_waiting(self) -> bool:
        """Whether a kill came between the choice of a trial of the grid and its begin."""
        return any(t.state.name == "WAITING" for t in self._study.get_trials(deepcopy=False))

    def _write_table(self) -> None:
        table = trials_csv(self.results(), self.settings.sweep)
        write_text(self.directory.path / TRIALS, table)

    def _thin(self) -> None:
        """Delete what need not stay of the trials that have ended; the best keeps all."""
        sweep = self.settings.sweep
        if sweep.keep == "all":
            return
        results = [r for r in self.results() if r.state != "running"]
        ranked = best_first(results, sweep)
        best = ranked[0].number if ranked and ranked[0].state == FINISHED else None
        for result in results:
            if result.number != best:
                for run in self.directory.runs(result.number, self.settings.seeds).values():
                    thin(run, sweep.keep)

    def _end_all(self) -> None:
        """Stop what still runs, after an error: each run ends after its step."""
        for active in self.active:
            if active.is_running and active.stopped_by is None:
                active.stop(signal.SIGTERM)
        while any(active.is_running and active.exit_code() is None for active in self.active):
            time.sleep(PAUSE)

    def _best_configuration(self, best: TrialResult, summary: SweepSummary) -> str:
        """The best trial's configuration, commented, for `train --config`."""
        config = self.settings.trial_config(best.parameters)
        values = config.model_dump(mode="json")
        values["run"] |= {"seed": self.settings.seeds[0], "output": None}
        _make_functions_absolute(values)
        heading = HEADING.format(
            count=summary.count(FINISHED),
            number=best.number,
            objective=self.settings.sweep.objective,
            value=best.value,
            kl=float("nan") if best.kl is None else best.kl,
            keys=", ".join(best.parameters),
            file=self.directory.path / BEST,
        )
        text = heading + commented_yaml(values)
        if validate(load_yaml(text, BEST, {}), BEST) != validate(values, BEST):
            raise AssertionError(f"{BEST} would hold other settings than those of the best trial")
        return text


def open_sweep(
    settings: SweepSettings,
    *,
    jobs: int = 1,
    resume: bool = False,
    overwrite: bool = False,
    command: Sequence[str] = COMMAND,
) -> Sweep:
    """Make or reopen the directory of a sweep, and lock it; `Sweep.directory.unlock` ends that.

    Raises:
        MissingPackageError: optuna is absent.
        UsageError: the directory cannot be used.
    """
    search.check_installed()
    directory = SweepDirectory(settings.output)
    if resume:
        directory.reopen(settings)
    else:
        directory.create(settings, overwrite)
    study = search.open_study(directory.journal, settings)
    return Sweep(settings, directory, study, jobs, command)


def surroundings(jobs: int, device: str) -> list[dict[str, str]]:
    """The environment of each of `jobs` processes: its share of the processor, and its GPU.

    `OMP_NUM_THREADS` and, with one GPU or a `device` with a number, what is visible stay as they
    are.
    """
    shared = os.environ | {OURS: str(os.getpid())}  # they end with this process, even by SIGKILL
    shared.setdefault("OMP_NUM_THREADS", str(max(usable_cores() // jobs, 1)))
    gpus = _gpus() if jobs > 1 and device in ("auto", "cuda") else []
    if len(gpus) < 2:
        return [dict(shared) for _ in range(jobs)]
    return [{**shared, "CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} for slot in range(jobs)]


def _gpus() -> list[str]:
    """The GPUs that processes may use, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _make_functions_absolute(values: dict[str, Any]) -> None:
    """Name the files of reward functions so that they are found from the sweep's directory."""
    for term in values.get("reward", {}).get("terms") or ():
        spec: Mapping[str, Any] | str | None = term.get("function")
        if isinstance(spec, str) and is_file(spec):
            term["function"] = os.path.abspath(os.path.expanduser(spec))
