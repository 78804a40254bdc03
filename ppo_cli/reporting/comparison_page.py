"""A comparison as one self-contained HTML page: verdict, charts, samples, settings.

The page asks for nothing outside of itself, and its Content-Security-Policy forbids it. It is whole
without its script, which only sorts, filters and searches the samples.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ppo_cli.evaluation import quality
from ppo_cli.evaluation.best_of_n import BestOfN
from ppo_cli.evaluation.comparison_result import Answer, Comparison
from ppo_cli.evaluation.verdict import headline, is_clear, verdict
from ppo_cli.reporting import comparison_tables as tables
from ppo_cli.reporting import page_charts as charts
from ppo_cli.reporting.curves import Runs
from ppo_cli.reporting.frontier import Trail
from ppo_cli.utils.ngrams import Changed, most_changed_grams
from ppo_cli.utils.text import escape_controls

LONG_NAME = 32  # characters, over which a path is shown by its last part
LEVELS = 7  # of a score's colour
WORDS, PAIRS = 8, 5  # most changed ones that are listed, more frequent and less
ABREAST, ABREAST_LETTERS = 2, 18  # models, and letters of their names, that fit a telephone
MANY = 200  # prompts, over which a browser draws only those in sight


@dataclass(frozen=True)
class PageDetails:
    """What a page shows beside the comparison.

    Attributes:
        runs: metrics of those models that are run directories, by name.
        trails: their evaluations during training, of the score that is compared.
        curve: best-of-n that a run measured, for a comparison without.
        settings: further lines of its last table.
    """

    runs: Runs = field(default_factory=dict)
    trails: Sequence[Trail] = ()
    curve: BestOfN | None = None
    settings: Mapping[str, str] = field(default_factory=dict)


def comparison_html(comparison: Comparison, details: PageDetails | None = None) -> str:
    """The page of a comparison."""
    details = details or PageDetails()
    names = _names([model.model for model in comparison.models])
    colours = [charts.colour(i, name) for i, name in enumerate(names)]
    several = len(names) > 1
    texts = [[row.responses[i].response for row in comparison.rows] for i in range(len(names))]
    counts = {1: WORDS, 2: PAIRS} if several else {}
    grams = {n: most_changed_grams(texts[0], texts[-1], n, count) for n, count in counts.items()}
    curve = comparison.best_of_n or _usable(details.curve, comparison)
    environment = _environment()
    script = environment.get_template("comparison.js").render()
    return environment.get_template("comparison.html").render(
        comparison=comparison,
        names=names,
        colours=colours,
        verdict=verdict(comparison, names),
        tiles=_tiles(comparison, names),
        measures=tables.measures(comparison.label, comparison.models),
        meanings={m.name.format(label=comparison.label): m.meaning for m in quality.MEASURES},
        histograms=charts.histograms(comparison, names),
        intervals=charts.interval_rows(comparison) if several else None,
        paired=[tables.paired_line(item) for item in comparison.differences],
        frontier=charts.frontier_chart(comparison, names, details.trails, curve),
        own_curve=comparison.best_of_n is None and curve is not None,
        training=charts.training_charts(comparison, names, details.runs),
        changed=[
            (title, [(comparison.rows[change.row], change) for change in found])
            for title, found in tables.changed_parts(comparison)
        ],
        grams=_grams(grams),
        tables=tables,
        level=_levels(comparison),
        stack=len(names) > ABREAST or sum(map(len, names)) > ABREAST_LETTERS,
        many=len(comparison.rows) > MANY,
        settings=_settings(comparison, details),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


@cache
def _environment() -> Environment:
    """Whatever a template shows is escaped, and has no control characters."""

    def shown(value: Any) -> Any:
        if isinstance(value, str) and not isinstance(value, Markup):
            return escape_controls(value, keep_lines=True)
        return value

    environment = Environment(
        loader=PackageLoader("ppo_cli.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["zip"] = zip
    environment.filters["sentence"] = lambda text: text[:1].upper() + text[1:]
    return environment


def _names(models: Sequence[str]) -> list[str]:
    """Models' names; a long path's last part, where no other model has that."""
    short = [PurePath(name).name if len(name) > LONG_NAME else name for name in models]
    counts = Counter(short)
    return [own if counts[own] == 1 else name for own, name in zip(short, models, strict=True)]


def _usable(curve: BestOfN | None, comparison: Comparison) -> BestOfN | None:
    return curve if curve is not None and curve.label == comparison.label else None


def _tiles(comparison: Comparison, names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Name, number and explanation of the first model's key figures, beside the last model's."""
    own, base, key = comparison.models[0], comparison.models[-1], headline(comparison)
    several = len(names) > 1

    def against(key: str, form: str) -> str:
        value = base.quality.values.get(key)
        return f"{names[-1]}: {value:{form}}" if several and value is not None else ""

    name = next(m.name for m in quality.MEASURES if m.key == key).format(label=comparison.label)
    tiles = [(name, f"{own.quality[key]:.2f}", against(key, ".2f"))]
    if several:
        item = comparison.differences[-1]
        low, high = item.difference.low, item.difference.high
        gap = f"{item.difference.mean:+.2f}"
        interval = f"95 % interval {low:+.2f} to {high:+.2f}"
        if not is_clear(item):
            interval += ", includes zero"
        tiles.append(("Difference in mean score", gap, interval))
        wins = item.win_rate_interval
        rate = f"95 % interval {wins.low:.0%} to {wins.high:.0%}"
        tiles.append((f"Scores higher than {names[-1]}", f"{item.win_rate:.0%}", rate))
    if (kl := own.quality.values.get("kl")) is not None:
        tiles.append(("KL from the reference", f"{kl:.2f}", "nats per response"))
    distinct = own.quality["distinct_2"]
    tiles.append(("Different word pairs", f"{distinct:.0%}", against("distinct_2", ".0%")))
    return tiles


