"""Untrusted text made safe to show: models, data and files decide what is in it."""

from __future__ import annotations

import unicodedata

# Format characters are invisible, and some turn the reading direction of what follows.
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def escape_controls(text: str) -> str:
    """`text` on one line, control and format characters shown as escapes (`\\x1b`, `\\u202e`)."""
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    if character == "\n":
        return "⏎"
    if character == "\u200d" or unicodedata.category(character) not in HIDDEN:
        return character  # the zero-width joiner belongs to emoji
    return character.encode("unicode_escape").decode("ascii")


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is: on one line, nothing in it markup."""
    shown = ""
    for character in escape_controls(text):
        if character in "|<>&":
            shown += f"&#{ord(character)};"
        elif character in "\\`*_{}[]()#+!~":
            shown += f"\\{character}"
        else:
            shown += character
    return shown


def shortened(text: str, width: int) -> str:
    """`text` cut to `width` characters, with an ellipsis where it was cut."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"
