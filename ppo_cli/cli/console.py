"""Where the command line writes: results to standard output, all else to standard error."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console, RenderableType

from ppo_cli.errors import UsageError
from ppo_cli.files import is_same_place, refuse_special, write_text
from ppo_cli.inventory import refuse_owned
from ppo_cli.text import escape_controls


def is_plain() -> bool:
    """Whether to write plain lines: no terminal, or NO_COLOR or CI set."""
    return not sys.stderr.isatty() or bool(os.environ.get("NO_COLOR") or os.environ.get("CI"))


def console(*, stderr: bool) -> Console:
    """A console on one of the streams; without a terminal 80 columns wide and free of codes."""
    stream = sys.stderr if stderr else sys.stdout
    plain = not stream.isatty() or bool(os.environ.get("NO_COLOR") or os.environ.get("CI"))
    width = None if stream.isatty() else int(os.environ.get("COLUMNS") or 80)
    return Console(
        file=stream,
        width=width,
        no_color=plain or None,
        force_terminal=False if plain else None,
        color_system=None if plain else "auto",
        highlight=False,
        emoji=False,
        markup=False,
    )


def note(message: str) -> None:
    """A line for people, on standard error."""
    console(stderr=True).print(escape_controls(message), soft_wrap=True)


def hush() -> None:
    """No progress bars of transformers for what takes a moment; the hub's downloads keep theirs."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def write_result(text: str, output: str | None) -> None:
    """A result as text: to standard output, or to a file, whole or not at all."""
    if output is None:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
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
        inputs: what is read, files, folders and other names: no file of them is replaced.
        allowed: files of runs that may be replaced all the same.
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
    """`check_output` of several, option -> file, which must not be one and the same either."""
    given = {option: output for option, output in outputs.items() if output is not None}
    for option, output in given.items():
        check_output(output, [*inputs])
        for other, earlier in given.items():
            if other != option and is_same_place(Path(earlier), Path(output)):
                raise UsageError(f"{other} {earlier} and {option} {output} are one file: give two")


def print_tables(tables: Sequence[RenderableType], output: str | None = None) -> None:
    """Tables to standard output, or as plain text to a file."""
    target = console(stderr=False)
    if output is None and target.is_terminal:
        for table in tables:
            target.print(table)
        return
    buffer = io.StringIO()
    plain = Console(
        file=buffer,
        width=target.width,
        color_system=None,
        highlight=False,
        emoji=False,
        markup=False,
    )
    for table in tables:
        plain.print(table)
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    write_result("\n".join(lines).strip("\n"), output)
