"""A comparison as HTML for notebooks: the verdict, means, differences, some samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ppo_cli.evaluation.bootstrap import Interval
from ppo_cli.evaluation.quality import MEASURES
from ppo_cli.evaluation.verdict import verdict
from ppo_cli.utils.html import folded, page, table, text

if TYPE_CHECKING:
    from ppo_cli.evaluation.comparison_result import Comparison

SHOWN_ROWS = 5


def comparison_html(comparison: Comparison) -> str:
    """HTML of a comparison."""
    return page(
        comparison.title,
        f'<div style="margin:2px 0 6px">{text(verdict(comparison).sentence)}</div>',
        _means(comparison),
        _differences(comparison) if comparison.differences else "",
        folded(f"{min(SHOWN_ROWS, len(comparison.rows))} of the prompts", _samples(comparison)),
    )


def _means(comparison: Comparison) -> str:
    rows = []
    for measure in MEASURES:
        values = [model.quality.values.get(measure.key) for model in comparison.models]
        if any(value is not None for value in values):
            shown = ["-" if value is None else f"{value:.{measure.places}f}" for value in values]
            rows.append((text(measure.name.format(label=comparison.label)), *map(text, shown)))
    return table(rows, ("", *(text(model.model) for model in comparison.models)))


def _differences(comparison: Comparison) -> str:
    def shown(interval: Interval, form: str) -> str:
        return text(f"{interval.low:{form}} to {interval.high:{form}}")

    rows = [
        (
            text(f"{item.first} - {item.second}"),
            text(f"{item.difference.mean:+.3f}"),
            shown(item.difference, "+.3f"),
            text(f"{item.win_rate:.0%}"),
            shown(item.win_rate_interval, ".0%"),
        )
        for item in comparison.differences
    ]
    return table(
        rows, ("paired difference in score", "mean", "95 % interval", "wins", "95 % interval")
    )


def _samples(comparison: Comparison) -> str:
    rows = [
        (
            "" if number else text(row.query),
            text(answer.model),
            text(answer.response.strip(), strong=True),
            text(f"{answer.score:+.2f}"),
        )
        for row in comparison.rows[:SHOWN_ROWS]
        for number, answer in enumerate(row.responses)
    ]
    return table(rows, ("prompt", "model", "response", "score"), "lllr")
