"""What samples come to: means, differences, intervals. Plain values, no models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ppo_cli.errors import UsageError

INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Sample:
    """One response: what was asked, what came, how it was judged (None without a classifier)."""

    query: str
    response: str
    score: float | None
    probability: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Generated:
    """All samples of one model, prompt by prompt."""

    model: str
    samples: list[Sample]


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds of its 95 % bootstrap interval."""

    mean: float
    """The mean over the prompts."""
    low: float
    """Lower bound."""
    high: float
    """Upper bound."""


def mean_score(samples: Sequence[Sample]) -> float:
    """Mean score of samples that were judged."""
    return float(np.mean([s.score for s in samples if s.score is not None]))


def mean_probability(samples: Sequence[Sample]) -> float:
    """Mean probability of the wanted label over samples that were judged."""
    return float(np.mean([s.probability for s in samples if s.probability is not None]))


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
