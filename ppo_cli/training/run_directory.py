"""The folder that a training run writes: its layout, and reading and writing its records."""

from __future__ import annotations

import glob
import json
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppo_cli.config.loading import validate
from ppo_cli.config.schema import RunConfig
from ppo_cli.data.fingerprint import inputs_of
from ppo_cli.errors import UsageError, did_you_mean
from ppo_cli.utils.files import (
    contains,
    is_same_place,
    refuse_special,
    refuse_stream,
    replacing,
    sync,
    write_text,
    writing,
)
from ppo_cli.utils.inventory import (
    CHECKPOINTS,
    HOLDER_FILE,
    LOCK_FILE,
    LOCK_FILES,
    MARKER,
    RUN_FILE,
    STATE_FILE,
    Inventory,
    lies_in_checkpoints,
    shown,
)
from ppo_cli.utils.text import json_text, shortened
from ppo_cli.utils.yaml_io import dump_yaml, read_yaml

if TYPE_CHECKING:
    from filelock import FileLock

CONFIG_FILE = "run.yaml"
METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
PLOT_FILE = "training.png"
CARD_FILE = "README.md"
EVALUATION = ("eval/", "time/evaluating")  # how the keys of an evaluation begin
RECORDS = (METRICS_FILE, SAMPLES_FILE)
# Written at any time, also by other commands; a model's files are listed as they are written.
LISTED = (CONFIG_FILE, *RECORDS, PLOT_FILE, "frontier.json", "frontier.png")
# What is there before run.yaml is.
BEGINNINGS = {f".{MARKER}.tmp", f".{CONFIG_FILE}.tmp"}
MOST_RANGES = 5  # of steps that a message names
LONGEST_NAME = 240  # of a folder, bytes; file systems take 255
CHANGEABLE = (
    "policy.kernels",
    "run.steps",
    "run.device",
    "run.checkpoint_every",
    "run.keep",
    "run.eval_every",
    "run.weights",
    "run.target_score",
    "run.stop_kl",
    "run.patience",
    "run.on_divergence",
    "run.kl_limit",
    "run.collapse_limit",
    "run.best_of_n",
    "run.samples_per_step",
    "rollout.batch_size",
    "reward.batch_size",
    "ppo.gradient_checkpointing",
    "ppo.optimize_device_cache",
)
# These may change where their product, the samples of an optimizer step, does not.
BACKWARD_BATCH = ("ppo.mini_batch_size", "ppo.gradient_accumulation_steps")
# These name inputs: where one is recorded it is known by that record, not by its name.
INPUTS = ("policy.model", "policy.revision", "reward.model", "reward.revision", "prompts.source")
VERSIONED = ("ppo-cli", "torch", "transformers", "accelerate", "trl", "datasets")


