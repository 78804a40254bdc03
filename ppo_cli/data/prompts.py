"""Where queries come from: texts, cut to their first tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ppo_cli.data.sources import EMBEDDED, read_texts
from ppo_cli.errors import DataError
from ppo_cli.utils.random_state import numpy_state, set_numpy_state

EMBEDDED_REVIEWS = 4000
MOST_EMBEDDED_REVIEWS = 100_000
AT_ONCE = 1000  # texts that a tokenizer is given together
TOLD_FROM = 20_000  # texts from which it is told how far tokenizing is
PROBE = "a"
CHARACTERS = 5  # a token: more than prose has
BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")
ACROSS_WORDS = re.compile(
    r"[^\sĠĊĉč▁][ Ġ▁]"
)  # in a token, as byte-level and SentencePiece write it
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a part of a character decodes to


class LengthSampler:
    """Draws an integer from `min_value` to `max_value - 1`, all alike, as TRL's does.

    Args:
        min_value: smallest length.
        max_value: one more than the largest.
        seed: gives the sampler random numbers of its own; None draws from NumPy's global state.

    Raises:
        ValueError: there is no length to draw.
    """

    def __init__(self, min_value: int, max_value: int, seed: int | None = None) -> None:
        if not 0 <= min_value < max_value:
            raise ValueError(
                f"LengthSampler draws from {min_value} to {max_value - 1}: max_value ({max_value}) "
                f"must exceed min_value ({min_value})"
            )
        self.values = list(range(min_value, max_value))
        self._own = None if seed is None else np.random.RandomState(seed)

    def __call__(self) -> int:
        """One length."""
        draw: Callable[[int], int] = (self._own or np.random).randint  # as `choice` does, faster
        return self.values[draw(len(self.values))]

    def state_dict(self) -> dict[str, Any]:
        """The state of its own random numbers, plain values."""
        return {} if self._own is None else numpy_state(self._own)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        if self._own is not None and state:
            set_numpy_state(self._own, state)


@dataclass(frozen=True)
class Prompt:
    """A query: its text for people, without special tokens; `input_ids` (query_length,) int64."""

    query: str
    input_ids: Any


@dataclass(frozen=True)
class PromptSet:
    """Queries to train on, and others kept apart to evaluate on."""

    train: list[Prompt]
    held_out: list[Prompt]


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows -> one list a column; what `PPOTrainer` wants of a dataset with ragged queries."""
    return {key: [row[key] for row in rows] for key in rows[0]}


class Encoder:
    """The one way from text to the tokens of a query.

    What the tokenizer puts before a text, such as <s>, is part of the query; what it puts after it,
    such as </s> or [SEP], is not: the model is to go on from there. Text that spells a special
    token is text, where the tokenizer can tell the two apart.

    Args:
        tokenizer: of the model that reads the queries.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        whole = tokenizer(PROBE).input_ids
        text = self._ids([PROBE])[0]
        places = range(len(whole) - len(text) + 1)
        before = next((i for i in places if whole[i : i + len(text)] == text), 0)
        self._beginning = list(whole[:before])

    def __call__(self, texts: Sequence[str], longest: int | None = None) -> list[list[int]]:
        """The ids of each text, without end; none for a text without tokens of its own.

        Args:
            texts: what is to be continued.
            longest: only so many ids of each are wanted, so that the rest of a text need not be
                read where that is sure to change nothing.
        """
        starts = [self._start(text, longest) for text in texts]
        rows = self._ids(starts)
        if longest is not None:
            wanted = longest - len(self._beginning)
            short = [
                i
                for i, row in enumerate(rows)
                if len(row) < wanted and len(starts[i]) < len(texts[i])
            ]
            for i, row in zip(short, self._ids([texts[i] for i in short]), strict=True):
                rows[i] = row
        return [(self._beginning + row)[:longest] if row else [] for row in rows]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of the texts alone."""
        tokenizer, rows = self._tokenizer, []
        is_fast = getattr(tokenizer, "is_fast", None)  # None: mistral-common's, which mixes up none
        if is_fast:
            for i in range(0, len(texts), AT_ONCE):
                batch = list(texts[i : i + AT_ONCE])
                rows += tokenizer(
                    batch, add_special_tokens=False, split_special_tokens=True
                ).input_ids
            return rows
        special = [] if is_fast is None else tokenizer.all_special_tokens
        for text in texts:
            # Asked to, tokenizers in Python leave all added tokens out, not just special ones.
            spelled = any(token in text for token in special)
            options = {"split_special_tokens": True} if spelled else {}
            rows.append(list(tokenizer(text, add_special_tokens=False, **options).input_ids))
        return rows

    def _start(self, text: str, longest: int | None) -> str:
        """The text up to a gap between words after which `longest` tokens should have come."""
        if longest is None:
            return text
        size = CHARACTERS * longest + 64
        if len(text) <= size or not self._reads_words_apart:
            return text
        gaps = [gap.start() for gap in BETWEEN_WORDS.finditer(text, size - 64, size)]
        return text[: gaps[-3]] if len(gaps) > 2 else text  # two words decide how the last one ends

    @cached_property
    def _reads_words_apart(self) -> bool:
        """Whether the tokens before a gap between words do not depend on what follows it.

        BPE makes each token from two others of its vocabulary, and Unigram chooses among paths of
        such tokens: where none reaches across a gap, the text falls apart there. What comes before
        either, normalizer and pre-tokenizer, looks no further than the next word.
        """
        if not getattr(self._tokenizer, "is_fast", False):
            return False
        model = self._tokenizer.backend_tokenizer.model
        kind = type(model).__name__
        if kind != "Unigram" and (kind != "BPE" or model.end_of_word_suffix):
            return False
        return not any(map(ACROSS_WORDS.search, self._tokenizer.get_vocab()))


