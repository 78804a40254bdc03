"""Writes files whole or not at all, with the mode of the user's umask; checks paths."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

from ppo_cli.errors import UsageError


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, replacing it in one step."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; without an error that file then replaces `path`."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.unlink(missing_ok=True)  # which could be a link
    try:
        with writing(path):
            yield unfinished
            sync(unfinished)
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Around writing to `place`: errors of the operating system name it.

    Raises:
        OSError: with `place` as its file name. An error of safetensors becomes one, too, where its
            text contains the number of a system error.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(place)) from error
    except SafetensorError as error:
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(place)) from error


def is_inside(name: str) -> bool:
    """Whether a path in a file is relative and stays in the file's folder, on any system."""
    kinds = (PurePosixPath(name), PureWindowsPath(name))
    return (
        bool(name.strip())
        and "\0" not in name
        and not any(path.anchor or ".." in path.parts for path in kinds)
    )


def is_same_place(a: Path, b: Path) -> bool:
    """Whether two paths lead to one file or folder, also through links or in other case."""
    try:
        return os.path.samefile(a, b)
    except OSError:  # one of them does not exist
        return os.path.realpath(a) == os.path.realpath(b)


def contains(folder: Path, path: Path) -> bool:
    """Whether `path`, links followed, is `folder` or lies in it."""
    real = Path(os.path.realpath(path))
    return any(is_same_place(folder, place) for place in (real, *real.parents))


def refuse_stream(path: Path) -> None:
    """Raise `UsageError` if `path`, links followed, exists but is neither file nor folder.

    Reading a pipe waits for a writer; reading some devices never ends.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise UsageError(
            f"{path} is a device, pipe or socket and is not read: put a file in its place"
        )


def refuse_special(path: Path) -> None:
    """Raise `UsageError` if `path`, which is to be written, is a link, device, pipe or socket.

    Writing through a link would write outside of the folder that the user named.
    """
    if os.path.islink(path):
        raise UsageError(f"{path} is a link and is not written to: give the place itself")
    if os.path.exists(path) and not (path.is_file() or path.is_dir()):
        raise UsageError(
            f"{path} is a device, pipe or socket, not a file: give the name of a file (results go "
            "to standard output where no name is given)"
        )


def settle(folder: Path) -> None:
    """Give every file in `folder`, at any depth, the mode of a new file, and flush it to the disk.

    safetensors writes files that only their owner can read.
    """
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)
        sync(file)
    sync(folder)


def sync(path: Path) -> None:
    """Flush a file, or the list of files of a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
