"""How a configuration names a Python function, and which file that is."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

FUNCTION = re.compile(r"(?P<file>.+\.py|(?:[^\W\d]\w*\.)*[^\W\d]\w*):(?P<name>[^\W\d]\w*)")


def function_parts(spec: str) -> tuple[str, str]:
    """`FILE.py:FUNCTION` or `package.module:FUNCTION` -> file or module, function.

    Raises:
        ValueError: it is neither.
    """
    if found := FUNCTION.fullmatch(spec):
        return found["file"], found["name"]
    raise ValueError(
        f"'{spec}' names no function: give FILE.py:FUNCTION or package.module:FUNCTION, such as "
        "rewards.py:score"
    )


def is_file(spec: str) -> bool:
    """Whether a function's spec names a file, not a module."""
    return function_parts(spec)[0].endswith(".py")


def function_file(spec: str) -> Path | None:
    """The file of a function's code, found without running any; None where there is none."""
    place, _ = function_parts(spec)
    if is_file(spec):
        path = Path(os.path.expanduser(place))
        return path if path.is_file() else None
    folders: Sequence[str] | None = [os.getcwd(), *sys.path]
    parts, found = place.split("."), None
    for number in range(1, len(parts) + 1):
        found = PathFinder.find_spec(".".join(parts[:number]), folders) if folders else None
        if found is None:
            return None
        folders = found.submodule_search_locations
    return Path(found.origin) if found and found.origin else None
