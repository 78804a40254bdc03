"""Queries: texts cut to their first tokens or whole, and conversations in their template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ppo_cli.config.prompts import PromptsConfig
from ppo_cli.data.chat import ChatEncoder, Message, without_oldest
from ppo_cli.data.encoder import TOKENIZER_BATCH, Encoder
from ppo_cli.data.rows import Row, mixed, split_rows
from ppo_cli.errors import DataError
from ppo_cli.utils.random_state import numpy_state, set_numpy_state

PROGRESS_FROM = 20_000  # texts; progress of tokenizing fewer is not shown
BROKEN = "\N{REPLACEMENT CHARACTER}"  # a cut character decodes to it
Report = Callable[[str], None]


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
    """A query: its text and tokens.

    Attributes:
        query: text without special tokens; of a conversation what its last message says.
        input_ids: (query_length,) int64.
        columns: the row's other columns, for rewards; a conversation is in `messages` there, too.
        messages: the conversation that the model answers; None for a text that it continues.
    """

    query: str
    input_ids: Any
    columns: Mapping[str, Any] = field(default_factory=dict)
    messages: list[Message] | None = None

    @property
    def row(self) -> Row:
        """What the query was made of, for a model with another tokenizer."""
        return Row(self.query, dict(self.columns), self.messages)


@dataclass(frozen=True)
class PromptSet:
    """Queries to train on, and held-out ones to evaluate on."""

    train: list[Prompt]
    held_out: list[Prompt]


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Rows -> one list per column: the data collator of `PPOTrainer` for ragged queries."""
    return {key: [row[key] for row in rows] for key in rows[0]}


