"""Where the command line writes: results to standard output, all else to standard error."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from ppo_cli.errors import UsageError


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
    console(stderr=True).print(message, soft_wrap=True)


def write_result(text: str, output: str | None) -> None:
    """A result as text: to standard output, or to a file, whole or not at all."""
    if output is None:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        return
    path = Path(output)
    check_output(output)
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")
    unfinished.replace(path)
    note(f"wrote {output}")


def check_output(output: str | None) -> None:
    """Raise `UsageError` where a file cannot be written; called before the work begins."""
    if output is None:
        return
    path = Path(output)
    if path.is_dir():
        raise UsageError(f"{output} is a folder: give a file")
    if not path.parent.is_dir():
        raise UsageError(f"{output}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"{output}: the folder {path.parent} cannot be written to")


def print_tables(tables: list[Any], output: str | None) -> None:
    """Tables to standard output, or as plain text to a file."""
    if output is None:
        out = console(stderr=False)
        for table in tables:
            out.print(table)
        return
    import io

    buffer = io.StringIO()
    plain = Console(file=buffer, width=100, force_terminal=False, color_system=None, markup=False)
    for table in tables:
        plain.print(table)
    write_result("\n".join(line.rstrip() for line in buffer.getvalue().splitlines()), output)
