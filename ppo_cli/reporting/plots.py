"""Figures and terminal charts of a run's metrics."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from ppo_cli.errors import UsageError, did_you_mean
from ppo_cli.utils.files import replacing
from ppo_cli.utils.text import escape_controls

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""Name of a run -> its metrics, one dictionary a step."""
Curves = dict[str, tuple[np.ndarray, np.ndarray]]
"""Name of a run -> steps and values of one metric."""

DEFAULT_METRICS = ("ppo/loss/total", "env/reward_mean")
TITLES = {
    "ppo/loss/total": ("PPO training loss over time", "total loss"),
    "env/reward_mean": ("PPO mean reward over time", "mean score"),
    "ppo/mean_scores": ("Mean score that PPO learns from", "mean score, scaled"),
    "eval/score": ("Mean score on held-out prompts", "mean score"),
    "eval/kl": ("KL from the reference on held-out prompts", "KL per sequence (nats)"),
    "objective/kl": ("KL from the reference over time", "KL per sequence (nats)"),
    "objective/kl_coef": ("KL coefficient over time", "coefficient"),
}
# Metric of a panel -> another metric that is drawn in it if a run has it, and its label.
COMPANIONS = {"env/reward_mean": ("eval/score", "held-out")}
SPARSE = "eval/"  # prefix of metrics that only some steps have: drawn as points and lines
ENDINGS = (".png", ".svg", ".pdf")
# The palette of Okabe and Ito, which colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
GREY = "#666666"
HOLLOW: dict[str, Any] = {
    "linewidth": 1.2,
    "linestyle": "--",
    "marker": "o",
    "markerfacecolor": "white",
}
BARS, AXES = " ▁▂▃▄▅▆▇█", "│└─"
ASCII_BARS, ASCII_AXES = " ...:::##", "|+-"
AXIS_WIDTH = 12  # columns left of a chart's bars
LABEL_WIDTH = 40  # characters of a legend's line


