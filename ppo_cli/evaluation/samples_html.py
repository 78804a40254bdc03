"""Samples as HTML for notebooks."""

from __future__ import annotations

from collections.abc import Sequence

from ppo_cli.evaluation.samples import Sample
from ppo_cli.utils.html import table, text


def samples_html(samples: Sequence[Sample], count: int) -> str:
    """Score, and query with response in bold, of at most `count` samples."""
    rows = [
        (
            text("" if sample.score is None else f"{sample.score:+.2f}"),
            text(sample.query + sample.gap, dim=True) + text(sample.response, strong=True),
        )
        for sample in samples[:count]
    ]
    return table(rows, (), "rl")
