"""What a comparison found: plain values, the document that `compare --format json` writes.

The docstrings of the fields are the descriptions in its JSON Schema.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict, TypeAdapter

from ppo_cli.evaluation.best_of_n import BestOfN, Share
from ppo_cli.evaluation.bootstrap import Interval, bootstrap_interval
from ppo_cli.evaluation.quality import Likelihoods, Quality
from ppo_cli.evaluation.samples import Sample


@dataclass(frozen=True)
class Judged:
    """What one model wrote, a sample a prompt, and how it reads.

    Attributes:
        model: its name.
        samples: in the order of the prompts.
        read: of the same responses.
        against_reference: whether `read` is against the reference. If not, nothing in it that a
            reference is needed for counts.
    """

    model: str
    samples: list[Sample]
    read: Likelihoods
    against_reference: bool

    @property
    def scores(self) -> np.ndarray:
        """(P,)."""
        return np.asarray([sample.score for sample in self.samples], dtype=np.float64)

    @property
    def kl(self) -> np.ndarray | None:
        """(P,), nats per response; None where it is not known."""
        return self.read.kl if self.against_reference else None


@dataclass(frozen=True)
class ModelVerdict:
    """Means over the samples of one model."""

    model: str
    """The model, as it was named; `reference` for the run's reference."""
    samples: int
    """How many samples, one to each prompt."""
    mean_score: float
    """The classifier's score, its mean."""
    mean_probability: float
    """Probability of the label, its mean."""
    on_target: float
    """Share of samples to which the label has a probability over a half."""
    kl: float | None
    """KL from the reference, nats per response; null where there is no comparing the two."""
    kl_interval: Interval | None
    """Bootstrap interval of it."""
    perplexity: float | None
    """Of the responses under the reference; null where that cannot read them."""
    entropy: float
    """Of the model's next token, nats."""
    distinct_1: float
    """Share of different words among all. Falls with the number of samples."""
    distinct_2: float
    """Share of different pairs of words among all. Falls with the number of samples."""
    repetition: float
    """Share of a response's word pairs that it contains already, mean."""
    most_common: float
    """Share of samples that the most frequent response makes up."""
    length: float
    """Tokens per response, an end-of-text token included."""

    @classmethod
    def of(cls, judged: Judged) -> ModelVerdict:
        """Of one model's samples."""
        quality = Quality.of(judged.samples, judged.read)
        kl = judged.kl
        return cls(
            model=judged.model,
            samples=quality.samples,
            mean_score=quality.score,
            mean_probability=quality.probability,
            on_target=quality.on_target,
            kl=None if kl is None else quality.kl,
            kl_interval=None if kl is None else bootstrap_interval(kl.tolist()),
            perplexity=quality.perplexity if judged.against_reference else None,
            entropy=quality.entropy,
            distinct_1=quality.distinct_1,
            distinct_2=quality.distinct_2,
            repetition=quality.repetition,
            most_common=quality.most_common,
            length=quality.length,
        )


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
    """The classifier's score of prompt and response together."""
    probability: float
    """Probability of the label."""
    kl: float | None
    """KL from the reference over this response, nats; null where that is not known."""
    tokens: int
    """Length of the response."""


@dataclass(frozen=True)
class Row:
    """One prompt, and each model's response."""

    query: str
    """The prompt."""
    responses: list[Answer]
    """In the order of `models`."""


@dataclass(frozen=True)
class Comparison:
    """Models beside each other: the same prompts and random numbers through each."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", use_attribute_docstrings=True
    )

    label: str
    """The classifier's label that scores and probabilities are of."""
    output: str
    """What the score is: the label's logit or its probability."""
    classifier: str
    """The classifier."""
    seed: int
    """Seed of the sampling."""
    reference: str | None
    """The model that KL and perplexity are measured from; null where there is none."""
    max_new_tokens: int
    """Limit on a response, tokens."""
    models: list[ModelVerdict]
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

    @property
    def gap(self) -> float:
        """Mean score of the first model minus that of the second."""
        return self.models[0].mean_score - self.models[1].mean_score

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def paired_difference(first: Judged, second: Judged) -> PairedDifference:
    """Differences in score and wins, from samples to the same prompts."""
    gaps = first.scores - second.scores
    wins = (gaps > 0) + 0.5 * (gaps == 0)
    rate = bootstrap_interval(wins.tolist())
    return PairedDifference(
        first.model, second.model, bootstrap_interval(gaps.tolist()), rate.mean, rate
    )


def most_changed(first: Judged, second: Judged, count: int) -> Changes:
    """The `count` prompts at most where the score rose most, and where it fell most."""
    gaps = first.scores - second.scores
    order = np.argsort(-gaps, kind="stable")
    changes = [Change(int(row), float(gaps[row])) for row in order]
    gained = [change for change in changes if change.change > 0]
    lost = [change for change in reversed(changes) if change.change < 0]
    return Changes(first.model, second.model, gained[:count], lost[:count])


def rows_of(models: Sequence[Judged]) -> list[Row]:
    """Prompt by prompt, every model's response."""
    return [
        Row(sample.query, [_answer(model, i) for model in models])
        for i, sample in enumerate(models[0].samples)
    ]


def _answer(judged: Judged, i: int) -> Answer:
    kl = judged.kl
    return Answer(
        model=judged.model,
        kl=None if kl is None else float(kl[i]),
        tokens=int(judged.read.tokens[i]),
        **judged.samples[i].as_dict(),
    )


def json_schema() -> str:
    """The JSON Schema of a comparison."""
    return json.dumps(TypeAdapter(Comparison).json_schema(), indent=2)
