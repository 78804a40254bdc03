"""Rows of the sources: texts or conversations, filtered, and split into training and held-out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ppo_cli.config.prompts import PromptsConfig, PromptSource
from ppo_cli.data.chat import Message, messages_of, split_answer
from ppo_cli.data.columns import Columns, matches
from ppo_cli.data.sources import EMBEDDED, check_encodable, read_cells, shown_source
from ppo_cli.errors import DataError

EMBEDDED_REVIEWS = 4000
MAX_EMBEDDED_REVIEWS = 100_000
MAX_MIXED = 1_000_000  # prompts


@dataclass(frozen=True)
class Row:
    """A text or a conversation, and what stands beside it.

    Attributes:
        text: of a conversation what its last message says.
        columns: other columns, for rewards. A conversation is in `messages`, and the answer that
            stood at its end in `completion`.
        messages: the conversation; None for a text.
    """

    text: str
    columns: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] | None = None

    @property
    def key(self) -> str:
        """Equal for rows with the same prompt."""
        return self.text if self.messages is None else json.dumps(self.messages, default=str)


def conversation(
    cell: Any, place: str, columns: dict[str, Any] | None = None, system: str | None = None
) -> Row | None:
    """The row of a conversation, as `messages_of` takes it; None where nobody asks anything.

    Raises:
        DataError: the cell is no conversation.
    """
    messages, answer = split_answer(messages_of(cell, place, system))
    if not any(m["role"] != "system" and m["content"].strip() for m in messages):
        return None
    for message in messages:
        check_encodable(message["content"], place)
    beside: dict[str, Any] = {} if answer is None else {"completion": answer}
    beside |= {**(columns or {}), "messages": messages}
    return Row(messages[-1]["content"], beside, messages)


def read_rows(
    settings: PromptSource, *, limit: int | None = None, distinct: bool = False, seed: int = 0
) -> list[Row]:
    """Read the rows of a source that pass its filters, at most `limit`, without blank ones.

    Args:
        settings: of the source.
        limit: None for all.
        distinct: leave repeats out; they count towards the limit nevertheless.
        seed: of the shuffling of a stream.

    Raises:
        DataError: the source is absent, unreadable, empty, not UTF-8, or lacks a column.
    """
    rows = _rows(settings, seed)
    first = next(rows, None)
    name = shown_source(settings.source)
    if first is None:
        passing = f" that prompts.where {settings.where} accepts" if settings.where else ""
        raise DataError(f"{name} holds no texts{passing or ': it is empty'}")
    found = (row for part in ([first], rows) for row in part if _has_length(row, settings))
    kept: dict[Any, Row] = {}
    for number, row in enumerate(islice(found, limit)):
        kept.setdefault(row.key if distinct else number, row)
    return list(kept.values())


def _rows(settings: PromptSource, seed: int) -> Iterator[Row]:
    """The rows that are not blank and that `where` accepts."""
    needed = dict.fromkeys(settings.where, "prompts.where")
    if settings.system_column:
        needed[settings.system_column] = "prompts.system_column"
    columns = Columns(settings.text_column, needed, settings.keep_columns)
    for place, (cell, beside) in read_cells(settings, columns, seed):
        row = _row(settings, place, cell, beside)
        if row is not None:
            yield row


def _row(settings: PromptSource, place: str, cell: Any, beside: dict[str, Any]) -> Row | None:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return None
    if settings.chat and isinstance(cell, (str, list)):
        system = beside.get(settings.system_column or "") or settings.system
        return conversation(cell, place, beside, str(system) if system else None)
    if isinstance(cell, list) and cell and isinstance(cell[0], dict):
        raise DataError(
            f"{place}: a conversation stands where a text is needed: set prompts.chat to true, or "
            "give --chat"
        )
    if not isinstance(cell, str):
        raise DataError(
            f"{place}: column '{settings.text_column}' holds {type(cell).__name__}, not text"
        )
    check_encodable(cell, place)
    return Row(cell, beside)


def _has_length(row: Row, settings: PromptSource) -> bool:
    length = len(row.text)
    if row.messages is not None:
        length = sum(len(message["content"]) for message in row.messages)
    most = settings.max_characters
    return settings.min_characters < length and (most is None or length <= most)


def split_rows(
    settings: PromptsConfig, source: PromptSource, share: float, seed: int
) -> tuple[list[Row], list[Row]]:
    """Rows of one source to train on, and held-out ones.

    Args:
        settings: say how many of each.
        source: one of `settings.mixture`.
        share: of the source among all.
        seed: decides which rows are held out.

    Raises:
        DataError: the source yields no row.
    """
    held_out = max(round(settings.held_out * share), 1)
    limit = settings.limit and max(round(settings.limit * share), 1)
    apart = source.held_out_split is not None or source.held_out_source is not None
    if source.source == EMBEDDED:
        rows, kept = _embedded_rows(source, limit, held_out)
        return rows, _held_out_rows(source, held_out, seed) if apart else kept
    read = limit if apart else limit and limit + held_out
    rows = read_rows(source, limit=read, distinct=True, seed=seed)
    if not rows:
        raise DataError(
            f"{shown_source(source.source)}: no text is longer than {source.min_characters} "
            f"characters{_and_shorter(source)}; lower prompts.min_characters"
        )
    if apart:
        kept = _held_out_rows(source, held_out, seed)
        keys = {row.key for row in kept}
        return [row for row in rows if row.key not in keys], kept
    held_out_size = min(held_out, len(rows) // 2)
    order = np.random.RandomState(seed).permutation(len(rows))
    kept = [rows[i] for i in order[:held_out_size]]
    return [rows[i] for i in order[held_out_size:]][:limit], kept


def _and_shorter(source: PromptSource) -> str:
    most = source.max_characters
    return "" if most is None else f" and no longer than {most} (prompts.max_characters)"


def _held_out_rows(source: PromptSource, count: int, seed: int) -> list[Row]:
    """Rows of the split or source that is there for the evaluation alone."""
    place: dict[str, Any] = {"split": source.held_out_split or source.split}
    if source.held_out_source is not None:
        place |= {"source": source.held_out_source, "revision": None, "streaming": False}
    elsewhere = source.model_copy(update=place)
    name = elsewhere.source
    if source.held_out_split is not None and _has_no_splits(name):
        raise DataError(
            f"prompts.held_out_split is {source.held_out_split}, and {shown_source(name)} has no "
            "splits: name a file with prompts.held_out_source, or leave it out"
        )
    if name == EMBEDDED:
        return _embedded_rows(elsewhere, 1, count)[1]
    # Of a stream the first ones are taken: they are shuffled in their buffer.
    limit = count if elsewhere.streaming else None
    rows = read_rows(elsewhere, limit=limit, distinct=True, seed=seed)
    order = np.random.RandomState(seed).permutation(len(rows))[:count]
    if not len(order):
        raise DataError(f"{shown_source(name)}: no held-out text passes the filters")
    return [rows[i] for i in order]


def _has_no_splits(name: str) -> bool:
    return name == EMBEDDED or "://" in name or Path(name).expanduser().is_file()


def _embedded_rows(
    source: PromptSource, limit: int | None, held_out: int
) -> tuple[list[Row], list[Row]]:
    from ppo_cli.data.embedded import HELD_OUT_SEED, TRAIN_SEED
    from ppo_cli.data.embedded.grammar import reviews

    def rows(count: int, seed: int) -> list[Row]:
        made = ((review.text, {"label": review.label}) for review in reviews(count, seed))
        found = [_row(source, EMBEDDED, t, c) for t, c in made if matches(source.where, c)]
        return [row for row in found if row is not None and _has_length(row, source)]

    count = min(limit or EMBEDDED_REVIEWS, MAX_EMBEDDED_REVIEWS)
    return rows(count, TRAIN_SEED), rows(held_out, HELD_OUT_SEED)


def mixed(parts: list[list[Any]], shares: list[float], limit: int | None) -> list[Any]:
    """Items of several lists in proportion to `shares`.

    Without a limit every item is there at least once; those of a list that is too short for its
    share are repeated.
    """
    if len(parts) == 1:
        return parts[0]
    most = max(len(part) / share for part, share in zip(parts, shares, strict=True))
    total = min(limit or most, MAX_MIXED)
    return [
        part[i % len(part)]
        for part, share in zip(parts, shares, strict=True)
        for i in range(round(total * share) if part else 0)
    ]
