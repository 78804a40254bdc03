"""What a launcher such as torchrun says in the environment about the processes that it started.

Nothing here imports torch: a process has to know whether it may print before it loads anything.
"""

from __future__ import annotations

import os


def count() -> int:
    """Number of processes that were started together; 1 without a launcher."""
    return max(_number("WORLD_SIZE", 1), 1)


def index() -> int:
    """Number of this process, from 0."""
    return _number("RANK", 0) if count() > 1 else 0


def local_index() -> int:
    """Number of this process among those of its machine, which decides its GPU."""
    return _number("LOCAL_RANK", 0) if count() > 1 else 0


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default
