"""Completion, asked for as each shell asks, through the command's own entry point."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from ppo_cli.cli import app
from ppo_cli.cli.completion import VARIABLE
from ppo_cli.config.loading import shipped_configs

Ask = Callable[..., list[str]]
SHELLS = ["bash", "zsh", "fish"]
COMMAND: Any = get_command(app.app)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run, a model, a folder with a run in it, and files."""
    for name in ("ppo-good", "more/ppo deep"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.yaml").touch()
    lines = [
        'cut off"}',
        '{"step": 1, "own/metric": 1.0}',
        '{"step": 2, "eval/kl": 1.0, "a\\u001b": 1}',
    ]
    (tmp_path / "ppo-good" / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "run.yaml").touch()
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """The values that a shell is told for a line that ends at the cursor; nothing else is said."""
    monkeypatch.setattr(app.typer.main, "get_command", lambda _: COMMAND)
    monkeypatch.setenv("COLUMNS", "80")  # which an answer changes

    def asked(line: str, shell: str = "bash") -> list[str]:
        monkeypatch.setenv(VARIABLE, f"complete_{shell}")
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        words = re.findall(r"[^\s=:]+|[=:]+|\s+$", line)  # as bash cuts it
        monkeypatch.setenv("COMP_WORDS", " ".join(word.strip() for word in words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        assert app._run() == 0
        out, err = capsys.readouterr()
        assert err == ""
        if shell == "zsh":
            return [
                value.replace("\\\\:", ":")
                for value in re.findall(r'(?:^|\(\()"([^"]*)"', out, re.M)
            ]
        return [text.partition("\t")[0] for text in out.splitlines()]

    return asked


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_is_told_the_same(ask: Ask, here: Path, shell: str) -> None:
    assert ask("ppo-cli tr", shell) == ["train"]
    assert ask("ppo-cli stats --expl", shell) == ["--explain"]
    assert ask("ppo-cli plot ppo-", shell) == ["ppo-good"]
    value = ["ppo.kl_in_loss=true", "ppo.kl_in_loss=false"]
    if shell == "bash":  # which cuts the word, and replaces what is behind the sign
        value = ["true", "false"]
    assert ask("ppo-cli train --set ppo.kl_in_loss=", shell) == value


def test_values_of_options(ask: Ask, here: Path) -> None:
    shipped = [*shipped_configs()]
    assert ask("ppo-cli train --config ") == [*shipped, "mine.yaml", "ppo-good", "model/", "more/"]
    assert ask("ppo-cli sweep ")[:2] == ["kl-and-learning-rate", "mine.yaml"]
    assert ask("ppo-cli sweep x.yaml --set run.weights=l") == ["last"]
    assert ask("ppo-cli config ti") == ask("ppo-cli init --from ti") == ["tiny"]
    assert ask("ppo-cli train --sentiment p") == ["positive"]
    assert ask("ppo-cli generate model --device c")[:2] == ["cpu", "cuda"]
    assert ask("ppo-cli train --track wandb,wa") == []
    assert ask("ppo-cli train --track aim,wa") == ["aim,wandb"]
    assert "none" in ask("ppo-cli train --track ")
    assert ask("ppo-cli compare model --format m") == ["markdown"]
    assert ask("ppo-cli stats --explain objective/kl_") == [
        "objective/kl_dist",
        "objective/kl_coef",
    ]
    assert ask("ppo-cli stats --explain al") == ["all"]
    assert ask("ppo-cli compare model --classifier e") == ["embedded"]


def test_keys_of_the_configuration_and_their_values(ask: Ask) -> None:
    found = ask("ppo-cli train --set ")
    assert {"ppo.init_kl_coef=", "policy.adapter.r=", "run.weights="} <= {*found}
    assert len(found) > 90
    assert ask("ppo-cli train --set run.wei") == [f"run.weights={x}" for x in ("", "best", "last")]
    assert ask("ppo-cli train --set run.weights=l") == ["last"]
    assert ask("ppo-cli train --set=run.weights=") == ["best", "last"]
    assert ask("ppo-cli config tiny --set ppo.init_kl_coef=") == ["0.2"]
    assert "cpu" in ask("ppo-cli train --set run.device=")
    assert ask("ppo-cli train --set no.such=") == []


def test_runs_models_and_the_folders_beside_them(ask: Ask, here: Path) -> None:
    assert ask("ppo-cli plot ") == ["ppo-good", "model/", "more/"]
    assert (
        ask("ppo-cli stats p") == ask("ppo-cli export p") == ask("ppo-cli push p") == ["ppo-good"]
    )
    assert ask("ppo-cli compare ppo-good ") == ["model", "ppo-good", "more/"]
    assert ask("ppo-cli generate more/") == [r"more/ppo\ deep"]
    assert ask("ppo-cli generate more/", "fish") == ["more/ppo deep"]
    assert ask("ppo-cli plot no") == []  # the shell completes files
    assert ask("ppo-cli plot .h") == [".hidden"]


def test_metrics_are_those_of_the_runs_that_are_named(ask: Ask, here: Path) -> None:
    assert ask("ppo-cli plot ppo-good --metric ") == ["own/metric", "eval/kl"]
    assert ask("ppo-cli plot model --metric eval/k") == ["eval/kl"]
    known = ask("ppo-cli plot --metric ")
    assert "objective/kl" in known
    assert not {"objective/kl_dist", "env/rewards/NAME/mean"} & {*known}


def test_of_an_error_a_shell_is_told_nothing(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask("ppo-cli plot nowhere/at/all/") == []
    assert "ppo.init_kl_coef=" in ask("ppo-cli train --set 'ppo.")  # an open quote
    monkeypatch.setattr("ppo_cli.cli.completion._entries", lambda _: 1 / 0)
    monkeypatch.setenv("COMP_WORDS", "ppo-cli plot ")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert app._run() == 1
    monkeypatch.delenv("COMP_CWORD")
    app._run()
    assert capsys.readouterr() == ("", "")


def test_completion_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom ppo_cli.cli import app\n"
        "os.environ['_PPO_CLI_COMPLETE'] = 'complete_bash'\n"
        "for words in ('train --set ppo.', 'plot --metric o', 'generate m', 'train --config t'):\n"
        "    os.environ['COMP_WORDS'] = f'ppo-cli {words}'\n"
        "    os.environ['COMP_CWORD'] = str(len(words.split()))\n"
        "    assert app._run() == 0\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"ppo.init_kl_coef=" in done.stdout and b"objective/kl" in done.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_itself(here: Path, tmp_path: Path) -> None:
    """With the script that is installed; the function is called as bash calls it."""
    program = tmp_path / "bin" / "ppo-cli"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m ppo_cli "$@"\n')
    program.chmod(0o755)
    script = (
        f'PATH={program.parent}:$PATH; export PYTHONPATH="{Path(app.__file__).parents[2]}"\n'
        'eval "$(_PPO_CLI_COMPLETE=source_bash ppo-cli)"\n'
        "COMP_WORDS=(ppo-cli train --set ppo.kl_in_loss = f) COMP_CWORD=5\n"
        '_ppo_cli_completion ppo-cli; echo "${COMPREPLY[*]}"; complete -p ppo-cli'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == "false\ncomplete -o default -F _ppo_cli_completion ppo-cli\n"
