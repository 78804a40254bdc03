"""Potential-based shaping: what it credits, what it leaves alone, and that it learns faster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ppo_cli.models.sampling import Rollout
from ppo_cli.ppo.advantages import generalized_advantages, shaping_rewards
from ppo_cli.ppo.scores import DECAY, PRIOR, PotentialCalibration
from ppo_cli.rewards.partial_scores import potentials
from tests.conftest import make_batch, make_policy, make_silent_policy, make_trainer


class Characters:
    """A tokenizer whose texts show which tokens they are made of."""

    def batch_decode(self, rows: Sequence[list[int]], **_: Any) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


def total(texts: Sequence[str]) -> Tensor:
    return torch.tensor([float(sum(map(int, text.split()))) for text in texts])


def rollout(*pairs: tuple[list[int], list[int]]) -> Rollout:
    queries, responses = zip(*pairs, strict=True)
    count = [""] * len(pairs)
    return Rollout(
        [torch.tensor(q) for q in queries],
        [torch.tensor(r, dtype=torch.long) for r in responses],
        count,
        count,
    )


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, [[1, 11, 111, 1111, 11111], [3], []]),
        (2, [[1, 1, 111, 111, 11111], [3], []]),
        (3, [[1, 1, 1, 1111, 1111], [3], []]),
        (9, [[1, 1, 1, 1, 1], [3], []]),
    ],
)
def test_the_text_is_scored_as_it_stood_before_each_token(
    every: int, expected: list[list[float]]
) -> None:
    drawn = rollout(([1], [10, 100, 1000, 10000, 5]), ([1, 2], [7]), ([4], []))
    found = potentials(drawn, Characters(), total, every)
    assert [row.tolist() for row in found] == expected


def test_no_response_has_no_potentials() -> None:
    assert [len(row) for row in potentials(rollout(([1], [])), Characters(), total, 1)] == [0]


def test_shaping_adds_to_each_sequence_what_no_response_can_change() -> None:
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    phi = torch.tensor([[1.0, 5.0, -2.0, 3.0], [7.0, 2.0, 99.0, 99.0]])
    rewards = shaping_rewards(phi, mask, 1.0)
    assert rewards.tolist() == [[4.0, -7.0, 5.0, -3.0], [-5.0, -2.0, 0.0, 0.0]]
    assert rewards.sum(1).tolist() == [-1.0, -7.0]
    assert shaping_rewards(phi, mask, 0.5)[0].tolist() == [1.5, -6.0, 3.5, -3.0]


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_shaping_does_what_adding_the_potentials_to_the_values_would(
    lam: float, gamma: float
) -> None:
    g = torch.Generator().manual_seed(0)
    values, rewards, phi = (torch.randn(3, 5, generator=g) for _ in range(3))
    mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
    shaped, _ = generalized_advantages(
        values, rewards + shaping_rewards(phi, mask, gamma), mask, gamma, lam
    )
    direct, _ = generalized_advantages(values + phi, rewards, mask, gamma, lam)
    torch.testing.assert_close(shaped, direct)


def test_a_step_credits_each_token_with_the_change_of_its_potential() -> None:
    """With lambda 0, no KL and a value head of zeros nothing else is left."""
    policy = make_silent_policy()
    settings = {"calibrate_potentials": False, "advantage_norm": "none", "ppo_epochs": 1}
    trainer = make_trainer(policy, lam=0.0, **settings)
    queries, responses, scores = make_batch()
    phi = [torch.arange(len(r)).float() * (i + 1) for i, r in enumerate(responses)]
    stats = trainer.step(queries, responses, scores, potentials=phi)
    expected = []
    for i in np.random.RandomState(0).permutation(8):
        expected += [i + 1] * (len(responses[i]) - 1)
        expected.append(float(scores[i]) - float(phi[i][-1]))
    np.testing.assert_allclose(stats["ppo/policy/advantages"], expected, rtol=1e-4, atol=1e-5)
    assert stats["ppo/mean_scores"] == pytest.approx(float(torch.stack(scores).mean()))


def test_potentials_are_scaled_and_clipped_as_the_scores_are() -> None:
    queries, responses, scores = make_batch()
    constant = [torch.full((len(r),), float(s)) for r, s in zip(responses, scores, strict=True)]
    settings = {"use_score_scaling": True, "use_score_norm": True, "score_clip": 0.5}
    policy = make_silent_policy()
    trainer = make_trainer(policy, advantage_norm="none", ppo_epochs=1, **settings)
    stats = trainer.step(queries, responses, scores, potentials=constant)
    # The text promised just what it came to: no token changed anything.
    np.testing.assert_allclose(stats["ppo/policy/advantages"], 0, atol=1e-5)


def test_masked_tokens_take_no_part() -> None:
    queries, responses, scores = make_batch()
    masks = [torch.arange(len(r)) % 2 == 0 for r in responses]
    phi = [torch.randn(len(r)) for r in responses]
    changed = [torch.where(m, p, 1e3) for m, p in zip(masks, phi, strict=True)]
    stats = [
        make_trainer(make_policy()).step(queries, responses, scores, masks, potentials=p)
        for p in (phi, changed)
    ]
    for key in ("ppo/policy/advantages", "ppo/returns/mean"):
        np.testing.assert_array_equal(stats[0][key], stats[1][key])


@pytest.mark.parametrize("bad", ["short", "few", "nan"])
def test_wrong_potentials_are_refused(bad: str) -> None:
    queries, responses, scores = make_batch()
    phi = [torch.zeros(len(r)) for r in responses]
    if bad == "few":
        phi = phi[:-1]
    else:
        phi[3] = torch.zeros(len(responses[3]) + 1) if bad == "short" else phi[3] * torch.nan
    what = "8 tensors" if bad == "few" else r"potentials\[3\] must be \d+ finite numbers"
    with pytest.raises(ValueError, match=what):
        make_trainer().step(queries, responses, scores, potentials=phi)


# ---------------------------------------------------------------- calibration

SLOPES, OFFSETS = np.array([0.3, 0.6, 0.9]), np.array([0.5, -0.2, 0.1])


def promises(seed: int, count: int = 4000) -> tuple[Tensor, Tensor, Tensor]:
    """Potentials of texts of three tokens, from scores that hang on them as SLOPES say."""
    random = np.random.RandomState(seed)
    score = random.randn(count)
    spread = np.sqrt(1 / SLOPES - 1)  # noise of this width makes the regression's slope so
    phi = (score[:, None] + spread * random.randn(count, 3)) + OFFSETS
    return torch.tensor(phi), torch.tensor(score), torch.ones(count, 3, dtype=torch.bool)


def test_calibrated_potentials_are_the_expected_scores() -> None:
    phi, scores, mask = promises(0)
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
    phi, scores, mask = promises(1)
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


def test_what_others_saw_counts_too() -> None:
    """Two processes, of which one has shorter texts, calibrate as one that has all of them."""
    phi, scores, mask = (part[:40] for part in promises(2))
    mask[20:, 2] = False
    phi = phi * mask
    alone, joint, second = (PotentialCalibration() for _ in range(3))
    alone.update(phi, scores, mask)
    second.update(phi[20:, :2], scores[20:], mask[20:, :2])
    theirs = torch.tensor([*second.state_dict()["sums"], [0.0] * 5], dtype=torch.float64)
    joint.update(phi[:20], scores[:20], mask[:20], lambda sums: sums + theirs)
    np.testing.assert_allclose(alone.lines(), joint.lines())


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
    """After some steps on one batch potentials that exaggerate are taken for what they are."""
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
