"""`RewardConfig`: one classifier, or a list of terms whose weighted sum is the reward."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from ppo_cli.config.functions import function_parts
from ppo_cli.config.section import MAX_COUNT, Name, Section

TEMPLATE_FIELD = re.compile(r"\{(\w*)\}")
TEMPLATE_FIELDS = ("text", "query", "response")
CHAT = "chat"
# Alternatives of a union, which pydantic names in the place of a fault.
ALTERNATIVES = ONE, LIST, MAPPING = "(one value)", "(a list)", "(a mapping)"
SCALING = "scaling"
"""Part of a sample's reward: what ppo.use_score_scaling and ppo.score_clip change."""
COST_NAMES = {
    "length": "length_cost",
    "repetition": "repetition_cost",
    "missing_eos": "missing_eos_penalty",
}
CLASSIFIER_KEYS = ("revision", "sentiment", "output", "template", "tokenizer", "batch_size")
# Keys that each kind of term takes, besides `name` and `weight`.
KINDS: dict[str, tuple[str, ...]] = {
    "model": (*CLASSIFIER_KEYS, "partial"),
    "function": ("partial",),
    "url": ("batch_size", "timeout", "retries", "partial"),
    "lexicon": ("template", "partial"),
    "cost": ("target_length",),
}
# Keys of the section that describe its one classifier, so that a list of terms has no use for them.
OF_ONE_CLASSIFIER = ("model", "revision", "output")


def _check_function(spec: str) -> str:
    function_parts(spec)
    return spec


def check_url(url: str) -> str:
    """`url`, if it is an http address; else raises `ValueError`."""
    if not url.startswith(("http://", "https://")) or not urlsplit(url).hostname:
        raise ValueError(f"'{url}' is no address: give one that starts with http:// or https://")
    return url


def _check_template(template: str) -> str:
    fields = TEMPLATE_FIELD.findall(template)
    if template != CHAT and (not fields or set(fields) - {*TEMPLATE_FIELDS}):
        raise ValueError(
            f"'{template}' has other fields than {{text}}, {{query}} and {{response}}: give a text "
            "with one of these or more, or chat for the classifier's chat template"
        )
    return template


class WeightSchedule(Section):
    """A weight that moves from `start` to `end` in a straight line, and then stays."""

    start: float
    """Weight in the first step."""
    end: float
    """Weight after `steps` steps."""
    steps: Annotated[int, Field(ge=1, le=MAX_COUNT)]
    """Number of PPO steps that the change takes."""

    def at(self, step: int) -> float:
        """The weight in `step`, counted from 0."""
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)

    def describe(self) -> str:
        """In a few words, for a table."""
        return f"{self.start:g} to {self.end:g} over {self.steps} steps"


def _form(value: Any) -> str:
    """Which alternative of a union a value is meant as: of it alone the faults are reported."""
    if isinstance(value, dict | Section):
        return MAPPING
    return LIST if isinstance(value, list) else ONE


Weight = Annotated[
    Annotated[float, Tag(ONE)]
    | Annotated[float, Tag(LIST)]
    | Annotated[WeightSchedule, Tag(MAPPING)],
    Discriminator(_form),
]
Labels = Annotated[
    Annotated[Name, Tag(ONE)]
    | Annotated[list[Name], Field(min_length=1), Tag(LIST)]
    | Annotated[dict[Name, float], Field(min_length=1), Tag(MAPPING)],
    Discriminator(_form),
]


