"""A reward of several terms: their weighted sum, and what each contributes to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ppo_cli.config.reward import CHAT, WeightSchedule
from ppo_cli.errors import UsageError
from ppo_cli.rewards.batch import RewardBatch, filled
from ppo_cli.rewards.endpoint import EndpointReward
from ppo_cli.rewards.functions import FunctionReward
from ppo_cli.rewards.lexicon import VaderReward
from ppo_cli.rewards.penalties import CostReward
from ppo_cli.rewards.sentiment import RewardFunction, SentimentReward

SUM = "sum"
"""The `output` of a reward of several terms."""
READS_BATCH = (FunctionReward, EndpointReward, VaderReward, CostReward)


class ClassifierReward:
    """A classifier as a term: the texts that it reads are filled into a template.

    Args:
        classifier: a `SentimentReward`, or anything with its `scores`, `output` and `label`.
        template: with {text}, {query} and {response}; or `chat` for its own chat template.
    """

    def __init__(self, classifier: Any, template: str = "{text}") -> None:
        self.classifier = classifier
        self._template = template

    def measure(self, batch: RewardBatch) -> tuple[Tensor, Tensor]:
        """Scores (B,) and probabilities (B,) of its label."""
        texts = self._chats(batch) if self._template == CHAT else filled(self._template, batch)
        if isinstance(self.classifier, SentimentReward):
            return self.classifier.measure(texts)
        logits, probabilities = self.classifier.scores(texts)
        return (logits if self.classifier.output == "logit" else probabilities), probabilities

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Scores (B,)."""
        return self.measure(batch)[0]

    def _chats(self, batch: RewardBatch) -> list[str]:
        """Each conversation with its response in the classifier's chat template."""
        tokenizer = self.classifier.tokenizer
        if not tokenizer.chat_template:
            raise UsageError(
                f"the tokenizer of {self.classifier.name} has no chat template: set template to a "
                "text with {query} and {response}"
            )

        def plain(text: Any) -> str:  # what spells a special token is none
            for token in tokenizer.all_special_tokens:
                text = str(text).replace(token, f"{token[:1]} {token[1:]}")
            return str(text)

        chats = []
        for messages, response in zip(batch.conversations, batch.responses, strict=True):
            told = [*messages, {"role": "assistant", "content": response}]
            told = [{**message, "content": plain(message["content"])} for message in told]
            chats.append(tokenizer.apply_chat_template(told, tokenize=False))
        return chats


@dataclass(frozen=True)
class Term:
    """A term of a sum.

    Attributes:
        name: in metrics, samples and tables.
        reward: batch -> B values, None where it does not apply.
        weight: factor of its values, which may depend on the step.
        is_partial: whether it scores unfinished texts.
    """

    name: str
    reward: Callable[[RewardBatch], Any]
    weight: float | WeightSchedule = 1.0
    is_partial: bool = True

    def weight_at(self, step: int | None) -> float:
        """The weight in a step, counted from 0; None for the last one."""
        if isinstance(self.weight, WeightSchedule):
            return self.weight.end if step is None else self.weight.at(step)
        return self.weight


@dataclass(frozen=True)
class Scores:
    """Scores of B responses.

    Attributes:
        total: (B,), the sum of the parts.
        probability: (B,), of the classifier's label; None without a classifier.
        parts: name -> (B,), a term's values times its weight; 0 where it does not apply.
        applies: name -> (B,), whether the term applies.
        weights: name -> its weight.
    """

    total: Tensor
    probability: Tensor | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    applies: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """The scores of several batches of the same reward, as of one."""
        if len(parts) == 1:
            return parts[0]
        chances = [part.probability for part in parts if part.probability is not None]

        def each(mappings: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.cat([m[name] for m in mappings]) for name in mappings[0]}

        return cls(
            torch.cat([part.total for part in parts]),
            torch.cat(chances) if chances else None,
            each([part.parts for part in parts]),
            each([part.applies for part in parts]),
            parts[0].weights,
        )

    def statistics(self) -> dict[str, float]:
        """Mean and standard deviation of the parts, share of None and weight, for metrics."""
        found: dict[str, float] = {}
        for name, part in self.parts.items():
            key = f"env/rewards/{name}"
            found[f"{key}/mean"] = part.mean().item()
            found[f"{key}/std"] = part.std().item() if len(part) > 1 else 0.0
            found[f"{key}/none"] = 1.0 - self.applies[name].float().mean().item()
            found[f"{key}/weight"] = self.weights[name]
        return found


