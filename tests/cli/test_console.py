"""Something is said before what takes seconds."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from ppo_cli.cli import console
from ppo_cli.data.embedded import policy_folder

ORDER = """
import os, sys
from ppo_cli.cli import app

class Import:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            sys.stderr.write(f"importing {name}\\n")
            sys.stderr.flush()
            os._exit(0)

sys.meta_path.insert(0, Import())
for line in sys.stdin.read().splitlines():
    if (child := os.fork()) == 0:
        sys.argv = ["ppo-cli", *line.split()]
        app.main()
    os.waitpid(child, 0)
"""


def test_a_line_comes_before_torch_is_imported(tmp_path: Path) -> None:
    """An import of torch ends each of the commands."""
    model = policy_folder()
    commands = [f"generate {model}", f"compare {model} {model}", "train", "train --quiet"]
    done = subprocess.run(
        [sys.executable, "-c", ORDER],
        input="\n".join(commands),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("policy ")]
    said = console.LOADING
    assert [line.split(".")[0] for line in lines] == [
        *(said, "importing torch", said, "importing torch"),
        *(said, "importing torch", "importing torch"),
    ]
    assert done.stdout == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "CI", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(console, "_width", lambda _: 80)
    with console.busy("waiting"):
        assert "waiting" in screen.getvalue()
    assert screen.getvalue().endswith(("\x1b[2K", "\x1b[?25h"))  # a cleared line, a cursor
    monkeypatch.setenv("TERM", "dumb")
    with console.busy("waiting again"):
        pass
    assert screen.getvalue().endswith("waiting again\n")
    before = screen.getvalue()
    with console.busy("unheard", quiet=True):
        pass
    assert screen.getvalue() == before
