"""Which columns of a source are read, and the messages where one is not there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ppo_cli.errors import DataError, did_you_mean
from ppo_cli.utils.text import shortened

TEXT = "text"
INSTEAD = ("messages", "conversations", "prompt")  # of a column `text` that is not there

Cell = tuple[Any, dict[str, Any]]
"""A row: its text or conversation, and its other columns."""


@dataclass(frozen=True)
class Columns:
    """The columns to read.

    Attributes:
        text: column of the texts or conversations.
        needed: other columns that have to be there -> the key that names them.
        kept: further columns to keep; None for all.
    """

    text: str = TEXT
    needed: Mapping[str, str] = field(default_factory=dict)
    kept: Sequence[str] | None = ()

    def choose(self, place: str, names: Iterable[str]) -> tuple[str, list[str]]:
        """The column of the texts and the others to read, out of the `names` that are there.

        Raises:
            DataError: one is not there.
        """
        names = list(names)
        text = self.text
        if text == TEXT and text not in names:
            text = next((name for name in INSTEAD if name in names), text)
        need_column(place, text, names, "prompts.text_column")
        for column, key in self.needed.items():
            need_column(place, column, names, key)
        for column in self.kept or ():
            need_column(place, column, names, "prompts.keep_columns")
        wanted = names if self.kept is None else {*self.needed, *self.kept}
        return text, [name for name in names if name in wanted and name != text]

    def candidates(self) -> list[str]:
        """Names that the column of the texts may have, the likeliest first."""
        return [self.text, *(INSTEAD if self.text == TEXT else ())]

    def bare(self, place: str, text: str) -> Cell:
        """A row that is only a text, in a file without columns.

        Raises:
            DataError: other columns are needed.
        """
        others = {**self.needed, **dict.fromkeys(self.kept or (), "prompts.keep_columns")}
        for column, key in others.items():
            raise DataError(f"{place}: no column '{column}', only texts ({key} names it)")
        return text, {}

    def pairs(self, batch: Mapping[str, Sequence[Any]], text: str, others: list[str]) -> list[Cell]:
        """The rows of a batch of columns."""
        columns = [batch[name] for name in others]
        return [
            (value, {name: column[i] for name, column in zip(others, columns, strict=True)})
            for i, value in enumerate(batch[text])
        ]


def matches(where: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether each column of `where` has its value, or one of its values, in a row."""
    return all(
        any(_equal(row.get(column), value) for value in (v if isinstance(v, list) else [v]))
        for column, v in where.items()
    )


def _equal(cell: Any, value: Any) -> bool:
    """Whether a cell has a value; in a table of texts, 1 and true are texts."""
    if isinstance(cell, str) and isinstance(value, (bool, int, float)):
        return cell.strip().lower() == json.dumps(value)
    return bool(cell == value)


def need_column(place: str, column: str, names: Sequence[str], key: str) -> None:
    """Raise `DataError` where `names` lack the column that `key` names."""
    if column not in names:
        shown = [shortened(name, 40) for name in names[:20]] + ["..."] * (len(names) > 20)
        raise DataError(
            f"{place}: no column '{column}'; it has {', '.join(shown)}."
            f"{did_you_mean(column, names)} (set {key})"
        )
