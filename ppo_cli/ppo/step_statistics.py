"""Computes the statistics of a step; `statistics.py` says what each means."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo_cli.ppo.advantages import masked_mean, masked_var
from ppo_cli.ppo.experience import Experience
from ppo_cli.ppo.forward import TokenOutputs
from ppo_cli.ppo.losses import MinibatchLoss, kl_penalty
from ppo_cli.ppo.statistics import is_array
from ppo_cli.utils.device import fetch, send

MEAN_RATIO, MEAN_K3 = "mean ratio", "mean k3"
"""Means of a mini-batch that decide whether it counts, and are no statistics."""


@torch.no_grad()
def output_means(
    share: Experience, outputs: TokenOutputs, loss: MinibatchLoss
) -> dict[str, Tensor]:
    """Means over the tokens of (a share of) a mini-batch that the policy's outputs decide.

    Args:
        share: b samples.
        outputs: the policy's outputs now, (b, R) each.
        loss: the loss of these samples.

    Returns:
        Scalars: statistics under their keys without `ppo/`, `MEAN_RATIO` and `MEAN_K3`, the KL from
        the old policy.
    """
    mask = share.tokens.mask
    log_ratio = outputs.logprobs - share.logprobs
    return {
        "loss/policy": loss.policy.loss,
        "loss/value": loss.value.loss,
        "loss/total": loss.total,
        "policy/clipfrac": loss.policy.clipfrac,
        "val/clipfrac": loss.value.clipfrac,
        "policy/entropy": masked_mean(outputs.entropies, mask),
        "policy/approxkl": 0.5 * masked_mean(log_ratio.square(), mask),
        "policy/policykl": masked_mean(-log_ratio, mask),
        "val/vpred": masked_mean(outputs.values, mask),
        "val/error": masked_mean((outputs.values - share.returns).square(), mask),
        MEAN_RATIO: masked_mean(log_ratio.exp(), mask),
        MEAN_K3: masked_mean(kl_penalty(share.logprobs, outputs.logprobs, "k3"), mask),
    }


@torch.no_grad()
def minibatch_statistics(
    batch: Experience, means: Mapping[str, Tensor], is_skipped: Tensor
) -> dict[str, Tensor]:
    """Scalar statistics of one mini-batch, under their keys without `ppo/`.

    Args:
        batch: its samples.
        means: its `output_means`; losses of 0 are reported where it is skipped.
        is_skipped: scalar bool: whether the mini-batch exceeds `ratio_threshold`.
    """
    mask = batch.tokens.mask
    losses = ("loss/policy", "loss/value", "loss/total")
    return {
        **{key: torch.where(is_skipped, 0.0, means[key]) for key in losses},
        "policy/clipfrac": means["policy/clipfrac"],
        "val/clipfrac": means["val/clipfrac"],
        "policy/entropy": means["policy/entropy"],
        "policy/approxkl": means["policy/approxkl"],
        "policy/policykl": means["policy/policykl"],
        "policy/advantages_mean": masked_mean(batch.advantages, mask),
        "returns/mean": masked_mean(batch.returns, mask),
        "returns/var": masked_var(batch.returns, mask),
        "val/vpred": means["val/vpred"],
        "val/error": means["val/error"],
        "val/mean": masked_mean(batch.values, mask),
        "val/var": masked_var(batch.values, mask),
        "policy/skipped": is_skipped.float(),
    }


@torch.no_grad()
def minibatch_arrays(
    share: Experience, outputs: TokenOutputs, order: Tensor | None = None
) -> dict[str, Tensor]:
    """A number for each token that counts, (N,) each, under the keys without `ppo/`.

    Args:
        share: b samples.
        outputs: the policy's outputs now, (b, R) each.
        order: (b,) order of the samples in the arrays; None for the order that they have.
    """
    tokens = share.tokens
    arrays = [share.advantages, (outputs.logprobs - share.logprobs).exp()]
    if order is not None:
        tokens, rows = tokens.select(order), send(order, tokens.device)
        arrays = [grid[rows] for grid in arrays]
    advantages, ratio = map(tokens.flat, arrays)
    return {"policy/advantages": advantages, "policy/ratio": ratio}


def join_minibatches(minibatches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Statistics of several mini-batches: scalars stacked, arrays joined."""
    return {
        key: (torch.cat if is_array(f"ppo/{key}") else torch.stack)(
            [stats[key] for stats in minibatches]
        )
        for key in minibatches[0]
    }


