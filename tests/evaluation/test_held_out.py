"""Evaluation during a run: measures and records, without an effect on learning."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ppo_cli.config.loading import load_config
from ppo_cli.evaluation.quality import MEASURES, Quality, explained_statistics
from ppo_cli.models.sampling import sample_responses
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.models.stop_tokens import end_tokens
from ppo_cli.ppo.statistics import grouped
from ppo_cli.reporting.summary import Pace, TrainingSummary
from ppo_cli.training.build import build_training
from ppo_cli.training.run import Training
from ppo_cli.training.run_directory import RunDirectory
from ppo_cli.utils.random_state import random_state
from tests.conftest import SMALL_RUN

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

QUICK = ["run.device=cpu", "run.seed=5", "run.eval_every=2"]


def make(folder: Path, *changes: str, resume: bool = False) -> Training:
    settings = [*QUICK, f"run.output={json.dumps(str(folder))}", *changes]
    return build_training(load_config(SMALL_RUN, assignments=settings), resume=resume)


def train(folder: Path, *changes: str, resume: bool = False) -> TrainingSummary:
    """A run to its end; unlocked, so that it can be resumed in this process."""
    training = make(folder, *changes, resume=resume)
    try:
        for _ in training.steps():
            pass
        return training.finish()
    finally:
        training.directory.unlock()


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def learning(folder: Path) -> list[dict[str, float]]:
    """The metrics without evaluations and times."""
    skipped = ("eval/", "time/", "perf/")
    return [{k: v for k, v in row.items() if not k.startswith(skipped)} for row in rows(folder)]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainingSummary]:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    return folder, train(folder, "run.steps=5", "run.weights=last")


Evaluated = tuple[Path, TrainingSummary]


def test_steps_that_are_due_and_the_last_are_evaluated_no_others(evaluated: Evaluated) -> None:
    keys = {*explained_statistics(), "time/evaluating"}
    assert {f"eval/{measure.key}" for measure in MEASURES} < keys
    for row in rows(evaluated[0]):
        found = {key for key in row if key.startswith("eval/") or key == "time/evaluating"}
        assert found == (keys if row["step"] in (2, 4, 5) else set())
        assert all(math.isfinite(value) for value in row.values())


def test_the_reference_is_measured_once_for_all_evaluations(evaluated: Evaluated) -> None:
    found = [row for row in rows(evaluated[0]) if "eval/score" in row]
    for name in ("score", "perplexity", "distinct_2"):
        assert len({row[f"eval/reference_{name}"] for row in found}) == 1
    assert len({row["eval/score"] for row in found}) == 3


def test_time_of_evaluating_is_no_part_of_the_steps(evaluated: Evaluated) -> None:
    metrics = rows(evaluated[0])
    for row in metrics:
        assert (
            row["time/sampling"] + row["time/scoring"] + row["time/optimising"] <= row["time/step"]
        )
    plain = [{k: v for k, v in row.items() if k != "time/evaluating"} for row in metrics]
    assert Pace.of(metrics) == Pace.of(plain)
    assert evaluated[1].seconds == pytest.approx(sum(row["time/step"] for row in metrics))


@pytest.mark.parametrize("every", [0, 1])
def test_a_run_that_is_evaluated_at_other_steps_learns_the_same(
    every: int, evaluated: Evaluated, tmp_path: Path
) -> None:
    train(tmp_path / "run", "run.steps=5", "run.weights=last", f"run.eval_every={every}")
    assert learning(tmp_path / "run") == learning(evaluated[0])
    for name in ("model.safetensors", "value_head.safetensors"):
        one, other = load_file(tmp_path / "run" / name), load_file(evaluated[0] / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_evaluating_changes_no_random_state_and_no_mode(tmp_path: Path) -> None:
    training = make(tmp_path / "run")
    training.trainer.model.train()
    training.trainer.ref_model.eval()
    before, own = random_state(), training.trainer.state_dict()["sampling"]["cpu"]
    training.held_out.begin()
    first = training.held_out.evaluate(0)
    after = random_state()
    for key in ("python", "numpy"):
        assert after[key] == before[key]
    assert torch.equal(after["torch"], before["torch"])
    assert torch.equal(training.trainer.state_dict()["sampling"]["cpu"], own)
    assert training.trainer.model.training
    assert not training.trainer.ref_model.training
    again = training.held_out.evaluate(0)
    del first[1]["time/evaluating"], again[1]["time/evaluating"]
    assert first == again  # the same random numbers each time


@pytest.mark.filterwarnings("ignore:with rollout")
def test_every_response_is_sampled_as_the_configuration_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["temperature=0.5", "top_k=7", "top_p=0.9", "stop=['.']"]
    training = make(tmp_path / "run", "run.steps=2", *(f"rollout.{change}" for change in changes))
    used = []

    def spy(model: Any, queries: Any, limits: Any, settings: Any, **kwargs: Any) -> Any:
        used.append(settings)
        return sample_responses(model, queries, limits, settings, **kwargs)

    for module in ("ppo_cli.ppo.trainer", "ppo_cli.evaluation.draw_samples"):
        monkeypatch.setattr(f"{module}.sample_responses", spy)
    try:
        assert len(list(training.steps())) == 2
    finally:
        training.directory.unlock()
    ends = tuple(end_tokens(training.tokenizer, ["."], training.trainer.model))
    assert len(ends) > 1
    expected = SamplingParams(0.5, 7, 0.9, ends, training.tokenizer.pad_token_id)
    assert len(used) == 4  # the reference, two batches, an evaluation
    assert used == [expected] * 4


def same_but_for_rounding(one: Quality, other: Quality) -> None:
    assert one.values == pytest.approx(other.values, abs=1e-4)


@pytest.mark.parametrize(
    "changes",
    [[], ["policy.adapter.r=2"], ["policy.num_shared_layers=1"], ["policy.precision=bf16"]],
    ids=["plain", "adapter", "shared layers", "bfloat16"],
)
def test_policy_and_reference_are_measured_separately(changes: list[str], tmp_path: Path) -> None:
    training = make(tmp_path / "run", *changes)
    policy, reference = training.held_out.of_policy(3), training.held_out.of_reference(3)
    assert policy.samples == reference.samples  # as yet the policy is its reference
    same_but_for_rounding(policy.quality, reference.quality)
    assert reference.quality["kl"] == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        for parameter in training.trainer.whole_policy().parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    moved, still = training.held_out.of_policy(3), training.held_out.of_reference(3)
    assert still.samples == reference.samples
    same_but_for_rounding(still.quality, reference.quality)
    assert moved.quality["kl"] > 0.01
    assert moved.quality["entropy"] != pytest.approx(reference.quality["entropy"], abs=1e-3)


def test_the_closing_figures_come_from_other_random_numbers(evaluated: Evaluated) -> None:
    folder, summary = evaluated
    last = rows(folder)[-1]
    assert summary.weights.step == 5  # the very weights that were evaluated last
    assert summary.after["score"] != last["eval/score"]
    assert summary.before["score"] != last["eval/reference_score"]
    assert summary.after.as_dict().keys() >= {"samples", "score", "probability", "kl"}
    assert summary.before.samples == len(summary.before_samples) == 8
    assert summary.before["kl"] == pytest.approx(0, abs=1e-5)


def test_the_card_holds_every_measure_of_both(evaluated: Evaluated) -> None:
    folder, summary = evaluated
    card = (folder / "README.md").read_text()
    for measure in MEASURES:
        low, high = (
            f"{q[measure.key]:.{measure.places}f}" for q in (summary.before, summary.after)
        )
        shown = measure.name.format(label=summary.label)
        assert f"| {shown} | {low} | {high} | {measure.meaning} |" in card
    assert "| weights | step 5 " in card
    assert "ended early" not in card


def test_statistics_are_shown_under_a_heading_where_they_are(evaluated: Evaluated) -> None:
    heading = "Evaluation on Held-out Prompts"
    first, second = rows(evaluated[0])[:2]
    assert heading not in grouped(first, False, explained_statistics())
    found = grouped(second, False, explained_statistics())[heading]
    assert [key for key, _, _ in found] == list(explained_statistics())
    assert all(meaning for _, _, meaning in found)


def test_an_evaluation_is_put_into_its_line_and_taken_out_again(tmp_path: Path) -> None:
    directory, path = RunDirectory(tmp_path), tmp_path / "metrics.jsonl"
    directory.records.put_evaluation(2, {"eval/score": 1.0})  # there is no file yet
    plain: list[dict[str, Any]] = [{"step": n, "a": 0.1 * n, "time/step": 1.0} for n in (1, 2)]
    directory.records.append("metrics.jsonl", plain)
    with path.open("a") as file:
        file.write('{"step": 3, "a"')  # a killed run's last line
    before = path.read_bytes()
    directory.records.put_evaluation(2, {"eval/score": 1.0, "time/evaluating": 2.0})
    assert directory.records.metrics() == [
        plain[0],
        plain[1] | {"eval/score": 1.0, "time/evaluating": 2.0},
    ]
    assert path.read_bytes().endswith(b'{"step": 3, "a"')
    directory.records.put_evaluation(2, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
