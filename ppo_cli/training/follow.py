"""Follows a run that another process writes: a look costs what is new since the last one."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppo_cli.config.schema import RunConfig
from ppo_cli.errors import PPOCliError
from ppo_cli.evaluation.history import EvaluationHistory
from ppo_cli.evaluation.samples import Sample
from ppo_cli.training.diagnostics import REQUIRED, Diagnostics
from ppo_cli.training.records import (
    EVALUATION,
    METRICS_FILE,
    SAMPLES_FILE,
    check_numbers,
    newest_samples,
    row_of,
)
from ppo_cli.training.run_directory import CONFIG_FILE, RunDirectory
from ppo_cli.training.run_list import state_of, with_row
from ppo_cli.utils.files import refuse_stream

LOCK_EVERY = 5.0  # seconds without news after which the lock is tried, and tried again
ABSENT, STARTING, RUNNING, INTERRUPTED = "absent", "starting", "running", "interrupted"

Row = Mapping[str, Any]
Signature = tuple[int, int, int] | None


@dataclass(frozen=True)
class News:
    """What a look at a run has found.

    Attributes:
        rows: metrics of the steps that are new, or that were evaluated since, oldest first.
        back_to: the step that the run went back to, by a rollback, a resume or `--overwrite`; None
            where it did not.
    """

    rows: Sequence[Row]
    back_to: int | None = None


class FollowedRun:
    """A run directory that another process writes, perhaps on another machine.

    Args:
        path: of the run directory, which may not be there yet.

    Attributes:
        path: the same.
        config: the run's settings; None as long as there is no `run.yaml`.
        rows: the metrics of all steps so far.
        history: the evaluations so far.
        warnings: what the diagnostics say of these steps, oldest first.
        state: `absent` or `starting` before there are settings, then as in `RunSummary`.
        note: why, where the state does not say it.

    Raises:
        UsageError: another file or folder is at `path`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._directory = RunDirectory(path)
        is_there = os.path.lexists(path)
        if not path.strip() or (
            is_there and not (os.path.isdir(path) and self._directory.is_blank())
        ):
            RunDirectory.existing(path)  # raises unless it is a run
        self._metrics = _GrowingMetrics(self._directory.path / METRICS_FILE)
        self.config: RunConfig | None = None
        self.history = EvaluationHistory()
        self.warnings: list[str] = []
        self.state, self.note = ABSENT, ""
        self._ended: Any = None
        self._signature: Signature = None
        self._diagnostics: Diagnostics | None = None
        self._changed_at = self._asked_at = -float("inf")  # by `time.monotonic`

    @property
    def rows(self) -> Sequence[Row]:
        """The metrics of all steps so far, oldest first."""
        return self._metrics.rows

    @property
    def steps(self) -> int:
        """The newest step; 0 before the first."""
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def has_ended(self) -> bool:
        """Whether the run has ended in a way that its directory records."""
        return self.state not in (ABSENT, STARTING, RUNNING, INTERRUPTED) or (
            self.state == INTERRUPTED and self._ended is not None
        )

    @property
    def seconds_unchanged(self) -> float:
        """How long the run has had no new step, and no other settings or end."""
        return max(time.monotonic() - self._changed_at, 0.0)

    def samples(self, count: int) -> list[Sample]:
        """Some samples of the newest step that has any; at most `count`."""
        return newest_samples(self._directory.path / SAMPLES_FILE, count)

    def look(self) -> News:
        """Read what has changed.

        Raises:
            UsageError: a record or the configuration is damaged.
        """
        steps = self.steps
        has_settings = self._read_settings()
        news = self._metrics.read()
        is_changed = bool(has_settings or news.rows or news.back_to is not None)
        is_evaluated = bool(news.rows) and news.rows[0]["step"] <= steps
        if has_settings or news.back_to is not None or is_evaluated:
            self._judge_again()
        else:
            self._judge(news.rows)
        if is_changed:
            self._note_change()
        self._update_state(is_changed)
        return news

    def _read_settings(self) -> bool:
        """Read `run.yaml` where it has changed; return whether it has."""
        path = self._directory.path / CONFIG_FILE
        signature = _signature(path)
        if signature == self._signature:
            return False
        try:
            self.config = None if signature is None else self._directory.config()
            self._ended = self._directory.recorded().get("ended") if signature else None
        except PPOCliError:
            if _signature(path) == signature:
                raise
            return False  # it was replaced meanwhile: the next look reads it
        self._signature = signature
        return True

    def _judge_again(self) -> None:
        self.history, self.warnings = EvaluationHistory(), []
        self._diagnostics = None if self.config is None else Diagnostics(self.config)
        self._judge(self.rows)

    def _judge(self, rows: Sequence[Row]) -> None:
        """Add steps to the evaluations and to what the diagnostics have seen."""
        if self.config is None or self._diagnostics is None:
            return
        for row in rows:
            self.history = with_row(self.history, row, self.config)
            if all(key in row for key in REQUIRED):
                self.warnings += self._diagnostics.check_step(row)

    def _note_change(self) -> None:
        """Remember when the run changed; at the first look the files' times say it."""
        now = time.monotonic()
        if self._changed_at < 0:
            written = [_modified(self._directory.path / f) for f in (METRICS_FILE, CONFIG_FILE)]
            now -= max(time.time() - max(written), 0.0)
        self._changed_at = now

    def _update_state(self, is_changed: bool) -> None:
        """Find out whether the run goes on. A run that makes steps is not asked for its lock."""
        if self.config is None:
            self.state, self.note = STARTING if os.path.isdir(self.path) else ABSENT, ""
            return
        now = time.monotonic()
        if is_changed and self.state == RUNNING:
            self._asked_at = now
        if self.state == RUNNING and self._ended is None and now - self._asked_at < LOCK_EVERY:
            return
        if self.state == INTERRUPTED and not is_changed and now - self._asked_at < LOCK_EVERY:
            return
        self._asked_at, before = now, self.state
        self.state, self.note = state_of(
            self._directory, self.config, self.steps, self.history, self._ended
        )
        if self.state == "finished" != before and self._diagnostics is not None:
            self.warnings += self._diagnostics.check_end()


