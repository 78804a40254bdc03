"""Models side by side: the same prompts and random numbers, paired differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ppo_cli.errors import UsageError
from ppo_cli.evaluation import (
    Generated,
    Interval,
    bootstrap_interval,
    mean_probability,
    mean_score,
)
from ppo_cli.generation import Request, generate, load_judge
from ppo_cli.loading import load_tokenizer
from ppo_cli.prompts import EMBEDDED, load_prompts


@dataclass(frozen=True)
class PairedDifference:
    """First model's score minus another's, prompt by prompt: mean, interval, share of wins."""

    first: str
    second: str
    difference: Interval
    win_rate: float


@dataclass(frozen=True)
class Comparison:
    """Samples of each model to the same prompts, in one order, and what they come to."""

    label: str
    classifier: str
    seed: int
    models: list[Generated]
    differences: list[PairedDifference]

    @property
    def queries(self) -> list[str]:
        """The prompts, in order."""
        return [sample.query for sample in self.models[0].samples]

    @property
    def gap(self) -> float:
        """Mean score of the first model minus that of the second."""
        return mean_score(self.models[0].samples) - mean_score(self.models[1].samples)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "label": self.label,
            "classifier": self.classifier,
            "seed": self.seed,
            "models": [
                {
                    "model": model.model,
                    "mean_score": mean_score(model.samples),
                    "mean_probability": mean_probability(model.samples),
                    "samples": len(model.samples),
                }
                for model in self.models
            ],
            "differences": [asdict(difference) for difference in self.differences],
            "rows": [
                {
                    "query": query,
                    "responses": [
                        {"model": model.model, **model.samples[i].as_dict()}
                        for model in self.models
                    ],
                }
                for i, query in enumerate(self.queries)
            ],
        }


def compare(
    request: Request,
    prompts: Sequence[str],
    *,
    count: int,
    max_new_tokens: int | None,
    seed: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Sample every model of `request` on the same prompts, and judge.

    Args:
        request: at least two models, the reference among them, and a classifier.
        prompts: texts; empty for the held-out prompts of the first run.
        count: prompts used; with fewer texts each is used several times.
        max_new_tokens: limit on a response; None for the run's own.
        seed: of the random numbers that all models share.
        progress: told the name of each model before its turn.

    Raises:
        UsageError: fewer than two models, or no prompts and no run that has some.
    """
    if len(request.sources) < 2:
        raise UsageError("compare needs two models, or a run directory and its reference")
    texts = list(prompts) or _held_out(request, count)
    texts = [texts[i % len(texts)] for i in range(count)]
    if max_new_tokens is None:
        max_new_tokens = request.run.rollout.output_max_length - 1 if request.run else 30
    judge = load_judge(request)
    assert judge is not None
    models = []
    for source in request.sources:
        progress(source.name)
        models.append(
            generate(
                source,
                texts,
                samples_each=1,
                max_new_tokens=max_new_tokens,
                seed=seed,
                device=request.device,
                reward=judge,
                trusted=request.trusted,
            )
        )
    differences = [_paired(models[0], other) for other in models[1:]]
    assert request.reward is not None
    return Comparison(judge.label, request.reward.model, seed, models, differences)


def _paired(first: Generated, second: Generated) -> PairedDifference:
    gaps = [
        (a.score or 0.0) - (b.score or 0.0)
        for a, b in zip(first.samples, second.samples, strict=True)
    ]
    wins = sum(gap > 0 for gap in gaps) + 0.5 * sum(gap == 0 for gap in gaps)
    return PairedDifference(first.model, second.model, bootstrap_interval(gaps), wins / len(gaps))


def _held_out(request: Request, count: int) -> list[str]:
    if request.run is None:
        raise UsageError("none of the models is a run directory with prompts: give --prompts FILE")
    settings = request.run.prompts
    if settings.source == EMBEDDED:  # there are as many as anyone wants
        settings = settings.model_copy(update={"held_out": count})
    policy = request.run.policy
    tokenizer = load_tokenizer(policy.model, policy.revision, request.trusted)
    return [p.query for p in load_prompts(settings, tokenizer, request.run.run.seed).held_out]
