"""The lock of a run directory: one process at a time writes there."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ppo_cli.errors import UsageError
from ppo_cli.utils.files import write_text, writing
from ppo_cli.utils.inventory import CHECKPOINTS, HOLDER_FILE, LOCK_FILE

if TYPE_CHECKING:
    from filelock import FileLock

PATIENCE = 0.1  # seconds; somebody who asks whether a run is written holds its lock for an instant


class RunLock:
    """A lock of the operating system: when a process dies, its lock is free.

    Args:
        run: the run directory, or that of a sweep.
        folder: where the lock file lies; by default among the run's checkpoints.
    """

    def __init__(self, run: Path, folder: Path | None = None) -> None:
        self._run = run
        self._folder = run / CHECKPOINTS if folder is None else folder
        self._lock: FileLock | None = None

    def acquire(self) -> None:
        """Take the lock until this process ends or calls `release`.

        Raises:
            UsageError: another process has it.
        """
        with writing(self._run):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._acquired(PATIENCE)
            since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            holder = {"pid": os.getpid(), "host": platform.node(), "since": since}
            write_text(self._folder / HOLDER_FILE, json.dumps(holder) + "\n")

    def release(self) -> None:
        """Let other processes write here."""
        if self._lock is not None:
            (self._folder / HOLDER_FILE).unlink(missing_ok=True)
            self._lock.release()
            self._lock = None

    def check(self, patience: float = PATIENCE) -> None:
        """Raise `UsageError` where another process has the lock; change nothing.

        Args:
            patience: seconds to wait for it.
        """
        lock = self._folder / LOCK_FILE
        if self._lock is not None:
            return
        if os.path.isfile(lock) and not os.path.islink(lock) and os.access(lock, os.W_OK):
            self._acquired(patience).release()

    def is_held(self) -> bool:
        """Whether another process writes here. Without its note the lock itself is not tried."""
        if self._lock is not None or not os.path.isfile(self._folder / HOLDER_FILE):
            return False
        try:
            self.check(patience=0)
        except UsageError:
            return True
        return False

    def _acquired(self, patience: float) -> FileLock:
        from filelock import FileLock, Timeout

        lock = FileLock(self._folder / LOCK_FILE)
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            raise UsageError(
                f"{self._run} is in use by {self._holder()}: wait for it or stop it, or choose "
                "another folder with --output"
            ) from None
        return lock

    def _holder(self) -> str:
        """The process that has the lock, as far as its file names it."""
        path = self._folder / HOLDER_FILE
        if not os.path.isfile(path):  # reading a pipe would wait for a writer
            return "another process"
        try:
            holder = json.loads(path.read_text(encoding="utf-8"))
            return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"
