"""Makes untrusted text of models, data and files safe to show.

Characters that are invisible or control a terminal become escapes: control characters (C0 and C1,
which include ANSI codes), format characters (bidirectional overrides, zero-width ones), and
Unicode's default ignorable ones (fillers, variation selectors, tags). They are kept where a script
needs them: inside emoji, and one at a time after a letter whose form they choose.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from typing import Any

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
# Default_Ignorable_Code_Point outside of these categories, then blank symbols.
INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8"
    "\U000e0000-\U000e0fff\U00013430-\U0001343f\u2800\U00016fe4\U0001d159]"
)
_EMOJI = (
    "[\u00a9\u00ae\u203c\u2049\u2100-\u214f\u2190-\u23ff\u2460-\u24ff\u25a0-\u27bf\u2900-\u297f"
    "\u2b00-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001faff][\ufe0e\ufe0f]?"
    "[\U0001f3fb-\U0001f3ff]?"
)
_SUBDIVISIONS = "|".join(
    "".join(chr(0xE0000 + ord(letter)) for letter in name) for name in ("gbeng", "gbsct", "gbwls")
)
# Sequences that are kept; any other character that may be invisible is checked alone.
_PIECES = re.compile(
    f"\U0001f3f4(?:{_SUBDIVISIONS})\U000e007f"  # flags of England, Scotland, Wales
    f"|{_EMOJI}(?:\u200d{_EMOJI})*"
    "|[0-9#*]\ufe0f?\u20e3"
    # joiners shape the letters of Arabic, Indic and other scripts; selectors choose among forms
    "|(?<=[\u0600-\u109f\u1780-\u18af\u1a20-\u1cff\ua800-\uabff\ufb50-\ufdff\ufe70-\ufefc"
    "\U00011000-\U00011fff])[\u200c\u200d]"
    "|(?<=[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])[\ufe00-\ufe02\U000e0100-\U000e01ef]"
    "|(?<=[\u2200-\u22ff\u1000-\u109f])\ufe00"  # mathematics, Myanmar
    "|(?<=[\u1820-\u18aa])[\u180b-\u180f]"  # Mongolian
    "|(?<=[\u05b0-\u05ea])\u034f"  # Hebrew points in their order
    "|(?P<alone>[^ -~])"
)
FORMULA_STARTS = tuple("=+-@\t\r＝＋－＠")


def escape_controls(text: str, *, keep_lines: bool = False) -> str:
    """`text`, control and format characters shown as escapes (`\\x1b`, `\\u202e`).

    It is on one line, unless `keep_lines` leaves its line ends as they are.
    """
    line_end = "\n" if keep_lines else "⏎"
    return _escaped(text, lambda c: line_end if c == "\n" else c.encode("unicode_escape").decode())


def json_text(value: Any, **options: Any) -> str:
    """`value` as JSON, its invisible characters as JSON escapes.

    Args:
        value: plain values.
        options: of `json.dumps`; `ensure_ascii` is off by default.
    """
    text = json.dumps(value, **{"ensure_ascii": False, **options})
    return _escaped(text, lambda c: c if c == "\n" else json.dumps(c)[1:-1])


def spreadsheet_text(text: str) -> str:
    """Text of a spreadsheet's cell: an apostrophe in front keeps it from being a formula."""
    shown = _escaped(text, lambda c: c if c == "\n" else c.encode("unicode_escape").decode())
    return f"'{shown}" if text.lstrip(" \n").startswith(FORMULA_STARTS) else shown


def markdown_text(text: str) -> str:
    """Text that Markdown shows literally, on one line, without markup and links."""
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
    """A name as Markdown code; as plain text where it contains a character that ends code."""
    shown = escape_controls(text)
    return markdown_text(text) if not shown.strip() or set("`|") & set(shown) else f"`{shown}`"


def shortened(text: str, width: int) -> str:
    """`text` cut to `width` characters; three dots show that it was cut."""
    return text if len(text) <= width else text[: max(width - 3, 0)] + "..."


def cut_middle(text: str, width: int) -> str:
    """`text` cut to `width` characters; three dots in the middle show that it was cut."""
    if len(text) <= width:
        return text
    kept = max(width - 3, 0)
    return f"{text[: kept // 2]}...{text[len(text) - (kept - kept // 2) :]}"


def _escaped(text: str, escape: Callable[[str], str]) -> str:
    """Replace the hidden characters of `text` by `escape(character)`."""
    if text.isascii() and text.isprintable():
        return text

    def shown(piece: re.Match[str]) -> str:
        character = piece["alone"]
        return escape(character) if character and _is_hidden(character) else piece[0]

    return _PIECES.sub(shown, text)


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in HIDDEN or INVISIBLE.match(character) is not None
