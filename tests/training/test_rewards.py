"""Runs with composed rewards: what is logged is what PPO learns from, and code asks for consent."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ppo_cli.cli import app
from ppo_cli.cli.requests import resolve
from ppo_cli.config.loading import load_config
from ppo_cli.config.schema import RunConfig
from ppo_cli.data.prompts import PromptSet
from ppo_cli.errors import ConsentError, DivergenceError, UsageError
from ppo_cli.evaluation.compare import compare
from ppo_cli.reporting.comparison_tables import comparison_csv, measures
from ppo_cli.training import build
from ppo_cli.training.build import build_training
from tests.conftest import SMALL_RUN

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

CODE = """
from pathlib import Path

Path("it-ran").touch()

def odd(responses):
    return [len(text) / 10 if len(text) % 2 else None for text in responses]
"""
TERMS = """[
  {model: embedded, name: sentiment, weight: 0.5},
  {function: r.py:odd, weight: {start: 0, end: 1, steps: 2}},
  {cost: length, target_length: 20, weight: 0.1}]"""
SETTINGS = [
    f"reward.terms={TERMS}",
    "reward.repetition_cost=2",
    "reward.score_every=6",
    "ppo.use_score_scaling=true",
    "ppo.use_score_norm=true",
    "ppo.score_clip=0.8",
    "run.device=cpu",
    "run.steps=4",
    "run.eval_every=2",
    "run.checkpoint_every=2",
    "run.samples_per_step=16",
    "run.output=run",
]
NAMES = ["sentiment", "odd", "length_cost"]


def config(*more: str) -> RunConfig:
    return load_config(SMALL_RUN, assignments=[*SETTINGS, *more])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a function, and a run of four steps that it is a term of."""
    home = tmp_path_factory.mktemp("made")
    (home / "r.py").write_text(CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        training = build_training(config(), consented=["r.py:odd"])
        for _ in training.steps():
            pass
        training.finish()
        training.directory.unlock()
    (home / "it-ran").unlink()
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, the working folder."""
    folder = tmp_path / "home"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


def test_the_columns_add_up_to_the_reward_that_ppo_learns_from(made: Path) -> None:
    rewards: dict[int, list[float]] = defaultdict(list)
    samples = lines(made / "run/samples.jsonl")
    for row in samples:
        parts = row["rewards"]
        assert list(parts) == [*NAMES, "repetition_cost", "scaling"]
        there = [value for value in parts.values() if value is not None]
        assert sum(there) == pytest.approx(row["reward"], abs=1e-5)
        assert sum(parts[name] or 0 for name in NAMES) == pytest.approx(row["score"], abs=1e-5)
        length = len(row["response"])
        weight = min((row["step"] - 1) / 2, 1)
        expected = pytest.approx(weight * length / 10, abs=1e-5) if length % 2 else None
        assert parts["odd"] == expected
        assert parts["length_cost"] <= 0 and abs(row["reward"]) <= 0.8 + 1e-6
        rewards[row["step"]].append(row["reward"])
    assert max(abs(row["reward"]) for row in samples) == pytest.approx(0.8)  # some are clipped
    for row in lines(made / "run/metrics.jsonl"):
        found = rewards[row["step"]]
        assert len(found) == 16
        assert sum(found) / 16 == pytest.approx(row["ppo/mean_scores"], abs=1e-5)
        means = [row[f"env/rewards/{name}/mean"] for name in NAMES]
        assert sum(means) == pytest.approx(row["env/reward_mean"], abs=1e-5)
        assert row["env/rewards/odd/weight"] == min((row["step"] - 1) / 2, 1)
        assert 0 < row["env/rewards/odd/none"] < 1
        if row["step"] % 2 == 0:
            evaluated = [row[f"eval/rewards/{name}"] for name in NAMES]
            assert sum(evaluated) == pytest.approx(row["eval/score"], abs=1e-5)
    card = (made / "run/README.md").read_text()
    assert "| reward odd | function `r.py:odd`, weight 0 to 1 over 2 steps |" in card
    assert "towards a reward of\n`sentiment` + `odd` + `length_cost` by ppo-cli." in card
    assert "| reward sentiment |" in card.partition("| reference |")[2]


def test_a_resumed_run_goes_on_with_the_schedule_where_its_user_allows_the_code(home: Path) -> None:
    expected = lines(home / "run/metrics.jsonl")
    shutil.rmtree(home / "run/checkpoints/step-000004", ignore_errors=True)
    newest = max((home / "run/checkpoints").glob("step-*"))
    assert newest.name.endswith("2")
    with pytest.raises(ConsentError, match=r"runs the code of r\.py:odd.*--reward r\.py:odd"):
        build_training(config(), resume=True)
    assert not (home / "it-ran").exists()
    training = build_training(config(), resume=True, consented=["r.py:odd"])
    found = [report.stats for report in training.steps()]
    training.directory.unlock()
    for row, same in zip(found, expected[2:], strict=True):
        for key in row:
            if not key.startswith(("time/", "perf/")):
                assert row[key] == same[key], key
    (home / "r.py").write_text(CODE + "\n")
    with pytest.raises(
        UsageError, match=r"reward\.terms\.1\.function r\.py:odd: r\.py has changed"
    ):
        build_training(config(), resume=True, consented=["r.py:odd"])


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """`ppo-cli` in this process: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ppo-cli", *arguments])
        with warnings.catch_warnings(), pytest.raises(SystemExit) as stopped:
            app.main()
        return int(stopped.value.code or 0), *capfd.readouterr()

    return run


def test_code_that_a_run_names_is_run_for_nobody_who_did_not_say_so(
    home: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    option = "--reward r.py:odd"
    for arguments in (["train", "--output", "run", "--resume"], ["compare", "run"]):
        code, _, said = command(*arguments)
        assert code == 2 and option in said and said.count("error: ") == 1
        assert "runs the code of /" not in said
    score = lines(home / "run/metrics.jsonl")[-1]["eval/score"]
    assert f"its own evaluation of step 4: score {score:.3f}" in said
    code, out, said = command("generate", "run", "--format", "jsonl")
    assert code == 0 and option in said
    assert json.loads(out)["score"] is None
    (home / "there").mkdir()
    monkeypatch.chdir(home / "there")
    code, _, said = command("generate", "../run", "--score")
    assert code == 2 and "r.py:odd" in said
    assert not list(home.rglob("it-ran"))
    code, out, said = command("generate", "../run", "--reward", "../r.py:odd", "--format", "jsonl")
    assert code == 0 and f"the reward runs the code of {home}/there/../r.py (odd)" in said
    parts = json.loads(out)["rewards"]
    assert list(parts) == NAMES
    assert sum(part or 0 for part in parts.values()) == pytest.approx(json.loads(out)["score"])


def test_a_comparison_has_a_column_for_each_term(home: Path) -> None:
    def request(**options: Any) -> Any:
        settings = {"sentiment": None, "classifier": None, "device": "cpu", **options}
        return resolve(["run"], reference=True, score=True, **settings)

    found = compare(request(rewards=["r.py:odd"]), [], count=4, max_new_tokens=None, seed=0)
    assert found.terms == NAMES and found.title == "score: sentiment + odd + length_cost"
    table = {name: values for name, *values in measures(found.label, found.models)}
    document = found.as_dict()
    rows = list(csv.DictReader(io.StringIO(comparison_csv(found))))
    for i, model in enumerate(document["models"]):
        answers = [row["responses"][i]["rewards"] for row in document["rows"]]
        for name in NAMES:
            mean = sum(answer[name] or 0 for answer in answers) / 4
            assert model["rewards"][name] == pytest.approx(mean)
            assert table[f"reward {name}"][i] == f"{mean:.3f}"
            written = [row[f"reward {name}"] for row in rows if row["model"] == model["model"]]
            assert [float(x) if x else None for x in written] == [a[name] for a in answers]
        assert sum(model["rewards"].values()) == pytest.approx(model["mean_score"])
    # Another function is a reward of its own, without a classifier's probability.
    (home / "s.py").write_text("def one(texts):\n    return [1] * len(texts)\n")
    other = compare(request(rewards=["s.py:one"]), [], count=2, max_new_tokens=4, seed=0)
    assert (other.terms, other.classifier, other.label) == (["one"], None, "one")
    assert other.models[0].quality["score"] == 1.0
    names = [name for name, *_ in measures(other.label, other.models)]
    assert "mean P(one)" not in names and "on target" not in names
    both = request(rewards=["s.py:one=2"], classifier="embedded").reward
    assert (both.names, both.terms[1].weight) == (["classifier", "one"], 2.0)
    with pytest.raises(UsageError, match=r"no such term; it has r\.py:odd"):
        request(rewards=["r.py:odd", "s.py:one"])


def test_a_function_gets_the_data_columns_and_its_fault_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "calls = []\ndef f(queries, length):\n    calls.append(1)\n"
    code += "    assert length == [len(query) for query in queries]\n"
    code += "    if len(calls) == 4:\n        raise KeyError('fourth')\n    return length\n"
    (tmp_path / "r.py").write_text(code)
    real = build.load_prompts

    def with_columns(*arguments: Any, **options: Any) -> PromptSet:
        found = real(*arguments, **options)
        parts = [
            [replace(one, columns={"length": len(one.query)}) for one in prompts]
            for prompts in (found.train, found.held_out)
        ]
        return PromptSet(*parts)

    alone = ["reward.terms=[{function: r.py:f}]", "reward.score_every=null"]
    with pytest.raises(UsageError, match="needs 'length', which the data has not"):
        build_training(config(*alone), consented=["r.py:f"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.py"]
    monkeypatch.setattr(build, "load_prompts", with_columns)
    training = build_training(config(*alone), consented=["r.py:f"])
    with pytest.raises(DivergenceError) as caught:
        list(training.steps())
    training.directory.unlock()
    assert "r.py, line 6: the reward function f raised KeyError ('fourth')" in str(caught.value)
    assert str(caught.value).startswith("step 2: ") and (tmp_path / "run/config.json").exists()
    samples = lines(tmp_path / "run/samples.jsonl")
    assert samples and all(row["score"] == len(row["query"]) for row in samples)
    assert samples[0]["probability"] is None


@pytest.mark.parametrize("name", ["length-and-keywords", "three-rewards"])
def test_a_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["ppo.batch_size=16", "ppo.mini_batch_size=16", "run.steps=1", "run.eval_every=1"]
    small += ["prompts.held_out=4", "prompts.limit=16", "run.device=cpu"]
    settings = load_config(name, assignments=small)
    training = build_training(settings, consented=settings.reward.foreign)
    (report,) = training.steps()
    training.finish()
    training.directory.unlock()
    card = (Path(settings.output) / "README.md").read_text()
    for term in settings.reward.names:
        assert f"env/rewards/{term}/mean" in report.stats
        assert f"| reward {term} | " in card.replace("\\", "")
    assert ("mean P" in card) == bool(settings.reward.models)
    assert report.stats["env/rewards/keywords/mean"] >= 0
    assert not list(tmp_path.glob("**/__pycache__"))
