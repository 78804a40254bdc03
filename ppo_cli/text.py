"""Untrusted text made safe to show: models, data and files decide what is in it.

What a reader would not see, or what steers a terminal, is written as an escape: control characters
(C0 and C1, so ANSI codes too), format characters (bidirectional overrides, zero-width ones).
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from typing import Any

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
JOINERS = "\u200c\u200d"  # belong to emoji and to Persian and Indic words, but not between letters
FORMULA_STARTS = tuple("=+-@\t\r＝＋－＠")


def escape_controls(text: str) -> str:
    """`text` on one line, control and format characters shown as escapes (`\\x1b`, `\\u202e`)."""
    return _escaped(text, lambda c: "⏎" if c == "\n" else c.encode("unicode_escape").decode())


def json_text(value: Any, **options: Any) -> str:
    """`value` as JSON that reads back the same, its invisible characters as JSON's escapes.

    Args:
        value: plain values.
        options: of `json.dumps`, whose `ensure_ascii` is off unless given.
    """
    text = json.dumps(value, **{"ensure_ascii": False, **options})
    return _escaped(text, lambda c: c if c == "\n" else json.dumps(c)[1:-1])


def spreadsheet_text(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: an apostrophe in front where one would."""
    shown = _escaped(text, lambda c: c if c == "\n" else c.encode("unicode_escape").decode())
    return f"'{shown}" if text.lstrip(" \n").startswith(FORMULA_STARTS) else shown


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: on one line, nothing in it markup or a link."""
    shown = ""
    for character in escape_controls(text):
        if character in "|<>&@":
            shown += f"&#{ord(character)};"
        elif character in "\\`*_{}[]()#+!~$":
            shown += f"\\{character}"
        else:
            shown += character
    return shown.replace("://", "&#58;//").replace("www.", "www&#46;")


def markdown_code(text: str) -> str:
    """A name as Markdown code; as plain text where it holds what would end the code."""
    shown = escape_controls(text)
    return markdown_text(text) if not shown.strip() or set("`|") & set(shown) else f"`{shown}`"


def shortened(text: str, width: int) -> str:
    """`text` cut to `width` characters, with an ellipsis, which ASCII has, where it was cut."""
    return text if len(text) <= width else text[: max(width - 3, 0)] + "..."


def _escaped(text: str, escape: Callable[[str], str]) -> str:
    """`text` with its hidden characters replaced by what `escape` makes of them."""
    if text.isprintable():
        return text
    shown = []
    before = ""
    for character in text:
        joins = character in JOINERS and before and not before.isascii()
        hidden = unicodedata.category(character) in HIDDEN and not joins
        shown.append(escape(character) if hidden else character)
        before = character
    return "".join(shown)
