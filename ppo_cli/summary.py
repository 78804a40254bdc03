"""What a training run reports: each step, and how it ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppo_cli.evaluation import Sample, mean_probability, mean_score


@dataclass(frozen=True)
class StepReport:
    """What one PPO step did, for a display."""

    step: int
    steps: int
    stats: dict[str, float]
    samples: list[Sample]

    @property
    def is_last(self) -> bool:
        """Whether the run is over after this step."""
        return self.step == self.steps


@dataclass(frozen=True)
class Judgement:
    """Mean score and mean probability of the label, on held-out prompts."""

    score: float
    probability: float

    @classmethod
    def of(cls, samples: list[Sample]) -> Judgement:
        """Of samples that were judged."""
        return cls(mean_score(samples), mean_probability(samples))


@dataclass(frozen=True)
class Pace:
    """How fast a run was: query and response tokens a second, and shares of the time."""

    tokens_per_second: float
    sampling: float
    scoring: float
    optimising: float

    @classmethod
    def of(cls, metrics: Sequence[Mapping[str, float]]) -> Pace:
        """Of the metrics of any number of steps; zeros for none."""
        total = sum(row["time/step"] for row in metrics) or 1.0
        tokens = sum(row["perf/tokens_per_second"] * row["time/step"] for row in metrics)
        parts = ("time/sampling", "time/scoring", "time/optimising")
        return cls(tokens / total, *(sum(row[part] for row in metrics) / total for part in parts))

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_second:,.0f} tokens/s: sampling {self.sampling:.0%}, scoring "
            f"{self.scoring:.0%}, optimising {self.optimising:.0%}"
        )


@dataclass(frozen=True)
class TrainingSummary:
    """How a run ended: the reference and the policy on the same held-out prompts."""

    run: str
    label: str
    steps: int
    planned_steps: int
    seconds: float
    before: Judgement
    after: Judgement
    kl: float
    pace: Pace
    before_samples: list[Sample]
    after_samples: list[Sample]

    def as_dict(self) -> dict[str, Any]:
        """Plain values without the samples, for JSON."""
        values = dataclasses.asdict(self)
        del values["before_samples"], values["after_samples"]
        return values
