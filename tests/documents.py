"""The fenced blocks of the documents, and the commands in them."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = sorted({ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")})
FENCE = re.compile(r"^( *)(```+)([\w-]*)[^\n]*\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
SHELL = ("", "sh", "bash", "console", "shell")
PROGRAMS = ("ppo-cli", "make", "pip")
STOPS = {">", ">>", "<", "|", "||", "&&", ";", "2>"}


class Block(NamedTuple):
    """A fenced block: where it stands, its language, its text without indentation."""

    page: Path
    line: int
    language: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    """A command of a document: where it stands, its line, and whether one could type it so."""

    place: str
    line: str
    is_whole: bool = True

    @property
    def program(self) -> str:
        return self.words[0]

    @property
    def words(self) -> list[str]:
        """The program and its arguments, without what the shell itself reads."""
        words = shlex.split(self.line, comments=True)
        if "ppo_cli" in words:  # python -m ppo_cli, torchrun -m ppo_cli
            words = ["ppo-cli", *words[words.index("ppo_cli") + 1 :]]
        elif "ppo-cli" in words:
            words = words[words.index("ppo-cli") :]
        ends = [place for place, word in enumerate(words) if word in STOPS]
        return words[: ends[0]] if ends else words


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start()) + 2
        yield Block(page, line, found[3], textwrap.dedent(found[4]))


def commands(page: Path) -> Iterator[Command]:
    """The commands of a page: lines of its shell blocks, and code in its sentences.

    Of a block with prompts these are the lines behind one; the others are output.
    """
    for block in blocks(page):
        lines = re.sub(r"\\\n\s*", " ", block.code).splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        elif block.language not in SHELL:
            lines = [line.strip() for line in lines if "-m ppo_cli " in line]
        for line in lines:
            if line.startswith(PROGRAMS) or "-m ppo_cli " in line:
                yield Command(block.place, line)
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    for line in re.findall(r"`(ppo-cli [a-z][^`]*)`", " ".join(prose.split())):
        yield Command(str(page.relative_to(ROOT)), line, is_whole=False)
