"""Charts of the comparison page: places in percent of a panel, which its template draws as SVG.

matplotlib chooses the ticks. It does not draw: its text cannot follow the width of a screen, its
colours cannot follow light and dark, and a page of its pictures is several times as large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ppo_cli.evaluation.best_of_n import BestOfN
from ppo_cli.evaluation.comparison_result import Comparison
from ppo_cli.evaluation.verdict import REFERENCE, is_clear
from ppo_cli.reporting.curves import Runs, moving_average
from ppo_cli.reporting.frontier import Trail

BINS = 28
MOST_POINTS = 300  # of a line; more are not seen
CURVES = (
    ("Loss", "ppo/loss/total"),
    ("Mean reward", "env/reward_mean"),
    ("KL from the reference, nats", "objective/kl"),
)
PALE = (
    "Pale lines: the evaluations during training, from the reference on, on the run's own held-out "
    "prompts."
)
COLOURS = 6  # that the style sheet has for models


@dataclass(frozen=True)
class Axis:
    """A range of values, and the ticks in it: place in percent and text."""

    low: float
    high: float
    ticks: list[tuple[float, str]]

    @classmethod
    def over(cls, values: Sequence[float], *, whole: bool = False) -> Axis:
        """The axis that holds finite values, with a margin."""
        from matplotlib.ticker import MaxNLocator

        low, high = min(values), max(values)
        margin = (high - low) * 0.05 or abs(high) * 0.1 or 0.5
        low, high = low - margin, high + margin
        places = MaxNLocator(5, integer=whole, min_n_ticks=2).tick_values(low, high)
        bare = cls(low, high, [])
        return cls(low, high, [(bare.at(p), f"{p:.6g}") for p in places if low <= p <= high])

    def at(self, value: float) -> float:
        """Place of a value, percent."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)


@dataclass(frozen=True)
class Histogram:
    """One model's scores: bars as left edge, width and height, percent; and their mean."""

    name: str
    colour: str
    bars: list[tuple[float, float, float]]
    mean: float
    text: str


@dataclass(frozen=True)
class IntervalRow:
    """A difference with its interval, percent; `side` is `better`, `worse` or `unclear`."""

    low: float
    mean: float
    high: float
    side: str


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: of its entry in the legend; empty for none.
        colour: class of the style sheet.
        points: of the SVG's polyline.
        pale: a second polyline behind it; may be empty.
        band: of the SVG's polygon; may be empty.
        dots: places of its points, with what they are.
    """

    name: str
    colour: str
    points: str = ""
    pale: str = ""
    band: str = ""
    dots: list[tuple[float, float, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Chart:
    """A panel with lines; `text` says what it shows to those who cannot see it."""

    title: str
    across: str
    x: Axis
    y: Axis
    lines: list[Line]
    text: str
    note: str = ""


def colour(index: int, name: str) -> str:
    """Class of a model's colour."""
    return "ref" if name == REFERENCE else f"c{index % COLOURS}"


def histograms(comparison: Comparison, names: Sequence[str]) -> tuple[Axis, list[Histogram]]:
    """How often each score occurs, on one scale for all models."""
    scores = np.asarray([[answer.score for answer in row.responses] for row in comparison.rows])
    axis = Axis.over(scores.ravel().tolist())
    edges = np.linspace(axis.low, axis.high, BINS + 1)
    counts = np.asarray([np.histogram(column, edges)[0] for column in scores.T])
    found = []
    for i, name in enumerate(names):
        bars = [
            (round(100 * k / BINS, 2), round(90 / BINS, 2), round(100 * n / counts.max(), 1))
            for k, n in enumerate(counts[i].tolist())
            if n
        ]
        low, middle, high = np.percentile(scores[:, i], (0, 50, 100))
        text = f"lowest {low:.2f}, median {middle:.2f}, highest {high:.2f}"
        mean = axis.at(comparison.models[i].quality["score"])
        found.append(Histogram(name, colour(i, name), bars, mean, text))
    return axis, found


def interval_rows(comparison: Comparison) -> tuple[Axis, float, list[IntervalRow]]:
    """Axis of the differences, where zero is, and a row for each difference."""
    found = [item.difference for item in comparison.differences]
    axis = Axis.over([0.0, *(end for one in found for end in (one.low, one.mean, one.high))])
    rows = []
    for item, one in zip(comparison.differences, found, strict=True):
        side = "better" if one.mean > 0 else "worse"
        side = side if is_clear(item) else "unclear"
        rows.append(IntervalRow(axis.at(one.low), axis.at(one.mean), axis.at(one.high), side))
    return axis, axis.at(0.0), rows