class RewardSum:
    """The weighted sum of several rewards.

    Args:
        rewards: name -> a `SentimentReward`, a `VaderReward`, an `EndpointReward` or any function
            that takes keywords by name (`texts`, `queries`, `responses`, a column) and returns B
            numbers, None where it does not apply.
        weights: name -> factor in the sum; 1 for those that are not named.

    Attributes:
        terms: the terms, in their order.
        is_composed: False for one classifier alone, whose scores are the sum.

    Raises:
        UsageError: there is no reward, or a weight for one that there is not.
    """

    def __init__(
        self, rewards: Mapping[str, Any], weights: Mapping[str, float] | None = None
    ) -> None:
        weights = weights or {}
        if strange := [name for name in weights if name not in rewards]:
            raise UsageError(f"there is a weight for '{strange[0]}', and no such reward")
        self._set(
            [
                Term(name, as_term(reward, name), weights.get(name, 1.0))
                for name, reward in rewards.items()
            ]
        )

    def _set(self, terms: Sequence[Term], *, is_composed: bool = True) -> None:
        if not terms:
            raise UsageError("a sum of rewards needs one or more")
        self.terms = list(terms)
        self.is_composed = is_composed
        found = [term.reward for term in terms if isinstance(term.reward, ClassifierReward)]
        self.classifiers = [one.classifier for one in found]
        self._measured = found[0] if found else None

    @classmethod
    def of_terms(cls, terms: Sequence[Term]) -> RewardSum:
        """The sum of terms that are made already."""
        self = cls.__new__(cls)
        self._set(terms)
        return self

    @classmethod
    def of(cls, reward: Any) -> RewardSum:
        """A classifier, or another reward, by itself; a sum stays as it is."""
        if isinstance(reward, RewardSum):
            return reward
        self = cls.__new__(cls)
        name = str(getattr(reward, "label", None) or getattr(reward, "__name__", "reward"))
        self._set([Term(name, as_term(reward, name))], is_composed=False)
        return self

    @property
    def name(self) -> str:
        """The first classifier's name, or those of the terms."""
        return str(self.classifiers[0].name) if self.classifiers else self.title

    @property
    def title(self) -> str:
        """What the score is of: the label, or the names of the terms."""
        return " + ".join(term.name for term in self.terms)

    @property
    def label(self) -> str:
        """The first classifier's label, whose probability is measured; or the title."""
        return str(self.classifiers[0].label) if self.classifiers else self.title

    @property
    def output(self) -> str:
        """What the score is: `logit` or `probability` of one classifier, or `sum`."""
        return SUM if self.is_composed or not self.classifiers else str(self.classifiers[0].output)

    def describe(self) -> str:
        """What is trained towards, in a few words."""
        return f"reward {self.title}" if self.is_composed else f"label '{self.label}'"

    def probe(self) -> None:
        """`SentimentReward.probe` of each classifier."""
        for classifier in self.classifiers:
            classifier.probe()

    def __call__(
        self,
        texts: Sequence[str],
        *,
        queries: Sequence[str] = (),
        responses: Sequence[str] = (),
        **columns: Sequence[Any],
    ) -> Tensor:
        """B texts -> (B,) scores, float32; the other arguments are for terms that ask for them."""
        return self.score(RewardBatch(texts, queries, responses, columns)).total

    def score(self, batch: RewardBatch, step: int | None = None) -> Scores:
        """Score a batch with the weights of a step, counted from 0; None for the last weights.

        Raises:
            UsageError: a function needs a column that the batch has not.
            ModelError: a reward fails, or gives a number that is not finite.
        """
        parts, applies, weights, probability = {}, {}, {}, None
        for term in self.terms:
            if term.reward is self._measured:
                values, probability = self._measured.measure(batch)
            else:
                values = term.reward(batch)
            values, applies[term.name] = _tensors(values)
            weights[term.name] = term.weight_at(step)
            parts[term.name] = values if weights[term.name] == 1 else weights[term.name] * values
        total = sum(parts.values(), torch.zeros(len(batch.texts)))
        return Scores(total, probability, parts, applies, weights)

    def unfinished(self, batch: RewardBatch, every: int, step: int | None = None) -> RewardFunction:
        """A scorer of the unfinished texts of `partial_scores.potentials`, in that order.

        Args:
            batch: the finished responses, of whose beginnings the texts will be.
            every: tokens between two of them.
            step: as in `score`.
        """
        lengths = [len(ids) for ids in batch.token_ids]
        owners = [i for i, length in enumerate(lengths) for _ in range(0, length, every)]

        def score(texts: Sequence[str]) -> Tensor:
            part, total = batch.take(owners, texts), torch.zeros(len(texts))
            for term in self.terms:
                if term.is_partial:
                    total = total + term.weight_at(step) * _tensors(term.reward(part))[0]
            return total

        return score


def as_term(reward: Any, name: str) -> Callable[[RewardBatch], Any]:
    """Any reward as one that scores a `RewardBatch`."""
    if isinstance(reward, (*READS_BATCH, ClassifierReward)):
        return reward
    if hasattr(reward, "scores"):
        return ClassifierReward(reward)
    if callable(reward):
        return FunctionReward(reward, name)
    raise UsageError(f"'{name}' is no reward: give a function or a SentimentReward")


def _tensors(values: Any) -> tuple[Tensor, Tensor]:
    """B values -> numbers (B,) with 0 for None, and whether each is there (B,)."""
    if isinstance(values, Tensor):
        return values, torch.ones(len(values), dtype=torch.bool)
    there = torch.tensor([value is not None for value in values], dtype=torch.bool)
    return torch.tensor([value or 0.0 for value in values]), there
