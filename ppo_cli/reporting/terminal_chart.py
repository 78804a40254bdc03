"""Charts of metrics in the terminal: bars for one run, overlaid curves for several."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

import numpy as np
from rich.cells import cell_len
from rich.text import Text

from ppo_cli.reporting.curves import (
    Curve,
    Group,
    Runs,
    curves_of,
    group_runs,
    linear_below,
    mean_and_band,
)
from ppo_cli.reporting.plots import TITLES
from ppo_cli.utils.text import cut_middle, escape_controls

BARS, AXES, JOIN = " ▁▂▃▄▅▆▇█", ("│", "└", "─"), "·"
ASCII_BARS, ASCII_AXES, ASCII_JOIN = " ...:::##", ("|", "+", "-"), "."
AXIS_WIDTH = 12  # columns left of a chart's bars
SYMBOLS = "ox+*#@%&$=~^"
COLOURS = ("cyan", "red", "green", "magenta", "yellow", "blue")
OVERLAID_ROWS = 14  # of a chart with symbols, which are coarser than bars


def terminal_chart(
    runs: Runs,
    metric: str,
    width: int = 72,
    height: int = 8,
    ascii_only: bool = False,
    *,
    groups: Sequence[Sequence[str]] | None = None,
    labels: Sequence[str] | None = None,
    smooth: int = 1,
    log: bool = False,
) -> list[Text]:
    """Lines of a chart: bars for one curve, and for several a symbol and a colour each.

    Each column is the mean of consecutive steps; of a group of runs that differ in the seed alone,
    the mean is drawn.

    Args:
        runs: metrics of each run.
        metric: key of the metric.
        width: columns.
        height: rows of bars; several curves have at least `OVERLAID_ROWS`.
        ascii_only: for terminals without other characters.
        groups, labels, smooth, log: as for `plot_training`.

    Raises:
        UsageError: no run has the metric, or the labels do not fit.
    """
    shown = group_runs(runs, groups, labels)
    curves = [_known(own, smooth) for own in curves_of(shown, metric)]
    key = escape_controls(metric)
    title, _ = TITLES.get(metric, (key, key))
    heading = f"{title} ({key})" if title != key else title
    if len(shown) == 1:
        heading += f", {_named(shown[0])}"
    lines = [*wrap(heading, max(width, 1), break_on_hyphens=False)]
    values = np.concatenate([curve.values for curve in curves])
    if not len(values):
        return [Text(line) for line in [*lines, " no finite value"]]
    scale = _Scale(values, log)
    if scale.note:
        lines.append(scale.note)
    columns = max(width - AXIS_WIDTH, 1)
    if len(shown) == 1:
        rows, ends = _bars(curves[0], scale, columns, height, ascii_only)
    else:
        rows, ends = _overlay(curves, scale, columns, max(height, OVERLAID_ROWS), ascii_only)
    bar, corner, dash = ASCII_AXES if ascii_only else AXES
    chart = [
        Text(f"{scale.edge(n, len(rows), ends):>10} {bar}").append_text(row)
        for n, row in enumerate(rows)
    ]
    steps = np.concatenate([curve.steps for curve in curves])
    under = [
        f"{'':10} {corner}{dash * len(rows[0])}",
        f"{'':12}step {steps.min()} to {steps.max()}",
    ]
    legend = _legend(shown, curves, width) if len(shown) > 1 else []
    return [*map(Text, lines), *chart, *map(Text, under), *legend]


class _Scale:
    """Places of values on the vertical axis, linear or logarithmic.

    Attributes:
        note: what to say of the scale.
    """

    def __init__(self, values: np.ndarray, log: bool) -> None:
        self._log = log and bool(np.any(values))
        self._linear = linear_below(values) if self._log else None
        self.note = " log scale" if self._log else " linear scale: all values are 0" if log else ""
        if self._linear is not None:
            self.note += f"; linear within {self._linear:g} of 0, as there are values of 0 or less"

    def place(self, values: np.ndarray) -> np.ndarray:
        """A number for each value, which rises with it."""
        if not self._log:
            return values
        if self._linear is None:
            return np.log10(values)
        return np.arcsinh(values / self._linear)

    @staticmethod
    def edge(row: int, rows: int, ends: tuple[float, float]) -> str:
        """The label of a row: the highest value at the top, the lowest at the bottom."""
        value = ends[1] if row == 0 else ends[0] if row == rows - 1 else None
        return "" if value is None else f"{value:.4g}"


def _known(curves: Sequence[Curve], smooth: int) -> Curve:
    """The finite values of a group's curve, of its mean if there are several; perhaps none."""
    if not curves:
        return Curve(np.array([], dtype=int), np.array([]))
    curve, _ = mean_and_band([curve.smoothed(smooth) for curve in curves], "range")
    kept = np.isfinite(curve.values)
    return Curve(curve.steps[kept], curve.values[kept])


