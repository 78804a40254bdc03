"""From log-probabilities and scores to advantages: pure functions over (B, R) grids.

`B` samples, `R` response tokens of the longest one; `mask` is True where a token counts, and the
tokens that count are at the left of their row. Results are zero outside the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor, axis: int | None = None) -> Tensor:
    """Mean of `values` where `mask` is True, along one axis or of all; 0 for no value."""
    return (values * mask).sum(axis) / mask.sum(axis).clamp(min=1)


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance where `mask` is True; 0 for no value. `unbiased` is Bessel's correction."""
    count = mask.sum()
    centered = (values - masked_mean(values, mask)) * mask
    return centered.square().sum() / (count - int(unbiased)).clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale to variance 1 inside `mask` and, with `shift_mean`, to mean 0; zero outside it.

    Source: Huang et al. 2024, "The N Implementation Details of RLHF with PPO", detail on
    whitening (https://huggingface.co/blog/the_n_implementation_details_of_rlhf_with_ppo).
    """
    mean, variance = masked_mean(values, mask), masked_var(values, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def token_rewards(
    scores: Tensor, kl_penalties: Tensor, mask: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    """Per-token rewards: minus the KL coefficient times the penalty, plus the score at the end.

    Args:
        scores: (B,) one score per sequence; a sequence without a token that counts has no reward.
        kl_penalties: (B, R) KL penalty of each token, before the coefficient.
        mask: (B, R).
        kl_coef: the KL coefficient.

    Returns:
        `rewards` (B, R), and the part of them that is KL, (B, R).

    Source: Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593), equation 2.
    """
    non_score = -kl_coef * kl_penalties * mask
    lengths = mask.sum(dim=1)
    positions = torch.arange(mask.shape[1], device=mask.device)
    at_end = positions == (lengths - 1).unsqueeze(1)
    return non_score + at_end * scores.unsqueeze(1), non_score


def mean_of_others(scores: Tensor, size: int) -> Tensor:
    """For each score (B,) the mean of the others in its group of `size` neighbours; 0 for size 1.

    Source: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!".
    """
    if size == 1:
        return torch.zeros_like(scores)
    groups = scores.view(-1, size)
    return ((groups.sum(1, keepdim=True) - groups) / (size - 1)).flatten()


def shaping_rewards(potentials: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Potential-based shaping: `gamma * phi_{t+1} - phi_t` of each token, (B, R), 0 after the last.

    With gamma 1 these rewards add up to minus the first potential of a sequence, which no response
    can change: the best policy is the same, but each token is rewarded at once for its effect.

    Args:
        potentials: (B, R) phi of the state before each token, an estimate of the final score.
        mask: (B, R).
        gamma: discount per token.

    Source: Ng, Harada and Russell 1999, "Policy invariance under reward transformations".
    """
    potentials = potentials * mask
    return gamma * torch.nn.functional.pad(potentials[:, 1:], (0, 1)) - potentials


def generalized_advantages(
    values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates, and returns, the targets of the value head.

    `delta_t = r_t + gamma * v_{t+1} - v_t`, `A_t = delta_t + gamma * lam * A_{t+1}`, both 0 after
    the last token; returns are `A + v`.

    Args:
        values: (B, R) value of the state before each token.
        rewards: (B, R).
        mask: (B, R).
        gamma: discount per token.
        lam: the estimator's lambda.

    Returns:
        `advantages` (B, R), not yet whitened, and `returns` (B, R).

    Source: Schulman et al. 2016 (https://arxiv.org/abs/1506.02438), equation 16.
    """
    values, rewards = values * mask, rewards * mask
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in range(deltas.shape[1] - 1, -1, -1):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    advantages = advantages * mask
    return advantages, (advantages + values) * mask
