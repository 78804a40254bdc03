"""Bootstrap intervals of means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppo_cli.errors import UsageError

INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its 95 % bootstrap interval."""

    mean: float
    """The mean over the prompts."""
    low: float
    """Lower bound."""
    high: float
    """Upper bound."""


def bootstrap_interval(values: Sequence[float], resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean of `values` with the percentile interval of means of resamples (95 %).

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.
    """
    data = np.asarray(values, dtype=np.float64)
    means = resampled_means(data[:, None], resamples, seed)[:, 0]
    low, high = np.percentile(means, INTERVAL)
    return Interval(float(data.mean()), float(low), float(high))


def resampled_means(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Means of K columns over N rows drawn with replacement, whole rows together.

    Args:
        values: (N, K).
        resamples: R, how often N rows are drawn.
        seed: equal seeds draw equal rows.

    Returns:
        (R, K).
    """
    if not len(values):
        raise UsageError("there is nothing to average: no samples")
    random = np.random.RandomState(seed)
    # A resample at a time: all of them at once are resamples x samples numbers.
    draws = (random.randint(len(values), size=len(values)) for _ in range(resamples))
    return np.stack([values[rows].mean(axis=0) for rows in draws])
