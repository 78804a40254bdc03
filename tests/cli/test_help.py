"""The pages of `--help`: nothing is cut, options are in groups, the examples are real."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
from typer.main import get_command

from ppo_cli.cli import app

COMMAND: Any = get_command(app.app)
NAMES = list(COMMAND.commands)


def page(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The help of a command, or with an empty name of the program."""
    monkeypatch.setenv("COLUMNS", str(columns))
    with COMMAND.make_context("ppo-cli", ["x"], resilient_parsing=True) as program:
        if not name:
            return str(program.get_help())
        one = COMMAND.commands[name]
        context = one.make_context(name, [], parent=program, resilient_parsing=True)
        return str(context.get_help())


@pytest.mark.parametrize("name", ["", *NAMES])
def test_a_page_fits_and_says_everything(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = (page(name, columns, monkeypatch) for columns in (80, 50))
    for text, columns in ((wide, 80), (narrow, 50)):
        assert max(map(len, text.splitlines())) <= columns
        assert not re.search(r"[│╭]|<(int|str|float|list)|\.\.\.$|\b(INTEGER|FLOAT)\b", text)
    plain = [" ".join(text.replace("\\\n", " ").split()) for text in (wide, narrow)]
    assert plain[0].split("Examples:")[0] == plain[1].split("Examples:")[0]
    for option in COMMAND.commands[name].params if name else ():
        assert " ".join(option.help.split()) in plain[0], option.name
        assert option.metavar or option.is_flag or option.param_type_name == "argument", option.name


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_are_commands(name: str) -> None:
    lines = [line.strip() for line in COMMAND.commands[name].epilog.splitlines()]
    assert 2 <= len(lines) <= 4
    for line in lines:
        program, called, *arguments = shlex.split(line)
        assert (program, called) == ("ppo-cli", name)
        COMMAND.commands[name].make_context(name, arguments)  # raises where one is wrong


def test_an_example_that_is_wider_than_the_page_can_be_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = page("generate", 50, monkeypatch).partition("Examples:\n")[2]
    lines = text.replace("\\\n", " ").splitlines()
    wanted = COMMAND.commands["generate"].epilog.splitlines()
    assert [shlex.split(line) for line in lines] == [shlex.split(line) for line in wanted]
    assert "\\\n" in text


def test_a_default_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        groups = re.split(r"\n  (?=-)", page(name, 80, monkeypatch).split("Examples:")[0])
        assert [group for group in groups if group.count("Default: ") > 1] == []
    text = " ".join(page("compare", 80, monkeypatch).split())
    assert "Number of prompts. Default: 32." in text
    assert "either way. Default: --reference." in text
    assert "Default: table." in text


def test_options_and_commands_are_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    def titles(text: str) -> list[str]:
        return re.findall(r"^([A-Z].*):$", text, re.MULTILINE)

    own = page("", 80, monkeypatch)
    assert titles(own) == ["Train", "Look", "Share", "Set up", "Options"]
    assert re.findall(r"^  ([a-z]+)  ", own, re.MULTILINE) == NAMES
    assert titles(page("compare", 80, monkeypatch)) == [
        *("Arguments", "Prompts", "Sampling", "Scores", "Machine", "Output", "Other", "Examples")
    ]
    assert titles(page("config", 80, monkeypatch)) == ["Arguments", "Options", "Examples"]
