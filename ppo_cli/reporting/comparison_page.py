"""A comparison as one self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Sequence

from ppo_cli.evaluation.comparison_result import Answer, Comparison
from ppo_cli.reporting.comparison_tables import (
    BEST_HEADS,
    PAIRED_HEADS,
    SHARE_TITLE,
    best_of_lines,
    best_of_title,
    changed_line,
    changed_parts,
    measures,
    paired_line,
    share_heads,
    share_lines,
    share_notes,
)
from ppo_cli.utils.text import escape_controls

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem;
  padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid #ccc; padding: .4rem .8rem; text-align: left;
  vertical-align: top; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
b { color: #0072B2; }
"""


def comparison_html(comparison: Comparison) -> str:
    """Means, paired differences, best-of-n, largest changes, then all responses side by side."""
    label = _text(" + ".join(comparison.terms) or comparison.label)
    classifier = f"Classifier {_text(comparison.classifier)}, " if comparison.classifier else ""
    names = [model.model for model in comparison.models]
    rows = "".join(
        f"<tr><td>{_text(row.query)}</td>{''.join(map(_answer, row.responses))}</tr>"
        for row in comparison.rows
    )
    heads = "".join(f"<th>{_text(name)}</th>" for name in ("query", *names))
    paired = [paired_line(item) for item in comparison.differences]
    reference = (
        f" KL and perplexity are measured from {_text(comparison.reference)}."
        if comparison.reference
        else ""
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ppo-cli compare</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style></head><body>
<h1>Score of “{label}”</h1>
<p>{classifier}{len(comparison.rows)} prompts, seed
{comparison.seed}. Every model had the same prompts and random numbers.{reference}</p>
{_table(("", *names), measures(comparison.label, comparison.models))}
<h2>Paired differences in score</h2>
{_table(PAIRED_HEADS, paired)}
{_best_of(comparison)}{_changed(comparison)}
<h2>All responses</h2>
<table><tr>{heads}</tr>{rows}</table>
</body></html>
"""


def _best_of(comparison: Comparison) -> str:
    curve = comparison.best_of_n
    if curve is None:
        return ""
    shares = _table(share_heads(comparison.shares), share_lines(comparison.shares))
    notes = "".join(f"<p>{_text(note)}</p>" for note in share_notes(comparison))
    title = _text(_sentence(best_of_title(curve)))
    return (
        f"<h2>{title}</h2>{_table(BEST_HEADS, best_of_lines(curve))}"
        f"<h2>{_text(_sentence(SHARE_TITLE))}</h2>{shares}{notes}"
    )


def _changed(comparison: Comparison) -> str:
    page = ""
    for title, found in changed_parts(comparison):
        rows = ""
        for change in found:
            by, query, *answers = changed_line(comparison, change)
            cells = "".join(map(_answer, answers))
            rows += f"<tr><td class=n>{by:+.2f}</td><td>{_text(query)}</td>{cells}</tr>"
        names = (comparison.changes.first, comparison.changes.second)
        heads = "".join(f"<th>{_text(name)}</th>" for name in ("change", "query", *names))
        page += f"<h2>{_text(_sentence(title))}</h2><table><tr>{heads}</tr>{rows}</table>"
    return page


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Names on the left, numbers on the right."""

    def row(values: Sequence[str], tag: str) -> str:
        cells = [
            f"<{tag}{' class=n' if i else ''}>{_text(v)}</{tag}>" for i, v in enumerate(values)
        ]
        return f"<tr>{''.join(cells)}</tr>"

    return f"<table>{row(heads, 'th')}{''.join(row(line, 'td') for line in lines)}</table>"


def _answer(answer: Answer) -> str:
    return f"<td>{_text(answer.response)} <b>{answer.score:.2f}</b></td>"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _text(text: str) -> str:
    return html.escape(escape_controls(text.strip()))
