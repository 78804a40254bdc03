"""Comparisons made by hand: no models are sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any
from unittest import mock

import numpy as np

from ppo_cli.evaluation import best_of_n as best
from ppo_cli.evaluation import bootstrap
from ppo_cli.evaluation.best_of_n import best_of_n, share
from ppo_cli.evaluation.comparison_result import (
    Comparison,
    ModelResult,
    ScoredSamples,
    most_changed,
    paired_difference,
    rows_of,
)
from ppo_cli.evaluation.quality import Likelihoods
from ppo_cli.evaluation.samples import Sample

REAL = bootstrap.resampled_means


def quick(function: Callable[..., Any]) -> Callable[..., Any]:
    """With intervals from 100 resamples, which take a twentieth of the time."""

    @wraps(function)
    def call(*args: Any, **settings: Any) -> Any:
        def few(values: np.ndarray, resamples: int = 0, seed: int = 0) -> np.ndarray:
            return REAL(values, 100, seed)

        with (
            mock.patch.object(bootstrap, "resampled_means", few),
            mock.patch.object(best, "resampled_means", few),
        ):
            return function(*args, **settings)

    return call


@quick
def comparison(
    scores: Mapping[str, Sequence[float]],
    *,
    texts: Mapping[str, Sequence[str]] | None = None,
    queries: Sequence[str] = (),
    label: str = "POSITIVE",
    terms: Sequence[str] = (),
    kl: float | None = 3.6,
    drawn: np.ndarray | None = None,
    examples: int = 2,
) -> Comparison:
    """Of models with these scores, the logits of `label`; one of them may be called `reference`.

    Args:
        scores: each model's, by prompt.
        texts: each model's responses; different words unless given.
        queries: the prompts.
        label: of the classifier.
        terms: of a composed reward, in place of a classifier: each gives an equal part.
        kl: of each response of a model but the reference; None for no reference.
        drawn: scores of the reference for best-of-n, a row for each prompt.
        examples: how many prompts that changed most.
    """
    models = []
    for model, values in scores.items():
        samples = [
            Sample(
                queries[i] if queries else f"Prompt {i}",
                texts[model][i] if texts else f"{model} {i} a b{i} c{i}",
                value,
                None if terms else float(1 / (1 + np.exp(-value))),
                rewards={term: value / len(terms) for term in terms},
            )
            for i, value in enumerate(values)
        ]
        nats = 0.0 if model == "reference" or kl is None else kl
        read = Likelihoods(*(np.full(len(values), x) for x in (nats, 2.0, 3.0, 4.0)))
        models.append(ScoredSamples(model, samples, read, kl is not None))
    counts = [] if drawn is None else [1, 2, drawn.shape[1]]
    return Comparison(
        label=label,
        output="sum of the terms" if terms else "logit",
        classifier=None if terms else "classifier",
        seed=0,
        reference=None if kl is None else "base",
        max_new_tokens=8,
        models=[ModelResult.of(model) for model in models],
        differences=[
            paired_difference(models[0], other, is_reference=other.model == "reference")
            for other in models[1:]
        ],
        changes=most_changed(models[0], models[-1], examples),
        best_of_n=None if drawn is None else best_of_n(drawn, counts, label=label, seed=0),
        shares=[]
        if drawn is None
        else [share(models[0].model, models[0].scores, models[0].kl, drawn, counts)],
        rows=rows_of(models),
        terms=list(terms),
    )
