"""Standard streams that last: whoever reads them may leave, they may be closed or full."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import stat
import sys
from typing import Any, TextIO

NARROWEST = 20  # columns, the least that tables and charts are laid out for
ESCAPES = "ppo_cli.escapes"  # the error handler of both streams
IN_ASCII = {"⏎": r"\n"}  # signs that this program puts into text


def settle() -> None:
    """Give this process streams that work, and a width that is one; called once, at the start.

    Progress and notes end no work: what standard error does not take is dropped. Results may be
    read in part, as in `ppo-cli generate ... | head`; any other fault of standard output is raised
    once, as an `OSError` that names it.
    """
    codecs.register_error(ESCAPES, _escaped)
    # Python has None for what is closed. In this order the null device takes the streams' numbers.
    # Otherwise a checkpoint would, and with it what a library in C says on standard error.
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = _lasting(sys.stdout, needed=True)
    sys.stderr = _lasting(sys.stderr, needed=False)
    for size in ("COLUMNS", "LINES"):
        _settle_size(size)


def say_at_once(message: str) -> None:
    """A line on standard error, from a signal handler: past Python's buffers, which may be busy."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{message}\n".encode())


class _Sink(io.RawIOBase):
    """Writes to a stream's descriptor as long as that takes anything."""

    def __init__(self, stream: TextIO, raw: io.RawIOBase, needed: bool) -> None:
        self._stream = stream  # which would close the descriptor if it were not needed any more
        self._raw = raw
        self._needed = needed
        self.name = "standard output" if needed else "standard error"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()

    def write(self, data: Any) -> int:
        try:
            # None where another process has made the descriptor one that does not block.
            while (written := self._raw.write(data)) is None:
                select.select([], [self.fileno()], [])
            return written
        except OSError as error:
            left = self._reader_has_left(error)
            if left or self._needed:  # what else is buffered has nowhere to go either
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if left or not self._needed:
                return len(data)
            raise OSError(error.errno, error.strerror, self.name) from error

    def _reader_has_left(self, error: OSError) -> bool:
        if error.errno in (errno.EIO, errno.ENXIO):  # of a terminal; of a file it is a bad disk
            return stat.S_ISCHR(os.fstat(self.fileno()).st_mode)
        return isinstance(error, ConnectionError)


def _lasting(stream: TextIO | None, *, needed: bool) -> TextIO:
    """`stream` over a `_Sink`; what its encoding lacks becomes an escape."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8", errors=ESCAPES)
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = getattr(stream.buffer, "raw", stream.buffer)  # Python without buffers has but one layer
    if isinstance(raw, _Sink):
        return stream
    if not isinstance(raw, io.RawIOBase):
        stream.reconfigure(errors=ESCAPES)
        return stream
    return io.TextIOWrapper(
        io.BufferedWriter(_Sink(stream, raw, needed)),
        encoding=stream.encoding,
        errors=ESCAPES,
        line_buffering=stream.line_buffering or stream.write_through,
    )


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """What a stream's encoding lacks, as `codecs.register_error` wants it."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    escapes = (IN_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking)
    return "".join(escapes), error.end


def _settle_size(name: str) -> None:
    """Leave a size that the environment claims where it can be one, for every library to read."""
    claimed = os.environ.pop(name, "")
    if claimed.isdecimal() and len(claimed) <= 4 and int(claimed):
        least = NARROWEST if name == "COLUMNS" else 1
        os.environ[name] = str(max(int(claimed), least))
