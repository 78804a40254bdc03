"""Standard streams that keep working when their reader exits, or when they are closed or full."""

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

MIN_COLUMNS = 20  # of tables and charts
ESCAPES = "ppo_cli.escapes"  # the error handler of both streams
IN_ASCII = {"⏎": r"\n", "…": "..."}  # for characters that this program adds to text


def settle() -> None:
    """Make this process's streams robust, and its screen size valid; call it once, at the start.

    A failing standard error must not end the work: its output is dropped. A reader of the results
    may exit early, as in `ppo-cli generate ... | head`. Any other fault of standard output is
    raised once, as an `OSError` that names it.
    """
    codecs.register_error(ESCAPES, _escaped)
    # Python has None for a closed stream. In this order the null device takes the streams'
    # descriptors. Otherwise a checkpoint could take one, and a C library would write into it.
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = _lasting(sys.stdout, needed=True)
    sys.stderr = _lasting(sys.stderr, needed=False)
    for size in ("COLUMNS", "LINES"):
        _settle_size(size)
    # A notebook's `!command` runs at a terminal, and the cell keeps all that is ever drawn there.
    # Its kernel names its backend for matplotlib to what it starts.
    if "backend_inline" in os.environ.get("MPLBACKEND", ""):
        os.environ.setdefault("NO_COLOR", "1")


def silence() -> None:
    """Drop what this process prints: another process of the run tells the same."""
    sys.stdout, sys.stderr = (open(os.devnull, "w", encoding="utf-8") for _ in range(2))  # noqa: SIM115


def say_at_once(message: str) -> None:
    """Write a line on standard error from a signal handler, past Python's buffers."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{message}\n".encode())


def has_reader(stream: TextIO) -> bool:
    """Whether somebody may still read a stream: no pipe whose reader has exited."""
    sink = getattr(getattr(stream, "buffer", None), "raw", None)
    if isinstance(sink, _Sink) and sink.is_left:
        return False
    try:
        watch = select.poll()
        watch.register(stream.fileno(), 0)
        return not any(event & select.POLLERR for _, event in watch.poll(0))
    except (AttributeError, OSError, ValueError):  # Windows, a stream without a descriptor
        return True


class _Sink(io.RawIOBase):
    """Writes to a stream's descriptor until that fails for good."""

    def __init__(self, stream: TextIO, raw: io.RawIOBase, needed: bool) -> None:
        self._stream = stream  # kept alive: its destructor would close the descriptor
        self._raw = raw
        self._needed = needed
        self.name = "standard output" if needed else "standard error"
        self.is_left = False  # by its reader

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()

    def write(self, data: Any) -> int:
        try:
            # None: another process made the descriptor non-blocking.
            while (written := self._raw.write(data)) is None:
                select.select([], [self.fileno()], [])
            return written
        except OSError as error:
            left = self.is_left = self._reader_has_left(error)
            if left or self._needed:  # for the rest of the buffer
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if left or not self._needed:
                return len(data)
            raise OSError(error.errno, error.strerror, self.name) from error

    def _reader_has_left(self, error: OSError) -> bool:
        if error.errno in (errno.EIO, errno.ENXIO):  # a closed terminal; for a file: a bad disk
            return stat.S_ISCHR(os.fstat(self.fileno()).st_mode)
        return isinstance(error, ConnectionError)


def _lasting(stream: TextIO | None, *, needed: bool) -> TextIO:
    """`stream` over a `_Sink`; characters that its encoding lacks become escapes."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8", errors=ESCAPES)
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = getattr(stream.buffer, "raw", stream.buffer)  # `python -u` has no buffer layer
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
    """Error handler for `codecs.register_error`: characters that the encoding lacks -> escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    escapes = (IN_ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking)
    return "".join(escapes), error.end


def _settle_size(name: str) -> None:
    """Make COLUMNS or LINES in the environment valid, as every library reads them, or unset it."""
    claimed = os.environ.pop(name, "")
    if claimed.isdecimal() and len(claimed) <= 4 and int(claimed):
        least = MIN_COLUMNS if name == "COLUMNS" else 1
        os.environ[name] = str(max(int(claimed), least))