def frontier_chart(
    comparison: Comparison, names: Sequence[str], trails: Sequence[Trail], curve: BestOfN | None
) -> Chart | None:
    """Score against KL: the models, their evaluations in training, best-of-n.

    None where no model but the reference has a KL.
    """
    models = [
        (kl, model.quality["score"], colour(i, name), name)
        for i, (model, name) in enumerate(zip(comparison.models, names, strict=True))
        if (kl := model.quality.values.get("kl")) is not None
    ]
    if all(name == REFERENCE for *_, name in models):
        return None
    colours = {
        m.model: colour(i, name)
        for i, (m, name) in enumerate(zip(comparison.models, names, strict=True))
    }
    points = curve.points if curve else []
    xs = [kl for kl, *_ in models] + [point.kl for point in points]
    ys = [score for _, score, *_ in models]
    ys += [end for p in points for end in (p.score_interval.low, p.score_interval.high)]
    for one in trails:
        xs += [0.0, *(e.kl for e in one.evaluations)]
        ys += [one.reference_score, *(e.score for e in one.evaluations)]
    x, y = Axis.over(xs), Axis.over(ys)
    place = _places(x, y)
    lines = []
    if points:
        upper = place([(p.kl, p.score_interval.high) for p in points])
        lower = place([(p.kl, p.score_interval.low) for p in reversed(points)])
        line = place([(p.kl, p.score) for p in points])
        dots = [(x.at(p.kl), 100 - y.at(p.score), f"{p.n:,}") for p in points]
        lines.append(
            Line("best of n from the reference", "best", line, band=f"{upper} {lower}", dots=dots)
        )
    for one in trails:
        path = [(0.0, one.reference_score), *((e.kl, e.score) for e in one.evaluations)]
        lines.append(Line("", colours.get(one.name, "c0"), pale=place(path)))
    for kl, score, hue, name in models:
        dot = (x.at(kl), 100 - y.at(score), f"{name}: score {score:.2f} at a KL of {kl:.2f}")
        lines.append(Line(name, hue, dots=[dot]))
    text = "; ".join(f"{name}: KL {kl:.2f}, score {score:.2f}" for kl, score, _, name in models)
    note = PALE if trails else ""
    return Chart("Mean score", "KL from the reference, nats per response", x, y, lines, text, note)


def training_charts(comparison: Comparison, names: Sequence[str], runs: Runs) -> list[Chart]:
    """Loss, mean reward and KL over the steps of each model that is in `runs` by its name."""
    models = [
        (name, colour(i, name), runs[model.model])
        for i, (model, name) in enumerate(zip(comparison.models, names, strict=True))
        if model.model in runs
    ]
    window = max(max((len(rows) for *_, rows in models), default=0) // 20, 1)
    note = f"Strong: mean of {window} steps; pale: each step." if window > 1 else ""
    charts = []
    for title, key in CURVES:
        curves = [(name, hue, *_curve(rows, key, window)) for name, hue, rows in models]
        curves = [one for one in curves if len(one[2])]
        if not curves:
            continue
        x = Axis.over([float(step) for one in curves for step in one[2]], whole=True)
        y = Axis.over([float(value) for one in curves for part in one[3:] for value in part])
        place = _places(x, y)
        lines, said = [], []
        for name, hue, steps, raw, mean in curves:
            pale = place(zip(steps, raw, strict=True)) if window > 1 else ""
            lines.append(Line(name, hue, place(zip(steps, mean, strict=True)), pale))
            said.append(f"{name}: {mean[0]:.3g} at step {steps[0]}, {mean[-1]:.3g} at {steps[-1]}")
        charts.append(Chart(title, "PPO step", x, y, lines, "; ".join(said), note))
    return charts


def _curve(
    rows: Sequence[Mapping[str, Any]], key: str, window: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, values and moving average of a metric, where they are finite; some of very many."""
    steps = np.asarray([row["step"] for row in rows if key in row])
    values = np.asarray([row[key] for row in rows if key in row], dtype=np.float64)
    kept = np.isfinite(values)
    steps, values = steps[kept], values[kept]
    few = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MOST_POINTS)).astype(int))
    return steps[few], values[few], moving_average(values, window)[few]


def _places(x: Axis, y: Axis) -> Callable[[Iterable[tuple[float, float]]], str]:
    """Points -> those of an SVG, whose y goes down."""
    return lambda points: " ".join(f"{x.at(a):g},{100 - y.at(b):.6g}" for a, b in points)
