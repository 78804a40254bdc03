"""Small HTML for notebooks: all text is escaped, and colours are those of the page."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from ppo_cli.utils.text import escape_controls

# Notebooks have styles of their own for cells, and most of them remove style sheets.
SIDES = {"l": "text-align:left;overflow-wrap:anywhere", "r": "text-align:right;white-space:nowrap"}


def text(value: object, *, strong: bool = False, dim: bool = False) -> str:
    """Untrusted text as HTML: markup and control characters are shown, not interpreted."""
    escaped = html.escape(escape_controls(str(value)))
    if strong:
        return f"<b>{escaped}</b>"
    return f'<span style="opacity:.65">{escaped}</span>' if dim else escaped


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), sides: str = "lr") -> str:
    """A table of cells that are HTML already.

    Args:
        rows: of cells.
        head: cells of the heading; none for no heading.
        sides: of each column, `l` for left or `r` for right; the last also counts for those after.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        styles = (SIDES[sides[min(number, len(sides) - 1)]] for number in range(len(cells)))
        pairs = zip(cells, styles, strict=True)
        return "".join(f'<{tag} style="{side}">{cell}</{tag}>' for cell, side in pairs)

    top = f"<thead><tr>{line(head, 'th')}</tr></thead>" if head else ""
    body = "".join(f"<tr>{line(cells, 'td')}</tr>" for cells in rows)
    style = "border-collapse:collapse;margin:2px 0 6px"
    return f'<table style="{style}" cellpadding="4">{top}<tbody>{body}</tbody></table>'


def folded(title: str, content: str) -> str:
    """HTML that is folded away below a title; the title is text."""
    return f'<details><summary style="cursor:pointer">{text(title)}</summary>{content}</details>'


def page(title: str, *parts: str) -> str:
    """A title, which is text, above parts that are HTML."""
    inner = f'<div style="margin:2px 0 4px">{text(title, strong=True)}</div>{"".join(parts)}'
    return f'<div style="line-height:1.4">{inner}</div>'
