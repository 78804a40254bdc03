"""What samples are worth, beside their score: variety, fluency, distance from the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from ppo_cli.evaluation.samples import Sample, mean_probability, mean_score
from ppo_cli.utils.ngrams import distinct, most_common, repetition


@dataclass(frozen=True)
class Likelihoods:
    """What policy and reference say of B responses, (B,) each.

    Attributes:
        kl: KL from the reference of each response, nats: the sum over its tokens of the exact KL
            between the two next-token distributions.
        entropy: sum of the policy's next-token entropies, nats.
        reference_nll: minus the response's log-probability under the reference, nats.
        tokens: length of each response.
    """

    kl: np.ndarray
    entropy: np.ndarray
    reference_nll: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Quality:
    """Means over the samples of one model.

    Attributes:
        samples: how many.
        score: the classifier's.
        probability: of the wanted label.
        on_target: share of samples to which the label has a probability over a half.
        kl: from the reference, nats per response.
        entropy: of the policy, nats per token.
        perplexity: of the responses, under the reference.
        distinct_1, distinct_2: share of different words, of different pairs of words, among all
            (Li et al. 2016, https://arxiv.org/abs/1510.03055). Falls with the number of samples:
            compare equal numbers alone.
        repetition: share of a response's word pairs that it contains already, mean.
        most_common: share of samples that the most frequent response makes up.
        length: tokens per response.
    """

    samples: int
    score: float
    probability: float
    on_target: float
    kl: float
    entropy: float
    perplexity: float
    distinct_1: float
    distinct_2: float
    repetition: float
    most_common: float
    length: float

    @classmethod
    def of(cls, samples: Sequence[Sample], likelihoods: Likelihoods) -> Quality:
        """Of samples that were judged."""
        texts = [sample.response for sample in samples]
        tokens = max(int(likelihoods.tokens.sum()), 1)
        chances = [sample.probability or 0.0 for sample in samples]
        return cls(
            samples=len(samples),
            score=mean_score(samples),
            probability=mean_probability(samples),
            on_target=float(np.mean(np.asarray(chances) > 0.5)),
            kl=float(likelihoods.kl.mean()),
            entropy=float(likelihoods.entropy.sum()) / tokens,
            perplexity=float(np.exp(likelihoods.reference_nll.sum() / tokens)),
            distinct_1=distinct(texts, 1),
            distinct_2=distinct(texts, 2),
            repetition=repetition(texts),
            most_common=most_common(texts),
            length=float(likelihoods.tokens.mean()),
        )

    def as_dict(self) -> dict[str, float]:
        """Plain values, for JSON."""
        return asdict(self)


class Measure(NamedTuple):
    """How one of `Quality`'s numbers is shown: name, meaning in a word, decimal places."""

    name: str
    meaning: str
    places: int


MEASURES: dict[str, Measure] = {
    "score": Measure("mean score", "what the classifier says", 3),
    "probability": Measure("mean P({label})", "the same as a probability", 3),
    "on_target": Measure("on target", "share of responses with P over a half", 3),
    "kl": Measure("KL", "distance from the reference, nats per response", 2),
    "entropy": Measure("entropy", "openness, nats per token", 2),
    "perplexity": Measure("perplexity", "how odd the reference finds the responses", 1),
    "distinct_1": Measure("distinct-1", "different words among all", 3),
    "distinct_2": Measure("distinct-2", "different pairs of words among all", 3),
    "repetition": Measure("repetition", "pairs of words that a response has already", 3),
    "most_common": Measure("most common", "share of the most frequent response", 3),
    "length": Measure("length", "tokens per response", 1),
}
