"""A run's evaluations so far: which is the best, and whether the run should end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ppo_cli.config.schema import RunSettings

TOLERANCE = 0.1  # an evaluation this near to the budget of KL, relative to it, is within it
# A ceiling is of the steps' KL, and the evaluations' responses are longer: theirs may be so far
# above it.
CEILING_TOLERANCE = 0.2


@dataclass(frozen=True)
class Evaluation:
    """Mean score and KL (nats per response) on the held-out prompts after a step."""

    step: int
    score: float
    kl: float


@dataclass(frozen=True)
class EvaluationHistory:
    """A run's evaluations so far.

    Attributes:
        newest: the last of them.
        best: the one with the highest score within the limits of KL; the first of equals. With a
            budget of KL, of those within `TOLERANCE` of it, or else the nearest to it.
        stale: how many followed the best; all where none is best.
    """

    newest: Evaluation | None = None
    best: Evaluation | None = None
    stale: int = 0

    def after(self, evaluation: Evaluation, settings: RunSettings) -> EvaluationHistory:
        """The history with one more evaluation."""
        best = self.within(settings).best
        counts = over_limit(evaluation, settings) is None
        if counts and (best is None or _rank(evaluation, settings) > _rank(best, settings)):
            return EvaluationHistory(evaluation, evaluation)
        return EvaluationHistory(evaluation, best, self.stale + 1)

    def within(self, settings: RunSettings) -> EvaluationHistory:
        """The history by limits of KL that may have changed since the best was chosen."""
        if self.best is None or over_limit(self.best, settings) is None:
            return self
        return EvaluationHistory(self.newest, None, self.stale)

    def reason_to_stop(self, settings: RunSettings) -> str | None:
        """Why the run should end after the newest evaluation; None to go on."""
        if (newest := self.newest) is None:
            return None
        which = f"the evaluation after step {newest.step}"
        if settings.stop_kl is not None and newest.kl > settings.stop_kl:
            return f"{which} has a KL of {newest.kl:.4g}, over run.stop_kl ({settings.stop_kl:g})"
        target = settings.target_score
        if target is not None and newest.score >= target and over_limit(newest, settings) is None:
            return f"{which} scores {newest.score:.4g}, run.target_score is {target:g}"
        if settings.patience is not None and self.stale >= settings.patience:
            best = f"since step {self.best.step}" if self.best else "at all"
            return f"{self.stale} evaluations without a new best {best} (run.patience)"
        return None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvaluationHistory:
        """The history that `as_dict` gave."""
        newest, best = (Evaluation(**v) if (v := values[k]) else None for k in ("newest", "best"))
        return cls(newest, best, values["stale"])


def _rank(evaluation: Evaluation, settings: RunSettings) -> tuple[float, float]:
    """What the best evaluation has most of: nearness to budget or ceiling of KL, then score."""
    away, tolerance = 0.0, TOLERANCE
    if settings.kl_budget is not None:
        away = abs(evaluation.kl / settings.kl_budget - 1)
    elif settings.kl_ceiling is not None:
        away, tolerance = evaluation.kl / settings.kl_ceiling - 1, CEILING_TOLERANCE
    return -max(away, tolerance), evaluation.score


def over_limit(evaluation: Evaluation, settings: RunSettings) -> str | None:
    """The limit of KL that an evaluation exceeds, None for none."""
    for name in ("kl_limit", "stop_kl"):
        limit = getattr(settings, name)
        if limit is not None and not evaluation.kl <= limit:  # NaN exceeds every limit
            return f"run.{name} ({limit:g})"
    return None
