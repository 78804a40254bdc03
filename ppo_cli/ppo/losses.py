"""PPO's losses and the KL penalties: pure functions of (B, R) grids or flat tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_cli.config.ppo import PPOSettings
from ppo_cli.ppo.advantages import masked_mean


class ClippedLoss(NamedTuple):
    """A clipped loss (scalar), and the fraction of tokens where the clipped term is the larger."""

    loss: Tensor
    clipfrac: Tensor


class MinibatchLoss(NamedTuple):
    """The loss of a mini-batch (scalar), and the two clipped losses that it is made of."""

    total: Tensor
    policy: ClippedLoss
    value: ClippedLoss


def minibatch_loss(
    *,
    logprobs: Tensor,
    entropies: Tensor,
    values: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    mask: Tensor,
    config: PPOSettings,
    kl_coef: float,
) -> MinibatchLoss:
    """PPO's loss: policy and value loss, entropy bonus, KL penalty. All grids are (B, R).

        total = policy + vf_coef * value - ent_coef * mean(entropy) + kl_coef * mean(KL penalty)

    with `policy = mean(max(-A r, -A clip(r, 1 - c, 1 + c)))` and `r = exp(logprob - old logprob)`.
    The entropy bonus is off by default; KL is in the loss only with `kl_in_loss`, and in the
    rewards otherwise (`advantages.token_rewards`).

    Args:
        logprobs, entropies, values: the policy's outputs now, with gradients.
        old_logprobs, ref_logprobs, old_values: outputs before the update, of policy and reference.
        advantages, returns: what the policy and the value head learn from.
        mask: True where a token counts.
        config: the clip ranges, coefficients and `kl_penalty` are read.
        kl_coef: the KL coefficient.

    Source: Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), equation 9; for a KL penalty in
    the loss of a language model: Shao et al. 2024 (https://arxiv.org/abs/2402.03300), equation 3.
    """
    ratio = (logprobs - old_logprobs).exp()
    policy = policy_loss(ratio, advantages, mask, config.cliprange)
    value = value_loss(values, old_values, returns, mask, config.cliprange_value)
    total = policy.loss + config.vf_coef * value.loss
    if config.ent_coef:
        total = total - config.ent_coef * masked_mean(entropies, mask)
    if config.kl_in_loss:
        penalties = kl_penalty(logprobs, ref_logprobs, config.kl_penalty)
        total = total + kl_coef * masked_mean(penalties, mask)
    return MinibatchLoss(total, policy, value)


def policy_loss(ratio: Tensor, advantages: Tensor, mask: Tensor, cliprange: float) -> ClippedLoss:
    """PPO's clipped surrogate, negated: `mean(max(-A r, -A clip(r, 1 - c, 1 + c)))`.

    Args:
        ratio: (B, R) probability of each token now, divided by the one when it was sampled.
        advantages: (B, R).
        mask: (B, R).
        cliprange: c.

    Source: Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), equation 7.
    """
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return ClippedLoss(
        masked_mean(torch.maximum(unclipped, clipped), mask),
        masked_mean((clipped > unclipped).float(), mask),
    )


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float
) -> ClippedLoss:
    """Half the mean of the larger squared error: of the value, or of the value when clipped.

    `mean(max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)) / 2`. All grids are (B, R).

    Source: the PPO implementation in OpenAI's baselines; Huang et al. 2024, "The N
    Implementation Details of RLHF with PPO".
    """
    near_old = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    unclipped = (values - returns).square()
    clipped = (near_old - returns).square()
    return ClippedLoss(
        0.5 * masked_mean(torch.maximum(unclipped, clipped), mask),
        masked_mean((clipped > unclipped).float(), mask),
    )


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kind: str) -> Tensor:
    """KL penalty of each token from the log-probabilities of the drawn token; any shape.

    With the log-ratio `x = log p - log q`: `kl`, or `k1`, is x; `mse`, or `k2`, half its square;
    `k3` is `exp(-x) - 1 + x`; `abs` the absolute value. For `full` see `full_kl`, which needs whole
    distributions. Over samples of p, k1 and k3 have the mean `KL(p || q)`; k3 is never negative and
    mostly varies less. k2 is biased, but its gradient over samples of p is that of `KL(p || q)`.

    Raises:
        ValueError: no such kind.

    Source: Schulman 2020, "Approximating KL Divergence" (http://joschu.net/blog/kl-approx.html).
    """
    log_ratio = logprobs - ref_logprobs
    if kind in ("kl", "k1"):
        return log_ratio
    if kind == "abs":
        return log_ratio.abs()
    if kind in ("mse", "k2"):
        return 0.5 * log_ratio.square()
    if kind == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"unknown kl_penalty {kind!r}: one of kl, k1, k2, k3, abs, mse, full")


def full_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Exact `KL(policy || reference)` per token from two (N, V) tensors of logits; (N,)."""
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
