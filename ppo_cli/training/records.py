"""A run's records: `metrics.jsonl`, one line a step, and `samples.jsonl`."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ppo_cli.errors import UsageError
from ppo_cli.evaluation.samples import Sample
from ppo_cli.utils.files import refuse_stream, replacing, sync, writing
from ppo_cli.utils.inventory import shown
from ppo_cli.utils.text import json_text, shortened

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
RECORDS = (METRICS_FILE, SAMPLES_FILE)
EVALUATION = ("eval/", "time/evaluating")  # prefixes of the keys of an evaluation
SAMPLES_READ = 256 * 1024  # bytes at the end of the record, for the newest samples
MAX_RANGES = 5  # of step numbers in a message


class Records:
    """The records in the run directory `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def append(self, file: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append JSON lines to one of the records."""
        path = self._folder / file
        with writing(path), path.open("a", encoding="utf-8") as out:
            for row in rows:
                out.write(json_text(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Read the statistics, one dictionary a step, oldest first.

        Raises:
            UsageError: the run has no steps yet, or a line is not JSON.
        """
        if rows := self.rows():
            return rows
        raise UsageError(f"{self._folder} has no steps in its {METRICS_FILE} yet")

    def rows(self) -> list[dict[str, Any]]:
        """Read `metrics`, or an empty list: a run whose record was lost can be resumed.

        Raises:
            UsageError: a line is not JSON.
        """
        path = self._folder / METRICS_FILE
        refuse_stream(path)
        rows = list(_json_lines(path)) if path.is_file() else []
        for row in rows:
            check_numbers(path, row)
        return rows

    def put_evaluation(self, step: int, numbers: Mapping[str, float]) -> None:
        """Replace the evaluation in a step's line of the metrics.

        Args:
            step: the newest step whose line is valid.
            numbers: statistics with `EVALUATION` keys; an empty mapping removes the evaluation.
        """
        path = self._folder / METRICS_FILE
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        for index in reversed(range(len(lines))):
            try:
                row = json.loads(lines[index])
            except (ValueError, RecursionError):
                continue  # an unfinished or damaged line, which `metrics` reports
            if isinstance(row, dict) and row.get("step") == step:
                kept = {k: v for k, v in row.items() if not k.startswith(EVALUATION)}
                if (changed := {**kept, **numbers}) != row:
                    lines[index] = json_text(changed).encode()
                    with replacing(path) as unfinished:
                        unfinished.write_bytes(b"\n".join(lines))
                return

    def lengths(self) -> dict[str, int]:
        """Flush the records to the disk and return the length of each in bytes."""
        lengths = {}
        for file in RECORDS:
            path = self._folder / file
            if path.exists():
                with writing(path):
                    sync(path)
            lengths[file] = path.stat().st_size if path.exists() else 0
        return lengths

    def check_names(self, lengths: Mapping[str, int]) -> None:
        """Raise `UsageError` where a checkpoint's `lengths` name other files than the records."""
        if strange := [file for file in lengths if file not in RECORDS]:
            raise UsageError(
                f"{self._folder}: a checkpoint names {shown(strange)} among the records of the "
                "run, which no run writes: take another copy of it, or train anew with --overwrite"
            )

    def restore(self, lengths: Mapping[str, int], step: int) -> None:
        """Cut the records to their lengths at a checkpoint; warn once about lost lines.

        Of a record that was damaged or shortened since, the whole lines of the steps are kept.

        Args:
            lengths: bytes in each record when the checkpoint was written.
            step: the checkpoint's step.
        """
        damaged = {}
        for file in RECORDS:
            path, length = self._folder / file, lengths.get(file, 0)
            content = path.read_bytes() if path.is_file() else b""
            lines = _whole_lines(content[:length], step, numbers_only=file == METRICS_FILE)
            if sum(len(line) for _, line in lines) == length:
                _break_hard_link(path)
                if len(content) > length:  # lines of steps after the checkpoint
                    os.truncate(path, length)
                continue
            lines = _whole_lines(content, step, numbers_only=file == METRICS_FILE)
            if file == METRICS_FILE:  # one line a step, the newest
                lines = sorted(dict(lines).items())
            with replacing(path) as unfinished:
                unfinished.write_bytes(b"".join(line for _, line in lines))
            missing = sorted(set(range(1, step + 1)) - {number for number, _ in lines})
            damaged[file] = f"{file} (nothing of {_ranges(missing)})" if missing else file
        if damaged:
            warnings.warn(
                f"{self._folder}: records were damaged or lost and hold what is left of them: "
                f"{', '.join(damaged.values())}. The checkpoint is whole: training goes on as "
                "before",
                stacklevel=3,
            )


def _break_hard_link(path: Path) -> None:
    """Copy a file that has other names (hard links), so that their content does not change."""
    if path.exists() and path.stat().st_nlink > 1:
        with replacing(path) as unfinished:
            shutil.copyfile(path, unfinished)


def _json_lines(path: Path) -> Iterable[dict[str, Any]]:
    # str.splitlines would also split at Unicode's line ends, which JSON text may hold.
    lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = row_of(path, number, line)
        except UsageError:
            if number == len(lines):
                return  # a killed run did not finish this line
            raise
        yield row


def row_of(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """A line of a record, its number counted from 1; `UsageError` where it is none of a step."""
    try:
        row = json.loads(line)
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(step, int) or not _is_number(step):
            raise ValueError("no step")
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}, line {number}: not a record of a step; the file is damaged there"
        ) from error
    found: dict[str, Any] = row
    return found


def newest_samples(path: Path, count: int) -> list[Sample]:
    """Samples of the newest step in a `samples.jsonl`, at most `count`; damaged ones are left out.

    Only the end of the file is read.
    """
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(os.fstat(file.fileno()).st_size - SAMPLES_READ, 0))
        lines = file.read().split(b"\n")
    samples: dict[int, list[Sample]] = {}
    for line in lines:
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            row = json.loads(line)
            sample = Sample(
                str(row["query"]),
                str(row["response"]),
                None if row["score"] is None else float(row["score"]),
                None,
                messages=row.get("messages"),
            )
            samples.setdefault(int(row["step"]), []).append(sample)
    return samples[max(samples)][:count] if samples else []


def check_numbers(path: Path, row: Mapping[str, Any]) -> None:
    """Raise `UsageError` where a value of a step's metrics is no number."""
    for key, value in row.items():
        if not _is_number(value):
            raise UsageError(
                f"{path}, step {row['step']}: '{key}' is {shortened(repr(value), 40)}, which is "
                "no number: the file is damaged"
            )


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float can represent; true and false are not."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _whole_lines(content: bytes, last: int, *, numbers_only: bool) -> list[tuple[int, bytes]]:
    """Step and text of each whole line of a record, up to step `last`.

    Args:
        numbers_only: whether every value of a line must be a number.
    """
    whole = []
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line)
            step, values = row["step"], row.values()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        is_whole = isinstance(step, int) and 1 <= step <= last and line.endswith(b"\n")
        if is_whole and not (numbers_only and not all(map(_is_number, values))):
            whole.append((step, line))
    return whole


def _ranges(numbers: Sequence[int]) -> str:
    """Sorted step numbers as text: `steps 1 to 3, 5`."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    parts = [" to ".join(str(number) for number in ends) for ends in ranges[:MAX_RANGES]]
    more = " and others" if len(ranges) > MAX_RANGES else ""
    return f"step{'s' if len(numbers) > 1 else ''} {', '.join(parts)}{more}"
