"""Bad input over the real command: the code, one message that names thing and remedy, no trace.

Each row: arguments, exit code, what the message must hold. `{...}` stands for files made below.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_gpt2, make_tokenizer
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from test_cli import environment

from ppo_cli.errors import ModelError, ModelNotFoundError
from ppo_cli.hub import loading_errors

T = "train"
FEW_PROMPTS = ["--set", "prompts.limit=256", "--set", "prompts.held_out=8"]
Case = tuple[list[str], int, list[str]]
LIGHT: list[Case] = [  # refused before torch is imported
    # the command line
    (["trian"], 2, ["No such command 'trian'", "'train'"]),
    ([T, "--sentimant", "positive"], 2, ["--sentimant", "--sentiment"]),
    ([T, "--steps", "0"], 2, ["--steps", "greater than or equal to 1"]),
    ([T, "--steps", "many"], 2, ["--steps", "valid integer"]),
    ([T, "--seed", "-1"], 2, ["--seed", "greater than or equal to 0"]),
    ([T, "--resume", "--overwrite"], 2, ["--resume", "--overwrite"]),
    (["generate"], 2, ["MODEL"]),
    (["plot"], 2, ["RUN"]),
    (["compare", "{run}", "--format", "xml"], 2, ["--format': 'xml'", "markdown"]),
    (["generate", "{policy}", "--temperature", "0"], 2, ["--temperature", "above 0"]),
    (["generate", "{policy}", "--temperature", "nan"], 2, ["--temperature", "above 0"]),
    (["generate", "{policy}", "--top-p", "1.5"], 2, ["--top-p", "at most 1"]),
    # configurations
    ([T, "--config", "tyni"], 2, ["'tyni'", "'tiny'"]),
    ([T, "--config", "absent.yaml"], 2, ["absent.yaml", "no such"]),
    ([T, "--config", "{broken.yaml}"], 2, ["broken.yaml, line 3, column 1", "YAML"]),
    ([T, "--config", "{unknown.yaml}"], 2, ["unknown.yaml, line 3", "learning_rat", "'learning_rate'"]),
    ([T, "--config", "{section.yaml}"], 2, ["section.yaml, line 1", "'ppo'"]),
    ([T, "--config", "{twice.yaml}"], 2, ["error: ", "twice.yaml, line 3: 'run.steps' is given twice"]),
    ([T, "--config", "{list.yaml}"], 2, ["list.yaml", "sections"]),
    ([T, "--config", "{latin.yaml}"], 2, ["latin.yaml", "UTF-8"]),
    ([T, "--config", "{null.yaml}"], 2, ["null.yaml, line 2", "run.steps", "null"]),
    ([T, "--set", "ppo.learning_rate=fast"], 2, ["--set ppo.learning_rate=fast", "number", "'fast'"]),
    ([T, "--set", "ppo.learning_rate=-1"], 2, ["ppo.learning_rate", "greater than or equal to 0"]),
    ([T, "--set", "ppo.learning_rate=.nan"], 2, ["ppo.learning_rate", "finite"]),
    ([T, "--set", "ppo.gamma=2"], 2, ["ppo.gamma", "less than or equal to 1"]),
    ([T, "--set", "ppo.batch_size=yes"], 2, ["ppo.batch_size", "integer", "true"]),
    ([T, "--set", "ppo.batch_size=100"], 2, ["100", "64 x 1 = 64"]),
    ([T, "--set", "ppo.kl_penalty=huge"], 2, ["ppo.kl_penalty", "'kl', 'abs', 'mse' or 'full'"]),
    ([T, "--set", "learning_rate=1"], 2, ["section.key=value"]),
    ([T, "--set", "prompts.input_max_text_length=2"], 2, ["input_max_text_length (2)", "exceed"]),
    ([T, "--set", "run.steps=999999999999999999999x"], 2, ["run.steps", "integer"]),
    ([T, "--set", "policy.adapter.rank=3"], 2, ["policy.adapter.rank", "r, alpha"]),
    # output
    ([T, "--output", "{run}"], 2, ["exists", "--resume", "--overwrite"]),
    ([T, "--output", "{notes.txt}"], 2, ["is a file", "--output"]),
    ([T, "--output", "{folder}", "--overwrite"], 2, ["no run directory", "not overwritten"]),
    ([T, "--output", "{notes.txt}/run"], 2, ["notes.txt"]),
    ([T, "--output", "absent", "--resume"], 2, ["absent", "no such run directory"]),
    ([T, "--output", "{run}", "--resume"], 2, ["no checkpoint", "--overwrite"]),
    (["generate", "{policy}", "--output", "absent/out.txt"], 2, ["absent", "does not exist"]),
    (["plot", "{run}", "--output", "picture.gif"], 2, ["picture.gif", ".png"]),
    # run directories
    (["plot", "absent"], 2, ["absent", "no such run directory"]),
    (["plot", "{folder}"], 2, ["folder", "run.yaml"]),
    (["stats", "{run}", "--step", "9"], 2, ["no step 9", "1 to 2"]),
    (["plot", "{run}", "--metric", "ppo/loss/totl"], 2, ["ppo/loss/totl", "'ppo/loss/total'"]),
    (["stats", "{damaged}"], 2, ["metrics.jsonl, line 1"]),
]  # fmt: skip
HEAVY: list[Case] = [
    # devices, models, classifiers
    ([T, "--device", "tpu"], 2, ["'tpu'", "cuda"]),
    ([T, "--device", "cuda:7"], 2, ["'cuda:7'", "cpu"]),
    ([T, "--sentiment", "joyful"], 2, ["'joyful'", "NEGATIVE, POSITIVE"]),
    ([T, "--set", "policy.model=./absent"], 2, ["./absent", "no such folder"]),
    ([T, "--set", "policy.model={folder}"], 2, ["folder", "no model", "config.json"]),
    ([T, "--set", "policy.model={notes.txt}"], 2, ["notes.txt", "is a file"]),
    ([T, "--set", "policy.model={classifier}"], 2, ["ForSequenceClassification", "causal"]),
    ([T, "--set", "policy.model={garbled}"], 1, ["garbled", "cannot be loaded"]),
    ([T, "--set", "policy.model={mismatched}"], 1, ["mismatched", "80 tokens", "60"]),
    ([T, "--set", "reward.model={policy}"], 1, ["GPT2LMHeadModel", "sequence classifier"]),
    ([T, "--set", "reward.model=./absent"], 2, ["./absent", "no such folder"]),
    (["generate", "no-such-org/no-such-model"], 1, ["no-such-org/no-such-model", "hub"]),
    ([T, "--set", "policy.model=no-such-org/none"], 1, ["no-such-org/none", "hub"]),
    ([T, "--set", "prompts.source=no-such-org/none"], 1, ["no-such-org/none", "hub"]),
    (["compare", "{policy}", "{policy}"], 2, ["no run directory", "--classifier"]),
    (["compare", "{policy}", "--classifier", "embedded"], 2, ["two models"]),
    # prompts
    ([T, "--set", "prompts.source=absent.csv"], 2, ["absent.csv", "no such file"]),
    ([T, "--set", "prompts.source={reviews.csv}"], 2, ["'text'", "review, stars", "text_column"]),
    ([T, "--set", "prompts.source={empty.txt}"], 2, ["empty.txt", "empty"]),
    ([T, "--set", "prompts.source={latin.txt}"], 2, ["latin.txt", "UTF-8"]),
    ([T, "--set", "prompts.source={broken.jsonl}"], 2, ["broken.jsonl, line 2", "not JSON (Expecting value)"]),
    ([T, "--set", "prompts.source={few.txt}"], 2, ["few.txt", "ppo.batch_size (128)"]),
    ([T, "--set", "prompts.source={few.txt}", "--set", "prompts.min_characters=999"], 2, ["999", "min_characters"]),
    ([T, "--set", "rollout.output_max_length=500"], 2, ["context of 128", "output_max_length"]),
    (["generate", "{policy}", "--prompt", " "], 2, ["empty"]),
    (["generate", "{policy}", "--prompts", "{empty.txt}"], 2, ["empty.txt", "empty"]),
    (["generate", "{policy}", "--prompts", "-"], 2, ["standard input"]),
    (["generate", "{policy}", "--prompt", "{long}"], 2, ["context", "--max-new-tokens"]),
    (["generate", "{policy}", "--max-new-tokens", "1000"], 2, ["context of", "--max-new-tokens"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files that the cases name."""
    from ppo_cli.embedded import classifier_folder, policy_folder

    folder = tmp_path_factory.mktemp("world")
    files: dict[str, bytes] = {
        "broken.yaml": b"run:\n  steps: [1, 2\n",
        "unknown.yaml": b"ppo:\n  gamma: 1.0\n  learning_rat: 1e-5\n",
        "section.yaml": b"pppo:\n  gamma: 1.0\n",
        "twice.yaml": b"run:\n  steps: 1\n  steps: 2\n",
        "list.yaml": b"- 1\n- 2\n",
        "latin.yaml": "run:\n  output: caf\u00e9\n".encode("latin-1"),
        "null.yaml": b"run:\n  steps: null\n",
        "notes.txt": b"not a run\n",
        "reviews.csv": b"review,stars\nfine film,4\n",
        "empty.txt": b"",
        "latin.txt": "caf\u00e9\n".encode("latin-1") * 100,
        "broken.jsonl": b'{"text": "fine"}\n{"text": \n',
        "few.txt": b"This film is fine.\n" * 20,
    }
    names = {"policy": str(policy_folder()), "classifier": str(classifier_folder())}
    for name, content in files.items():
        (folder / name).write_bytes(content)
        names[name] = str(folder / name)
    for name in ("folder", "run", "damaged", "garbled", "mismatched"):
        (folder / name).mkdir()
        names[name] = str(folder / name)
    (folder / "folder" / "something.txt").write_text("here\n")
    run = subprocess.run(
        [sys.executable, "-m", "ppo_cli", "config", "tiny"],
        capture_output=True, text=True, env=environment(), check=True,
    )  # fmt: skip
    record = "config:\n" + "".join(f"  {line}\n" for line in run.stdout.splitlines())
    for name, metrics in (("run", None), ("damaged", "{\n{}\n")):
        (folder / name / "run.yaml").write_text(record)
        rows = [
            json.dumps({"step": i, "ppo/loss/total": 0.1, "ppo/mean_scores": 1.0}) for i in (1, 2)
        ]
        (folder / name / "metrics.jsonl").write_text(metrics or "\n".join(rows) + "\n")
    make_gpt2().save_pretrained(folder / "garbled")
    make_tokenizer().save_pretrained(folder / "garbled")
    weights = folder / "garbled" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    make_gpt2(vocab_size=60).save_pretrained(folder / "mismatched")
    make_tokenizer().save_pretrained(folder / "mismatched")
    return names | {"long": "word " * 300}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"/"
        for path in folder.rglob("*")
    }


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


@pytest.mark.parametrize("case", [*LIGHT, *HEAVY[::8]], ids=name_of)
def test_bad_input(case: Case, world: dict[str, str], tmp_path: Path) -> None:
    check(case, world, tmp_path, run_bad)


@pytest.mark.parametrize("case", HEAVY, ids=name_of)
def test_bad_input_without_a_new_process(
    case: Case,
    world: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The command's own entry point, called here: torch is imported once for all of them."""
    from ppo_cli.cli import app

    def run_here(arguments: list[str], cwd: Path) -> tuple[int, str, str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["ppo-cli", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stopped:
            app.main()
        captured = capfd.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

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
    quick = FEW_PROMPTS if arguments[0] == T and "--resume" not in arguments else []
    returncode, stdout, stderr = run([*arguments, *quick], here)
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
    code, _, stderr = run_bad([T], tmp_path)
    assert code == 2
    assert "cannot be written" in stderr