def _levels(comparison: Comparison) -> Any:
    """Answer -> level of its colour, from 0 to `LEVELS` - 1: its probability, or else its place
    between the lowest and the highest score."""
    scores = [answer.score for row in comparison.rows for answer in row.responses]
    low, high = min(scores), max(scores)
    is_probability = all(a.probability is not None for r in comparison.rows for a in r.responses)

    def level(answer: Answer) -> int:
        share = answer.probability if is_probability and not comparison.terms else None
        if share is None:
            share = (answer.score - low) / (high - low) if high > low else 0.5
        return min(int(share * LEVELS), LEVELS - 1)

    return level


def _grams(grams: Mapping[int, Sequence[Changed]]) -> list[tuple[str, list[Changed]]]:
    """Titled lists: words and pairs of words that became more frequent, and less."""
    parts = []
    for n, found in grams.items():
        what = "Words" if n == 1 else "Pairs of words"
        parts.append((f"{what}, more frequent", [one for one in found if one.change > 0]))
        parts.append((f"{what}, less frequent", [one for one in found if one.change < 0]))
    return [(title, found) for title, found in parts if found]


def _settings(comparison: Comparison, details: PageDetails) -> list[tuple[str, str]]:
    is_sum = bool(comparison.terms)
    lines = [
        ("Models", ", ".join(model.model for model in comparison.models)),
        ("Reference", comparison.reference or "none"),
        ("Score", f"sum of {' + '.join(comparison.terms)}" if is_sum else comparison.output),
        ("Label", "" if is_sum else comparison.label),
        ("Classifier", comparison.classifier or ""),
        ("Prompts", str(len(comparison.rows))),
        ("Longest response", f"{comparison.max_new_tokens} tokens"),
        ("Sampling", "from the full distribution (temperature 1, no top-k, no top-p)"),
        ("Seed", f"{comparison.seed}; every model had the same prompts and random numbers"),
        ("Intervals", "95 % percentile bootstrap over the prompts"),
    ]
    return [line for line in lines if line[1]] + [*details.settings.items()]
