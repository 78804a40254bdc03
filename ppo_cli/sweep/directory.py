"""The directory of a sweep: its files, the run directories of its trials, and its lock."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ppo_cli.config.sweep_loading import SweepSettings
from ppo_cli.data.fingerprint import inputs_of
from ppo_cli.errors import ConfigError, UsageError
from ppo_cli.training.lock import RunLock
from ppo_cli.training.provenance import code
from ppo_cli.training.run_directory import CARD_FILE, LISTED, RunDirectory, check_place
from ppo_cli.training.run_list import flat
from ppo_cli.utils.files import contains, write_text
from ppo_cli.utils.inventory import (
    LOCK_FILES,
    STEP_FOLDER,
    is_unfinished_checkpoint,
    shown,
)
from ppo_cli.utils.yaml_io import dump_yaml, read_yaml

RECORD = "sweep.yaml"  # what is swept, on which base, with which versions
JOURNAL = "study.journal"
TRIALS = "trials.csv"
FRONTIER = "frontier.png"
IMPORTANCE = "importance.png"
BEST = "best.yaml"
LOGS = "logs"  # what the runs print
FILES = (RECORD, JOURNAL, TRIALS, FRONTIER, IMPORTANCE, BEST)
TRIAL = re.compile(r"trial-(\d{3,})")
SEED = re.compile(r"seed-\d+")
LOG = re.compile(r"trial-\d{3,}(-seed-\d+)?\.log")
LOCKS = re.compile(rf"{re.escape(JOURNAL)}\.lock.*")  # of optuna, while it writes
FREE = ("trials", "output", "keep")  # keys of a sweep that may differ when it is resumed


class SweepDirectory:
    """The directory of a sweep at `path`, whether it exists or not."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.lock = RunLock(self.path, self.path)

    @property
    def journal(self) -> Path:
        """optuna's record of the trials."""
        return self.path / JOURNAL

    def trial(self, number: int) -> Path:
        """The folder of a trial."""
        return self.path / f"trial-{number:03}"

    def runs(self, number: int, seeds: Iterable[int]) -> dict[int, RunDirectory]:
        """Seed -> run directory of a trial; with one seed it is the trial's own folder."""
        folder, seeds = self.trial(number), list(seeds)
        if len(seeds) == 1:
            return {seeds[0]: RunDirectory(folder)}
        return {seed: RunDirectory(folder / f"seed-{seed}") for seed in seeds}

    def log(self, run: RunDirectory) -> Path:
        """Where a run prints to."""
        name = "-".join(run.path.relative_to(self.path).parts)
        return self.path / LOGS / f"{name}.log"

    def is_sweep(self) -> bool:
        """Whether a sweep wrote this folder."""
        return bool(self.recorded())

    def recorded(self) -> dict[str, Any]:
        """Read `sweep.yaml`; empty where it is not there or not that of a sweep."""
        path = self.path / RECORD
        if not path.is_file():
            return {}
        try:
            record = read_yaml(path)
        except ConfigError:
            return {}
        is_ours = isinstance(record, dict) and record.keys() >= {"sweep", "base", "versions"}
        return record if is_ours else {}

    def create(self, settings: SweepSettings, overwrite: bool) -> None:
        """Make the folder, empty but for its record, and lock it.

        Raises:
            UsageError: it is there already, or cannot be written.
        """
        self.check_writable(settings, overwrite)
        self.lock.acquire()
        self._clear()
        record = {
            **code(),
            "sweep": _plain(settings),
            "base": settings.base.model_dump(mode="json"),
        }
        write_text(self.path / RECORD, dump_yaml(record))
        (self.path / LOGS).mkdir(exist_ok=True)

    def reopen(self, settings: SweepSettings) -> None:
        """Lock the folder of a sweep that is resumed, and record its settings.

        Raises:
            UsageError: there is none, or it was made with other settings.
        """
        self.check_resumable(settings)
        self.lock.acquire()
        record = {**self.recorded(), "sweep": _plain(settings)}
        write_text(self.path / RECORD, dump_yaml(record))
        (self.path / LOGS).mkdir(exist_ok=True)

    def check_writable(self, settings: SweepSettings, overwrite: bool) -> None:
        """Raise `UsageError` unless a new sweep may be written here; change nothing."""
        inputs = {**inputs_of(settings.base), "the sweep": settings.name}
        for key, name in inputs.items():
            if os.path.exists(name) and contains(self.path, Path(name)):
                raise UsageError(
                    f"{key} {name} lies in {self.path}, where the sweep is to be written: choose "
                    "another folder with --output"
                )
        check_place(self.path)
        if not os.path.lexists(self.path) or (self.path.is_dir() and not self._names()):
            return
        if not self.is_sweep():
            raise UsageError(
                f"{self.path} exists, is no directory of a sweep and is not overwritten: choose "
                "another folder with --output"
            )
        self.lock.check()
        if not overwrite:
            raise UsageError(
                f"{self.path} exists: continue it with --resume, replace it with --overwrite, or "
                "choose another folder with --output"
            )
        if strangers := self._strangers():
            raise UsageError(
                f"{self.path} holds {shown(strangers)}, which no sweep wrote, and is not "
                "overwritten: move that elsewhere, or choose another folder with --output"
            )

    def check_resumable(self, settings: SweepSettings) -> None:
        """Raise `UsageError` unless the sweep here can be resumed with these settings."""
        recorded = self.recorded()
        if not recorded:
            raise UsageError(f"{self.path} holds no sweep to resume: start it without --resume")
        self.lock.check()
        before = flat({**recorded["sweep"], "base": recorded["base"]})
        now = flat({**_plain(settings), "base": settings.base.model_dump(mode="json")})
        differing = [
            name.removeprefix("base.")
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name) and name not in (*FREE, "config", "set")
        ]  # config and set are what the base was made from
        if differing:
            raise UsageError(
                f"{self.path} was begun with other settings ({shown(differing)}): put them back, "
                f"or begin anew with --overwrite. Free to change: {', '.join(FREE)}"
            )

    def unlock(self) -> None:
        """Let other processes write here."""
        self.lock.release()

    def _names(self) -> list[str]:
        """What is here, but for what a process that was killed at once has left."""
        return sorted({*os.listdir(self.path)} - LOCK_FILES - {f".{RECORD}.tmp"})

    def _strangers(self) -> list[str]:
        found = []
        for name in self._names():
            path = self.path / name
            if TRIAL.fullmatch(name) and path.is_dir():
                found += [f"{name}/{inner}" for inner in _strange_in_trial(path)]
            elif name == LOGS and path.is_dir():
                found += [f"{LOGS}/{x}" for x in os.listdir(path) if not LOG.fullmatch(x)]
            elif name.removeprefix(".").removesuffix(".tmp") not in FILES and not (
                LOCKS.fullmatch(name)
            ):
                found.append(name)
        return found

    def _clear(self) -> None:
        """Delete an older sweep, its record last, so that a kill leaves what can be replaced."""
        for name in sorted(self._names(), key=lambda name: name == RECORD):
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def thin(run: RunDirectory, keep: str) -> None:
    """Delete what need not stay of a run that has ended; safe to repeat.

    Args:
        run: its directory.
        keep: all, models (all but checkpoints), or best (its records alone).
    """
    if keep == "all" or not run.is_run():
        return
    for path in [*run.checkpoints.glob("*")] if run.checkpoints.is_dir() else ():
        is_step = STEP_FOLDER.fullmatch(path.name) or is_unfinished_checkpoint(path)
        if is_step and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    if keep == "best":
        names = run.inventory.names() or frozenset()
        records = {*LISTED, CARD_FILE}
        run.inventory.remove(
            name for name in names if name not in records and not name.endswith("/")
        )


def _strange_in_trial(folder: Path) -> list[str]:
    """What no run wrote in the folder of a trial: one run, or one for each seed."""
    run = RunDirectory(folder)
    if run.is_run() or (folder / "checkpoints").exists():
        return run.inventory.strangers()
    found = []
    for entry in sorted(folder.iterdir()):
        if SEED.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            inner = RunDirectory(entry).inventory.strangers()
            found += [f"{entry.name}/{name}" for name in inner]
        else:
            found.append(entry.name)
    return found


def _plain(settings: SweepSettings) -> dict[str, Any]:
    """The sweep as it is recorded, with the options of the command."""
    return {
        **settings.sweep.model_dump(mode="json"),
        "config": settings.config,
        "set": list(settings.assignments),
    }
