"""Memory of this process and of its device: used, available, and its peak while a block runs."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

POLL = 0.002  # seconds between two readings
CGROUP = Path("/sys/fs/cgroup")  # of a container, version 2


def used(device: torch.device) -> int:
    """Bytes of a GPU that torch has allocated; for any other device, this process's memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def available(device: torch.device) -> int:
    """Bytes that this process can have in all, those that it has now included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    free = psutil.virtual_memory().available
    if (limit := _number(CGROUP / "memory.max")) is not None:
        free = min(free, max(limit - (_number(CGROUP / "memory.current") or 0), 0))
    return free + used(device)


def peak_so_far(device: torch.device) -> int:
    """The most bytes that `used` would have given since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return used(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class MemoryWatch:
    """Reads `used` every few milliseconds while its block runs.

    Args:
        device: whose memory.

    Attributes:
        readings: time (`time.perf_counter`) and bytes of each reading.
    """

    def __init__(self, device: torch.device) -> None:
        self.readings: list[tuple[float, int]] = []
        self._device = device
        self._exact = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Read until the block ends."""
        ended = threading.Event()
        reader = threading.Thread(target=self._read, args=(ended,), daemon=True)
        self._take()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        reader.start()
        try:
            yield
        finally:
            ended.set()
            reader.join()
            self._take()
            if self._device.type == "cuda":
                self._exact = torch.cuda.max_memory_allocated(self._device)

    @property
    def peak(self) -> int:
        """Bytes in use at most while the block ran; on a GPU the allocator knows them exactly."""
        return max(self._exact, *(size for _, size in self.readings))

    def peaks_around(self, moment: float) -> tuple[int, int]:
        """Bytes in use at most before a moment, and after it; the larger one is `peak`."""
        before = max(size for when, size in self.readings if when <= moment)
        after = max(size for when, size in self.readings if when > moment)
        return (self.peak, after) if before > after else (before, self.peak)

    def _read(self, ended: threading.Event) -> None:
        while not ended.wait(POLL):
            self._take()

    def _take(self) -> None:
        self.readings.append((time.perf_counter(), used(self._device)))


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, as for `max`."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
