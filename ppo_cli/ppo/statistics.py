"""What `PPOTrainer.step` returns: every key, what it means, and how to print it.

Keys and definitions are TRL 0.11.4's. "Averaged" means: the unweighted mean over the mini-batches
of all epochs of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppo_cli.ppo.advantages import masked_mean, masked_var
from ppo_cli.ppo.experience import Experience


class Statistic(NamedTuple):
    """One key of the statistics: its meaning, and whether it concerns the optimised objective."""

    meaning: str
    objective: bool = False
    is_array: bool = False


STATISTICS: dict[str, Statistic] = {
    "objective/kl": Statistic("KL penalty per sequence, before the coefficient", True),
    "objective/kl_dist": Statistic("the same of each sequence (B,)", True, True),
    "objective/logprobs": Statistic("log-probabilities when sampled (B, T-1)", True, True),
    "objective/ref_logprobs": Statistic("the reference's log-probabilities (B, T-1)", True, True),
    "objective/kl_coef": Statistic("KL coefficient that this step used", True),
    "objective/entropy": Statistic("minus the log-probability of a response, mean", True),
    "ppo/loss/policy": Statistic("clipped policy loss, averaged", True),
    "ppo/loss/value": Statistic("clipped value loss before vf_coef, averaged", True),
    "ppo/loss/total": Statistic("policy loss + vf_coef x value loss, averaged", True),
    "ppo/policy/entropy": Statistic("entropy per token of the policy, averaged", True),
    "ppo/policy/approxkl": Statistic("half the squared log-ratio per token, averaged", True),
    "ppo/policy/policykl": Statistic("old minus new log-probability per token, averaged", True),
    "ppo/policy/clipfrac": Statistic("fraction of tokens with a clipped ratio, averaged", True),
    "ppo/policy/advantages_mean": Statistic("mean whitened advantage, averaged", True),
    "ppo/policy/advantages": Statistic("advantage of each token in training order", True, True),
    "ppo/policy/ratio": Statistic("probability ratio of each token in training order", True, True),
    "ppo/mean_non_score_reward": Statistic("mean reward per token without the score"),
    "ppo/mean_scores": Statistic("mean score, after scaling and clipping"),
    "ppo/std_scores": Statistic("standard deviation of the scores"),
    "ppo/returns/mean": Statistic("mean return, averaged"),
    "ppo/returns/var": Statistic("variance of the returns, averaged"),
    "ppo/val/vpred": Statistic("mean value prediction, averaged"),
    "ppo/val/error": Statistic("squared error of the value prediction, averaged"),
    "ppo/val/clipfrac": Statistic("fraction of tokens with a clipped value, averaged"),
    "ppo/val/mean": Statistic("mean value when sampled, averaged"),
    "ppo/val/var": Statistic("variance of the values when sampled, averaged"),
    "ppo/val/var_explained": Statistic("share of the returns' variance that the values explain"),
    "ppo/learning_rate": Statistic("learning rate of the first parameter group"),
    "tokens/queries_len_mean": Statistic("mean query length, tokens"),
    "tokens/queries_len_std": Statistic("its standard deviation"),
    "tokens/queries_dist": Statistic("query length of each sample (B,)", is_array=True),
    "tokens/responses_len_mean": Statistic("mean response length, tokens"),
    "tokens/responses_len_std": Statistic("its standard deviation"),
    "tokens/responses_dist": Statistic("response length of each sample (B,)", is_array=True),
    "time/ppo/forward_pass": Statistic("seconds: policy and reference before the update"),
    "time/ppo/compute_rewards": Statistic("seconds: rewards"),
    "time/ppo/compute_advantages": Statistic("seconds: advantages"),
    "time/ppo/optimize_step": Statistic("seconds: all epochs"),
    "time/ppo/calc_stats": Statistic("seconds: these statistics"),
    "time/ppo/total": Statistic("seconds: the whole step"),
}


def minibatch_statistics(
    *,
    log_ratio: Tensor,
    advantages: Tensor,
    returns: Tensor,
    old_values: Tensor,
    values: Tensor,
    mask: Tensor,
    token_entropy: Tensor,
) -> dict[str, Tensor]:
    """Scalars of one mini-batch that do not depend on the losses. All grids are (b, R).

    `token_entropy` is (N,), one a counted token.
    """
    return {
        "policy/entropy": token_entropy.mean()
        if token_entropy.numel()
        else log_ratio.new_zeros(()),
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
    """Tensors to floats where they hold one element and the key is no array, else to NumPy."""
    numbers: dict[str, Any] = {}
    for key, value in stats.items():
        if isinstance(value, torch.Tensor):
            value = value.detach().float().cpu().numpy()
        is_array = key in STATISTICS and STATISTICS[key].is_array
        if not is_array and np.size(value) == 1:
            value = float(np.asarray(value).item())
        numbers[key] = value
    return numbers


def scalars(stats: Mapping[str, Any]) -> dict[str, float]:
    """Those statistics that are single numbers."""
    return {k: v for k, v in stats.items() if isinstance(v, (int, float))}


GROUPS: dict[bool, dict[str, tuple[str, ...]]] = {
    True: {
        "Objective Statistics": ("objective/",),
        "PPO Losses (Related to Minimizing Objective Function)": ("ppo/loss/",),
        "PPO Policy Statistics": ("ppo/policy/",),
    },
    False: {
        "Reward and Value Function Estimation": (
            "ppo/mean_",
            "ppo/std_",
            "ppo/returns/",
            "ppo/val/",
        ),
        "Optimizer": ("ppo/learning_rate",),
        "Token Lengths": ("tokens/",),
        "Time Statistics": ("time/", "perf/"),
        "Environment": ("env/",),
    },
}


def grouped(
    stats: Mapping[str, Any], related_to_objective: bool
) -> dict[str, list[tuple[str, float, str]]]:
    """Scalar statistics under their headings: (key, value, meaning) of each."""
    numbers = scalars(stats)
    groups: dict[str, list[tuple[str, float, str]]] = {}
    for title, prefixes in GROUPS[related_to_objective].items():
        rows = [
            (key, numbers[key], STATISTICS[key].meaning if key in STATISTICS else "")
            for key in sorted(numbers, key=_table_order)
            if key.startswith(prefixes)
        ]
        if rows:
            groups[title] = rows
    return groups


def print_ppo_stats(
    stats: Mapping[str, Any],
    related_to_objective: bool = False,
    write: Callable[[str], Any] = print,
) -> None:
    """Print what `step()` returned, a line a statistic, under headings.

    Args:
        stats: the statistics; arrays are left out.
        related_to_objective: True for those that concern the optimised losses, False for the
            others: rewards, values, lengths, times.
        write: called with each line.
    """
    write("PPO Training Statistics")
    for title, rows in grouped(stats, related_to_objective).items():
        write("")
        write(f"{title}:")
        for key, value, meaning in rows:
            label = meaning.partition(",")[0] or key
            shown = f"{value:.6g}" if math.isfinite(value) else str(value)
            write(f"  {label[:1].upper()}{label[1:]} ({key}): {shown}")


def _table_order(key: str) -> tuple[int, str]:
    order = list(STATISTICS)
    return (order.index(key) if key in STATISTICS else len(order), key)
