"""What a run will take: nothing is changed by measuring, and the arithmetic of scaling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch

from ppo_cli.config.loading import load_config
from ppo_cli.config.schema import RunConfig
from ppo_cli.reporting.estimate import Space, seconds, size
from ppo_cli.training import estimate as estimating
from ppo_cli.training import measure as measuring
from ppo_cli.training.build import build_training
from ppo_cli.training.estimate import (
    checkpoint_count,
    estimate,
    evaluation_count,
    evaluation_seconds,
    step_peaks,
    step_seconds,
)
from ppo_cli.training.measure import MeasuredEvaluation, MeasuredStep, Shape, at_size, shapes
from ppo_cli.training.remedies import remedies
from ppo_cli.utils import memory
from ppo_cli.utils.random_state import random_state
from tests.conftest import SMALL_RUN, weights
from tests.forked import ppo_cli

QUICK = ["--config", SMALL_RUN]


def settings(*assignments: str) -> RunConfig:
    return load_config(SMALL_RUN, assignments=["run.device=cpu", *assignments])


def everything(training: Any) -> Any:
    """The state that decides how a run goes on, to compare."""
    state = {
        "weights": weights(training.trainer.model),
        "trainer": training.trainer.state_dict(),
        "lengths": training.ppo_step._length_sampler.state_dict(),
        "random": random_state(),
        "gradients": [p.grad for p in training.trainer.model.parameters()],
        "sizes": (training.trainer.config.batch_size, training.trainer.config.log_with),
    }
    return json.dumps(state, default=lambda tensor: crc32(tensor.numpy().tobytes()))


@pytest.mark.usefixtures("fresh_accelerate")
def test_measuring_changes_nothing_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # As a reward could, which draws from the process's random numbers.
    monkeypatch.setattr("ppo_cli.training.step.check_texts", lambda *_: torch.rand(1))
    # Adam's moments, an adaptive learning rate and calibrated scores: much that could change.
    asked = ["ppo.lr_scheduler_type=adaptive", "ppo.mini_batch_size=8", "reward.score_every=8"]
    training = build_training(settings(*asked))
    training.ppo_step.run(0)
    before = everything(training)
    found = estimate(training, 7.0)
    assert everything(training) == before
    assert list(tmp_path.iterdir()) == []

    times = found.times
    assert times is not None
    assert (times.startup, times.steps, times.evaluations) == (7.0, 1, 4)
    assert min(times.step, times.evaluation, times.saving) > 0
    parts = times.step + times.evaluation * 4 + times.saving
    assert times.total == pytest.approx(7.0 + parts)
    assert found.samples == 16
    assert found.measured == "steps of 8 and 16 samples, evaluations of 8 prompts"
    model_bytes = weights(training.trainer.model).numel() * 4
    kinds = {space.kind: space for space in found.spaces}
    assert model_bytes * 4 < kinds["memory"].needed < kinds["memory"].available
    assert kinds["disk"].needed == (3 + 2) * model_bytes  # the last checkpoint, the model twice


@pytest.mark.usefixtures("fresh_accelerate")
def test_what_does_not_fit_is_said_with_what_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    training = build_training(settings())
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    found = estimate(training, 0.0)  # not even the gradients fit: no step is made
    assert found.times is None
    assert found.measured == estimating.NO_ROOM
    assert [space.kind for space in found.lacking] == ["memory"]
    assert "policy.adapter" in found.remedies[0]
    unmeasured = estimate(training, 0.0, measure=False)
    assert (unmeasured.times, unmeasured.lacking) == (None, [])
    assert unmeasured.measured == estimating.NOT_MEASURED


def step(mini: int, minis: int, chunk: int, **changes: Any) -> MeasuredStep:
    """A step whose costs are 1 + 0.1 a sequence (sampling), 2 + 0.2 (mini-batch), 3 + 0.3."""
    values = {
        "sampling": 1 + 0.1 * chunk,
        "updating": 2 + 0.2 * mini,
        "rest": 3 + 0.3 * mini * minis,
        "peak_sampling": 1000 + 2 * chunk,
        "peak_updating": 1000 + 10 * mini,
    }
    return MeasuredStep(Shape(mini, minis, 1), chunk, **{**values, **changes})


def test_a_step_is_scaled_by_sampling_calls_mini_batches_and_samples() -> None:
    asked = ["ppo.batch_size=96", "ppo.mini_batch_size=24", "rollout.batch_size=32"]
    measured = [step(4, 2, 8), step(12, 2, 24)]
    expected = 3 * (1 + 0.1 * 32) + 4 * (2 + 0.2 * 24) + 3 + 0.3 * 96
    assert step_seconds(measured, settings(*asked)) == pytest.approx(expected)
    assert step_peaks(measured, settings(*asked), 0) == pytest.approx((1064, 1240))
    whole = [step(4, 2, 8), step(24, 4, 32)]  # the run's own step was measured: nothing to scale
    assert step_seconds(whole, settings(*asked)) == pytest.approx(whole[-1].seconds)


def test_a_line_through_two_sizes_is_followed_unless_it_falls() -> None:
    assert at_size([(2, 10.0), (4, 14.0)], 10) == 26.0
    assert at_size([(2, 10.0), (4, 9.0)], 10) == 9.0
    assert at_size([(4, 9.0)], 8) == 18.0
    assert at_size([(4, 9.0)], 8, start=5.0) == 13.0


def test_an_evaluation_is_scaled_by_calls_of_sampling() -> None:
    measured = [MeasuredEvaluation(16, 2.0, 0), MeasuredEvaluation(32, 3.0, 0)]
    assert evaluation_seconds(measured, 256) == 5.0 * 4  # 64 prompts at once
    assert evaluation_seconds(measured, 32) == 3.0


@pytest.mark.parametrize(
    ("asked", "done", "evaluations", "checkpoints"),
    [
        (["run.steps=128", "run.eval_every=32", "run.checkpoint_every=50"], 0, 7, 7),
        (["run.steps=100", "run.eval_every=0", "run.checkpoint_every=0"], 0, 4, 2),
        (["run.steps=10", "run.eval_every=4", "run.checkpoint_every=0"], 4, 5, 2),
        (["run.steps=4", "run.eval_every=4", "run.best_of_n=[1,8]"], 0, 12, 2),
    ],
)
def test_evaluations_and_checkpoints_are_counted(
    asked: list[str], done: int, evaluations: int, checkpoints: int
) -> None:
    config = settings(*asked)
    assert evaluation_count(config, done) == evaluations
    assert checkpoint_count(config, done) == checkpoints


def test_measured_shapes_have_the_form_of_the_runs_own() -> None:
    def sizes(*asked: str) -> list[Shape]:
        return shapes(settings(*asked))

    assert sizes("ppo.batch_size=6", "ppo.mini_batch_size=6")[0] == Shape(4, 1, 1)
    accumulated = "ppo.gradient_accumulation_steps=4"
    several = sizes("ppo.batch_size=64", "ppo.mini_batch_size=8", accumulated)
    assert (several[0], several[-1]) == (Shape(4, 2, 2), Shape(8, 8, 4))
    grouped = sizes("ppo.batch_size=24", "ppo.mini_batch_size=24", "ppo.responses_per_query=6")
    assert [shape.mini for shape in grouped] == [6, 12, 18, 24]


def test_remedies_name_the_largest_sizes_that_fit() -> None:
    config = settings("ppo.batch_size=64", "ppo.mini_batch_size=64")
    measured = [step(4, 1, 4), step(16, 1, 16)]
    found = remedies(config, measured, Space("memory", 1640, 1400), 1000)
    assert found[0].startswith("ppo.mini_batch_size=32 with ppo.gradient_accumulation_steps=2 ")
    assert found[1].startswith("ppo.gradient_checkpointing=true")
    assert not any("rollout" in line for line in found)
    hungry = [step(4, 1, 4, peak_sampling=1200), step(16, 1, 16, peak_sampling=1800)]
    found = remedies(config, hungry, Space("memory", 4200, 2700), 1000)
    assert found[0].startswith("rollout.batch_size=32 ")
    found = remedies(config, measured, Space("memory", 1640, 900), 1000)  # the weights are too many
    assert found[0].startswith("policy.adapter")


@pytest.mark.parametrize(
    ("seconds", "peak", "made"),
    [
        (0.1, 0, [4, 4, 64]),  # a whole step of the run
        (4.0, 0, [4, 4, 12]),  # what takes 12 seconds
        (9.0, 0, [4, 4, 8]),  # twice as much, if that takes longer
        (13.0, 0, [4]),
        (0.1, 2**60, [4, 4]),  # a larger one might not fit into memory
    ],
)
def test_the_larger_step_is_bounded_by_time_and_memory(
    seconds: float, peak: int, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Training:
        config = settings("ppo.batch_size=64", "ppo.mini_batch_size=64")

        class trainer:
            class accelerator:
                device = torch.device("cpu")

    sizes: list[int] = []

    def fake(_: Any, shape: Shape) -> MeasuredStep:
        sizes.append(shape.mini)
        costs = {"sampling": seconds, "updating": 0.0, "rest": 0.0, "peak_updating": peak}
        return step(shape.mini, shape.minis, shape.samples, **costs)

    monkeypatch.setattr(measuring, "_step", fake)
    measured = measuring.measure_steps(Training)  # type: ignore[arg-type]
    assert sizes == made
    assert [step.shape.mini for step in measured] == sorted({*made})


def test_durations_and_sizes_are_written_in_two_units() -> None:
    assert [seconds(v) for v in (0.123, 9.9, 59.4, 95, 11460)] == [
        "0.12 s", "9.9 s", "59 s", "1 min 35 s", "3 h 11 min",
    ]  # fmt: skip
    assert [size(v) for v in (2**20, 1.5 * 2**30)] == ["1 MiB", "1.5 GiB"]


def little_memory() -> None:
    memory.available = lambda device: memory.used(device) + 2**20  # type: ignore[assignment]


def test_a_dry_run_prints_what_the_run_takes(tmp_path: Path) -> None:
    done = ppo_cli("train", *QUICK, "--dry-run", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "all is well" in done.err
    found = json.loads(done.out)
    assert found["fits"] and found["steps"] == 2 and found["samples"] == 32
    assert found["times"]["total"] > found["times"]["startup"] > 0
    refused = ppo_cli("train", *QUICK, "--dry-run", cwd=tmp_path, fault=little_memory)
    assert refused.code == 1
    assert "steps     2 of 16 samples" in refused.out and "too little" in refused.out
    assert "error: the run does not fit: it needs about" in refused.err
    assert "policy.adapter={}" in refused.err and "all is well" not in refused.err
    assert list(tmp_path.iterdir()) == []
