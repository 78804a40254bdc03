"""PPO's maths against closed forms, naive loops and other libraries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ppo_cli.kernels.lm_head import entropy, token_logprobs
from ppo_cli.ppo.advantages import (
    generalized_advantages,
    masked_mean,
    masked_var,
    masked_whiten,
    token_rewards,
)
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.ppo.kl_controller import AdaptiveKLController, FixedKLController
from ppo_cli.ppo.losses import full_kl, kl_penalty, minibatch_loss, policy_loss, value_loss


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def left_mask(*lengths: int, width: int | None = None) -> Tensor:
    return torch.tensor([[t < n for t in range(width or max(lengths))] for n in lengths])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# ---------------------------------------------------------------- masked statistics


def test_masked_mean_and_variance_are_numpys_over_the_counted_values() -> None:
    values, mask = normal(4, 7) * 3 + 5, left_mask(7, 3, 0, 1)
    counted = values[mask].numpy()
    assert masked_mean(values, mask).item() == pytest.approx(np.mean(counted))
    assert masked_var(values, mask).item() == pytest.approx(np.var(counted, ddof=1))


def test_masked_statistics_of_nothing_and_of_one_value_are_finite() -> None:
    values = torch.tensor([[4.0, 9.0]])
    assert masked_mean(values, torch.tensor([[False, False]])) == 0
    assert masked_var(values, torch.tensor([[False, False]])) == 0
    assert masked_var(values, torch.tensor([[True, False]])) == 0
    assert masked_whiten(values, torch.tensor([[True, False]])).isfinite().all()


def test_whitened_values_have_mean_0_and_variance_1_inside_the_mask_and_are_0_outside() -> None:
    values, mask = normal(5, 9) * 7 + 3, left_mask(9, 2, 5, 1, 4)
    whitened = masked_whiten(values, mask)
    inside = whitened[mask].numpy()
    assert inside.mean() == pytest.approx(0, abs=1e-9)
    assert inside.var(ddof=1) == pytest.approx(1, abs=1e-6)
    assert (whitened[~mask] == 0).all()


def test_whitening_without_shift_keeps_the_mean_and_still_stays_inside_the_mask() -> None:
    values, mask = normal(5, 9) * 7 + 3, left_mask(9, 2, 5, 1, 4)
    whitened = masked_whiten(values, mask, shift_mean=False)
    inside = whitened[mask].numpy()
    assert inside.mean() == pytest.approx(values[mask].mean().item(), rel=1e-6)
    assert inside.var(ddof=1) == pytest.approx(1, abs=1e-6)
    assert (whitened[~mask] == 0).all()


def test_whitening_keeps_the_order_of_the_values() -> None:
    values, mask = normal(3, 4), left_mask(4, 4, 2)
    assert (masked_whiten(values, mask)[mask].argsort() == values[mask].argsort()).all()


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_does_not_depend_on_padding_or_on_what_lies_in_it(shift_mean: bool) -> None:
    values, mask = normal(3, 4), left_mask(4, 2, 3)
    wide = torch.full((3, 11), 1e3, dtype=torch.float64)
    wide[:, :4] = torch.where(mask, values, -77.0)
    narrow = masked_whiten(values, mask, shift_mean)
    padded = masked_whiten(wide, left_mask(4, 2, 3, width=11), shift_mean)
    torch.testing.assert_close(padded[:, :4], narrow)
    assert (padded[:, 4:] == 0).all()


# ---------------------------------------------------------------- rewards, advantages, returns


def test_the_score_is_added_at_the_last_counted_token_alone() -> None:
    mask = left_mask(3, 1, 0)
    penalties = torch.tensor([[1.0, 2.0, 3.0], [4.0, 50.0, 50.0], [50.0, 50.0, 50.0]])
    scores = torch.tensor([10.0, 20.0, 30.0])
    rewards, non_score = token_rewards(scores, penalties, mask, kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, -1.0, 8.5], [18.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert non_score.tolist() == [[-0.5, -1.0, -1.5], [-2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_advantages_are_the_discounted_sum_of_later_temporal_differences(
    gamma: float, lam: float
) -> None:
    lengths = (6, 1, 4, 0)
    values, rewards, mask = normal(4, 6, seed=1), normal(4, 6, seed=2), left_mask(*lengths)
    advantages, returns = generalized_advantages(values, rewards, mask, gamma, lam)
    for row, length in enumerate(lengths):
        v, r = values[row].tolist(), rewards[row].tolist()
        deltas = [
            r[t] + gamma * (v[t + 1] if t + 1 < length else 0.0) - v[t] for t in range(length)
        ]
        for t in range(length):
            expected = sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(expected + v[t], abs=1e-12)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_with_lambda_1_returns_are_the_discounted_rewards_to_come(gamma: float) -> None:
    values, rewards, mask = normal(2, 5, seed=3), normal(2, 5, seed=4), left_mask(5, 3)
    _, returns = generalized_advantages(values, rewards, mask, gamma, lam=1.0)
    for row, length in enumerate((5, 3)):
        for t in range(length):
            to_come = sum(gamma ** (k - t) * rewards[row, k].item() for k in range(t, length))
            assert returns[row, t].item() == pytest.approx(to_come, abs=1e-12)


def test_advantages_do_not_depend_on_padding_or_on_what_lies_in_it() -> None:
    values, rewards, mask = normal(2, 4, seed=5), normal(2, 4, seed=6), left_mask(4, 2)
    narrow = generalized_advantages(values, rewards, mask, 0.9, 0.8)
    junk = torch.full((2, 5), 1e3, dtype=torch.float64)
    wide = generalized_advantages(
        torch.cat([torch.where(mask, values, 5.0), junk], 1),
        torch.cat([torch.where(mask, rewards, -9.0), junk], 1),
        left_mask(4, 2, width=9),
        0.9,
        0.8,
    )
    for a, b in zip(narrow, wide, strict=True):
        torch.testing.assert_close(b[:, :4], a)
        assert (b[:, 4:] == 0).all()


# ---------------------------------------------------------------- losses


def naive_policy_loss(ratio: Any, advantages: Any, mask: Any, c: float) -> tuple[float, float]:
    """A loop over tokens; the clip is written as the cases in which it makes a difference."""
    losses, clipped = [], 0
    for r_row, a_row, m_row in zip(ratio.tolist(), advantages.tolist(), mask.tolist(), strict=True):
        for r, a, counts in zip(r_row, a_row, m_row, strict=True):
            if not counts:
                continue
            if a > 0 and r > 1 + c:
                losses.append(-a * (1 + c))
                clipped += 1
            elif a < 0 and r < 1 - c:
                losses.append(-a * (1 - c))
                clipped += 1
            else:
                losses.append(-a * r)
    return sum(losses) / len(losses), clipped / len(losses)


@pytest.mark.parametrize("cliprange", [0.1, 0.2, 0.5])
def test_policy_loss_is_that_of_a_loop_over_tokens(cliprange: float) -> None:
    ratio, advantages = normal(6, 8, seed=7).mul(0.4).exp(), normal(6, 8, seed=8)
    mask = left_mask(8, 3, 5, 1, 0, 7)
    result = policy_loss(ratio, advantages, mask, cliprange)
    loss, clipfrac = naive_policy_loss(ratio, advantages, mask, cliprange)
    assert result.loss.item() == pytest.approx(loss, abs=1e-12)
    assert result.clipfrac.item() == pytest.approx(clipfrac)
    assert 0 < clipfrac < 1


def test_clipped_tokens_have_no_gradient_and_the_others_pull_towards_their_advantage() -> None:
    ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0, 1.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    policy_loss(ratio, advantages, mask, 0.2).loss.backward()
    assert ratio.grad is not None
    assert ratio.grad[0].tolist() == pytest.approx([0.0, 0.0, 0.2, -0.2, -0.2])


@pytest.mark.parametrize("clip", [0.05, 0.2, 0.5])
def test_value_loss_is_that_of_a_loop_over_tokens(clip: float) -> None:
    old, values, returns = normal(4, 6, seed=9), normal(4, 6, seed=10), normal(4, 6, seed=11)
    values = old + 2 * values
    mask = left_mask(6, 2, 4, 1)
    squares, decided = [], 0
    for v, o, r, counts in zip(
        *(t.flatten().tolist() for t in (values, old, returns, mask)), strict=True
    ):
        if not counts:
            continue
        held = o + math.copysign(min(abs(v - o), clip), v - o)
        squares.append(max((v - r) ** 2, (held - r) ** 2))
        decided += (held - r) ** 2 > (v - r) ** 2
    result = value_loss(values, old, returns, mask, clip)
    assert result.loss.item() == pytest.approx(sum(squares) / len(squares) / 2, abs=1e-12)
    assert result.clipfrac.item() == pytest.approx(decided / len(squares))
    assert decided > 0


def naive_minibatch_loss(outputs: dict[str, Tensor], config: PPOConfig, kl_coef: float) -> Tensor:
    """A loop over the tokens that count; a clip is written as the cases in which it matters.

    `outputs` are the grids of `minibatch_loss`, under the same names.
    """
    lo, hi, vc = 1 - config.cliprange, 1 + config.cliprange, config.cliprange_value
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, column in outputs["mask"].nonzero().tolist():
        now = {key: grid[row, column] for key, grid in outputs.items()}
        ratio = now["logprobs"].exp() / now["old_logprobs"].exp()
        advantage = now["advantages"].item()
        is_clipped = ratio > hi if advantage > 0 else ratio < lo
        if not is_clipped:
            total = total - advantage * ratio
        else:
            total = total - advantage * (hi if advantage > 0 else lo)
        moved = (now["values"] - now["old_values"]).item()
        error = (now["values"] - now["returns"]) ** 2
        held = (now["old_values"] + math.copysign(vc, moved) - now["returns"]) ** 2
        if abs(moved) > vc and held > error:
            error = held
        total = total + config.vf_coef * error / 2 - config.ent_coef * now["entropies"]
        if config.kl_in_loss:
            x = now["logprobs"] - now["ref_logprobs"]
            penalty = x * x / 2 if config.kl_penalty == "k2" else 1 / x.exp() - 1 + x
            total = total + kl_coef * penalty
        count += 1
    return total / count


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cliprange": 0.05, "cliprange_value": 0.4, "vf_coef": 1.5},
        {"ent_coef": 0.3},
        {"kl_in_loss": True, "kl_penalty": "k3"},
        {"kl_in_loss": True, "kl_penalty": "k2", "ent_coef": 0.1},
    ],
    ids=str,
)
def test_minibatch_loss_and_its_gradient_are_those_of_a_loop_over_tokens(
    settings: dict[str, Any],
) -> None:
    names = ["logprobs", "entropies", "values", "old_logprobs", "ref_logprobs", "old_values"]
    grids = {
        name: 0.4 * normal(5, 6, seed=40 + i)
        for i, name in enumerate([*names, "advantages", "returns"])
    }
    grids["mask"] = left_mask(6, 2, 0, 1, 5)
    outputs = [grids[name].requires_grad_() for name in names[:3]]
    config = PPOConfig(**settings)
    result = minibatch_loss(**grids, config=config, kl_coef=0.7)
    expected = naive_minibatch_loss(grids, config, 0.7)
    torch.testing.assert_close(result.total, expected)
    assert 0 < result.policy.clipfrac < 1
    assert 0 < result.value.clipfrac < 1
    found, wanted = (
        torch.autograd.grad(loss, outputs, allow_unused=True, materialize_grads=True)
        for loss in (result.total, expected)
    )
    for mine, naive in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, naive)
    assert found[0].abs().max() > 0
    assert found[2].abs().max() > 0


def test_token_logprobs_full_kl_and_entropy_are_those_of_torch_distributions() -> None:
    p_logits, q_logits = normal(9, 13, seed=12) * 3, normal(9, 13, seed=13) * 3
    p = torch.distributions.Categorical(logits=p_logits)
    q = torch.distributions.Categorical(logits=q_logits)
    tokens = torch.randint(0, 13, (9,), generator=generator())
    torch.testing.assert_close(token_logprobs(p_logits, tokens), p.log_prob(tokens))
    expected_kl = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(full_kl(p_logits, q_logits), expected_kl)
    torch.testing.assert_close(entropy(p_logits), p.entropy())
    assert (full_kl(p_logits, q_logits) - full_kl(q_logits, p_logits)).abs().max() > 0.1


def test_kl_penalties_per_token() -> None:
    logprobs, reference = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.0, -3.0])
    assert kl_penalty(logprobs, reference, "kl").tolist() == [0.5, -1.0, 0.0]
    assert kl_penalty(logprobs, reference, "abs").tolist() == [0.5, 1.0, 0.0]
    assert kl_penalty(logprobs, reference, "mse").tolist() == [0.125, 0.5, 0.0]
    assert kl_penalty(logprobs, reference, "k1").tolist() == [0.5, -1.0, 0.0]
    assert kl_penalty(logprobs, reference, "k2").tolist() == [0.125, 0.5, 0.0]
    k3 = [math.exp(-0.5) - 0.5, math.e - 2, 0.0]
    assert kl_penalty(logprobs, reference, "k3").tolist() == pytest.approx(k3)
    with pytest.raises(ValueError, match="sqrt"):
        kl_penalty(logprobs, reference, "sqrt")


def test_k1_and_k3_estimate_the_exact_kl_over_samples_and_k3_with_less_noise() -> None:
    p_logits, q_logits = normal(1, 7, seed=14), normal(1, 7, seed=15)
    draws = torch.multinomial(p_logits.softmax(-1)[0], 40_000, True, generator=generator())
    p, q = p_logits.expand(40_000, 7), q_logits.expand(40_000, 7)
    spread = []
    for kind in ("k1", "k3"):
        estimate = kl_penalty(token_logprobs(p, draws), token_logprobs(q, draws), kind)
        error = estimate.std() / 200
        assert abs(estimate.mean() - full_kl(p_logits, q_logits)[0]) < 4 * error
        spread.append(float(error))
    assert spread[1] < spread[0]


def test_over_samples_the_gradient_of_k2_is_that_of_the_exact_kl() -> None:
    logits = normal(1, 5, seed=16).requires_grad_()
    reference = normal(1, 5, seed=17)
    (exact,) = torch.autograd.grad(full_kl(logits, reference).sum(), logits)
    every = torch.arange(5)
    penalties = kl_penalty(
        token_logprobs(logits.expand(5, 5), every),
        token_logprobs(reference.expand(5, 5), every),
        "k2",
    )
    chances = logits.detach().softmax(-1)[0]  # the samples' own: no gradient through them
    (expected,) = torch.autograd.grad((chances * penalties).sum(), logits)
    torch.testing.assert_close(expected, exact)


# ---------------------------------------------------------------- KL coefficient


def test_the_adaptive_coefficient_rises_above_the_target_falls_below_and_rests_on_it() -> None:
    controller = AdaptiveKLController(0.2, target=6.0, horizon=100.0)
    controller.update(6.0, 10)
    assert controller.value == pytest.approx(0.2)
    controller.update(6.6, 10)  # 10 % above, a tenth of the horizon: 1 % up
    assert controller.value == pytest.approx(0.202)
    controller.update(5.4, 10)
    assert controller.value == pytest.approx(0.202 * 0.99)


@pytest.mark.parametrize(("kl", "factor"), [(600.0, 1.02), (0.0, 0.98), (-50.0, 0.98)])
def test_the_adaptive_coefficient_moves_by_a_fifth_of_its_share_at_most(
    kl: float, factor: float
) -> None:
    controller = AdaptiveKLController(0.5, target=6.0, horizon=100.0)
    controller.update(kl, 10)
    assert controller.value == pytest.approx(0.5 * factor)


def test_the_fixed_coefficient_stays() -> None:
    controller = FixedKLController(0.3)
    controller.update(1000.0, 64)
    assert controller.value == 0.3
