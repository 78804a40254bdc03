"""A response with its score: plain values, no models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Sample:
    """A query, the response to it, and its score and probability (None without a classifier).

    `messages` is the conversation that the response answers; None for a text that it continues.
    """

    query: str
    response: str
    score: float | None
    probability: float | None
    messages: list[dict[str, Any]] | None = None

    @property
    def gap(self) -> str:
        """What stands between query and response where they are shown together."""
        return "" if self.messages is None else "\n"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `messages` only of a conversation."""
        values = asdict(self)
        if self.messages is None:
            del values["messages"]
        return values


@dataclass(frozen=True)
class Generated:
    """All samples of one model, prompt by prompt."""

    model: str
    samples: list[Sample]


def mean_score(samples: Sequence[Sample]) -> float:
    """Mean score of the samples that have one."""
    return float(np.mean([s.score for s in samples if s.score is not None]))


def mean_probability(samples: Sequence[Sample]) -> float:
    """Mean probability of the wanted label over the samples that have one."""
    return float(np.mean([s.probability for s in samples if s.probability is not None]))