class RunDirectory:
    """A run directory at `path`, whether it exists or not.

    Attributes:
        path: the folder.
        facts: what `record` writes beside configuration, versions and commit.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.inventory = Inventory(self.path)
        self.facts: dict[str, Any] = {}
        self._lock: FileLock | None = None

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
        return self.inventory.names() is not None

    @classmethod
    def existing(cls, path: str | Path) -> RunDirectory:
        """The run directory at `path`.

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
        """Raise `UsageError` unless a run can go on here, writing nowhere else; changes nothing."""
        self._check_entries()
        if not any(self.checkpoints.glob("step-*")):
            raise UsageError(
                f"{self.path} has no checkpoint to resume from: train anew with --overwrite"
            )

    def check_writable(self, overwrite: bool, inputs: Mapping[str, str]) -> None:
        """Raise `UsageError` unless a new run may be written here; changes nothing.

        Args:
            overwrite: whether an older run may be replaced.
            inputs: what the new run reads, which must not lie here: option or key -> name.
        """
        longest = max((len(os.fsencode(part)) for part in self.path.parts), default=0)
        if longest > LONGEST_NAME:
            raise UsageError(
                f"{shortened(str(self.path), 60)}: a name of {longest} bytes is too long for a "
                "folder; choose another with --output"
            )
        refuse_special(self.path)
        if os.path.exists(self.path) and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file: choose another folder with --output")
        if lies_in_checkpoints(self.path):
            raise UsageError(f"{self.path} lies among a run's checkpoints: choose another folder")
        self._check_inputs(inputs)
        if self.path.is_dir() and not self._is_blank():
            self._check_replaceable(overwrite)
        elif self._lock is None:
            self._check_lock()
        nearest = next(p for p in (self.path, *self.path.absolute().parents) if os.path.exists(p))
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UsageError(
                f"{self.path}: {nearest} is not a folder that can be written to; choose another "
                "place with --output"
            )

    def _check_replaceable(self, overwrite: bool) -> None:
        """Raise `UsageError` unless all that is here is a run that may be replaced."""
        if not self.is_run():
            raise UsageError(
                f"{self.path} exists, is no run directory and is not overwritten: choose another "
                "folder with --output"
            )
        if self._lock is None:
            self._check_lock()
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
        """Raise `UsageError` where something that a run reads lies here, or around here."""
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
        """Raise `UsageError` where a file to be written is a link, or is not the run's."""
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

    def create(self, config: RunConfig, overwrite: bool) -> None:
        """Make the folder, empty but for `run.yaml`, and lock it."""
        read = inputs_of(config)
        self.check_writable(overwrite, read)
        self.lock()
        self.check_writable(overwrite, read)  # another run may have come and gone
        self.inventory.begin(LISTED)
        self.record(config)

    def lock(self) -> None:
        """Keep other processes from writing here until this one ends or calls `unlock`.

        The lock is the operating system's: that of a process that died is free.

        Raises:
            UsageError: another process has it.
        """
        with writing(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = self._acquired()
            since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            about = {"pid": os.getpid(), "host": platform.node(), "since": since}
            write_text(self.checkpoints / HOLDER_FILE, json.dumps(about) + "\n")

    def unlock(self) -> None:
        """Let other processes write here."""
        if self._lock is not None:
            (self.checkpoints / HOLDER_FILE).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None

    def _acquired(self) -> FileLock:
        from filelock import FileLock, Timeout

        lock = FileLock(self.checkpoints / LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UsageError(
                f"{self.path} is in use by {_holder(self.checkpoints / HOLDER_FILE)}: wait for it "
                "or stop it, or choose another folder with --output"
            ) from None
        return lock

    def _check_lock(self) -> None:
        """Raise `UsageError` where another process writes here."""
        lock = self.checkpoints / LOCK_FILE
        if os.path.isfile(lock) and not os.path.islink(lock) and os.access(lock, os.W_OK):
            self._acquired().release()

    def _is_blank(self) -> bool:
        """Whether nothing is in the folder but what a process killed at its beginning leaves."""
        marker = {MARKER} if self.is_run() else set()
        if not os.path.lexists(self.checkpoints):
            return _holds_only(self.path, BEGINNINGS | marker)
        return (
            self.checkpoints.is_dir()
            and not self.checkpoints.is_symlink()
            and _holds_only(self.path, BEGINNINGS | marker | {CHECKPOINTS})
            and _holds_only(self.checkpoints, LOCK_FILES)
        )

    def record(self, config: RunConfig) -> None:
        """Write `run.yaml`: configuration, versions, commit, `facts`."""
        self.inventory.add(LISTED)  # of an older release's run, which kept no list
        record = {**code(), **self.facts, "config": config.model_dump(mode="json")}
        write_text(self.path / CONFIG_FILE, dump_yaml(record))

    def recorded(self) -> dict[str, Any]:
        """What `run.yaml` holds beside the configuration."""
        record = read_yaml(self.path / CONFIG_FILE)
        if not isinstance(record, dict):
            return {}
        return {key: value for key, value in record.items() if key != "config"}

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

    def made_with(self) -> RunConfig:
        """The configuration that the newest checkpoint was made with, whoever edits `run.yaml`.

        That of `run.yaml` where no checkpoint says, as those of earlier releases do not.
        """
        for state in sorted(self.checkpoints.glob(f"step-*/{STATE_FILE}"), reverse=True):
            if not state.is_file():
                continue
            try:
                return validate(json.loads(state.read_bytes())["settings"], str(state))
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # damaged, or of another version
        return self.config()

    def resumed_config(self, wanted: RunConfig) -> tuple[RunConfig, list[str]]:
        """`wanted`, and what differs in it from the run's own, as lines such as `run.steps 4 -> 6`.

        Where the inputs are recorded their names may differ: by what they name they are known.

        Raises:
            UsageError: it differs in what would make it another run.
        """
        made_with = self.made_with()
        changes = _differences(made_with.model_dump(mode="json"), wanted.model_dump(mode="json"))
        free = set(CHANGEABLE)
        if made_with.ppo.backward_batch_size == wanted.ppo.backward_batch_size:
            free.update(BACKWARD_BATCH)
        inputs = self.recorded().get("inputs")
        known = {str(key).partition(".")[0] for key in inputs} if isinstance(inputs, dict) else ()
        free.update(key for key in INPUTS if key.partition(".")[0] in known)
        if fixed := {key: change for key, change in changes.items() if key not in free}:
            edits = _differences(
                made_with.model_dump(mode="json"), self.config().model_dump(mode="json")
            )
            if edited := [change for key, change in fixed.items() if edits.get(key) == change]:
                raise UsageError(
                    f"{self.path / CONFIG_FILE} was edited after its newest checkpoint was made "
                    f"({', '.join(edited)}): put back what it was, or train anew with --overwrite"
                )
            raise UsageError(
                f"{self.path} was made with other settings ({', '.join(fixed.values())}): resume "
                "it with the options it was started with, or train anew with --overwrite. Free to "
                f"change: {', '.join(CHANGEABLE)}; {' and '.join(BACKWARD_BATCH)} with an equal "
                "product"
            )
        here = wanted.run.model_copy(update={"output": str(self.path)})
        return wanted.model_copy(update={"run": here}), list(changes.values())

    def append(self, file: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add JSON lines to one of the run's records."""
        path = self.path / file
        with writing(path), path.open("a", encoding="utf-8") as out:
            for row in rows:
                out.write(json_text(row) + "\n")

    def record_lengths(self) -> dict[str, int]:
        """Bytes in each of the run's records, once they are on the disk."""
        lengths = {}
        for file in RECORDS:
            path = self.path / file
            if path.exists():
                with writing(path):
                    sync(path)
            lengths[file] = path.stat().st_size if path.exists() else 0
        return lengths

    def check_records(self, lengths: Mapping[str, int]) -> None:
        """Raise `UsageError` where `lengths`, which a file holds, are not those of the records."""
        if strange := [file for file in lengths if file not in RECORDS]:
            raise UsageError(
                f"{self.checkpoints}: a checkpoint names {shown(strange)} among the records of the "
                "run, which no run writes: take another copy of it, or train anew with --overwrite"
            )

    def put_evaluation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Make `numbers` the evaluation in a step's line of the metrics, in place of what is there.

        Args:
            step: the newest whose line counts.
            numbers: under `EVALUATION` keys; none take the evaluation away.
        """
        path = self.path / METRICS_FILE
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        for place in reversed(range(len(lines))):
            try:
                row = json.loads(lines[place])
            except (ValueError, RecursionError):
                continue  # half of a line, or what damaged it: left for `metrics` to tell of
            if isinstance(row, dict) and row.get("step") == step:
                kept = {k: v for k, v in row.items() if not k.startswith(EVALUATION)}
                if (changed := {**kept, **numbers}) != row:
                    lines[place] = json_text(changed).encode()
                    with replacing(path) as unfinished:
                        unfinished.write_bytes(b"\n".join(lines))
                return

    def restore_records(self, lengths: Mapping[str, int], step: int) -> None:
        """Make the records what they were at a checkpoint; warns once of what is lost of them.

        Of a record that was damaged or shortened since, what is left of the steps is kept.

        Args:
            lengths: bytes that each had then.
            step: the checkpoint's.
        """
        lost = {}
        for file in (METRICS_FILE, SAMPLES_FILE):
            path, length = self.path / file, lengths.get(file, 0)
            content = path.read_bytes() if path.is_file() else b""
            found = _whole_rows(content[:length], step, numbers=file == METRICS_FILE)
            if sum(len(line) for _, line in found) == length:
                _unshare(path)
                if len(content) > length:  # what followed the checkpoint
                    os.truncate(path, length)
                continue
            found = _whole_rows(content, step, numbers=file == METRICS_FILE)
            if file == METRICS_FILE:  # one a step, the newest
                found = sorted(dict(found).items())
            with replacing(path) as unfinished:
                unfinished.write_bytes(b"".join(line for _, line in found))
            missing = sorted(set(range(1, step + 1)) - {number for number, _ in found})
            lost[file] = f"{file} (nothing of {_ranges(missing)})" if missing else file
        if lost:
            warnings.warn(
                f"{self.path}: records were damaged or lost and hold what is left of them: "
                f"{', '.join(lost.values())}. The checkpoint is whole: training goes on as before",
                stacklevel=3,
            )

    def metrics(self) -> list[dict[str, Any]]:
        """A dictionary a step, oldest first.

        Raises:
            UsageError: the run has no steps yet, or a line is no JSON.
        """
        if rows := self.rows():
            return rows
        raise UsageError(f"{self.path} has no steps in its {METRICS_FILE} yet")

    def rows(self) -> list[dict[str, Any]]:
        """`metrics`, none where there are none: a run whose record was lost may go on.

        Raises:
            UsageError: a line is no JSON.
        """
        path = self.path / METRICS_FILE
        refuse_stream(path)
        rows = list(_json_lines(path)) if path.is_file() else []
        for row in rows:
            for key, value in row.items():
                if not _is_number(value):
                    raise UsageError(
                        f"{path}, step {row['step']}: '{key}' is {shortened(repr(value), 40)}, "
                        "which is no number: the file is damaged"
                    )
        return rows


def _places(name: str) -> list[Path]:
    """The files and folders that a name stands for: itself, by a pattern, by links in a folder."""
    name = os.path.expanduser(name)
    found = [Path(name)] if os.path.exists(name) else [*map(Path, glob.glob(name, recursive=True))]
    return found + [
        inner
        for place in found
        if place.is_dir()
        for inner in place.iterdir()
        if inner.is_symlink() and inner.is_file()
    ]


def _unshare(path: Path) -> None:
    """Give a file with further names, hard links, content of its own: theirs shall not change."""
    if path.exists() and path.stat().st_nlink > 1:
        with replacing(path) as unfinished:
            shutil.copyfile(path, unfinished)


def _holds_only(folder: Path, names: Collection[str]) -> bool:
    return all(
        entry.name in names and (entry.name == CHECKPOINTS or entry.is_file(follow_symlinks=False))
        for entry in [*os.scandir(folder)]
    )


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> `key old -> new` where values differ; where the run lies does not count."""
    found: dict[str, str] = {}
    for key in {**a, **b}:
        left, right, name = a.get(key), b.get(key), prefix + key
        if isinstance(left, dict) and isinstance(right, dict):
            found |= _differences(left, right, name + ".")
        elif left != right and name != "run.output":
            found[name] = f"{name} {json.dumps(left)} -> {json.dumps(right)}"
    return found


def _holder(path: Path) -> str:
    """Who has the lock, as far as is known."""
    if not os.path.isfile(path):  # a pipe would be waited for
        return "another process"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def code() -> dict[str, Any]:
    """The code that makes a run: versions, and the commit of the repository around it, if any."""
    return {"versions": versions(), "git_commit": _git_commit()}


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
            step = row.get("step") if isinstance(row, dict) else None
            if not isinstance(step, int) or not _is_number(step):
                raise ValueError("no step")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                return  # the line that a killed run was writing
            raise UsageError(
                f"{path}, line {number}: not a record of a step; the file is damaged there"
            ) from error
        yield row


def _is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that a float can be; true and false are none."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _whole_rows(content: bytes, last: int, *, numbers: bool) -> list[tuple[int, bytes]]:
    """Step and line of the lines of a record that are whole, up to step `last`.

    Args:
        numbers: whether all values of such a line are numbers.
    """
    found = []
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line)
            step, values = row["step"], row.values()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        is_whole = isinstance(step, int) and 1 <= step <= last and line.endswith(b"\n")
        if is_whole and not (numbers and not all(map(_is_number, values))):
            found.append((step, line))
    return found


def _ranges(numbers: Sequence[int]) -> str:
    """`steps 1 to 3, 5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    told = [" to ".join(str(number) for number in part) for part in parts[:MOST_RANGES]]
    more = " and others" if len(parts) > MOST_RANGES else ""
    return f"step{'s' if len(numbers) > 1 else ''} {', '.join(told)}{more}"
