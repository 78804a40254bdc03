"""Small HTML for notebooks: all text is escaped, and colours are those of the page."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from ppo_cli.utils.text import escape_controls

# Notebooks have styles of their own for tables; sanitisers remove style sheets.
_CELL = "padding:2px 12px 2px 0;vertical-align:top;overflow-wrap:anywhere;text-align:"
_LINE = "border-bottom:1px solid rgba(128,128,128,.5);"


def text(value: object, *, strong: bool = False, dim: bool = False) -> str:
    """Untrusted text as HTML: markup and control characters are shown, not interpreted."""
    escaped = html.escape(escape_controls(str(value)))
    if strong:
        return f"<b>{escaped}</b>"
    return f'<span style="opacity:.65">{escaped}</span>' if dim else escaped


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), left: int = 1) -> str:
    """A table of cells that are HTML already.

    Args:
        rows: of cells.
        head: cells of the heading; none for no heading.
        left: number of columns that are aligned on the left; the others are on the right.
    """

    def line(cells: Sequence[str], tag: str, style: str) -> str:
        sides = ("left" if number < left else "right" for number in range(len(cells)))
        pairs = zip(cells, sides, strict=True)
        inner = (f'<{tag} style="{_CELL}{side};{style}">{cell}</{tag}>' for cell, side in pairs)
        return f"<tr>{''.join(inner)}</tr>"

    top = f"<thead>{line(head, 'th', _LINE)}</thead>" if head else ""
    body = "".join(line(cells, "td", "") for cells in rows)
    style = "border-collapse:collapse;margin:2px 0 6px"
    return f'<table style="{style}">{top}<tbody>{body}</tbody></table>'


def folded(title: str, content: str) -> str:
    """HTML that is folded away below a title; the title is text."""
    return f'<details><summary style="cursor:pointer">{text(title)}</summary>{content}</details>'


def page(title: str, *parts: str) -> str:
    """A title, which is text, above parts that are HTML."""
    inner = f'<div style="margin:2px 0 4px">{text(title, strong=True)}</div>{"".join(parts)}'
    return f'<div style="line-height:1.4">{inner}</div>'
