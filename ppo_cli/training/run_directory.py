"""The folder of a run: its layout, its configuration, and whether it may be written."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ppo_cli.config.loading import validate
from ppo_cli.config.policy import PolicyConfig
from ppo_cli.config.schema import RunConfig
from ppo_cli.data.fingerprint import inputs_of
from ppo_cli.errors import UsageError, did_you_mean
from ppo_cli.training.lock import RunLock
from ppo_cli.training.provenance import code
from ppo_cli.training.records import RECORDS, Records
from ppo_cli.utils.files import (
    contains,
    is_same_place,
    refuse_special,
    refuse_stream,
    write_text,
)
from ppo_cli.utils.inventory import (
    CHECKPOINTS,
    LOCK_FILES,
    MARKER,
    RUN_FILE,
    Inventory,
    lies_in_checkpoints,
    shown,
)
from ppo_cli.utils.model_folder import adapter_base
from ppo_cli.utils.text import shortened
from ppo_cli.utils.yaml_io import dump_yaml, read_yaml

CONFIG_FILE = "run.yaml"
PLOT_FILE = "training.png"
CARD_FILE = "README.md"
# Files that are written at any time, by other commands too. A model's files are added to the
# inventory when they are written.
LISTED = (CONFIG_FILE, *RECORDS, PLOT_FILE, "frontier.json", "frontier.png")
UNFINISHED_BEGINNING = {f".{MARKER}.tmp", f".{CONFIG_FILE}.tmp"}  # written before run.yaml
MAX_NAME_BYTES = 240  # of a folder's name; file systems take 255


class RunDirectory:
    """A run directory at `path`, whether it exists or not.

    Attributes:
        path: the folder.
        inventory: the list of the files that the run wrote.
        records: metrics and samples of the steps.
        lock: keeps other processes from writing here.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.inventory = Inventory(self.path)
        self.records = Records(self.path)
        self.lock = RunLock(self.path)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def plot(self) -> Path:
        """The picture of loss and mean reward."""
        return self.path / PLOT_FILE

    def is_run(self) -> bool:
        """Whether a training run wrote this folder."""
        return self.inventory.names() is not None

    @classmethod
    def existing(cls, path: str | Path) -> RunDirectory:
        """Open the run directory at `path`.

        Raises:
            UsageError: there is none.
        """
        run = cls(path)
        if not str(path).strip():
            raise UsageError("the name of the run directory is empty: give one that is there")
        for entry in run.path.iterdir() if os.path.isdir(path) else ():
            refuse_stream(entry)
        if run.is_run():
            return run
        if os.path.exists(path):
            has_file = os.path.exists(run.path / CONFIG_FILE)
            why = "is another program's" if has_file else "is missing"
            raise UsageError(
                f"{path} is no run directory (its {CONFIG_FILE} {why}): give one that "
                "'ppo-cli train' wrote"
            )
        parent = run.path.parent
        siblings = (
            [p.parent.name for p in parent.glob(f"*/{CONFIG_FILE}")] if parent.is_dir() else []
        )
        near = did_you_mean(run.path.name, siblings) or " 'ppo-cli train' makes one"
        raise UsageError(f"{path}: no such run directory.{near}")

    def check_resumable(self) -> None:
        """Raise `UsageError` unless a run can be resumed here; change nothing."""
        self._check_entries()
        if not any(self.checkpoints.glob("step-*")):
            raise UsageError(
                f"{self.path} has no checkpoint to resume from: train anew with --overwrite"
            )

    def check_writable(self, overwrite: bool, inputs: Mapping[str, str]) -> None:
        """Raise `UsageError` unless a new run may be written here; change nothing.

        Args:
            overwrite: whether an older run may be replaced.
            inputs: names of what the new run reads, by option or key; they must not lie here.
        """
        check_place(self.path)
        self._check_inputs(inputs)
        if self.path.is_dir() and not self.is_blank():
            self._check_replaceable(overwrite)
        else:
            self.lock.check()

    def _check_replaceable(self, overwrite: bool) -> None:
        """Raise `UsageError` unless the folder holds a replaceable run and nothing else."""
        if not self.is_run():
            raise UsageError(
                f"{self.path} exists, is no run directory and is not overwritten: choose another "
                "folder with --output"
            )
        self.lock.check()
        if not overwrite:
            raise UsageError(
                f"{self.path} exists: continue it with --resume, replace it with --overwrite, "
                "or choose another folder with --output"
            )
        if strangers := self.inventory.strangers():
            raise UsageError(
                f"{self.path} holds {shown(strangers)}, which no run wrote, and is not "
                "overwritten: move that elsewhere, or choose another folder with --output"
            )

    def _check_inputs(self, inputs: Mapping[str, str]) -> None:
        """Raise `UsageError` where an input is this folder, lies in it or contains it."""
        for key, name in inputs.items():
            for place in _places(name):
                where = "is" if is_same_place(place, self.path) else None
                if where is None and contains(self.path, place):
                    where = "lies in"
                if where is None and place.is_dir() and contains(place, self.path):
                    where = "contains"
                if where is not None:
                    raise UsageError(
                        f"{key} {name} {where} {self.path}, where the run is to be written: choose "
                        "another folder with --output"
                    )

    def _check_entries(self) -> None:
        """Raise `UsageError` where a file to be written is a link or is not the run's."""
        refuse_special(self.path)
        for folder in (self.path, self.checkpoints, *self.checkpoints.glob("step-*")):
            refuse_special(folder)
            for entry in folder.iterdir() if folder.is_dir() else ():
                refuse_special(entry)
        if strange := [name for name in self.inventory.strangers() if RUN_FILE.fullmatch(name)]:
            raise UsageError(
                f"{self.path} holds {shown(strange)}, which the run would replace but did not "
                "write: move that elsewhere"
            )

    def create(
        self, config: RunConfig, overwrite: bool, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Make the folder, empty but for `run.yaml`, and lock it; `facts` as for `record`."""
        inputs = inputs_of(config)
        self.check_writable(overwrite, inputs)
        self.lock.acquire()
        self.check_writable(overwrite, inputs)  # another run may have ended here meanwhile
        self.inventory.begin(LISTED)
        self.record(config, facts)

    def clear(self) -> None:
        """Delete the files of a run that could not begin: another may be written here."""
        self.inventory.begin(())

    def unlock(self) -> None:
        """Let other processes write here."""
        self.lock.release()

    def is_blank(self) -> bool:
        """Whether the folder is empty, but for files of a process that was killed at once."""
        marker = {MARKER} if self.is_run() else set()
        if not os.path.lexists(self.checkpoints):
            return _holds_only(self.path, UNFINISHED_BEGINNING | marker)
        return (
            self.checkpoints.is_dir()
            and not self.checkpoints.is_symlink()
            and _holds_only(self.path, UNFINISHED_BEGINNING | marker | {CHECKPOINTS})
            and _holds_only(self.checkpoints, LOCK_FILES)
        )

    def record(self, config: RunConfig, facts: Mapping[str, Any] | None = None) -> None:
        """Write `run.yaml`: versions, commit, `facts` (machine, kernels, inputs), configuration."""
        self.inventory.add(LISTED)  # runs of earlier releases have no list
        record = {**code(), **(facts or {}), "config": config.model_dump(mode="json")}
        write_text(self.path / CONFIG_FILE, dump_yaml(record))

    def recorded(self) -> dict[str, Any]:
        """Read `run.yaml` without the configuration: versions, commit, machine, kernels, inputs."""
        record = read_yaml(self.path / CONFIG_FILE)
        if not isinstance(record, dict):
            return {}
        return {key: value for key, value in record.items() if key != "config"}

    def config(self) -> RunConfig:
        """Read the configuration in `run.yaml`."""
        path = self.path / CONFIG_FILE
        record = read_yaml(path)
        settings = record.get("config") if isinstance(record, dict) else None
        if not isinstance(settings, dict):
            raise UsageError(
                f"{path} is damaged: it holds no configuration; train anew with --overwrite"
            )
        return validate(settings, str(path))


def check_place(path: Path) -> None:
    """Raise `UsageError` where no folder for results can be; change nothing."""
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > MAX_NAME_BYTES:
        raise UsageError(
            f"{shortened(str(path), 60)}: a name of {longest} bytes is too long for a folder; "
            "choose another with --output"
        )
    refuse_special(path)
    if os.path.exists(path) and not path.is_dir():
        raise UsageError(f"{path} is a file: choose another folder with --output")
    if lies_in_checkpoints(path):
        raise UsageError(f"{path} lies among a run's checkpoints: choose another folder")
    nearest = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UsageError(
            f"{path}: {nearest} is not a folder that can be written to; choose another place "
            "with --output"
        )


def loading_settings(directory: RunDirectory, policy: PolicyConfig) -> PolicyConfig:
    """How a run's own model is loaded: as in training, but merged weights are not quantised."""
    if policy.quantization is None or adapter_base(str(directory.path)) is not None:
        return policy
    return policy.model_copy(update={"quantization": None})


def _places(name: str) -> list[Path]:
    """Files and folders that a name stands for: itself, matches of a pattern, links in it."""
    name = os.path.expanduser(name)
    found = [Path(name)] if os.path.exists(name) else [*map(Path, glob.glob(name, recursive=True))]
    return found + [
        inner
        for place in found
        if place.is_dir()
        for inner in place.iterdir()
        if inner.is_symlink() and inner.is_file()
    ]


def _holds_only(folder: Path, names: Collection[str]) -> bool:
    return all(
        entry.name in names and (entry.name == CHECKPOINTS or entry.is_file(follow_symlinks=False))
        for entry in [*os.scandir(folder)]
    )
