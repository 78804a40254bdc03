"""Scored samples: the same prompts and random numbers through a model, each response judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ppo_cli.errors import UsageError
from ppo_cli.reward import SentimentReward
from ppo_cli.rollout import sample_texts
from ppo_cli.runtime import RandomStream


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
class Interval:
    """A mean and the bounds of its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def draw_samples(
    model: Any,
    tokenizer: Any,
    queries: Sequence[Any],
    query_texts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int,
    reward: SentimentReward | None,
    batch_size: int = 64,
    **sampling: Any,
) -> list[Sample]:
    """Sample a response to each of N queries, with random numbers that `seed` alone decides.

    Args:
        model: has `generate`; the policy or a plain causal model.
        tokenizer: the model's.
        queries: N tensors of token ids.
        query_texts: N strings, the same queries.
        max_new_tokens: limit on a response.
        seed: two models asked with one seed draw from the same random numbers.
        reward: judges query and response together; None leaves scores out.
        batch_size: sequences a forward pass.
        sampling: temperature, top_k, top_p; pure sampling without.
    """
    stream = RandomStream(seed, model.device)
    with stream.active():
        rollout = sample_texts(
            model,
            tokenizer,
            queries,
            [max_new_tokens] * len(queries),
            batch_size=batch_size,
            **sampling,
        )
    scores: list[float] | list[None] = [None] * len(queries)
    probabilities: list[float] | list[None] = [None] * len(queries)
    if reward is not None:
        logits, chances = reward.scores(rollout.texts)
        scores = (logits if reward.output == "logit" else chances).tolist()
        probabilities = chances.tolist()
    return [
        Sample(*row)
        for row in zip(query_texts, rollout.response_texts, scores, probabilities, strict=True)
    ]


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
    if not values:
        raise UsageError("there is nothing to average: no samples")
    data = np.asarray(values, dtype=np.float64)
    draws = np.random.RandomState(seed).randint(len(data), size=(resamples, len(data)))
    means = data[draws].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(data.mean()), float(low), float(high))