def step_statistics(
    experience: Experience,
    kl_penalties: Tensor,
    kl_rewards: Tensor,
    scores: Tensor,
    kl_coef: float,
    updates: Mapping[str, Tensor],
) -> dict[str, Any]:
    """All statistics of a step apart from lengths and times, as tensors and floats.

    Args:
        experience: the batch before the update.
        kl_penalties: (B, R) KL penalty of each token, before the coefficient.
        kl_rewards: (B, R) the part of the rewards that is KL.
        scores: (B,) scaled and clipped.
        kl_coef: the coefficient that the step used.
        updates: the mini-batches' statistics, as `Update.run` returns them.
    """
    tokens = experience.tokens
    kl = kl_penalties.sum(dim=1)
    stats: dict[str, Any] = {
        "objective/kl": kl.mean(),
        "objective/kl_dist": kl,
        "objective/logprobs": tokens.to_rows(experience.logprobs),
        "objective/ref_logprobs": tokens.to_rows(experience.ref_logprobs),
        "objective/kl_coef": kl_coef,
        "objective/entropy": -experience.logprobs.sum(dim=1).mean(),
        "ppo/mean_non_score_reward": masked_mean(kl_rewards, tokens.mask),
        "ppo/mean_scores": scores.mean(),
        "ppo/std_scores": scores.std() if len(scores) > 1 else scores.new_zeros(()),
    }
    for key, value in updates.items():
        name = f"ppo/{key}"
        stats[name] = value if is_array(name) else value.mean(0)
    if {"ppo/val/error", "ppo/returns/var"} <= stats.keys():  # a replaced loss may have others
        error, variance = stats["ppo/val/error"], stats["ppo/returns/var"]
        stats["ppo/val/var_explained"] = torch.where(variance > 0, 1 - error / variance, 0.0)
    return stats


def length_statistics(name: str, lengths: list[int]) -> dict[str, Any]:
    """`tokens/NAME_len_mean`, `_len_std` and `_dist` of B lengths in tokens."""
    dist = np.asarray(lengths, dtype=np.float32)
    return {
        f"tokens/{name}_len_mean": float(dist.mean()),
        f"tokens/{name}_len_std": float(dist.std(ddof=1)) if len(dist) > 1 else 0.0,
        f"tokens/{name}_dist": dist,
    }


def to_numbers(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as floats where they hold one element and the key is no array, else as NumPy arrays.

    This waits for a GPU, once.
    """
    tensors = {k: v.detach().float() for k, v in stats.items() if isinstance(v, torch.Tensor)}
    flat = fetch([tensor.flatten() for tensor in tensors.values()])
    arrays = {
        key: part.view(tensor.shape).numpy()
        for (key, tensor), part in zip(tensors.items(), flat, strict=True)
    }
    numbers: dict[str, Any] = {}
    for key, value in {**stats, **arrays}.items():
        if not is_array(key) and np.size(value) == 1:
            value = float(np.asarray(value).item())
        numbers[key] = value
    return numbers


class Stopwatch:
    """Seconds of each part of a step, under `time/ppo/NAME`, and of the whole step.

    A part ends when its work is queued on the GPU; only the last part waits for the results.
    """

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self._started = self._mark = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a part."""
        now = time.perf_counter()
        self.times[f"time/ppo/{name}"] = now - self._mark
        self._mark = now

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started