class RewardTerm(Section):
    """A term of the reward: exactly one of model, function, url, lexicon and cost."""

    model: Name | None = None
    """A classifier: `embedded`, a folder, or a hub id."""
    function: Annotated[Name, AfterValidator(_check_function)] | None = None
    """A Python function, FILE.py:FUNCTION (relative to the configuration file) or
    package.module:FUNCTION."""
    url: Annotated[Name, AfterValidator(check_url)] | None = None
    """An HTTP endpoint that takes and returns JSON."""
    lexicon: Literal["vader"] | None = None
    """`vader`: a text's compound score by VADER, -1 to 1 (needs the `lexicon` extra)."""
    cost: Literal["length", "repetition", "missing_eos"] | None = None
    """A cost of the response: its length in tokens (its difference from `target_length`), the share
    of its repeated word pairs, or 1 where it reaches its length limit without an end."""
    name: Annotated[str, Field(pattern=r"^[\w.-]{1,60}$")] | None = None
    """Its name in metrics, samples and tables; null for the function, the server, the lexicon or
    the cost, and for classifier."""
    weight: Weight = 1.0
    """Factor of its values in the sum; or {start, end, steps} for one that moves from start to end
    in a straight line over that many steps."""
    revision: Name | None = None
    """Of a classifier: branch, tag or commit of a hub model."""
    sentiment: Labels | None = None
    """Of a classifier: a label, a list of labels whose scores are added, or {label: weight}; null
    for reward.sentiment."""
    output: Literal["logit", "probability"] = "logit"
    """Of a classifier: a label's raw logit or its probability."""
    template: Annotated[str, AfterValidator(_check_template)] = "{text}"
    """Of a classifier or lexicon, the text that is scored: {text} is query and response together,
    of a conversation or an encoder-decoder the response alone; `chat` applies the classifier's own
    chat template."""
    tokenizer: Name | None = None
    """Of a classifier: folder or hub id of its tokenizer; null for the model's."""
    batch_size: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    """Texts per forward pass or request; null for reward.batch_size, and for all in one request."""
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    """Of an endpoint: seconds to wait for an answer."""
    retries: Annotated[int, Field(ge=0, le=20)] = 3
    """Of an endpoint: further attempts, after 1, 2, 4 ... seconds, if it does not answer, is
    overloaded or has an error of its own."""
    target_length: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    """Of the length cost: length (tokens) without a cost."""
    partial: bool | None = None
    """Whether reward.score_every applies this term to unfinished texts too; null for classifiers
    and lexicons alone."""

    @model_validator(mode="after")
    def _of_one_kind(self) -> RewardTerm:
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            found = f"has {' and '.join(kinds)}" if kinds else "says nothing that scores"
            raise ValueError(f"{found}: give a term one of {', '.join(KINDS)}")
        for key, field in type(self).model_fields.items():
            known = {*KINDS[kinds[0]], kinds[0], "name", "weight"}
            if key not in known and getattr(self, key) != field.default:
                raise ValueError(f"{key} is not for a term with {kinds[0]}: leave it out")
        if self.template == CHAT and self.model is None:
            raise ValueError("template chat is for a classifier: give a text with {text}")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        return {k: v for k, v in serialize(self).items() if getattr(self, k) != fields[k].default}

    @property
    def label(self) -> str:
        """Its name in metrics, samples and tables."""
        if self.name is not None:
            return self.name
        if self.function is not None:
            return function_parts(self.function)[1]
        if self.url is not None:
            return re.sub(r"[^\w.-]", "-", urlsplit(self.url).hostname or "url")[:60]
        return self.lexicon or (COST_NAMES[self.cost] if self.cost else "classifier")

    @property
    def foreign(self) -> str | None:
        """The code or the server that it uses, which takes its user's consent; None for neither."""
        return self.function or self.url

    @property
    def is_partial(self) -> bool:
        """Whether it scores unfinished texts, where `reward.score_every` asks for that."""
        scores_texts = self.model is not None or self.lexicon is not None
        return scores_texts if self.partial is None else self.partial

    @property
    def kind(self) -> tuple[str, str]:
        """What it is, such as `function`, and the name of that one."""
        kind = next(kind for kind in KINDS if getattr(self, kind) is not None)
        return "classifier" if kind == "model" else kind, str(getattr(self, kind))