class PromptEncoder:
    """Makes queries of rows, for one tokenizer.

    Args:
        tokenizer: of the model that reads them.
        settings: how they are cut, and variables of the chat template.
        seed: of their lengths.
        name: of the model, for messages about errors.
        complete: whether an encoder reads the texts; after a cut, too, their end tokens follow.
    """

    def __init__(
        self,
        tokenizer: Any,
        settings: PromptsConfig,
        seed: int = 0,
        name: str = "",
        *,
        complete: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._name = name
        self._encode = Encoder(tokenizer, complete=complete)
        self._chat: ChatEncoder | None = None
        self._lengths = LengthSampler(
            settings.input_min_text_length, settings.input_max_text_length, seed=seed
        )

    def skip(self, rows: Sequence[Row]) -> None:
        """Draw the lengths of `rows`, so that those of others are what they would be after them."""
        for row in rows:
            self._draw(row)

    def prompts(self, rows: Sequence[Row], tell: Report = lambda _: None) -> Iterator[Prompt]:
        """The queries of the rows; rows without tokens, and those that are too long, are left out.

        Raises:
            UsageError: there are conversations, and the tokenizer has no chat template.
            DataError: the template refuses a conversation.
        """
        shown = 0  # quarters
        for start in range(0, len(rows), TOKENIZER_BATCH):
            batch = rows[start : start + TOKENIZER_BATCH]
            kept = [found for found in map(self._fitted, batch, self.ids(batch)) if found[1]]
            yield from self._finished(kept)
            quarter = 4 * (start + len(batch)) // len(rows)
            if shown < quarter and len(rows) >= PROGRESS_FROM:
                shown = quarter
                tell(f"{start + len(batch)} of {len(rows)} texts tokenized")

    def ids(self, rows: Sequence[Row]) -> list[list[int]]:
        """Token ids of each row, a text cut where the settings say so; [] without any."""
        lengths = [self._draw(row) for row in rows]
        texts = [row.text if row.messages is None else "" for row in rows]
        longest = self._lengths.values[-1] if self._settings.cut else None
        return [
            self._of_messages(row.messages)
            if row.messages is not None
            else found and found[:length] + self._encode.ending
            for row, found, length in zip(rows, self._encode(texts, longest), lengths, strict=True)
        ]

    def _draw(self, row: Row) -> int | None:
        return self._lengths() if self._settings.cut and row.messages is None else None

    def _of_messages(self, messages: Sequence[Message]) -> list[int]:
        if self._chat is None:
            variables = self._settings.chat_template_kwargs
            self._chat = ChatEncoder(self._tokenizer, self._name, variables)
        return self._chat(messages)

    def _fitted(self, row: Row, ids: list[int]) -> tuple[Row, list[int]]:
        """A row and its ids, no more than `max_tokens`; no ids where it is left out."""
        most = self._settings.max_tokens
        if most is None or len(ids) <= most:
            return row, ids
        if self._settings.too_long == "drop":
            return row, []
        if row.messages is None:
            first = self._encode.beginning
            return row, [*first, *ids[len(ids) - most + len(first) :]] if most > len(first) else []
        messages = row.messages
        while len(ids) > most:
            messages = without_oldest(messages)
            if not messages:
                return row, []
            ids = self._of_messages(messages)
        return Row(row.text, {**row.columns, "messages": messages}, messages), ids

    def _finished(self, rows: Sequence[tuple[Row, list[int]]]) -> Iterator[Prompt]:
        import torch

        if not rows:  # `batch_decode` would give one text
            return
        shown = [ids if row.messages is None else [] for row, ids in rows]
        texts = self._tokenizer.batch_decode(shown, skip_special_tokens=True)
        for (row, ids), decoded in zip(rows, texts, strict=True):
            # The cut may split a character.
            text = (decoded.rstrip(BROKEN) or decoded) if row.messages is None else row.text
            yield Prompt(text, torch.tensor(ids, dtype=torch.long), row.columns, row.messages)


def load_prompts(
    settings: PromptsConfig,
    tokenizer: Any,
    seed: int,
    tell: Report = lambda _: None,
    *,
    complete: bool = False,
) -> PromptSet:
    """Read the sources, keep what passes the filters, hold some out, make queries of all.

    Args:
        settings: say what and how.
        tokenizer: the policy's.
        seed: decides which rows are held out, and how long each query is.
        tell: receives messages about progress where tokenizing takes a while.
        complete: as for `PromptEncoder`.

    Raises:
        DataError: a source is absent, unreadable, without its column, or yields no query.
        UsageError: there are conversations, and the tokenizer has no chat template.
    """
    encoder = PromptEncoder(tokenizer, settings, seed, complete=complete)
    train, held_out = [], []
    for name, rows, kept in _splits(settings, seed):
        train.append(list(encoder.prompts(rows, tell)))
        held_out.append(list(encoder.prompts(kept, tell)))
        if not train[-1]:
            raise DataError(f"{name}: no text yields a query{_too_long(settings)}")
    return PromptSet(mixed(train, _shares(settings), settings.limit), _shuffled(held_out, seed))


def load_held_out(
    settings: PromptsConfig, tokenizer: Any, seed: int, *, complete: bool = False
) -> list[Prompt]:
    """The held-out prompts of `load_prompts`, without tokenizing the others."""
    encoder = PromptEncoder(tokenizer, settings, seed, complete=complete)
    held_out = []
    for _, rows, kept in _splits(settings, seed):
        encoder.skip(rows)  # `load_prompts` draws their lengths first
        held_out.append(list(encoder.prompts(kept)))
    return _shuffled(held_out, seed)


def _splits(settings: PromptsConfig, seed: int) -> Iterator[tuple[str, list[Row], list[Row]]]:
    """Name, rows to train on, and held-out rows of each source."""
    for source, share in zip(settings.mixture, _shares(settings), strict=True):
        yield source.source, *split_rows(settings, source, share, seed)


def _shares(settings: PromptsConfig) -> list[float]:
    weights = [source.weight for source in settings.mixture]
    return [weight / sum(weights) for weight in weights]


def _shuffled(parts: list[list[Prompt]], seed: int) -> list[Prompt]:
    """The prompts of several sources in random order: `compare` takes the first ones."""
    if len(parts) == 1:
        return parts[0]
    together = [prompt for part in parts for prompt in part]
    return [together[i] for i in np.random.RandomState(seed).permutation(len(together))]


def _too_long(settings: PromptsConfig) -> str:
    most = settings.max_tokens
    return "" if most is None else f" of at most {most} tokens: raise prompts.max_tokens"
