"""What a training run reports: each step, and how it ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppo_cli.evaluation.quality import Quality
from ppo_cli.evaluation.samples import Sample


@dataclass(frozen=True)
class StepReport:
    """What one PPO step did, for a display.

    Attributes:
        step, steps: its number, and how many were asked for.
        stats: its line of the metrics.
        samples: some of its batch.
        best: the step whose evaluation is best so far, if any.
        stops: whether its evaluation ends the run.
    """

    step: int
    steps: int
    stats: dict[str, float]
    samples: list[Sample]
    best: int | None = None
    stops: bool = False

    @property
    def is_last(self) -> bool:
        """Whether the run is over after this step."""
        return self.stops or self.step == self.steps


@dataclass(frozen=True)
class Weights:
    """Which step's weights a run directory has, and why those."""

    step: int
    why: str

    def __str__(self) -> str:
        return f"step {self.step} ({self.why})"


@dataclass(frozen=True)
class Pace:
    """How fast a run was: query and response tokens a second, and shares of the time."""

    tokens_per_second: float
    sampling: float
    scoring: float
    optimising: float

    @classmethod
    def of(cls, metrics: Sequence[Mapping[str, float]]) -> Pace:
        """Of the metrics of any number of steps; zeros for none that are whole."""
        parts = ("time/sampling", "time/scoring", "time/optimising")
        needed = {"time/step", "perf/tokens_per_second", *parts}
        whole = [row for row in metrics if needed <= row.keys()]
        total = sum(row["time/step"] for row in whole) or 1.0
        tokens = sum(row["perf/tokens_per_second"] * row["time/step"] for row in whole)
        return cls(tokens / total, *(sum(row[part] for row in whole) / total for part in parts))

    def __str__(self) -> str:
        return (
            f"{self.tokens_per_second:,.0f} tokens/s: sampling {self.sampling:.0%}, scoring "
            f"{self.scoring:.0%}, optimising {self.optimising:.0%}"
        )


@dataclass(frozen=True)
class TrainingSummary:
    """How a run ended: the reference and the policy on the same held-out prompts.

    Attributes:
        run: the run directory.
        label: what the policy was steered towards.
        steps, planned_steps: made, and asked for.
        seconds: spent in steps.
        before, after: the reference's samples, and those of the weights that the directory has,
            with random numbers that no evaluation drew from: the choice of the best by evaluations
            does not flatter them.
        kl: of the last step's batch, as the penalty estimates it.
        pace: of the steps.
        weights: which step's are in the directory.
        stopped_early: why the run ended before the steps that were asked for; None where it did not
            or was interrupted.
        before_samples, after_samples: what `before` and `after` are means of.
    """

    run: str
    label: str
    steps: int
    planned_steps: int
    seconds: float
    before: Quality
    after: Quality
    kl: float
    pace: Pace
    weights: Weights
    stopped_early: str | None
    before_samples: list[Sample]
    after_samples: list[Sample]

    def as_dict(self) -> dict[str, Any]:
        """Plain values without the samples, for JSON."""
        values = dataclasses.asdict(self)
        del values["before_samples"], values["after_samples"]
        return values | {"before": self.before.as_dict(), "after": self.after.as_dict()}
