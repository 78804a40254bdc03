"""The commands that the documents and the program's own messages give, as any shell takes them.

zsh, for one, looks for files wherever an unquoted word holds a bracket, an asterisk or the like,
and refuses the command where there is none; typed in, it takes `#` for a word.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from ppo_cli.cli import app
from tests.test_structure import modules

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
SPECIAL = set("[]*?{}()<>^~#;&|!$`")
SYNTAX = {"&&", "||", ">", "|"}


def commands_of(text: str) -> list[str]:
    """Commands in the fenced blocks without a language or of a shell, and in sentences."""
    blocks = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines = [line.removeprefix("$ ") for line in lines]
    inline = re.findall(r"`((?:ppo-cli|--set) [^`]+)`", text.replace("\n", " "))
    starts = ("ppo-cli ", "make ", "pip ", "--set ")
    return [line for line in (*lines, *inline) if line.startswith(starts)]


def bare_words(command: str) -> list[str]:
    """The words of a command as they are written, quotes and all."""
    lexer = shlex.shlex(command, posix=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    return [re.sub(r"'[^']*'|\"[^\"$`!]*\"", "", word) for word in lexer]


def shell_faults(command: str) -> list[str]:
    words = bare_words(command)
    return [word for word in words if word not in SYNTAX and SPECIAL & set(word)]


def test_the_oracle_finds_what_a_shell_would_expand() -> None:
    assert shell_faults("ppo-cli train --set run.best_of_n=[1,2]")
    assert shell_faults("ppo-cli plot ppo-good # draws it")
    assert not shell_faults("ppo-cli train --set 'run.best_of_n=[1,2]' --steps 3 > out.json")


def test_commands_of_the_documents_are_the_same_in_every_shell() -> None:
    commands = [line for page in PAGES for line in commands_of(page.read_text(encoding="utf-8"))]
    assert len(commands) > 20
    assert {command: shell_faults(command) for command in commands if shell_faults(command)} == {}


def texts_of_the_program() -> list[str]:
    """Every text in the source, with `X` for what is put in."""
    found = []
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [n.value if isinstance(n, ast.Constant) else "X" for n in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_advice_of_the_program_is_the_same_in_every_shell() -> None:
    texts = texts_of_the_program()
    found = [word for text in texts for word in re.findall(r"--set ('[^']*'|[\w.]+=\S+)", text)]
    advised = [word.rstrip("`,;:") for word in found]
    assert any("best_of_n" in word for word in advised)
    assert [word for word in advised if shell_faults(word)] == []
    command = get_command(app.app)
    helps = [
        option.help or ""
        for name in command.commands  # type: ignore[attr-defined]
        for option in command.commands[name].params  # type: ignore[attr-defined]
        if hasattr(option, "help")
    ]
    assert len(helps) > 40
    assert not [text for text in helps if re.search(r"--set [\w.]+=\S*[\[{*?]", text)]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_itself_finds_nothing_to_expand() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for command in commands_of(text):
        words = " ".join(f"{word!s}" for word in command.split(">")[0].split("||")[:1])
        done = subprocess.run(["zsh", "-fc", f"print -r -- {words}"], capture_output=True)
        assert done.returncode == 0, done.stderr
