"""The folder that a training run writes: its layout, and reading and writing its records."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ppo_cli.config import RunConfig
from ppo_cli.config_source import validate
from ppo_cli.errors import UsageError, did_you_mean
from ppo_cli.files import refuse_special, write_text
from ppo_cli.text import json_text, shortened
from ppo_cli.yaml_io import dump_yaml, read_yaml

CONFIG_FILE = "run.yaml"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
PLOT_FILE = "training.png"
CARD_FILE = "README.md"
CHECKPOINTS = "checkpoints"
LONGEST_NAME = 240  # of a folder, bytes; file systems take 255
CHANGEABLE = (
    "run.steps",
    "run.device",
    "run.checkpoint_every",
    "run.keep",
    "run.samples_per_step",
)
VERSIONED = ("ppo-cli", "torch", "transformers", "accelerate", "trl", "datasets")


class RunDirectory:
    """A run directory at `path`, whether it exists or not."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def checkpoints(self) -> Path:
        """The folder of what `--resume` needs."""
        return self.path / CHECKPOINTS

    @property
    def plot(self) -> Path:
        """The picture of loss and mean reward."""
        return self.path / PLOT_FILE

    def is_run(self) -> bool:
        """Whether a training run wrote this folder."""
        return os.path.isfile(self.path / CONFIG_FILE)

    @classmethod
    def existing(cls, path: str | Path) -> RunDirectory:
        """The run directory at `path`.

        Raises:
            UsageError: there is none.
        """
        run = cls(path)
        if not str(path).strip():
            raise UsageError("the name of the run directory is empty: give one that is there")
        if run.is_run():
            return run
        if os.path.exists(path):
            raise UsageError(
                f"{path} is no run directory (it has no {CONFIG_FILE}): give one that "
                "'ppo-cli train' wrote"
            )
        parent = run.path.parent
        siblings = (
            [p.parent.name for p in parent.glob(f"*/{CONFIG_FILE}")] if parent.is_dir() else []
        )
        near = did_you_mean(run.path.name, siblings) or " 'ppo-cli train' makes one"
        raise UsageError(f"{path}: no such run directory.{near}")

    def check_writable(self, overwrite: bool) -> None:
        """Raise `UsageError` unless a new run may be written here; changes nothing."""
        longest = max((len(os.fsencode(part)) for part in self.path.parts), default=0)
        if longest > LONGEST_NAME:
            raise UsageError(
                f"{shortened(str(self.path), 60)}: a name of {longest} bytes is too long for a "
                "folder; choose another with --output"
            )
        refuse_special(self.path)
        if os.path.exists(self.path) and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file: choose another folder with --output")
        if self.path.is_dir() and any(self.path.iterdir()):
            if not overwrite:
                raise UsageError(
                    f"{self.path} exists: continue it with --resume, replace it with --overwrite, "
                    "or choose another folder with --output"
                )
            if not self.is_run():
                raise UsageError(
                    f"{self.path} is no run directory and is not overwritten: choose another "
                    "folder with --output"
                )
        nearest = next(p for p in (self.path, *self.path.absolute().parents) if os.path.exists(p))
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UsageError(
                f"{self.path}: {nearest} is not a folder that can be written to; choose another "
                "place with --output"
            )

    def check_entries(self) -> None:
        """Raise `UsageError` where a file to be written is a link to somewhere else."""
        refuse_special(self.path)
        for folder in (self.path, self.checkpoints):
            for entry in folder.iterdir() if folder.is_dir() else ():
                refuse_special(entry)

    def create(self, config: RunConfig, overwrite: bool) -> None:
        """Make the folder, empty but for `run.yaml`."""
        self.check_writable(overwrite)
        if overwrite and self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.record(config)

    def record(self, config: RunConfig) -> None:
        """Write `run.yaml`: configuration, versions, commit."""
        record = {
            "versions": versions(),
            "git_commit": _git_commit(),
            "config": config.model_dump(mode="json"),
        }
        write_text(self.path / CONFIG_FILE, dump_yaml(record))

    def config(self) -> RunConfig:
        """The configuration that the run was made with."""
        path = self.path / CONFIG_FILE
        record = read_yaml(path)
        settings = record.get("config") if isinstance(record, dict) else None
        if not isinstance(settings, dict):
            raise UsageError(
                f"{path} is damaged: it holds no configuration; train anew with --overwrite"
            )
        return validate(settings, str(path))

    def resumed_config(self, wanted: RunConfig) -> RunConfig:
        """The run's configuration with those settings of `wanted` that a resumed run may change.

        Raises:
            UsageError: `wanted` differs in another setting, which would make it another run.
        """
        made_with = self.config()
        differing = _differences(made_with.model_dump(mode="json"), wanted.model_dump(mode="json"))
        fixed = [key for key in differing if key not in CHANGEABLE]
        if fixed:
            raise UsageError(
                f"{self.path} was made with other settings ({', '.join(fixed)}): resume it with "
                f"the options it was started with, or train anew with --overwrite. Free to change: "
                f"{', '.join(CHANGEABLE)}"
            )
        changes = {key.split(".")[1]: getattr(wanted.run, key.split(".")[1]) for key in CHANGEABLE}
        return made_with.model_copy(
            update={"run": made_with.run.model_copy(update=changes | {"output": str(self.path)})}
        )

    def append(self, file: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add JSON lines to one of the run's records."""
        with (self.path / file).open("a", encoding="utf-8") as out:
            for row in rows:
                out.write(json_text(row) + "\n")

    def cut_records(self, step: int) -> None:
        """Drop what the records hold of steps after `step`."""
        for file in (METRICS_FILE, SAMPLES_FILE):
            path = self.path / file
            if not path.exists():
                continue
            kept = [line for line in _json_lines(path) if line["step"] <= step]
            text = "".join(json_text(row) + "\n" for row in kept)
            write_text(path, text)

    def metrics(self) -> list[dict[str, Any]]:
        """A dictionary a step, oldest first.

        Raises:
            UsageError: the run has no steps yet, or a line is no JSON.
        """
        path = self.path / METRICS_FILE
        rows = list(_json_lines(path)) if path.is_file() else []
        for row in rows:
            for key, value in row.items():
                if not isinstance(value, (int, float)):
                    raise UsageError(
                        f"{path}, step {row['step']}: '{key}' is {shortened(repr(value), 40)}, "
                        "which is no number: the file is damaged"
                    )
        if not rows:
            raise UsageError(f"{self.path} has no steps in its {METRICS_FILE} yet")
        return rows


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the keys whose values differ; where the run lies does not count."""
    names: list[str] = []
    for key in {**a, **b}:
        left, right, name = a.get(key), b.get(key), prefix + key
        if isinstance(left, dict) and isinstance(right, dict):
            names += _differences(left, right, name + ".")
        elif left != right and name != "run.output":
            names.append(name)
    return names


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _json_lines(path: Path) -> Iterable[dict[str, Any]]:
    # Not split at what Unicode calls line ends, as str.splitlines does: JSON may hold those.
    lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                raise ValueError("no step")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                return  # the line that a killed run was writing
            raise UsageError(
                f"{path}, line {number}: not a record of a step; the file is damaged there"
            ) from error
        yield row
