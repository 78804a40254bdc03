"""What the sections of the configuration share: their base class, and names in them."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MAX_NAME_LENGTH = 1000
MAX_COUNT = 10**9


def check_name(text: str) -> str:
    """`text`, if it can be the name of a model, file or label; else raises `ValueError`."""
    if not text.strip():
        raise ValueError("is empty: give a name")
    if any(ord(character) < 32 for character in text):
        raise ValueError("holds a control character: give a name without one")
    if len(text) > MAX_NAME_LENGTH:
        raise ValueError(f"has {len(text)} characters: give a name of {MAX_NAME_LENGTH} at most")
    return text


Name = Annotated[str, AfterValidator(check_name)]
Length = Annotated[int, Field(ge=1, le=1_000_000)]


def check_order(section: BaseModel, low: str, high: str) -> None:
    """Raise `ValueError` unless key `low` is less than key `high`."""
    lowest, highest = getattr(section, low), getattr(section, high)
    if lowest >= highest:
        raise ValueError(f"{high} ({highest}) must exceed {low} ({lowest})")


class Section(BaseModel):
    """A part of the configuration. Unknown keys are refused; values cannot be changed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
