"""Handlers of signals that are in place for a while."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
"""What ends a command; Windows has no SIGHUP."""


@contextmanager
def handling(
    handler: Callable[[int, FrameType | None], Any],
    numbers: Collection[int] = STOPS,
    always: Collection[int] = (signal.SIGINT,),
) -> Iterator[None]:
    """Have a handler take signals in the block.

    Signals that are ignored stay so, as SIGHUP is under `nohup`, but for those of `always`: a
    script's job in the background ignores SIGINT. In a thread nothing changes: only the main one
    may handle signals.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = {
        number: signal.signal(number, handler)
        for number in numbers
        if is_main and (number in always or signal.getsignal(number) is not signal.SIG_IGN)
    }
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
