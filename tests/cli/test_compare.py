"""What `compare --html` reads from run directories; no model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ppo_cli.cli.compare import _page_details
from ppo_cli.config.loading import load_config
from ppo_cli.training.run_directory import RunDirectory
from tests.conftest import SMALL_RUN

EVALUATED = {"eval/score": 1.0, "eval/kl": 2.0, "eval/reference_score": 0.0}


def make_run(folder: Path, *settings: str, rows: list[dict[str, Any]]) -> str:
    directory = RunDirectory(folder)
    folder.mkdir()
    directory.record(load_config(SMALL_RUN, assignments=settings))
    directory.records.append("metrics.jsonl", rows)
    return str(folder)


def request(model: str) -> Any:
    return SimpleNamespace(run=RunDirectory(model).config(), device="cpu")


def test_curves_are_of_every_run_and_evaluations_of_those_with_the_same_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"step": 1, "objective/kl": 0.5}, {"step": 2, "objective/kl": 1.0, **EVALUATED}]
    good = make_run(tmp_path / "good", rows=rows)
    new = make_run(tmp_path / "new", rows=rows[:1])
    other = make_run(tmp_path / "other", "reward.sentiment=negative", rows=rows)
    point = {"n": 1, "kl": 0.0, "score": 0.1, "score_interval": {"mean": 0, "low": 0, "high": 1}}
    curve = {"label": "POSITIVE", "seed": 0, "prompts": 4, "samples": 1, "reference_score": 0.1}
    (tmp_path / "good" / "frontier.json").write_text(json.dumps({**curve, "points": [point]}))
    monkeypatch.setattr("sys.argv", ["ppo-cli", "compare", "a b", "hf_" + "a" * 34])
    models = [good, new, other, "gpt2"]
    found = _page_details(models, request(good), own_score=True)
    assert list(found.runs) == [good, new, other] and found.runs[good] == rows
    assert [one.name for one in found.trails] == [good]
    assert found.curve is not None and found.curve.prompts == 4
    assert found.settings["Command"] == "ppo-cli compare 'a b' ***"
    assert {"ppo-cli", "torch"} < set(found.settings["Versions"].replace(",", "").split())
    another_score = _page_details(models, request(good), own_score=False)
    assert another_score.trails == [] and another_score.curve is None
    assert another_score.runs == found.runs


def test_what_is_damaged_is_noted_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", rows=[{"step": 1, **EVALUATED}, {"step": 2}])
    (tmp_path / "run" / "metrics.jsonl").write_text("no JSON\n{}\n")
    assert _page_details([run], request(run), own_score=True).runs == {}
    assert "left out of the report: " in capsys.readouterr().err
