"""A response with its score: plain values, no models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Sample:
    """A query, the response to it, and its score.

    Attributes:
        score: of the reward; None where nothing is scored.
        probability: of the classifier's label; None without a classifier.
        rewards: what each term of a composed reward contributes to the score, by name; None where
            the term does not apply.
        reward: in training what PPO learned from, None elsewhere: `rewards` add up to it.
        messages: the conversation that the response answers; None for a text.
        continues: whether the response continues the query, where that is a text.
        ended: whether the model ended the response itself, rather than the limit on its length.
    """

    query: str
    response: str
    score: float | None
    probability: float | None
    messages: list[dict[str, Any]] | None = None
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    reward: float | None = None
    continues: bool = True
    ended: bool = True

    @property
    def gap(self) -> str:
        """What stands between query and response where they are shown together."""
        return "" if self.messages is None and self.continues else "\n"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `messages`, `rewards` and `reward` only where there are any."""
        values = asdict(self)
        del values["continues"], values["ended"]
        if self.messages is None:
            del values["messages"]
        if self.reward is None:
            del values["reward"]
        if not self.rewards:
            del values["rewards"]
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


def has_probability(samples: Sequence[Sample]) -> bool:
    """Whether a classifier scored the samples."""
    return any(sample.probability is not None for sample in samples)


def mean_rewards(samples: Sequence[Sample]) -> dict[str, float]:
    """Mean contribution of each term, by name; they add up to the mean score."""
    names = samples[0].rewards if samples else ()
    return {name: float(np.mean([s.rewards[name] or 0.0 for s in samples])) for name in names}
