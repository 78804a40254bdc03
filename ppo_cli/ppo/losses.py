"""PPO's losses and the divergences beside them: pure functions over flat tokens or (B, R) grids."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ppo_cli.ppo.advantages import masked_mean


class ClippedLoss(NamedTuple):
    """A clipped loss (scalar) and the fraction of tokens where the clipped branch decided."""

    loss: Tensor
    clipfrac: Tensor


def policy_loss(ratio: Tensor, advantages: Tensor, mask: Tensor, cliprange: float) -> ClippedLoss:
    """PPO's clipped surrogate, negated: `mean(max(-A r, -A clip(r, 1 - c, 1 + c)))`.

    Args:
        ratio: (B, R) probability of each token now over that when it was sampled.
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
    """Half the squared error, the larger of that of the value and of the value clipped.

    The clip holds the new value within `cliprange_value` of the old one. All grids are (B, R).

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
    """Per-token penalty from the log-probabilities of the token that was drawn.

    With the log-ratio `x = log p - log q`: `kl`, or `k1`, is x; `mse`, or `k2`, half its square;
    `k3` is `exp(-x) - 1 + x`; `abs` the absolute value. For `full` see `full_kl`, which needs whole
    distributions. Over samples of p, k1 and k3 have the mean `KL(p || q)`; k3 is never negative and
    mostly varies less. k2 is biased, but over p's samples its gradient is that of `KL(p || q)`.

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
