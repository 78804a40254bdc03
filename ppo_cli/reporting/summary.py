"""Reports of a training run: each step, and the summary at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppo_cli.evaluation.quality import Quality
from ppo_cli.evaluation.samples import Sample
from ppo_cli.evaluation.samples_html import samples_html
from ppo_cli.utils.html import folded, page, table, text

SHOWN_SAMPLES = 5  # in a notebook


@dataclass(frozen=True)
class StepReport:
    """One PPO step, for a display.

    Attributes:
        step, steps: number of the step, and of all steps of the run.
        stats: the step's line of the metrics.
        samples: some samples of the batch.
        best: the step whose evaluation is the best so far, if any.
        stops: whether the step's evaluation ends the run.
    """

    step: int
    steps: int
    stats: dict[str, float]
    samples: list[Sample]
    best: int | None = None
    stops: bool = False

    @property
    def is_last(self) -> bool:
        """Whether the run ends after this step."""
        return self.stops or self.step == self.steps


@dataclass(frozen=True)
class Weights:
    """The step whose weights a run directory holds, and why."""

    step: int
    why: str

    def __str__(self) -> str:
        return f"step {self.step} ({self.why})"


@dataclass(frozen=True)
class Pace:
    """Speed of a run: query and response tokens per second, and shares of the time."""

    tokens_per_second: float
    sampling: float
    scoring: float
    optimising: float

    @classmethod
    def of(cls, metrics: Sequence[Mapping[str, float]]) -> Pace:
        """Compute the pace over the steps that have all their times; zeros where none has."""
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
    """Results of a run: reference and policy on the same held-out prompts.

    Attributes:
        run: the run directory.
        label: the label that the policy was trained towards.
        steps, planned_steps: number of steps made, and of steps asked for.
        seconds: time spent in steps.
        before, after: quality of the reference, and of the policy with the weights in the
            directory. Their random numbers are used by no evaluation, so that the choice of the
            weights by evaluations does not bias them.
        kl: of the last step's batch, as the KL penalty estimates it, nats per response.
        pace: speed of the steps.
        weights: the step whose weights are in the directory.
        stopped_early: why an evaluation ended the run before its last step; None where none did.
        before_samples, after_samples: the samples that `before` and `after` summarise.
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

    def __repr__(self) -> str:
        scores = (f"{quality.values['score']:+.3f}" for quality in (self.before, self.after))
        return f"TrainingSummary({self.about}; mean score {' -> '.join(scores)})"

    @property
    def about(self) -> str:
        """The run, how far it went, and its weights, in a line."""
        made = f"{self.steps} of {self.planned_steps} steps in {self.seconds:.0f} s"
        early = f", ended early: {self.stopped_early}" if self.stopped_early else ""
        return f"{self.run}: {made}{early}; weights of {self.weights}"

    def _repr_html_(self) -> str:
        """Reference and tuned model on the held-out prompts, for a notebook."""
        before = self.before.rows(self.label)
        rows = [
            (
                text(name),
                text(f"{before[name][0]:{form}}"),
                text(f"{value:{form}}", strong=True),
                text(f"{value - before[name][0]:+{form}}"),
                text(meaning, dim=True),
            )
            for name, (value, form, meaning) in self.after.rows(self.label).items()
        ]
        head = (f"{len(self.after_samples)} held-out prompts", "reference", "tuned", "change", "")
        return page(
            self.about,
            table(rows, head, "lrrrl"),
            folded("samples of the tuned model", samples_html(self.after_samples, SHOWN_SAMPLES)),
        )

    def as_dict(self) -> dict[str, Any]:
        """All values but the samples, for JSON."""
        values = dataclasses.asdict(self)
        del values["before_samples"], values["after_samples"]
        return values | {"before": self.before.as_dict(), "after": self.after.as_dict()}