def load_prompts(
    settings: Any, tokenizer: Any, seed: int, tell: Callable[[str], None] = lambda _: None
) -> PromptSet:
    """Read the source, keep texts long enough, hold some out, cut all to their first tokens.

    Args:
        settings: a `PromptsConfig`.
        tokenizer: the policy's.
        seed: decides which texts are held out and how long each query is.
        tell: told how far it is, where that takes a while.

    Raises:
        DataError: the source is absent, unreadable, without its column, or yields no query.
    """
    train, held_out = _split_texts(settings, seed)
    lengths = _lengths(settings, seed)
    prompts = PromptSet(
        train=list(_cut(train, tokenizer, lengths, tell)),
        held_out=list(_cut(held_out, tokenizer, lengths, tell)),
    )
    if not prompts.train:
        raise DataError(f"{settings.source}: no text yields a query")
    return prompts


def load_held_out(settings: Any, tokenizer: Any, seed: int) -> list[Prompt]:
    """The held-out prompts of `load_prompts`, without tokenizing the others."""
    train, held_out = _split_texts(settings, seed)
    lengths = _lengths(settings, seed)
    for _ in train:  # each has drawn its length before
        lengths()
    return list(_cut(held_out, tokenizer, lengths))


def _split_texts(settings: Any, seed: int) -> tuple[list[str], list[str]]:
    """Texts to train on and others, held out."""
    if settings.source == EMBEDDED:
        return _embedded_texts(settings)
    texts = read_texts(
        settings.source,
        column=settings.text_column,
        subset=settings.subset,
        split=settings.split,
        keep=lambda text: len(text) > settings.min_characters,
        limit=settings.limit and settings.limit + settings.held_out,
        distinct=True,  # what is held out is not trained on
    )
    if not texts:
        raise DataError(
            f"{settings.source}: no text is longer than {settings.min_characters} characters; "
            "lower prompts.min_characters"
        )
    held_out_size = min(settings.held_out, len(texts) // 2)
    order = np.random.RandomState(seed).permutation(len(texts))
    held_out = [texts[i] for i in order[:held_out_size]]
    return [texts[i] for i in order[held_out_size:]][: settings.limit], held_out


def _embedded_texts(settings: Any) -> tuple[list[str], list[str]]:
    from ppo_cli.data.embedded import HELD_OUT_SEED, TRAIN_SEED
    from ppo_cli.data.embedded.grammar import reviews

    count = min(settings.limit or EMBEDDED_REVIEWS, MOST_EMBEDDED_REVIEWS)
    return (
        [review.text for review in reviews(count, TRAIN_SEED)],
        [review.text for review in reviews(settings.held_out, HELD_OUT_SEED)],
    )


def _lengths(settings: Any, seed: int) -> LengthSampler:
    return LengthSampler(settings.input_min_text_length, settings.input_max_text_length, seed=seed)


def _cut(
    texts: Sequence[str],
    tokenizer: Any,
    lengths: LengthSampler,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Prompt]:
    import torch

    encode = Encoder(tokenizer)
    told = 0
    for start in range(0, len(texts), AT_ONCE):
        batch = texts[start : start + AT_ONCE]
        rows = [ids[: lengths()] for ids in encode(batch, longest=lengths.values[-1])]
        for ids, text in zip(
            rows, tokenizer.batch_decode(rows, skip_special_tokens=True), strict=True
        ):
            if ids:
                # The cut may go through a character, whose part is no text.
                yield Prompt(text.rstrip(BROKEN) or text, torch.tensor(ids, dtype=torch.long))
        quarter = 4 * (start + len(batch)) // len(texts)
        if told < quarter and len(texts) >= TOLD_FROM:
            told = quarter
            tell(f"{start + len(batch)} of {len(texts)} texts tokenized")
