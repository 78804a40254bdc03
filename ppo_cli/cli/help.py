"""The pages of `--help`: options in groups, short metavars, each default once, examples at the end.

Typer's own pages are either one list of options, or boxes; neither fits 50 columns.
"""

from __future__ import annotations

import inspect
import shlex
import textwrap
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ppo_cli.cli.options import OUTPUT

Entries = list[tuple[str, str]]  # names and descriptions
EXAMPLES = "Examples:"
OTHER = "Other"  # the group of options that name none
NARROW = 64  # columns below which a description stands under its option
WIDEST = 24  # columns of an option that has its description beside it


class Command(TyperCommand):
    """A command whose help groups its options by their `rich_help_panel`."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """`[OPTIONS]`, then the arguments."""
        return [str(self.options_metavar), *map(_metavar, _arguments(self))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then each group of options."""
        _write_groups(formatter, _parameters(self, ctx))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples."""
        if self.epilog:
            with formatter.section(EXAMPLES.rstrip(":")):
                for line in self.epilog.splitlines():
                    formatter.write(_command_line(line.strip(), formatter.width - 2))


class Group(TyperGroup):
    """The program's help: the commands by their groups, then its own options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, then the options."""
        groups: dict[str, Entries] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            groups.setdefault(command.rich_help_panel, []).append((name, command.help))
        _write_groups(formatter, groups | _parameters(self, ctx))

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Say where more is."""
        formatter.write_paragraph()
        formatter.write_text("'ppo-cli COMMAND --help' has a command's options, and examples.")


def register(app: typer.Typer, command: Callable[..., Any], group: str) -> None:
    """Make a function a command; its docstring is the help, with `Examples:` at the end."""
    text, _, examples = (inspect.getdoc(command) or "").partition(f"\n\n{EXAMPLES}\n")
    app.command(cls=Command, help=text, epilog=examples or None, rich_help_panel=group)(command)


def _arguments(command: Any) -> list[Any]:
    return [p for p in command.params if p.param_type_name == "argument"]


def _metavar(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _parameters(command: Any, ctx: Any) -> dict[str, Entries]:
    """Names and descriptions of the parameters by group, the arguments first."""
    groups: dict[str, Entries] = {}
    if arguments := _arguments(command):
        groups["Arguments"] = [(_metavar(item).strip("[]"), item.help or "") for item in arguments]
    options = [item for item in command.get_params(ctx) if item.param_type_name == "option"]
    has_groups = any(_group(option) for option in options)
    for option in sorted(options, key=_rank):
        title = _group(option) or (OTHER if has_groups else "Options")
        groups.setdefault(title, []).append((_names(option), _about(option)))
    return groups


def _group(option: Any) -> str | None:
    return getattr(option, "rich_help_panel", None)


def _rank(option: Any) -> int:
    """The group of the output stands behind the others, and options without a group last."""
    return 2 if _group(option) is None else int(_group(option) == OUTPUT)


def _names(option: Any) -> str:
    """`-n, --num-samples N` or `--chat/--no-chat`."""
    names = "/".join([", ".join(sorted(option.opts, key=len)), *option.secondary_opts])
    return names if option.is_flag else f"{names} {option.metavar or 'VALUE'}"


def _about(option: Any) -> str:
    """The description, with the default if there is one and the text does not name it."""
    text, default = str(option.help or ""), option.default
    if isinstance(default, bool):
        default = next(iter(option.opts if default else option.secondary_opts), None)
    elif isinstance(default, Enum):
        default = default.value
    if not isinstance(default, str | int | float) or "Default: " in text:
        return text
    return f"{text} Default: {default}."


def _write_groups(formatter: Any, groups: Mapping[str, Entries]) -> None:
    """Write each group below its title; on a wide page all descriptions begin in one column."""
    names = [len(name) for entries in groups.values() for name, _ in entries]
    column = max((width for width in names if width <= WIDEST), default=0) + 4
    is_narrow = formatter.width < NARROW
    if is_narrow:
        column = 6
    for title, entries in groups.items():
        with formatter.section(title):
            for name, text in entries:
                lines = textwrap.wrap(text, formatter.width - column, break_on_hyphens=False)
                shown = f"  {name}"
                if lines and not is_narrow and len(shown) <= column - 2:
                    shown = shown.ljust(column) + lines.pop(0)
                formatter.write("\n".join([shown, *(" " * column + line for line in lines)]) + "\n")


def _command_line(line: str, width: int) -> str:
    """A command, continued with backslashes where it is wider than the page."""
    lines = [""]
    for part in _parts(line):
        if lines[-1] and len(lines[-1]) + 1 + len(part) > width - len(" \\"):
            lines.append("   ")
        lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n".join(f"  {line}" for line in lines) + "\n"


def _parts(line: str) -> list[str]:
    """The words of a command as they are written; an option and its value are one."""
    lexer = shlex.shlex(line, posix=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    parts: list[str] = []
    for word in lexer:
        if parts and parts[-1].startswith("-") and not word.startswith("-"):
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    return parts
