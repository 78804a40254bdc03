# ruff: noqa: F811
"""`ppo-cli push`: what leaves this machine, and what the hub's refusals look like."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from ppo_cli.config.loading import validate
from ppo_cli.evaluation import quality
from ppo_cli.evaluation.quality import Quality
from ppo_cli.evaluation.samples import Sample
from ppo_cli.reporting.model_card import run_card
from ppo_cli.training.run_directory import RunDirectory
from ppo_cli.utils import hub as hub_module
from tests.loopback_hub import Hub, serving
from tests.test_bad_input import run_here  # noqa: F401

TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyz012345"
OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run-0.1" / "run"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client asks, with a token."""
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def make_summary(run: Path, **changes: Any) -> Any:
    values = {m.key: 0.25 for m in quality.MEASURES}
    sample = Sample(f"{Path.home()}/notes says", " it is fine", 1.0, 0.9)
    summary = {
        "run": str(run), "label": "POSITIVE", "steps": 2, "planned_steps": 2, "kl": 1.5,
        "weights": "step 2", "stopped_early": None, "before": Quality(1, values),
        "after": Quality(1, {**values, "score": 1.23456}), "after_samples": [sample],
    }  # fmt: skip
    return SimpleNamespace(**summary | changes)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of local models, whose files say where they lie."""
    shutil.copytree(OLD_RUN, tmp_path / "mine")
    run, models = tmp_path / "mine", tmp_path / "models"
    monkeypatch.chdir(tmp_path)
    directory = RunDirectory(run)
    config = validate(
        {
            "policy": {"model": str(models / "gpt2")},
            "reward": {"model": "models/judge"},
            "prompts": {"source": "owner/reviews"},
            "ppo": {"project_kwargs": {"logging_dir": str(Path.home() / "logs")}},
            "run": {"output": str(run)},
        }
    )
    base = {"name": "owner/base", "commit": "0" * 40}
    inputs = {
        "policy.model": {"name": str(models / "gpt2"), "path": str(models / "gpt2"),
                         "files": {"config.json": "sha256 0"}, "base": base},
        "reward.model": {"name": "models/judge", "path": str(models / "judge"), "files": {}},
        "prompts.source": {"name": "owner/reviews", "commit": "1" * 40},
    }  # fmt: skip
    directory.inventory.add(["adapter/adapter_config.json", "logs/", "notes.sqlite"])
    directory.record(config, {"inputs": inputs})
    (run / "README.md").write_text(run_card(make_summary(run), config, inputs))
    made = json.loads((run / "config.json").read_text()) | {"_name_or_path": str(models / "gpt2")}
    (run / "config.json").write_text(json.dumps(made))
    (run / "adapter").mkdir()
    adapter = {"base_model_name_or_path": str(models / "gpt2"), "r": 8, "note": TOKEN}
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    (run / "logs").mkdir()
    (run / "logs" / "events").write_text(TOKEN)
    (run / "notes.sqlite").write_text(str(run))
    (run / "stranger.txt").write_text("mine alone")
    return run


def test_what_is_uploaded_and_that_nothing_private_is(
    run: Path,
    hub: Hub,
    run_here: Command,
) -> None:
    hub.cards["owner/base"] = {"license": "mit"}
    code, out, err = run_here(["push", "mine", "me/model"], run.parent)
    assert (code, out) == (0, f"{hub.address}/me/model\n"), err
    files = hub.repositories["me/model"]["main"]
    weights = {"model.safetensors", "value_head.safetensors"}
    assert files.keys() == {
        ".gitattributes", "README.md", "config.json", "generation_config.json", "metrics.jsonl",
        "run.yaml", "tokenizer.json", "tokenizer_config.json", "adapter/adapter_config.json",
        *weights,
    }  # fmt: skip
    for name in (*weights, "metrics.jsonl", "tokenizer.json"):
        assert files[name] == (run / name).read_bytes(), name
    private = {
        str(Path.home()), tempfile.gettempdir(), str(run.parent), TOKEN, platform.node(),
        socket.gethostname(), "models/judge", "mine alone",
    }  # fmt: skip
    for path, body in [*hub.received, *files.items()]:
        for secret in private:
            assert secret.encode() not in body, (path, secret)
    assert json.loads(files["adapter/adapter_config.json"]) == {
        "base_model_name_or_path": "gpt2", "r": 8, "note": "***",
    }  # fmt: skip
    record = yaml.safe_load(files["run.yaml"])
    settings = record["config"]
    assert (settings["policy"]["model"], settings["reward"]["model"]) == ("gpt2", "judge")
    assert settings["prompts"]["source"] == "owner/reviews"
    assert record["inputs"]["policy.model"]["files"] == {"config.json": "sha256 0"}
    card = files["README.md"].decode()
    assert 'model="me/model"' in card and 'model="mine"' not in card
    assert "| notes says |" in card and "license: mit" in card
    for listed in ("model.safetensors", "adapter/adapter_config.json", "stays: for --resume",
                   "stays: texts of the prompts", "stays: logs of trackers",
                   "stranger.txt", "stays: no run wrote it"):  # fmt: skip
        assert listed in err


def test_a_dry_run_asks_for_nothing(
    run: Path,
    hub: Hub,
    run_here: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    code, out, err = run_here(["push", "mine", "me/model", "--dry-run"], run.parent)
    assert code == 0 and "nothing was uploaded" in err and hub.received == []
    assert "together" in out and "samples.jsonl" in out and "for me/model" in out


def test_a_damaged_file_is_named(run: Path, run_here: Command) -> None:
    (run / "config.json").write_text("{")
    code, _, err = run_here(["push", "mine", "me/model", "--dry-run"], run.parent)
    assert code == 2 and "mine/config.json is damaged" in err


def test_options_reach_the_hub(run: Path, hub: Hub, run_here: Command) -> None:
    options = ["--private", "--revision", "trial", "--message", "a first try"]
    code, out, err = run_here(["push", "mine", "me/model", *options], run.parent)
    assert (code, out) == (0, f"{hub.address}/me/model/tree/trial\n"), err
    assert hub.settings["me/model"]["visibility"] == "private"
    branches = hub.repositories["me/model"]
    assert "config.json" in branches["trial"] and "config.json" not in branches["main"]
    assert hub.commits[0]["summary"] == "a first try"


def test_a_repository_with_files_is_updated_when_that_is_asked_for(
    run: Path,
    hub: Hub,
    run_here: Command,
) -> None:
    push = ["push", "mine", "me/model"]
    hub.repositories["me/model"] = {"main": {".gitattributes": b""}}  # of a push that failed
    assert run_here(push, run.parent)[0] == 0
    code, _, err = run_here(push, run.parent)
    assert code == 2 and "me/model exists on the hub: give another name, or --update" in err
    assert len(hub.commits) == 1
    assert run_here([*push, "--update"], run.parent)[0] == 0
    assert [commit["summary"] for commit in hub.commits] == ["Upload mine with ppo-cli"] * 2
    code, _, err = run_here([*push, "--update", "--private"], run.parent)
    assert code == 2 and "is public: leave --private out" in err


REFUSALS = {
    "no token": (2, "uploading needs a token"),
    "token": (1, "the hub does not accept the token"),
    "rights": (1, "the token has no right to write to me"),
    "server": (1, "me/model: the hub answers 500"),
    "network": (1, "me/model: the hub cannot be reached"),
    "offline": (1, "HF_HUB_OFFLINE forbids to upload"),
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_each_refusal_has_its_message(
    fault: str,
    run: Path,
    hub: Hub,
    run_here: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, message = REFUSALS[fault]
    statuses = {"token": 401, "rights": 403, "server": 500}
    if fault in statuses:
        hub.fails["/api/repos/create"] = statuses[fault]
    if fault == "no token":
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", os.devnull)
    if fault == "network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    if fault == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found, out, err = run_here(["push", "mine", "me/model"], run.parent)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (found, out, len(errors)) == (code, "", 1), err
    assert message in errors[0] and TOKEN not in err
    assert hub.commits == []


# ------------------------------------------------------------------ the card


def test_the_cards_metadata_is_true(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = validate({"policy": {"model": "owner/base"}, "prompts": {"source": "texts/a.csv"}})
    inputs = {
        "policy.model": {"name": "owner/base", "commit": "0" * 40},
        "prompts.source": {"name": "texts/a.csv", "path": "/x/texts/a.csv", "files": {}},
    }
    monkeypatch.setitem(hub_module._licenses, "owner/base", "mit")
    card = ModelCard(run_card(make_summary(run), config, inputs))
    data = card.data.to_dict()
    assert (data["base_model"], data["license"]) == ("owner/base", "mit")
    assert data["pipeline_tag"] == "text-generation" and "datasets" not in data
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"] == {"name": "a.csv, 1 held-out prompts", "type": "custom"}
    score = next(m for m in result["metrics"] if m["type"] == "score")
    assert (score["value"], score["args"]) == (
        1.2346, {"classifier": "embedded", "label": "POSITIVE"}
    )  # fmt: skip
    assert "args" not in next(m for m in result["metrics"] if m["type"] == "kl")
    assert len(result["metrics"]) == len(quality.MEASURES)
    assert "classifier marked `embedded` is this program's own" in " ".join(card.text.split())


def test_what_is_not_known_is_not_claimed(tmp_path: Path) -> None:
    base = tmp_path / "owner" / "base"
    base.mkdir(parents=True)
    config = validate({"policy": {"model": "owner/base"}, "prompts": {"source": "owner/reviews"}})
    inputs = {"policy.model": {"name": "owner/base", "path": str(base), "files": {}},
              "prompts.source": {"name": "owner/reviews", "commit": "1" * 40}}  # fmt: skip
    data = ModelCard(run_card(make_summary(tmp_path), config, inputs)).data.to_dict()
    assert "base_model" not in data and "license" not in data
    assert data["datasets"] == ["owner/reviews"]
    (base / "README.md").write_text("---\nlicense: cc0-1.0\n---\n")
    data = ModelCard(run_card(make_summary(tmp_path), config, inputs)).data.to_dict()
    assert data["license"] == "cc0-1.0"
    data = ModelCard(run_card(make_summary(tmp_path), validate({}))).data.to_dict()
    assert data["license"] == "apache-2.0" and "base_model" not in data and "datasets" not in data
