"""Scores before they become rewards: running moments, scaling, calibrated potentials."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ppo_cli.ppo.scores import DECAY, PRIOR, PotentialCalibration, RunningMoments
from tests.conftest import make_batch, make_policy, make_silent_policy, make_trainer


def normal(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------- scaling


def test_running_moments_are_numpys_over_everything_seen() -> None:
    moments, seen = RunningMoments(), np.empty(0)
    for i, size in enumerate((5, 1, 32, 3)):
        batch = normal(size, seed=20 + i) * (i + 1) + 10 * i
        own = moments.update(batch)
        seen = np.concatenate([seen, batch.numpy()])
        assert moments.mean == pytest.approx(seen.mean())
        assert moments.std == pytest.approx(seen.std(ddof=1))
        assert moments.var == pytest.approx(seen.var())
        assert own[0] == pytest.approx(batch.numpy().mean())
        if size > 1:
            assert own[1] == pytest.approx(batch.numpy().std(ddof=1))


def test_running_moments_go_on_from_their_saved_state() -> None:
    first, second, whole = RunningMoments(), RunningMoments(), RunningMoments()
    a, b = normal(8, seed=30), normal(6, seed=31) + 4
    first.update(a)
    second.load_state_dict(first.state_dict())
    second.update(b)
    whole.update(torch.cat([a, b]))
    assert second.state_dict() == pytest.approx(whole.state_dict())
    assert first.count == 8  # the state is a copy


def test_running_moments_of_one_score_are_finite() -> None:
    moments = RunningMoments()
    moments.update(torch.tensor([3.0]))
    assert moments.mean == pytest.approx(3.0)
    assert math.isfinite(moments.std)


def test_potentials_are_scaled_and_clipped_as_the_scores_are() -> None:
    queries, responses, scores = make_batch()
    constant = [torch.full((len(r),), float(s)) for r, s in zip(responses, scores, strict=True)]
    settings = {"use_score_scaling": True, "use_score_norm": True, "score_clip": 0.5}
    policy = make_silent_policy()
    trainer = make_trainer(policy, advantage_norm="none", ppo_epochs=1, **settings)
    stats = trainer.step(queries, responses, scores, potentials=constant)
    # The potentials equal the scores: no token changed anything.
    np.testing.assert_allclose(stats["ppo/policy/advantages"], 0, atol=1e-5)


def test_scores_times_ten_make_the_same_run_where_they_are_scaled() -> None:
    def trained(factor: float, **settings: Any) -> Tensor:
        trainer = make_trainer(make_policy(0), init_kl_coef=0.3, **settings)
        for seed in range(2):
            queries, responses, scores = make_batch(seed=seed)
            trainer.step(queries, responses, [factor * score for score in scores])
        return trainer.model.pretrained_model.transformer.wte.weight.detach()

    scaled: dict[str, Any] = {"use_score_scaling": True, "score_scaling_samples": 8}
    torch.testing.assert_close(trained(10, **scaled), trained(1, **scaled), atol=1e-6, rtol=0)
    assert not torch.allclose(trained(10), trained(1), atol=1e-4)


def test_the_scale_stays_once_it_has_its_samples_and_they_differ() -> None:
    trainer = make_trainer(use_score_scaling=True, score_scaling_samples=9)
    queries, responses, _ = make_batch()

    def scale_after(scores: Tensor) -> float:
        trainer.step(queries, responses, list(scores))
        return trainer.running.std

    equal, spread = torch.full((8,), 2.0), torch.arange(8.0)
    assert [scale_after(equal) for _ in range(2)] == pytest.approx([0, 0])  # without a spread
    found = scale_after(spread)
    assert found == pytest.approx(float(torch.cat([equal, equal, spread]).std()))
    assert scale_after(10 * spread) == found


# ---------------------------------------------------------------- calibration

SLOPES, OFFSETS = np.array([0.3, 0.6, 0.9]), np.array([0.5, -0.2, 0.1])


def potentials_and_scores(seed: int, count: int = 4000) -> tuple[Tensor, Tensor, Tensor]:
    """Potentials of texts of three tokens, and scores that depend on them with SLOPES."""
    random = np.random.RandomState(seed)
    score = random.randn(count)
    spread = np.sqrt(1 / SLOPES - 1)  # noise of this width makes the regression's slope so
    phi = (score[:, None] + spread * random.randn(count, 3)) + OFFSETS
    return torch.tensor(phi), torch.tensor(score), torch.ones(count, 3, dtype=torch.bool)


def test_calibrated_potentials_are_the_expected_scores() -> None:
    phi, scores, mask = potentials_and_scores(0)
    calibration = PotentialCalibration()
    calibration.update(phi, scores, mask)
    expected = calibration(phi, mask)
    for t in range(3):
        slope, offset = np.polyfit(phi[:, t].numpy(), scores.numpy(), 1)
        found = np.polyfit(phi[:, t].numpy(), expected[:, t].numpy(), 1)
        assert found == pytest.approx([slope, offset], abs=0.02)
        assert slope == pytest.approx(SLOPES[t], abs=0.03)
    assert ((scores.unsqueeze(1) - expected).square().mean(0) < scores.var() * 0.75).all()


def test_few_observations_move_little_and_old_ones_fade() -> None:
    phi, scores, mask = potentials_and_scores(1)
    few, many, before = (PotentialCalibration() for _ in range(3))
    few.update(phi[:3], scores[:3], mask[:3])
    assert few.lines()[2] == pytest.approx((0, 1), abs=0.2)
    before.update(-3 * phi[:50], scores[:50], mask[:50])
    for _ in range(60):
        many.update(phi[:50], scores[:50], mask[:50])
        before.update(phi[:50], scores[:50], mask[:50])
    np.testing.assert_allclose(many.lines(), before.lines(), atol=0.02)
    slope = np.polyfit(phi[:50, 2].numpy(), scores[:50].numpy(), 1)[0]
    n = 50 * (1 - DECAY**60) / (1 - DECAY)
    assert many.lines()[2][1] == pytest.approx(1 + n / (n + PRIOR) * (slope - 1))


def test_positions_that_nothing_is_known_of_are_as_those_after_them() -> None:
    calibration = PotentialCalibration()
    phi = torch.tensor([[7.0, 1.0, 5.0], [7.0, 2.0, 0.0]])  # the same before each first token
    mask = torch.tensor([[True, True, True], [True, True, False]])
    calibration.update(phi, torch.tensor([4.0, 6.0]), mask)
    assert calibration.lines()[0][1] == calibration.lines()[1][1]
    assert np.isfinite(calibration.lines()).all()
    assert calibration(phi, mask)[1, 2] == 0


def test_calibration_goes_on_where_a_checkpoint_left_it() -> None:
    queries, responses, scores = make_batch()
    phi = [
        torch.randn(len(r), generator=torch.Generator().manual_seed(i))
        for i, r in enumerate(responses)
    ]
    first, second = make_trainer(make_policy()), make_trainer(make_policy())
    first.step(queries, responses, scores, potentials=phi)
    second.load_state_dict(first.state_dict())
    assert first.state_dict()["calibration"]["sums"] == second.state_dict()["calibration"]["sums"]
    assert len(first.state_dict()["calibration"]["sums"]) == max(map(len, responses))


def test_a_step_calibrates_unless_told_otherwise() -> None:
    """After some steps on one batch, potentials that are too extreme are corrected."""
    queries, responses, scores = make_batch()
    phi = [3 * s + torch.zeros(len(r)) for r, s in zip(responses, scores, strict=True)]
    largest = []
    for calibrate in (False, True):
        policy = make_silent_policy()
        settings = {"init_kl_coef": 0.0, "learning_rate": 0.0, "advantage_norm": "none"}
        trainer = make_trainer(policy, calibrate_potentials=calibrate, **settings)
        for _ in range(20):
            stats = trainer.step(queries, responses, scores, potentials=phi)
        largest.append(float(np.abs(stats["ppo/policy/advantages"]).max()))
    assert largest[1] < largest[0] / 2
