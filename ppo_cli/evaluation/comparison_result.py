"""The result of a comparison: plain values, the document that `compare --format json` writes.

The docstrings of the fields are the descriptions in its JSON Schema.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter, create_model
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import CoreSchema
from pydantic_core.core_schema import DataclassSchema

from ppo_cli.evaluation import quality
from ppo_cli.evaluation.best_of_n import BestOfN, Share, win_rate
from ppo_cli.evaluation.bootstrap import Interval, bootstrap_interval
from ppo_cli.evaluation.comparison_html import comparison_html
from ppo_cli.evaluation.quality import Likelihoods, Quality
from ppo_cli.evaluation.samples import Sample
from ppo_cli.evaluation.verdict import verdict


@dataclass(frozen=True)
class ScoredSamples:
    """One model's responses, one to each of P prompts, with scores and likelihoods.

    Attributes:
        model: its name.
        samples: in the order of the prompts.
        likelihoods: of the same responses.
        against_reference: whether `likelihoods` are those of the reference. If not, measures that
            need a reference are unknown.
    """

    model: str
    samples: list[Sample]
    likelihoods: Likelihoods
    against_reference: bool

    @property
    def scores(self) -> np.ndarray:
        """(P,)."""
        return np.asarray([sample.score for sample in self.samples], dtype=np.float64)

    @property
    def kl(self) -> np.ndarray | None:
        """(P,), nats per response; None where it is not known."""
        return self.likelihoods.kl if self.against_reference else None


@dataclass(frozen=True)
class ModelResult:
    """The quality measures of one model's samples.

    Attributes:
        model: its name; `reference` for the run's reference.
        quality: the measures.
        intervals: bootstrap intervals of those that are means over the samples, by key.
    """

    model: str
    quality: Quality
    intervals: dict[str, Interval]

    @classmethod
    def of(cls, scored: ScoredSamples) -> ModelResult:
        """Measure one model's samples."""
        samples, likelihoods = scored.samples, scored.likelihoods
        measured = Quality.of(samples, likelihoods, scored.against_reference)
        intervals = {
            m.key: bootstrap_interval(m.of_each(samples, likelihoods).tolist())
            for m in quality.MEASURES
            if m.of_each is not None and m.key in measured.values
        }
        return cls(scored.model, measured, intervals)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; None for what is not known."""
        values: dict[str, Any] = {"model": self.model, "samples": self.quality.samples}
        for measure in quality.MEASURES:
            key = measure.document_key or measure.key
            values[key] = self.quality.values.get(measure.key)
            if measure.of_each is not None:
                interval = self.intervals.get(measure.key)
                values[f"{key}_interval"] = None if interval is None else asdict(interval)
        return values | {"rewards": self.quality.rewards}

    @classmethod
    def __get_pydantic_core_schema__(cls, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The schema of `as_dict`."""
        name = "The model, as it was named; `reference` for the run's reference."
        fields: dict[str, Any] = {
            "model": (str, Field(description=name)),
            "samples": (int, Field(description="How many samples, one to each prompt.")),
        }
        for measure in quality.MEASURES:
            key = measure.document_key or measure.key
            text = measure.description or f"{measure.meaning[:1].upper()}{measure.meaning[1:]}."
            is_optional = measure.needs_reference or measure.needs_classifier
            kind = float | None if is_optional else float
            fields[key] = (kind, Field(description=text))
            if measure.of_each is not None:
                interval = Field(description="Bootstrap interval of it.")
                fields[f"{key}_interval"] = (Interval | None, interval)
        terms = (
            "Mean contribution of each term of the reward to the score; empty for one classifier."
        )
        fields["rewards"] = (dict[str, float], Field(description=terms))
        document = create_model(
            "ModelVerdict",  # the name that the schema has had from the first release on
            __config__=ConfigDict(extra="forbid", use_attribute_docstrings=True),
            __doc__="Means over the samples of one model.",
            **fields,
        )
        return handler(document)


@dataclass(frozen=True)
class PairedDifference:
    """First model's score minus another's, prompt by prompt."""

    first: str
    """The first model."""
    second: str
    """The other one."""
    difference: Interval
    """Mean difference in score, with its paired bootstrap interval."""
    win_rate: float
    """Share of prompts on which the first model scores higher; ties count half."""
    win_rate_interval: Interval
    """Bootstrap interval of it."""
    best_of_n_win_rate: float | None
    """n/(n+1): the win rate of best-of-n at the first model's KL, against one response of the
    reference. null where the other model is not the reference, or the KL is not known."""


@dataclass(frozen=True)
class Change:
    """One prompt on which two models differ."""

    row: int
    """Which of `rows`, counted from 0."""
    change: float
    """Score of the first model minus that of the other."""


@dataclass(frozen=True)
class Changes:
    """The prompts on which the first model differs most from the last one, the reference if any."""

    first: str
    """The first model."""
    second: str
    """The one that it is compared with."""
    gained: list[Change]
    """Where its score gained most, the largest gain first."""
    lost: list[Change]
    """Where its score lost most, the largest loss first."""