class RewardConfig(Section):
    """The sentiment classifier, or a list of terms."""

    model: Name = "embedded"
    """`embedded`, a folder, or a hub id of a sequence classifier, or of a peft adapter of one. If a
    text is longer than the classifier can read, its end is scored."""
    revision: Name | None = None
    """Branch, tag or commit of a hub model."""
    sentiment: Name = "positive"
    """Label to train towards: its name, its index, or a synonym. The single output of a reward
    model is chosen by its name, by 0, or by positive."""
    output: Literal["logit", "probability"] = "logit"
    """The score: the label's raw logit or its probability."""
    terms: Annotated[list[RewardTerm], Field(min_length=1, max_length=32)] | None = None
    """Terms whose weighted sum is the score, in place of the one classifier; `reward: [...]` is
    short for it. null for the classifier alone."""
    batch_size: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 64
    """Texts per forward pass."""
    score_every: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    """Also score the unfinished text, each time this many response tokens are added. Each token is
    credited with the change that follows it (potential-based shaping), which learns from far fewer
    samples, above all with ppo.lam well below 1. null scores only the finished text."""
    probe: bool = True
    """Check the classifier on clearly positive and negative sentences before training."""
    missing_eos_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Subtracted from the score of a response that reaches its length limit without an end-of-text
    token or a text of `rollout.stop`; 0 for off."""
    length_cost: Annotated[float, Field(ge=0)] = 0.0
    """Subtracted from the score for each token by which the response's length differs from
    `target_length`; 0 for off."""
    target_length: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    """Length (tokens) without a cost; with 0, `length_cost` is a cost per token."""
    repetition_cost: Annotated[float, Field(ge=0)] = 0.0
    """This times the share of the response's word pairs that occur earlier in it is subtracted from
    the score; 0 for off."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return {"terms": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _of_terms(self) -> RewardConfig:
        if self.terms is None:
            return self
        for key in OF_ONE_CLASSIFIER:
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is of a reward without terms: move it into a term")
        given = [term.name for term in self.terms if term.name is not None]
        for name in self.names:
            if name in given and self.names.count(name) > 1:
                raise ValueError(f"two terms are called '{name}': give each a name of its own")
            if name == SCALING:
                raise ValueError(f"'{name}' is what scaling and clipping change: name it otherwise")
            if name in COST_NAMES.values() and getattr(self, name):
                raise ValueError(f"{name} is there twice: as a key and as a term; leave one out")
        if self.sentiment != "positive" and not self.takes_sentiment:
            raise ValueError(
                f"sentiment ({self.sentiment}) has no effect: no term is a classifier without a "
                "sentiment of its own"
            )
        if self.score_every is not None and not any(term.is_partial for term in self.terms):
            raise ValueError(
                f"score_every ({self.score_every}) scores unfinished texts, and no term does: set "
                "partial: true in a term that can, or score_every to null"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        unused = () if self.terms is None else OF_ONE_CLASSIFIER
        return {key: value for key, value in serialize(self).items() if key not in unused}

    @property
    def names(self) -> list[str]:
        """Names of the terms; of two functions `score` without a name, `score` and `score-2`."""
        labels = [term.label for term in self.terms or ()]
        numbers = [labels[: i + 1].count(label) for i, label in enumerate(labels)]
        return [
            label if number == 1 or term.name else f"{label}-{number}"
            for term, label, number in zip(self.terms or (), labels, numbers, strict=True)
        ]

    @property
    def takes_sentiment(self) -> bool:
        """Whether `sentiment` has an effect."""
        return self.terms is None or any(
            term.model is not None and term.sentiment is None for term in self.terms
        )

    @property
    def models(self) -> list[str]:
        """The classifiers, as they are named."""
        if self.terms is None:
            return [self.model]
        return [term.model for term in self.terms if term.model is not None]

    @property
    def foreign(self) -> list[str]:
        """Functions and endpoints, as they are named, that take their user's consent."""
        return [term.foreign for term in self.terms or () if term.foreign is not None]

    @property
    def goal(self) -> str:
        """What is trained towards, for the name of a run directory: a label, or the terms."""
        return self.sentiment if self.takes_sentiment else "-".join(self.names)[:60]

    def describe(self) -> str:
        """The whole reward in a few words: the classifier, or the names of the terms."""
        if self.terms is None:
            return f"classifier {self.model}"
        return f"reward {' + '.join(self.names)}"
