"""Writing files: each is there whole or not at all, with the mode that the user's umask says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ppo_cli.errors import UsageError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write: it takes its name when the block ends, or goes if it fails."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.unlink(missing_ok=True)  # it may be a link to somewhere else
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def refuse_special(path: Path) -> None:
    """Raise `UsageError` if `path` is a link, or neither file nor folder: nothing is written there.

    Following a link would write outside of the folder that was named.
    """
    if os.path.islink(path):
        raise UsageError(f"{path} is a link and is not written to: give the place itself")
    if os.path.exists(path) and not (path.is_file() or path.is_dir()):
        raise UsageError(
            f"{path} is a device, pipe or socket, not a file: give the name of a file (results go "
            "to standard output where no name is given)"
        )


def settle(folder: Path) -> None:
    """Give every file in `folder` the mode of a new file, and put it on the disk.

    safetensors makes files that only their owner can read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(0o666 & ~umask)
        sync(file)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
