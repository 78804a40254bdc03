"""Quality measures of a model's samples: score, variety, fluency, distance from the reference.

`MEASURES` is the one list of them. The tables, the model card, the documents of `compare` and the
`eval/` statistics are made from it: a new measure is one more entry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ppo_cli.evaluation.samples import (
    Sample,
    has_probability,
    mean_probability,
    mean_rewards,
    mean_score,
)
from ppo_cli.ppo.statistics import RUN_STATISTICS, STATISTICS, Statistic
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

    @classmethod
    def joined(cls, parts: Sequence[Likelihoods]) -> Likelihoods:
        """The likelihoods of several batches, as of one."""
        fields = (vars(part).values() for part in parts)
        return cls(*(np.concatenate(rows) for rows in zip(*fields, strict=True)))

    @property
    def total_tokens(self) -> int:
        """Tokens of all responses, at least 1."""
        return max(int(self.tokens.sum()), 1)


@dataclass(frozen=True)
class Measure:
    """One quality measure of a model's samples.

    Attributes:
        key: its name in code, in metrics (`eval/KEY`) and in the summary of `train --json`.
        name: its name in tables; `{label}` stands for the classifier's label.
        meaning: what it is, in a few words.
        places: decimal places in tables.
        of: computes it from samples and their likelihoods.
        needs_reference: whether it is unknown where the reference cannot read the responses.
        needs_classifier: whether it is unknown where no classifier scores them.
        of_each: computes (B,) values, one for each sample, of which `of` is the mean; given, the
            comparison shows a bootstrap interval.
        of_reference: whether a run's metrics also hold the reference's, as `eval/reference_KEY`.
        document_key: its key in the document of `compare`; empty for `key`.
        description: its description in that document's JSON Schema; empty for `meaning`.
        unit, formula, healthy, remedy: as in `Statistic`.
    """

    key: str
    name: str
    meaning: str
    places: int
    of: Callable[[Sequence[Sample], Likelihoods], float]
    needs_reference: bool = False
    needs_classifier: bool = False
    of_each: Callable[[Sequence[Sample], Likelihoods], np.ndarray] | None = None
    of_reference: bool = False
    document_key: str = ""
    description: str = ""
    unit: str = ""
    formula: str = ""
    healthy: str = ""
    remedy: str = ""

    def statistic(self, *, of_reference: bool = False) -> Statistic:
        """The measure as a statistic of a run, of the policy or of the reference."""
        if of_reference:
            return Statistic(
                f"the reference's: {self.meaning}", unit=self.unit, formula=self.formula
            )
        detail = "Only with a classifier." if self.needs_classifier else ""
        texts = detail, self.unit, self.formula, self.healthy, self.remedy
        return Statistic(self.meaning, False, False, *texts)


def _on_target(samples: Sequence[Sample], _: Likelihoods) -> float:
    return float(np.mean([(sample.probability or 0.0) > 0.5 for sample in samples]))


def _perplexity(_: Sequence[Sample], likelihoods: Likelihoods) -> float:
    return float(np.exp(likelihoods.reference_nll.sum() / likelihoods.total_tokens))


def _texts(samples: Sequence[Sample]) -> list[str]:
    return [sample.response for sample in samples]


MEASURES: tuple[Measure, ...] = (
    Measure(
        "score",
        "mean score",
        "mean score of the responses",
        3,
        lambda samples, _: mean_score(samples),
        of_reference=True,
        document_key="mean_score",
        description="The score, its mean.",
        unit="score",
        formula="mean over the held-out prompts",
        healthy="above the reference's (eval/reference_score), and level at the end",
        remedy="as for env/reward_mean",
    ),
    Measure(
        "probability",
        "mean P({label})",
        "mean probability of the wanted label",
        3,
        lambda samples, _: mean_probability(samples),
        needs_classifier=True,
        document_key="mean_probability",
        description="Probability of the label, its mean; null without a classifier.",
        unit="a share, 0 to 1",
        formula="mean of the classifier's P(label)",
        healthy="rises towards 1",
        remedy="as for env/reward_mean",
    ),
    Measure(
        "on_target",
        "on target",
        "share of responses with a probability over a half",
        3,
        _on_target,
        needs_classifier=True,
        description="Share of samples to which the label has a probability over a half; null "
        "without a classifier.",
        unit="a share, 0 to 1",
        formula="share with P(label) > 0.5",
        healthy="rises towards 1",
        remedy="as for env/reward_mean",
    ),
    Measure(
        "kl",
        "KL",
        "exact KL from the reference, nats per response",
        2,
        lambda _, likelihoods: float(likelihoods.kl.mean()),
        needs_reference=True,
        of_each=lambda _, likelihoods: likelihoods.kl,
        description="KL from the reference, nats per response; null where there is no comparing "
        "the two.",
        unit="nats per response",
        formula=(
            "sum over a response's tokens of the exact KL between the next-token distributions "
            "of policy and reference, mean"
        ),
        healthy=(
            "a few nats for short responses; the less for the same score, the better (ppo-cli "
            "plot RUN --frontier)"
        ),
        remedy="too high: --kl N, a higher ppo.init_kl_coef, or weights of an earlier step",
    ),
    Measure(
        "entropy",
        "entropy",
        "entropy of the policy, nats per token",
        2,
        lambda _, likelihoods: float(likelihoods.entropy.sum()) / likelihoods.total_tokens,
        description="Of the model's next token, nats.",
        unit="nats per token",
        formula="-sum over the vocabulary of p log p, mean over response tokens",
        healthy="somewhat below the reference's",
        remedy="far below: raise ppo.init_kl_coef or set ppo.ent_coef",
    ),
    Measure(
        "perplexity",
        "perplexity",
        "perplexity of the responses under the reference",
        1,
        _perplexity,
        needs_reference=True,
        of_reference=True,
        description="Of the responses under the reference; null where that cannot read them.",
        unit="no unit",
        formula="exp(-mean log p(token) under the reference)",
        healthy="near the reference's own (eval/reference_perplexity)",
        remedy=(
            "far above: the text is odd to the reference; raise ppo.init_kl_coef. Far below: it "
            "is monotonous; see distinct_2"
        ),
    ),
    # Li et al. 2016 (https://arxiv.org/abs/1510.03055).
    Measure(
        "distinct_1",
        "distinct-1",
        "different words among all",
        3,
        lambda samples, _: distinct(_texts(samples), 1),
        description="Share of different words among all. Falls with the number of samples.",
        unit="a share, 0 to 1",
        formula=(
            "different words / words of all responses (Li et al. 2016); falls with the number of "
            "samples"
        ),
        healthy="not far below the reference's; the default run keeps four fifths of it",
        remedy="raise ppo.init_kl_coef, or set ppo.ent_coef",
    ),
    Measure(
        "distinct_2",
        "distinct-2",
        "different pairs of words among all",
        3,
        lambda samples, _: distinct(_texts(samples), 2),
        of_reference=True,
        description="Share of different pairs of words among all. Falls with the number of "
        "samples.",
        unit="a share, 0 to 1",
        formula=(
            "different word pairs / word pairs of all responses (Li et al. 2016); falls with the "
            "number of samples"
        ),
        healthy="not far below the reference's; the default run keeps four fifths of it",
        remedy="raise ppo.init_kl_coef, or set ppo.ent_coef",
    ),
    Measure(
        "repetition",
        "repetition",
        "share of a response's word pairs that it has already",
        3,
        lambda samples, _: repetition(_texts(samples)),
        description="Share of a response's word pairs that it contains already, mean.",
        unit="a share, 0 to 1",
        formula="share of a response's word pairs that it had before, mean (Welleck et al. 2020)",
        healthy="near the reference's",
        remedy="reward.repetition_cost, or a higher ppo.init_kl_coef",
    ),
    Measure(
        "most_common",
        "most common",
        "share that the most frequent response makes up",
        3,
        lambda samples, _: most_common(_texts(samples)),
        description="Share of samples that the most frequent response makes up.",
        unit="a share, 0 to 1",
        formula="share of the most frequent response",
        healthy="near 0; 1 is collapse",
        remedy="raise ppo.init_kl_coef; run.collapse_limit ends such a run",
    ),
    Measure(
        "length",
        "length",
        "tokens per response",
        1,
        lambda _, likelihoods: float(likelihoods.tokens.mean()),
        description="Tokens per response, an end-of-text token included.",
        unit="tokens",
        formula="mean, an end-of-text token included",
        healthy="near the reference's, unless the reward is about length",
        remedy="as for tokens/responses_len_mean",
    ),
)


@dataclass(frozen=True)
class Quality:
    """The quality measures of one model's samples.

    Attributes:
        samples: how many.
        values: by key of `MEASURES`; those that need a reference or a classifier are missing
            without one.
        rewards: mean contribution of each term of a composed reward, by name.
    """

    samples: int
    values: dict[str, float]
    rewards: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, samples: Sequence[Sample], likelihoods: Likelihoods, has_reference: bool = True
    ) -> Quality:
        """Measure samples that have scores.

        Args:
            samples: B samples.
            likelihoods: of their responses.
            has_reference: whether `likelihoods` are those of a reference.
        """
        has_classifier = has_probability(samples)
        values = {
            m.key: m.of(samples, likelihoods)
            for m in MEASURES
            if (has_reference or not m.needs_reference)
            and (has_classifier or not m.needs_classifier)
        }
        return cls(len(samples), values, mean_rewards(samples))

    def __getitem__(self, key: str) -> float:
        return self.values[key]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        terms = {"rewards": self.rewards} if self.rewards else {}
        return {"samples": self.samples, **self.values, **terms}

    def rows(
        self, label: str, escape: Callable[[str], str] = str
    ) -> dict[str, tuple[float, str, str]]:
        """Name -> number, its form and its meaning: a table's rows, those of the terms last.

        Args:
            label: the classifier's label, for the name of its probability.
            escape: makes labels and names of terms fit for the table.
        """
        rows = {
            m.name.format(label=escape(label)): (self.values[m.key], f".{m.places}f", m.meaning)
            for m in MEASURES
            if m.key in self.values
        }
        return rows | {
            f"reward {escape(name)}": (mean, ".3f", "mean contribution of this term to the score")
            for name, mean in self.rewards.items()
        }


def evaluation_statistics(policy: Quality, reference: Quality) -> dict[str, float]:
    """What an evaluation on held-out prompts adds to its step's metrics."""
    own = {f"eval/{key}": value for key, value in policy.values.items()}
    own |= {f"eval/reference_{m.key}": reference[m.key] for m in MEASURES if m.of_reference}
    return own | {f"eval/rewards/{name}": mean for name, mean in policy.rewards.items()}


def explained_statistics() -> dict[str, Statistic]:
    """The keys of `evaluation_statistics`, and what they mean."""
    own = {f"eval/{m.key}": m.statistic() for m in MEASURES}
    return own | {
        f"eval/reference_{m.key}": m.statistic(of_reference=True)
        for m in MEASURES
        if m.of_reference
    }


def all_statistics() -> dict[str, Statistic]:
    """Every key that a step, a run or an evaluation has, and what it means."""
    return STATISTICS | RUN_STATISTICS | explained_statistics()
