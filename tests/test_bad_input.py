"""Bad input to the real command: exit code, one message with thing and remedy, nothing written.

The table is in `bad_inputs.py`.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)

from ppo_cli.config.loading import change_config, load_config
from ppo_cli.config.schema import RunConfig
from ppo_cli.data.embedded import policy_folder
from ppo_cli.errors import ConfigError, ModelError, ModelNotFoundError
from ppo_cli.utils.hub import loading_errors
from tests.bad_inputs import HEAVY, LIGHT, Case, make_endless_model, make_world
from tests.conftest import SMALL_RUN
from tests.forked import Done, ppo_cli
from tests.test_cli import environment

QUICK = ["--config", SMALL_RUN]  # a case's own --config comes later, and wins


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files that the cases name."""
    return make_world(tmp_path_factory.mktemp("world"))


def snapshot(folder: Path) -> dict[str, tuple[int, ...]]:
    """All files and folders with their modes, sizes and times."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        found[str(path)] = (about.st_mode, about.st_ino, about.st_size, about.st_mtime_ns)
    return found


def run_bad(arguments: list[str], cwd: Path, **extra: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "ppo_cli", *arguments],
        cwd=cwd,
        env=environment(HF_HOME=str(cwd / ".." / "hf"), **extra),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def name_of(case: Case) -> str:
    return " ".join(case[0])[:60]


# All of them through the command's own entry point in this process, where torch is imported once;
# a sample of them in processes of their own as well, of which those without models start anew.
@pytest.mark.parametrize("case", LIGHT[::40], ids=name_of)
def test_bad_input(case: Case, world: dict[str, str], tmp_path: Path) -> None:
    check(case, world, tmp_path, run_bad)


def run_forked(arguments: list[str], cwd: Path) -> Done:
    return ppo_cli(*arguments, cwd=cwd)


@pytest.mark.parametrize("case", HEAVY[::40], ids=name_of)
def test_bad_input_in_a_forked_process(case: Case, world: dict[str, str], tmp_path: Path) -> None:
    check(case, world, tmp_path, run_forked)


@cache
def _built() -> Any:
    from ppo_cli.cli import app

    return app.typer.main.get_command(app.app)


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[[list[str], Path], tuple[int, str, str]]:
    """The command, called in this process; typer builds it once for all."""
    from ppo_cli.cli import app

    command = _built()
    monkeypatch.setattr(app.typer.main, "get_command", lambda _: command)

    def run(arguments: list[str], cwd: Path) -> tuple[int, str, str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["ppo-cli", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 3 if "-" not in arguments else ""))
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stopped:
            app.main()
        captured = capfd.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return run


@pytest.mark.parametrize("case", [*LIGHT, *HEAVY], ids=name_of)
def test_bad_input_without_a_new_process(
    case: Case,
    world: dict[str, str],
    tmp_path: Path,
    run_here: Callable[[list[str], Path], tuple[int, str, str]],
) -> None:
    check(case, world, tmp_path, run_here)


def check(
    case: Case, world: dict[str, str], tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    arguments, code, wanted = case
    for name, path in world.items():
        arguments = [argument.replace(f"{{{name}}}", path) for argument in arguments]
    made = Path(world["notes.txt"]).parent
    before = snapshot(made)
    here = tmp_path / "here"
    here.mkdir()
    quick = QUICK if arguments[0] == "train" and "--resume" not in arguments else []
    returncode, stdout, stderr = run([arguments[0], *quick, *arguments[1:]], here)
    assert returncode == code, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    messages = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, stderr
    for part in wanted:
        assert part in stderr.replace("\n       ", " "), f"{part!r} is not in: {stderr}"
    assert list(here.iterdir()) == [], "something was created"
    assert snapshot(made) == before, "something was changed"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ConnectionError("refused"), ModelError, "cannot be reached"),
        (TimeoutError("slow"), ModelError, "cannot be reached"),
        (OfflineModeIsEnabled("offline"), ModelError, "HF_HUB_OFFLINE"),
        (LocalEntryNotFoundError("nothing cached"), ModelError, "cannot be reached"),
        (HFValidationError("bad id"), ModelNotFoundError, "neither a folder here nor"),
        (RuntimeError("odd"), ModelError, "cannot be loaded as a model: We couldn't connect"),
    ],
)
def test_what_the_hub_raises_becomes_one_message(
    error: Exception, kind: type[Exception], message: str
) -> None:
    wrapped = OSError("We couldn't connect")
    wrapped.__cause__ = error
    with pytest.raises(kind, match=message) as caught, loading_errors("org/name"):
        raise wrapped
    assert "org/name" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    code, _, stderr = run_bad(["train"], tmp_path)
    assert code == 2
    assert "cannot be written" in stderr


def bad_values() -> Iterator[tuple[str, str]]:
    """Every key of every section with what it cannot be, told by the JSON Schema: key, YAML."""
    schema = RunConfig.model_json_schema()
    for section, reference in schema["properties"].items():
        name = next(iter(re.findall(r"/(\w+)\"", json.dumps(reference))))
        for key, about in schema["$defs"][name]["properties"].items():
            kinds = about.get("anyOf", [about])
            types = {kind.get("type", "enum") for kind in kinds}
            if "enum" in kinds[0] or "const" in kinds[0]:
                types = (types - {"string"}) | {"enum"}
            bad = ["[[1]]", "2020-01-01: 1" if "object" in types else ""]
            bad += [] if "null" in types else ["null"]
            bad += [] if "object" in types or "$ref" in kinds[0] else ["{}", "{a: {b: 1}}"]
            if types & {"integer", "number"}:
                bad += [".nan", ".inf", "-.inf", "words", "'1'", "'ünïcode'", "''"]
            if any("minimum" in kind or "exclusiveMinimum" in kind for kind in kinds):
                bad += ["-1" + "0" * 30]
            if "integer" in types:
                bad += ["1.5", "true"]
            if types & {"string", "enum"} and key != "tracker_project_name":  # the tracker's own
                bad += ["5", "''", "'  '", "true", '"a\\nb"', "x" * 2000]
            if "boolean" in types:
                bad += ["1", "'true'", "words"]
            if any("maximum" in kind or "exclusiveMaximum" in kind for kind in kinds):
                bad += ["1" + "0" * 30]
            yield from ((f"{section}.{key}", value) for value in bad if value)


def test_every_key_refuses_by_name_what_it_cannot_be() -> None:
    tried = list(bad_values())
    assert len(tried) > 450
    assert {name.partition(".")[0] for name, _ in tried} == set(RunConfig.model_fields)
    config = load_config("tiny")
    for name, value in tried:
        try:
            change_config(config, assignments=[f"{name}={value}"])
        except ConfigError as error:
            told = str(error)
        else:
            pytest.fail(f"{name} takes {value[:20]}")
        assert told.startswith(f"--set {name}="), told


@pytest.mark.parametrize(
    "prompt",
    [
        "This movie 😀👩‍👩‍👧",
        "הסרט הזה היה נהדר",
        "This\0movie\x1b[31m",
        "This\u202emovie\u200b",
        "  This movie ",
        "=1+1",
        "[red]<b>`x`|",
    ],
)
def test_unusual_prompts_are_answered_and_shown_as_text(
    prompt: str, tmp_path: Path, run_here: Callable[[list[str], Path], tuple[int, str, str]]
) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"text": prompt}))
    shared = ["generate", policy_folder(), "--prompts", "prompts.jsonl", "--max-new-tokens", "3"]
    for form in ("table", "text", "jsonl"):
        code, stdout, stderr = run_here([*map(str, shared), "--format", form], tmp_path)
        assert code == 0, stderr
        shown = stdout.replace("\n", "")
        assert not re.search("[\x00-\x1f\x7f-\x9f\u200b\u202a-\u202e]", shown)
    assert json.loads(stdout)["query"] == prompt


def test_a_model_without_end_and_padding_tokens_is_trained(
    tmp_path: Path, run_here: Callable[[list[str], Path], tuple[int, str, str]]
) -> None:
    make_endless_model(tmp_path / "endless")
    (tmp_path / "texts.txt").write_text("".join(f"t{i} t{i + 1} t3 t4\n" for i in range(70)))
    code, _, stderr = run_here(
        [
            "train", *QUICK, "--steps", "1", "--quiet", "--output", "run",
            "--set", "policy.model=endless", "--set", "prompts.source=texts.txt",
            "--set", "prompts.limit=null", "--set", "prompts.held_out=4",
        ],
        tmp_path,
    )  # fmt: skip
    assert code == 0, stderr
    assert (tmp_path / "run" / "model.safetensors").is_file()