class _GrowingMetrics:
    """The rows of a `metrics.jsonl` that is appended to, and that may be cut or replaced."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        self._end = 0  # of the last whole line that was read, in bytes
        self._last = b""  # that line, which has to be there still

    def read(self) -> News:
        """Read what is new."""
        old = self.rows
        refuse_stream(self._path)
        try:
            with self._path.open("rb") as file:
                file.seek(self._end - len(self._last))
                if file.read(len(self._last)) == self._last:
                    count = len(old)
                    self._take(file.read())
                    return News(self.rows[count:])
                self._begin_again()
                file.seek(0)
                self._take(file.read())
        except FileNotFoundError:
            self._begin_again()
        return _news(old, self.rows)

    def _begin_again(self) -> None:
        self.rows, self._end, self._last = [], 0, b""

    def _take(self, content: bytes) -> None:
        """Add the whole lines of `content`; the last line may not be finished yet."""
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.split(b"\n")[:-1]
        for line in lines:
            row = row_of(self._path, len(self.rows) + 1, line)
            check_numbers(self._path, row)
            self.rows.append(row)
        self._end += len(whole)
        if lines:
            self._last = lines[-1] + b"\n"


def _news(old: Sequence[Row], rows: Sequence[Row]) -> News:
    """What has become of the `old` rows."""
    pairs = zip(old, rows, strict=False)
    kept = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(old), len(rows)))
    is_whole = kept == len(old)
    if is_whole or (
        len(rows) > kept and _without_evaluation(rows[kept]) == _without_evaluation(old[kept])
    ):
        return News(rows[kept:])
    return News(rows[kept:], rows[kept - 1]["step"] if kept else 0)


def _without_evaluation(row: Row) -> Row:
    return {key: value for key, value in row.items() if not key.startswith(EVALUATION)}


def _signature(path: Path) -> Signature:
    """What changes when a file is written or replaced; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
