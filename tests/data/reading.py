"""Reads the texts of a source in tests, without the rest of each row."""

from __future__ import annotations

from typing import Any

from ppo_cli.config.prompts import PromptSource
from ppo_cli.data.rows import read_rows


def read_texts(
    source: str,
    *,
    column: str = "text",
    limit: int | None = None,
    distinct: bool = False,
    **settings: Any,
) -> list[str]:
    """The texts of a source, at most `limit`."""
    place = PromptSource(source=source, text_column=column, **settings)
    return [row.text for row in read_rows(place, limit=limit, distinct=distinct)]
