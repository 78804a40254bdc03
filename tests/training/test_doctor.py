"""What `doctor` finds: versions, token, what is missing, and problems with their remedies."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from ppo_cli.cli.doctor import doctor
from ppo_cli.training import doctor as examination
from ppo_cli.training.doctor import examine

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
METADATA = ["torch>=2.13", "rich>=13", 'peft>=0.19; extra == "peft"', 'zzz; extra == "zzz"']


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Versions that seem to be installed, by package; tests change them."""
    found = {"ppo-cli": "9.9", "torch": "2.13.0+cpu", "rich": "15.0", "peft": "0.20"}

    def version(name: str) -> str:
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    class Extras:
        @staticmethod
        def get_all(name: str) -> list[str]:
            return ["dev", "peft", "zzz"]

    monkeypatch.setattr(examination, "version", version)
    monkeypatch.setattr(examination, "requires", lambda _: METADATA)
    monkeypatch.setattr(examination, "metadata", lambda _: Extras)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    return found


def test_a_sound_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    snapshot = tmp_path / "hub/models--me--model/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes(b" " * 3 * 2**20)
    assert doctor(as_json=True) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert found["can_train"] and found["problems"] == []
    assert found["facts"]["versions"]["torch"] == "2.13.0+cpu"
    assert found["facts"]["hub"]["cache holds"] == "3 MiB in 1 repository"
    assert found["facts"]["hub"]["token"] == "set, by HF_TOKEN"
    assert found["facts"]["machine"]["device"].startswith("cpu (")
    assert [(f["extra"], f["missing"]) for f in found["features"]] == [
        ("peft", []),
        ("zzz", ["zzz (not installed)"]),
    ]
    assert doctor(as_json=False) == 0
    table = capsys.readouterr().out
    assert "no problems found" in table and "pip install 'ppo-cli[zzz]'" in table
    assert TOKEN not in text + table
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert examine().facts["hub"]["token"] == "not set"


def test_what_stops_a_run_gives_exit_code_1(
    installed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    installed["torch"] = "2.0"
    del installed["rich"]
    assert doctor(as_json=False) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "no run is possible: package torch 2.0 (needed: >=2.13); pip install 'torch>=2.13'" in out
    )
    assert "package rich (not installed)" in out
    installed |= {"torch": "2.13.0", "rich": "13.0"}
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: a)
    assert [p.what for p in examine().problems] == ["cpu does not compute (a product is wrong)"]
    assert not examine().can_train


def test_warnings_do_not_stop_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=5 * 2**20))
    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.setattr(examination, "policy_folder", lambda: tmp_path)
    found = examine()
    words = ["embedded model", "NVIDIA driver", "nothing can be fetched", "--output", "5 MiB"]
    texts = [f"{problem.what}; {problem.remedy}" for problem in found.problems]
    assert len(texts) == len(words)
    assert all(word in text for word, text in zip(words, texts, strict=True)), texts
    assert found.can_train
