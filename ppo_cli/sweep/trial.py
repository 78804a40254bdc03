"""One trial of a sweep: its runs, one for each seed, each a process of `ppo-cli train`."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import TYPE_CHECKING, Any

from ppo_cli.config.sweep import SCORE
from ppo_cli.config.sweep_loading import SweepSettings
from ppo_cli.errors import PPOCliError, did_you_mean
from ppo_cli.reporting.sweep_tables import FAILED, FINISHED, MAX_WHY, PRUNED, TrialResult
from ppo_cli.sweep.directory import SweepDirectory
from ppo_cli.training.run_directory import RunDirectory
from ppo_cli.training.run_list import summarise
from ppo_cli.utils.text import shortened

if TYPE_CHECKING:
    from optuna import Trial

KL = "eval/kl"  # every line of the metrics with an evaluation has it
REFERENCE_SCORE = "eval/reference_score"
MARGIN = " " * len("error: ")  # before the further lines of a message
WRONG_REQUEST = 2  # exit code of `train`
DONE = ("finished", "ended early")


class ActiveTrial:
    """A trial under way.

    Args:
        trial: optuna's.
        settings: the sweep's.
        directory: where its runs are written.
        command: what `train` is an argument of.
        surroundings: environment of its processes.

    Attributes:
        result: what is known of it so far.
        slot: the place among the sweep's parallel trials.
    """

    def __init__(
        self,
        trial: Trial,
        settings: SweepSettings,
        directory: SweepDirectory,
        command: Sequence[str],
        surroundings: Mapping[str, str],
        slot: int,
    ) -> None:
        self.trial = trial
        self.slot = slot
        self._settings = settings
        self._directory = directory
        self._command = command
        self._surroundings = surroundings
        self._runs = directory.runs(trial.number, settings.seeds)
        self._process: Popen[bytes] | None = None
        self._seed = settings.seeds[0]
        self._log_start = 0
        self._seen = 0  # step of the newest evaluation that was read of the run
        self._read: tuple[int, int] | None = None  # time and size of the metrics that were read
        self._is_pruned = False
        self._started = 0.0
        self.stopped_by: int | None = None
        folder = str(directory.trial(trial.number))
        self.result = TrialResult(trial.number, dict(trial.params), folder)

    def prepare(self) -> None:
        """Raise `ConfigError` where its values do not go together."""
        steps = self._settings.trial_config(self.result.parameters).run.steps
        self.result = dataclasses.replace(self.result, steps=steps)

    def begin(self) -> bool:
        """Start the next run that has not ended; False where all have, or another process runs it.

        A run that was interrupted goes on from its checkpoint.
        """
        for seed, run in self._runs.items():
            if _has_ended(run):
                continue
            if run.lock.is_held():  # the process of a sweep that was killed; it is stopping
                return False
            self._seed, self._read, self._seen = seed, None, 0
            self._start(run)
            return True
        return False

    @property
    def is_running(self) -> bool:
        """Whether a process of it is at work."""
        return self._process is not None

    @property
    def is_waiting(self) -> bool:
        """Whether a process that this sweep did not start writes to one of its runs."""
        return self._process is None and any(run.lock.is_held() for run in self._runs.values())

    @property
    def is_at_its_end(self) -> bool:
        """Whether its run has made its last step, or is being stopped."""
        return self.stopped_by is not None or self._seen >= (self.result.steps or 0)

    def stop(self, number: int) -> None:
        """Ask its process to end after the step that it is making, or send it a further signal."""
        self.stopped_by = number
        if self._process is not None:
            self._process.send_signal(number)

    def prune(self) -> None:
        """End it early: its evaluations are worse than those of others."""
        self._is_pruned = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End its process at once."""
        if self._process is not None:
            self._process.kill()

    def new_evaluations(self) -> list[tuple[int, float]]:
        """Step and objective of the evaluations that came since the last call.

        They are those of the first seed's run: of the others none is reported. `result` holds the
        newest.
        """
        run = self._runs[self._seed]
        rows = self._new_rows(run)
        if rows:
            self._note(rows[-1])
        if self._seed != self._settings.seeds[0] or self._is_pruned:
            return []
        return [(row["step"], float(row[self._objective])) for row in rows]

    def exit_code(self) -> int | None:
        """The exit code of its process, which is over then; None while it runs."""
        code = None if self._process is None else self._process.poll()
        if code is not None:
            self._process = None
            taken = self.result.wall + time.monotonic() - self._started
            self.result = dataclasses.replace(self.result, wall=taken)
        return code

    def ended(self, code: int) -> TrialResult | None:
        """What it came to after a run ended with a code; None if another run follows.

        Also None where the sweep itself stopped it: then it goes on when the sweep is resumed.
        """
        if (result := self.whole()) is not None:  # perhaps before a signal reached it
            return result
        if self._is_pruned:
            return self._pruned()
        return None if code == 0 or self.stopped_by else self.failed(self.failure(code))

    def whole(self) -> TrialResult | None:
        """What it came to if all its runs have ended; else None."""
        runs = {seed: summarise(run.path) for seed, run in self._runs.items()}
        if diverged := [run for run in runs.values() if run.state == "diverged"]:
            return self.failed(diverged[0].note)
        if any(run.state not in DONE for run in runs.values()):
            return None
        rows = {seed: self._row(seed, run.step) for seed, run in runs.items()}
        for row in rows.values():
            if not math.isfinite(row.get(self._objective, math.nan)):
                return self.failed(self._missing(row))
        values = {str(seed): float(row[self._objective]) for seed, row in rows.items()}
        kls = [row[KL] for row in rows.values() if KL in row]
        first = rows[self._settings.seeds[0]]
        self.result = dataclasses.replace(
            self.result,
            state=FINISHED,
            value=sum(values.values()) / len(values),
            kl=sum(kls) / len(kls) if kls else None,
            by_seed=values,
            step=first["step"],
            reference_score=first.get(REFERENCE_SCORE),
            seconds=self._seconds(),
        )
        return self.result

    def failed(self, why: str) -> TrialResult:
        """That it failed."""
        self.result = dataclasses.replace(
            self.result, state=FAILED, value=None, why=why, seconds=self._seconds()
        )
        return self.result

    def failure(self, code: int) -> str:
        """Why its process failed: its own message, or how it ended."""
        log = self._directory.log(self._runs[self._seed])
        if message := _message(log, self._log_start):
            return message
        if code < 0:
            name = signal.Signals(-code).name
            lack = ": the machine may lack memory" if name == "SIGKILL" else ""
            return f"its process was killed ({name}){lack}"
        return f"its process ended with exit code {code}; {log} has what it printed"

    @property
    def _objective(self) -> str:
        return self._settings.sweep.objective

    def _start(self, run: RunDirectory) -> None:
        log = self._directory.log(run)
        self._log_start = log.stat().st_size if log.is_file() else 0
        arguments = [
            *self._command, "train", "--config", self._settings.config,
            *(part for text in self._settings.trial_assignments(self.result.parameters)
              for part in ("--set", text)),
            "--seed", str(self._seed), "--output", str(run.path),
        ]  # fmt: skip
        if any(run.checkpoints.glob("step-*")):
            arguments.append("--resume")
        elif run.path.is_dir():  # a kill left it without a checkpoint
            arguments.append("--overwrite")
        self._started = time.monotonic()
        with log.open("ab") as out:
            # A group of its own: the signals of the terminal reach the sweep alone.
            self._process = Popen(
                arguments, env=self._surroundings, stdin=DEVNULL, stdout=out, stderr=out,
                process_group=0 if os.name == "posix" else None,
            )  # fmt: skip

    def _new_rows(self, run: RunDirectory) -> list[dict[str, Any]]:
        path = run.path / "metrics.jsonl"
        try:
            about = path.stat()
            if (state := (about.st_mtime_ns, about.st_size)) == self._read:
                return []
            self._read = state
            rows = run.records.rows()
        except (OSError, PPOCliError):  # `train` is writing it anew, or says what is wrong with it
            return []
        found = [
            row for row in rows if row["step"] > self._seen and KL in row and self._objective in row
        ]
        self._seen = found[-1]["step"] if found else self._seen
        return found

    def _note(self, row: Mapping[str, Any]) -> None:
        self.result = dataclasses.replace(
            self.result,
            value=float(row[self._objective]),
            kl=float(row[KL]),
            step=row["step"],
            reference_score=row.get(REFERENCE_SCORE),
            seconds=self._seconds(),
        )

    def _pruned(self) -> TrialResult:
        rows = self._new_rows(self._runs[self._seed])
        if rows:
            self._note(rows[-1])
        self.result = dataclasses.replace(self.result, state=PRUNED, seconds=self._seconds())
        return self.result

    def _row(self, seed: int, step: int | None) -> dict[str, Any]:
        """The line of a run's metrics at the step whose weights it keeps."""
        rows = self._runs[seed].records.rows()
        return next((row for row in reversed(rows) if row["step"] == step), {"step": step})

    def _missing(self, row: Mapping[str, Any]) -> str:
        if self._objective in row:
            return f"{self._objective} is {row[self._objective]} at step {row['step']}"
        near = did_you_mean(self._objective, row) if self._objective != SCORE else ""
        return f"its metrics have no {self._objective} at step {row['step']} (objective).{near}"

    def _seconds(self) -> float:
        total = 0.0
        for run in self._runs.values():
            try:
                total += sum(row.get("time/step", 0.0) for row in run.records.rows())
            except PPOCliError:
                continue
        return total


def _has_ended(run: RunDirectory) -> bool:
    return run.is_run() and summarise(run.path).state in DONE


def _message(log: Path, start: int) -> str:
    """The last error in a log from a place on, on one line."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    first = next((i for i in reversed(range(len(lines))) if lines[i].startswith("error: ")), None)
    if first is None:
        return ""
    message = [lines[first].removeprefix("error: ")]
    for line in lines[first + 1 :]:
        if not line.startswith(MARGIN):
            break
        message.append(line.strip())
    return shortened(" ".join(message), MAX_WHY)
