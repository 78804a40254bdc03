"""Queries: texts of a source, cut to their first tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ppo_cli.data.sources import EMBEDDED, read_texts
from ppo_cli.errors import DataError
from ppo_cli.utils.random_state import numpy_state, set_numpy_state

EMBEDDED_REVIEWS = 4000
MAX_EMBEDDED_REVIEWS = 100_000
TOKENIZER_BATCH = 1000  # texts
PROGRESS_FROM = 20_000  # texts; progress of tokenizing fewer is not shown
PROBE = "a"
MAX_CHARACTERS = 5  # per token, more than prose has
BETWEEN_WORDS = re.compile(r"(?<=\S) (?=\S)")
ACROSS_WORDS = re.compile(
    r"[^\sĠĊĉč▁][ Ġ▁]"
)  # a token with a gap between words, in the form of byte-level or SentencePiece
BROKEN = "\N{REPLACEMENT CHARACTER}"  # a cut character decodes to it


class LengthSampler:
    """Draws an integer from `min_value` to `max_value - 1` uniformly, like TRL's.

    Args:
        min_value: smallest length.
        max_value: largest length plus one.
        seed: of the sampler's own generator; None draws from NumPy's global state.

    Raises:
        ValueError: the range is empty.
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
        """Draw a length."""
        draw: Callable[[int], int] = (self._own or np.random).randint  # like `choice`, but faster
        return self.values[draw(len(self.values))]

    def state_dict(self) -> dict[str, Any]:
        """State of the sampler's own generator, plain values."""
        return {} if self._own is None else numpy_state(self._own)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        if self._own is not None and state:
            set_numpy_state(self._own, state)


@dataclass(frozen=True)
class Prompt:
    """A query: text without special tokens, and `input_ids`, (query_length,) int64.

    `columns` holds the row's other columns, for rewards; a conversation is in `messages`.
    """

    query: str
    input_ids: Any
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSet:
    """Queries to train on, and held-out ones to evaluate on."""

    train: list[Prompt]
    held_out: list[Prompt]


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows -> one list per column: the data collator of `PPOTrainer` for ragged queries."""
    return {key: [row[key] for row in rows] for key in rows[0]}


class Encoder:
    """Encodes texts as queries.

    Special tokens that the tokenizer puts before a text, such as <s>, are part of the query. Those
    after it, such as </s> or [SEP], are not, because the model continues the text. Text that spells
    a special token stays text, where the tokenizer can distinguish the two.

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
        """Encode texts, without end tokens; a text without tokens gives an empty list.

        Args:
            texts: the texts to continue.
            longest: number of ids to return of each text; the rest of a long text is not encoded
                where that cannot change them.
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
        """Encode the texts without special tokens."""
        tokenizer, rows = self._tokenizer, []
        is_fast = getattr(
            tokenizer, "is_fast", None
        )  # None: mistral-common's, which takes no text for special tokens
        if is_fast:
            for i in range(0, len(texts), TOKENIZER_BATCH):
                batch = list(texts[i : i + TOKENIZER_BATCH])
                rows += tokenizer(
                    batch, add_special_tokens=False, split_special_tokens=True
                ).input_ids
            return rows
        special = [] if is_fast is None else tokenizer.all_special_tokens
        for text in texts:
            # With this option, tokenizers in Python split all added tokens, not only special ones.
            spelled = any(token in text for token in special)
            options = {"split_special_tokens": True} if spelled else {}
            rows.append(list(tokenizer(text, add_special_tokens=False, **options).input_ids))
        return rows

    def _start(self, text: str, longest: int | None) -> str:
        """The start of a text, cut between words, that should hold `longest` tokens."""
        if longest is None:
            return text
        size = MAX_CHARACTERS * longest + 64
        if len(text) <= size or not self._reads_words_apart:
            return text
        gaps = [gap.start() for gap in BETWEEN_WORDS.finditer(text, size - 64, size)]
        return (
            text[: gaps[-3]] if len(gaps) > 2 else text
        )  # the last token may depend on two more words

    @cached_property
    def _reads_words_apart(self) -> bool:
        """Whether the tokens before a gap between words do not depend on the text after it.

        BPE merges two tokens of its vocabulary into a third, and Unigram chooses among sequences of
        its tokens. If no token contains a gap, neither looks across one. Normalizers and
        pre-tokenizers look no further than the next word.
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
    """Read the source, keep the long texts, hold some out, cut all to their first tokens.

    Args:
        settings: a `PromptsConfig`.
        tokenizer: the policy's.
        seed: decides which texts are held out and how long each query is.
        tell: receives messages about progress where tokenizing takes a while.

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
    for _ in train:  # `load_prompts` draws their lengths first
        lengths()
    return list(_cut(held_out, tokenizer, lengths))


def _split_texts(settings: Any, seed: int) -> tuple[list[str], list[str]]:
    """Texts to train on, and held-out texts."""
    if settings.source == EMBEDDED:
        return _embedded_texts(settings)
    texts = read_texts(
        settings.source,
        column=settings.text_column,
        subset=settings.subset,
        split=settings.split,
        keep=lambda text: len(text) > settings.min_characters,
        limit=settings.limit and settings.limit + settings.held_out,
        distinct=True,  # no text is both held out and trained on
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

    count = min(settings.limit or EMBEDDED_REVIEWS, MAX_EMBEDDED_REVIEWS)
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
    shown = 0  # quarters
    for start in range(0, len(texts), TOKENIZER_BATCH):
        batch = texts[start : start + TOKENIZER_BATCH]
        rows = [ids[: lengths()] for ids in encode(batch, longest=lengths.values[-1])]
        for ids, text in zip(
            rows, tokenizer.batch_decode(rows, skip_special_tokens=True), strict=True
        ):
            if ids:
                # The cut may split a character.
                yield Prompt(text.rstrip(BROKEN) or text, torch.tensor(ids, dtype=torch.long))
        quarter = 4 * (start + len(batch)) // len(texts)
        if shown < quarter and len(texts) >= PROGRESS_FROM:
            shown = quarter
            tell(f"{start + len(batch)} of {len(texts)} texts tokenized")
