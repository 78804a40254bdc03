"""docs/make_outputs.py: what its markers and pictures name is there, and it replaces a block."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from ppo_cli.cli import app
from ppo_cli.config.loading import load_config

ROOT = Path(__file__).parent.parent


def load_script() -> Any:
    path = ROOT / "docs" / "make_outputs.py"
    spec = importlib.util.spec_from_file_location("make_outputs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()
COMMANDS = {f"train {name}": f"ppo-cli train {options}" for name, options in script.RUNS.items()}
COMMANDS |= script.PICTURES | script.MEASURED
for page in script.PAGES:
    for found in script.MARKER.finditer(page.read_text(encoding="utf-8")):
        COMMANDS[f"{page.name} {found['command']}"] = found["command"]


def steps(command: str) -> list[list[str]]:
    """The words of each command of a line."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|&")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&"):
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def parameters(name: str, arguments: list[str]) -> dict[str, Any]:
    """The values of a command's options and arguments; raises where it has no such option."""
    group: Any = get_command(app.app)
    parsed: dict[str, Any] = group.commands[name].make_context(name, arguments).params
    return parsed


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_makes_an_output_parses_and_reads_a_run_that_is_made(name: str) -> None:
    for program, *arguments in steps(COMMANDS[name]):
        if program != "ppo-cli":
            assert program in {
                "python",
                "screen",
                "cat",
                "grep",
                "sed",
                "cp",
                "make",
                "[",
                "short",
                "fold",
            }
            continue
        values = parameters(*arguments[:1], arguments[1:])  # type: ignore[arg-type]
        read = [*(values.get("models") or ()), *(values.get("runs") or ())]
        if name not in script.MEASURED:
            assert {*read} <= {*script.RUNS, "."}, read
        if arguments[0] == "train":
            load_config(values["config"] or "tiny", assignments=values["assignments"])


def test_what_does_not_parse_is_noticed() -> None:
    with pytest.raises(Exception, match="--sampels"):
        parameters("compare", ["ppo-good", "--sampels", "3"])


@pytest.mark.parametrize("name", script.RUNS)
def test_a_page_says_how_a_run_was_made(name: str) -> None:
    texts = [" ".join(page.read_text().replace("\\\n", " ").split()) for page in script.PAGES]
    assert any(f"ppo-cli train {script.RUNS[name]}" in text for text in texts)


def test_every_picture_has_its_command_and_every_output_a_block() -> None:
    pictures = {path.name for path in (ROOT / "docs").glob("*.[ps][nv]g")}
    assert pictures == {*script.PICTURES, *script.MEASURED}
    for page in script.PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(script.MARKER.findall(text)) == len(re.findall("^<!-- output:", text, re.M))
        if script.PYTHON in text:
            assert text.count(script.PYTHON) == script.program(text).count(repr(script.END))


def test_blocks_hold_what_the_commands_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    frames = "\x1b[2Kstep 1/9\n\x1b[1mkl 2  \x1b[0m\r\n\x1b[1A\x1b[2Kstep 2/9\nkl 3\n"
    (tmp_path / "run.screen").write_text(frames)
    (tmp_path / "page.py").write_text(script.program("```python\nprint('new')\n```\n" + MARKED))
    page = f"# Title\n\n{block('screen run 1')}\n{MARKED}\n{block('echo $COLUMNS | sed s/8/9/')}"
    made = script.with_outputs(page, "page.md")
    shown = re.findall(r"```text\n(.*?)\n```", made, re.DOTALL)
    assert shown == ["step 1/9\nkl 2", "new", "90"]
    assert script.with_outputs(made, "page.md") == made
    assert script.MARKER.sub("", made) == script.MARKER.sub("", page)
    with pytest.raises(SystemExit, match="ended with 3"):
        script.run("exit 3")


def block(command: str) -> str:
    return f"<!-- output: {command} -->\n```text\nold\n```\n"


MARKED = block("python")
