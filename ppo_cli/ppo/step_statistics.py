"""The statistics of a step, computed; `statistics.py` says what each means."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo_cli.ppo.advantages import masked_mean, masked_var
from ppo_cli.ppo.experience import Experience
from ppo_cli.ppo.statistics import STATISTICS
from ppo_cli.utils.device import fetch


def minibatch_statistics(
    *,
    log_ratio: Tensor,
    advantages: Tensor,
    returns: Tensor,
    old_values: Tensor,
    values: Tensor,
    mask: Tensor,
    entropies: Tensor,
) -> dict[str, Tensor]:
    """Scalars of one mini-batch that do not depend on the losses. All grids are (b, R)."""
    return {
        "policy/entropy": masked_mean(entropies, mask),
        "policy/approxkl": 0.5 * masked_mean(log_ratio.square(), mask),
        "policy/policykl": masked_mean(-log_ratio, mask),
        "policy/advantages_mean": masked_mean(advantages, mask),
        "returns/mean": masked_mean(returns, mask),
        "returns/var": masked_var(returns, mask),
        "val/vpred": masked_mean(values, mask),
        "val/error": masked_mean((values - returns).square(), mask),
        "val/mean": masked_mean(old_values, mask),
        "val/var": masked_var(old_values, mask),
    }


def step_statistics(
    experience: Experience, scores: Tensor, kl_coef: float, updates: Mapping[str, Tensor]
) -> dict[str, Any]:
    """All of a step's statistics but those of lengths and times, as tensors and floats.

    Args:
        experience: the batch before the update.
        scores: (B,) scaled and clipped.
        kl_coef: the coefficient that the step used.
        updates: the mini-batches' statistics, as `Update.run` returns them.
    """
    tokens, mask = experience.tokens, experience.tokens.mask
    kl = experience.penalties.sum(dim=1)
    stats: dict[str, Any] = {
        "objective/kl": kl.mean(),
        "objective/kl_dist": kl,
        "objective/logprobs": tokens.to_rows(experience.logprobs),
        "objective/ref_logprobs": tokens.to_rows(experience.ref_logprobs),
        "objective/kl_coef": kl_coef,
        "objective/entropy": -experience.logprobs.sum(dim=1).mean(),
        "ppo/mean_non_score_reward": masked_mean(experience.non_score_reward, mask),
        "ppo/mean_scores": scores.mean(),
        "ppo/std_scores": scores.std() if len(scores) > 1 else scores.new_zeros(()),
    }
    for key, value in updates.items():
        name = f"ppo/{key}"
        stats[name] = value if STATISTICS[name].is_array else value.mean()
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
    """Tensors to floats where they hold one element and the key is no array, else to NumPy.

    A GPU is waited for once.
    """
    tensors = {k: v.detach().float() for k, v in stats.items() if isinstance(v, torch.Tensor)}
    flat = fetch([tensor.flatten() for tensor in tensors.values()])
    arrays = {
        key: part.view(tensor.shape).numpy()
        for (key, tensor), part in zip(tensors.items(), flat, strict=True)
    }
    numbers: dict[str, Any] = {}
    for key, value in {**stats, **arrays}.items():
        is_array = key in STATISTICS and STATISTICS[key].is_array
        if not is_array and np.size(value) == 1:
            value = float(np.asarray(value).item())
        numbers[key] = value
    return numbers


class Stopwatch:
    """Seconds of each part of a step, under `time/ppo/NAME`, and of all of it.

    A part is over once a GPU has been told what to do; the last waits until it is done.
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
        """Seconds since the beginning."""
        return time.perf_counter() - self._started