def _bars(
    curve: Curve, scale: _Scale, columns: int, height: int, ascii_only: bool
) -> tuple[list[Text], tuple[float, float]]:
    """Rows of a bar chart from the top down, and its lowest and highest value."""
    parts = np.array_split(curve.values, min(columns, len(curve.values)))
    means = np.array([part.mean() for part in parts])
    places = scale.place(means)
    span = np.ptp(places) or 1.0
    levels = 1 + (places - places.min()) / span * (height * 8 - 1)
    bars = ASCII_BARS if ascii_only else BARS
    rows = [
        Text("".join(bars[int(min(max(level - row * 8, 0), 8))] for level in levels))
        for row in range(height - 1, -1, -1)
    ]
    return rows, (means.min(), means.max())


def _overlay(
    curves: Sequence[Curve], scale: _Scale, columns: int, height: int, ascii_only: bool
) -> tuple[list[Text], tuple[float, float]]:
    """Rows with a symbol per curve, dots between its points, and the lowest and highest value.

    Where curves meet, they take turns from column to column.
    """
    steps = np.concatenate([curve.steps for curve in curves])
    columns = columns if np.ptp(steps) else 1
    means = [_column_means(curve, steps.min(), np.ptp(steps), columns) for curve in curves]
    every = np.concatenate([values for _, values in means])
    lowest, highest = scale.place(np.array([every.min(), every.max()]))
    points: dict[tuple[int, int], list[int]] = {}
    joins: dict[tuple[int, int], int] = {}
    for number, (used, values) in enumerate(means):
        between = np.arange(used[0], used[-1] + 1) if len(used) else used
        places = np.interp(between, used, scale.place(values)) if len(used) else values
        rows = (places - lowest) / ((highest - lowest) or 1.0) * (height - 1)
        for cell in zip(np.round(rows).astype(int).tolist(), between.tolist(), strict=True):
            if cell[1] in used:
                points.setdefault(cell, []).append(number)
            else:
                joins[cell] = number

    def drawn(row: int, column: int) -> Text:
        if here := points.get((row, column)):
            number = here[column % len(here)]
            return Text(_symbol(number), _colour(number))
        if (row, column) in joins:
            return Text(ASCII_JOIN if ascii_only else JOIN, _colour(joins[row, column]))
        return Text(" ")

    top_down = range(height - 1, -1, -1)
    lines = [Text().join(drawn(row, column) for column in range(columns)) for row in top_down]
    return lines, (every.min(), every.max())


def _column_means(
    curve: Curve, first: int, span: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """The columns in which a curve has values, and their means."""
    at = (curve.steps - first) * (columns - 1) // max(span, 1)
    used = np.unique(at)
    return used, np.array([curve.values[at == column].mean() for column in used])


def _legend(groups: Sequence[Group], curves: Sequence[Curve], width: int) -> list[Text]:
    """Symbol and label of each curve, as many abreast as the width allows."""
    entries = []
    for number, (group, curve) in enumerate(zip(groups, curves, strict=True)):
        suffix = "" if len(curve.values) else ": no finite value"
        room = max(width - AXIS_WIDTH - 2 - len(suffix), 8)
        label = cut_middle(_named(group), room)
        if cell_len(label) > room:  # characters of two columns
            label = cut_middle(label, room // 2)
        entry = Text(" ").append(_symbol(number), style=_colour(number))
        entries.append(entry.append(f" {label}{suffix}"))
    widest = max(cell_len(entry.plain) for entry in entries) + 2
    abreast = max((width - AXIS_WIDTH) // widest, 1)
    lines = []
    for start in range(0, len(entries), abreast):
        line = Text(" " * (AXIS_WIDTH - 1))
        for entry in entries[start : start + abreast]:
            line.append_text(entry).append(" " * (widest - cell_len(entry.plain)))
        line.rstrip()
        lines.append(line)
    return lines


def _named(group: Group) -> str:
    return f"mean of {group.label}" if len(group.runs) > 1 else group.label


def _symbol(number: int) -> str:
    return SYMBOLS[number % len(SYMBOLS)]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
