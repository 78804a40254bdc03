"""Output of the commands: results to standard output, all else to standard error."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.measure import Measurement

from ppo_cli.errors import UsageError
from ppo_cli.utils.files import is_same_place, refuse_special, write_text
from ppo_cli.utils.inventory import refuse_owned
from ppo_cli.utils.text import escape_controls, json_text

LOADING = "loading torch and transformers"  # what a command with a model does first
TABLE_WIDTH = 80  # least width of tables, in columns; a narrower screen wraps their lines


def is_plain(stream: TextIO) -> bool:
    """Whether to write plain lines: no terminal or a dumb one, or NO_COLOR or CI set."""
    asked = os.environ.get("NO_COLOR") or os.environ.get("CI")
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return not stream.isatty() or dumb or bool(asked)


def console(*, stderr: bool) -> Console:
    """A console on one of the streams; without a terminal: 80 columns, no control codes."""
    stream = sys.stderr if stderr else sys.stdout
    plain = is_plain(stream)
    return Console(
        file=stream,
        width=_width(stream),
        no_color=plain or None,
        force_terminal=False if plain else None,
        force_jupyter=False,
        color_system=None if plain else "auto",
        highlight=False,
        emoji=False,
        markup=False,
    )


def _width(stream: TextIO) -> int | None:
    """COLUMNS, at most the width of the terminal; None to follow the terminal's width."""
    asked = os.environ.get("COLUMNS")
    if not stream.isatty():
        return int(asked or 80)
    if asked is None:
        return None
    try:
        there = os.get_terminal_size(stream.fileno()).columns
    except OSError:  # the terminal was closed
        there = 0
    return min(int(asked), there or 80)


def note(*lines: str) -> None:
    """Print lines on standard error."""
    target = console(stderr=True)
    for line in lines:
        target.print(escape_controls(line), soft_wrap=True)


@contextmanager
def busy(what: str = LOADING, *, quiet: bool = False) -> Iterator[None]:
    """Say what will take seconds: a spinner, which goes away; a line where there is no terminal."""
    if quiet:
        yield
    elif is_plain(sys.stderr):
        note(what)
        yield
    else:
        from rich.live import Live
        from rich.spinner import Spinner

        with Live(Spinner("dots", what), console=console(stderr=True), transient=True) as live:
            live.refresh()  # now: what follows may not let another thread draw it
            yield


def hush() -> None:
    """Hide the progress bars of transformers; those of downloads from the hub stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def write_result(text: str, output: str | None) -> None:
    """Write a result to standard output, or to a file, which is written whole or not at all."""
    if output is None:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()  # a full disk is an error here, not at the end of the process
        return
    check_output(output)
    write_text(Path(output), text if text.endswith("\n") else text + "\n")
    note(f"wrote {output}")


def check_output(
    output: str | None, inputs: Iterable[str | None] = (), allowed: Collection[Path] = ()
) -> None:
    """Raise `UsageError` where a file cannot be written; called before the work begins.

    Args:
        output: the file; None for standard output.
        inputs: names of what is read; no file among them may be replaced.
        allowed: files of runs that may be replaced nevertheless.
    """
    if output is None:
        return
    path = Path(output)
    refuse_special(path)
    if path.is_dir():
        raise UsageError(f"{output} is a folder: give a file")
    if not path.parent.is_dir():
        raise UsageError(f"{output}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{output}: the folder {path.parent} cannot be written to")
    refuse_owned(path, filter(None, inputs), allowed)


def check_outputs(outputs: Mapping[str, str | None], inputs: Iterable[str | None]) -> None:
    """`check_output` of several files, by option; no two options may name one file."""
    given = {option: output for option, output in outputs.items() if output is not None}
    for option, output in given.items():
        check_output(output, [*inputs])
        for other, earlier in given.items():
            if other != option and is_same_place(Path(earlier), Path(output)):
                raise UsageError(f"{other} {earlier} and {option} {output} are one file: give two")


def write_json(*values: Any, output: str | None = None, indent: int | None = None) -> None:
    """Write each value as a JSON document; ASCII only where standard output is."""
    ascii_only = output is None and console(stderr=False).options.ascii_only
    texts = [json_text(value, indent=indent, ensure_ascii=ascii_only) for value in values]
    write_result("\n".join(texts), output)


def print_tables(tables: Sequence[RenderableType], output: str | None = None) -> None:
    """Write tables to standard output, or as plain text to a file."""
    target = console(stderr=False)
    target.width = max(target.width, min(TABLE_WIDTH, _least_width(target, tables)))
    if output is None and target.is_terminal:
        for table in tables:
            target.print(table)
        return
    if output is not None:  # files are UTF-8, whatever standard output is
        target = Console(file=io.StringIO(), width=target.width, color_system=None, markup=False)
    with target.capture() as written:
        for table in tables:
            target.print(table)
    lines = [line.rstrip() for line in written.get().splitlines()]
    write_result("\n".join(lines).strip("\n"), output)


def _least_width(target: Console, tables: Sequence[RenderableType]) -> int:
    """Least width in columns at which no word and no number of a table is cut."""
    unlimited = target.options.update(width=10_000)
    return max(Measurement.get(target, unlimited, table).minimum for table in tables)