def plot_training(
    runs: Runs,
    output: Path,
    metrics: Sequence[str] = DEFAULT_METRICS,
    smooth: int | None = None,
) -> None:
    """Draw one panel per metric, one colour per run: the raw line pale, its moving average over it.

    Args:
        runs: metrics of each run.
        output: `.png`, `.svg` or `.pdf`.
        metrics: keys of the metrics.
        smooth: steps in the moving average; None for a twentieth of the longest run.

    Raises:
        UsageError: another ending, or a metric that a run does not have.
    """
    curves = {metric: _curves(runs, metric) for metric in metrics}
    columns = min(len(metrics), 2)
    rows = math.ceil(len(metrics) / columns)
    labels = legend_labels(runs)
    with drawing(output, 5.6 * columns, 3.8 * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flat
        longest = max(len(steps) for curve in curves.values() for steps, _ in curve.values())
        window = min(smooth or max(longest // 20, 1), longest)
        for (metric, curve), panel in zip(curves.items(), panels, strict=False):
            own_window = (smooth or 1) if metric.startswith(SPARSE) else window
            _draw_panel(panel, metric, curve, labels, own_window)
            for name, colour in zip(curve, _cycle(COLOURS), strict=False):
                _draw_companion(panel, metric, labels[name], runs[name], colour)
        for panel in panels:  # an odd number of metrics leaves one empty
            panel.set_visible(False)
        _add_legend(figure, labels.values())
        if window > 1:
            figure.supxlabel(
                f"pale: each step; strong: mean of {window} steps",
                fontsize=8,
                color=GREY,
                x=0.99,
                ha="right",
            )


@contextmanager
def drawing(output: Path, width: float, height: float) -> Iterator[Any]:
    """Make a figure, sizes in inches, and save it when the block ends.

    matplotlib's warnings are hidden: a font that lacks a character of a run's name is not the
    user's concern.

    Raises:
        UsageError: `output` has no ending of a picture.
    """
    check_ending(output)
    # Importing matplotlib logs a warning where it cannot cache its list of fonts.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # With a user's own TeX setting, names would have to be valid TeX.
    with warnings.catch_warnings(), matplotlib.rc_context({"text.usetex": False}):
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
        FigureCanvasAgg(figure)
        yield figure
        with replacing(output) as unfinished:
            figure.savefig(unfinished, format=output.suffix[1:].lower())


def _draw_panel(
    panel: Any, metric: str, curve: Curves, labels: Mapping[str, str], window: int
) -> None:
    from matplotlib.ticker import MaxNLocator

    shown = plain(metric)
    title, label = TITLES.get(metric, (f"{shown} over time", shown))
    panel.set_title(title, fontsize=12, loc="left")
    panel.set_xlabel("PPO step")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    panel.set_ylabel(label)
    for (name, (steps, values)), colour in zip(curve.items(), _cycle(COLOURS), strict=False):
        marker = "o" if metric.startswith(SPARSE) or len(steps) == 1 else None
        if window > 1:
            panel.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
        panel.plot(
            steps,
            moving_average(values, window),
            color=colour,
            linewidth=2,
            label=labels[name],
            marker=marker,
        )
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.margins(x=0.01)


def _draw_companion(
    panel: Any, metric: str, run: str, rows: Sequence[Mapping[str, Any]], colour: str
) -> None:
    """Draw the companion of a metric: hollow points, joined by a dashed line."""
    key, label = COMPANIONS.get(metric, ("", ""))
    if points := [(row["step"], row[key]) for row in rows if key in row]:
        panel.plot(
            *zip(*points, strict=True), color=colour, label=f"{run}, {label}", zorder=3, **HOLLOW
        )


def _add_legend(figure: Any, runs: Collection[str]) -> None:
    """Add a legend below the panels: one entry per run, one per companion. The figure grows."""
    from matplotlib.lines import Line2D

    lines = {line.get_label(): line for panel in figure.axes for line in panel.get_lines()}
    keys = [lines[run] for run in runs]
    for _, label in COMPANIONS.values():
        if any(f"{run}, {label}" in lines for run in runs):
            keys.append(Line2D([], [], color=GREY, label=label, **HOLLOW))
    widest = max(len(line) for run in runs for line in run.split("\n"))
    width, height = figure.get_size_inches()
    abreast = max(min(int(width / (0.6 + 0.08 * widest)), len(keys)), 1)  # inches, at this size
    figure.legend(
        handles=keys, loc="outside lower center", ncols=abreast, frameon=False, fontsize=9
    )
    further = sum(run.count("\n") + 1 for run in runs) // abreast - 1
    figure.set_size_inches(width, height + 0.18 * max(further, 0))


def check_ending(output: Path) -> None:
    """Raise `UsageError` unless `output` has the ending of a picture."""
    if output.suffix.lower() not in ENDINGS:
        raise UsageError(f"{output}: a picture ends in {', '.join(ENDINGS)}")


def moving_average(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each place, of fewer at the start; skips NaN and inf."""
    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)

    def window_sums(terms: np.ndarray) -> np.ndarray:
        sums = np.cumsum(np.insert(terms, 0, 0.0))
        ends = np.arange(1, len(terms) + 1)
        return sums[ends] - sums[np.maximum(ends - window, 0)]

    counts = window_sums(finite.astype(np.float64))
    sums = window_sums(np.where(finite, array, 0.0))
    return np.divide(sums, counts, out=np.full(len(array), np.nan), where=counts > 0)


def terminal_chart(
    runs: Runs, metric: str, width: int = 72, height: int = 8, ascii_only: bool = False
) -> list[str]:
    """Lines of a bar chart, one chart per run; each column is the mean of consecutive steps."""
    lines: list[str] = []
    bars, axes = (ASCII_BARS, ASCII_AXES) if ascii_only else (BARS, AXES)
    for name, (steps, values) in _curves(runs, metric).items():
        kept = np.isfinite(values)
        steps, values = steps[kept], values[kept]
        name, shown = escape_controls(name), escape_controls(metric)
        if not len(values):
            lines += ["", f"{shown}, {name}: no finite value"]
            continue
        columns = [
            part.mean()
            for part in np.array_split(values, min(max(width - AXIS_WIDTH, 1), len(values)))
        ]
        low, high = min(columns), max(columns)
        span = (high - low) or 1.0
        levels = [1 + (value - low) / span * (height * 8 - 1) for value in columns]
        title, _ = TITLES.get(metric, (shown, shown))
        lines += ["", f"{title} ({shown}), {name}"]
        for row in range(height - 1, -1, -1):
            edge = high if row == height - 1 else low if row == 0 else None
            label = " " * 10 if edge is None else f"{edge:10.4g}"
            cells = "".join(bars[int(min(max(level - row * 8, 0), 8))] for level in levels)
            lines.append(f"{label} {axes[0]}{cells}")
        lines.append(f"{'':10} {axes[1]}{axes[2] * len(columns)}")
        lines.append(f"{'':{AXIS_WIDTH}}step {steps[0]} to {steps[-1]}")
    return lines


def _curves(runs: Runs, metric: str) -> Curves:
    curves: Curves = {}
    for name, rows in runs.items():
        kept = [(row["step"], row[metric]) for row in rows if metric in row]
        if not kept:
            keys = [key for key in {k: None for row in rows for k in row} if key != "step"]
            near = did_you_mean(metric, keys)
            raise UsageError(
                f"{name} has no metric '{metric}'.{near}"
                + ("" if near else f" It has {', '.join(keys)}")
            )
        steps, values = zip(*kept, strict=True)
        curves[name] = (np.asarray(steps), np.asarray(values, dtype=np.float64))
    return curves


def _cycle(colours: Sequence[str]) -> Any:
    while True:
        yield from colours


def legend_labels(names: Iterable[str]) -> dict[str, str]:
    """Paths of runs -> their shortest distinct ends, wrapped for a legend."""
    parts = {name: Path(name).parts for name in names}
    labels = {}
    for name, own in parts.items():
        others = [part for other, part in parts.items() if other != name]
        count = 1
        while count < len(own) and any(part[-count:] == own[-count:] for part in others):
            count += 1
        end = escape_controls(str(Path(*own[-count:])))
        labels[name] = plain(*wrap(end, LABEL_WIDTH))
    return labels


def plain(*lines: str) -> str:
    """Text for matplotlib, without `$` as mathematics and a leading `_`, which hides a label."""
    shown = "\n".join(map(escape_controls, lines))
    return shown.replace("$", r"\$").lstrip("_") or "run"