@dataclass(frozen=True)
class Answer:
    """One model's response to one prompt."""

    model: str
    """The model."""
    query: str
    """The prompt."""
    response: str
    """What the model wrote."""
    score: float
    """The score of prompt and response together; of an answer in a conversation, of the response
    alone."""
    probability: float | None
    """Probability of the label; null without a classifier."""
    rewards: dict[str, float | None]
    """What each term of the reward contributes to the score, null where it does not apply; empty
    for one classifier."""
    kl: float | None
    """KL from the reference over this response, nats; null where that is not known."""
    tokens: int
    """Length of the response."""


@dataclass(frozen=True)
class Row:
    """One prompt, and each model's response."""

    query: str
    """The prompt; of a conversation what its last message says."""
    responses: list[Answer]
    """In the order of `models`."""
    messages: list[dict[str, Any]] | None
    """The conversation; null for a text."""

    @property
    def change(self) -> float:
        """Score of the first model minus that of the last one."""
        return self.responses[0].score - self.responses[-1].score


@dataclass(frozen=True)
class Comparison:
    """Models beside each other: the same prompts and random numbers through each."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", use_attribute_docstrings=True
    )

    label: str
    """The classifier's label that scores and probabilities are of; without one, the terms."""
    output: str
    """What the score is: the label's logit or its probability; or the sum of the terms."""
    classifier: str | None
    """The classifier, the first of several; null without one."""
    seed: int
    """Seed of the sampling."""
    reference: str | None
    """The model that KL and perplexity are measured from; null where there is none."""
    max_new_tokens: int
    """Limit on a response, tokens."""
    models: list[ModelResult]
    """What each model's samples come to, in the order given, the reference last."""
    differences: list[PairedDifference]
    """The first model against each other one."""
    changes: Changes
    """Prompts on which the first model differs most from the last one."""
    best_of_n: BestOfN | None
    """Best-of-n from the reference; null unless --best-of-n asked for it."""
    shares: list[Share]
    """Each model beside best-of-n at its own KL; empty unless --best-of-n asked for it."""
    rows: list[Row]
    """Every prompt with every response."""
    terms: list[str]
    """Names of the terms whose sum is the score; empty for one classifier."""

    def __repr__(self) -> str:
        return f"Comparison({verdict(self).sentence})"

    def _repr_html_(self) -> str:
        """Verdict, means, differences and some samples, for a notebook."""
        return comparison_html(self)

    @property
    def title(self) -> str:
        """What the score is of."""
        return f"score: {' + '.join(self.terms)}" if self.terms else f"score of '{self.label}'"

    @property
    def gap(self) -> float:
        """Mean score of the first model minus that of the second."""
        return self.models[0].quality["score"] - self.models[1].quality["score"]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"models": [model.as_dict() for model in self.models]}


def paired_difference(
    first: ScoredSamples, second: ScoredSamples, *, is_reference: bool
) -> PairedDifference:
    """Differences in score and wins, from samples to the same prompts.

    Args:
        first: one model's samples.
        second: the other's.
        is_reference: whether the second model is the reference.
    """
    gaps = first.scores - second.scores
    wins = (gaps > 0) + 0.5 * (gaps == 0)
    rate = bootstrap_interval(wins.tolist())
    best = None
    if is_reference and first.kl is not None:
        best = win_rate(float(first.kl.mean()))
    return PairedDifference(
        first.model, second.model, bootstrap_interval(gaps.tolist()), rate.mean, rate, best
    )


def most_changed(first: ScoredSamples, second: ScoredSamples, count: int) -> Changes:
    """The `count` prompts at most where the score rose most, and where it fell most."""
    gaps = first.scores - second.scores
    order = np.argsort(-gaps, kind="stable")
    changes = [Change(int(row), float(gaps[row])) for row in order]
    gained = [change for change in changes if change.change > 0]
    lost = [change for change in reversed(changes) if change.change < 0]
    return Changes(first.model, second.model, gained[:count], lost[:count])


def rows_of(models: Sequence[ScoredSamples]) -> list[Row]:
    """Prompt by prompt, every model's response."""
    return [
        Row(sample.query, [_answer(model, i) for model in models], sample.messages)
        for i, sample in enumerate(models[0].samples)
    ]


def _answer(scored: ScoredSamples, i: int) -> Answer:
    kl, sample = scored.kl, scored.samples[i]
    assert sample.score is not None
    return Answer(
        model=scored.model,
        query=sample.query,
        response=sample.response,
        score=sample.score,
        probability=sample.probability,
        rewards=dict(sample.rewards),
        kl=None if kl is None else float(kl[i]),
        tokens=int(scored.likelihoods.tokens[i]),
    )


class _Described(GenerateJsonSchema):
    """Dataclasses with docstrings and without other fields, as pydantic has them from 2.14 on."""

    def dataclass_schema(self, schema: DataclassSchema) -> JsonSchemaValue:
        described = super().dataclass_schema(schema)
        described.setdefault("description", inspect.cleandoc(schema["cls"].__doc__ or ""))
        described.setdefault("additionalProperties", False)
        return described


def json_schema() -> str:
    """The JSON Schema of a comparison."""
    schema = TypeAdapter(Comparison).json_schema(schema_generator=_Described)
    return json.dumps(schema, indent=2)
