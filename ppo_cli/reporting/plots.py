"""Pictures of metrics: a panel per metric, a curve per run, or the mean and band of its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ppo_cli.reporting.curves import (
    Band,
    Curve,
    Group,
    Runs,
    curves_of,
    group_runs,
    linear_below,
    mean_and_band,
)
from ppo_cli.reporting.figures import (
    GREY,
    add_footer,
    add_title,
    drawing,
    looks,
    name_axes,
    wrapped,
)
from ppo_cli.utils.text import escape_controls

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
CROWD = 4  # with more curves, those of single steps are paler and companions are not joined
FEW = 10  # up to so many values, each is marked
MANY = 2000  # points of a band at most; matplotlib itself simplifies long lines
PANEL_WIDTH, PANEL_HEIGHT = 5.6, 3.6  # inches
HOLLOW: dict[str, Any] = {
    "linewidth": 1.0,
    "marker": "o",
    "markersize": 5,
    "markerfacecolor": "white",
}


@dataclass(frozen=True)
class _Drawing:
    """How curves are drawn: see `plot_training`."""

    window: int
    band: Band
    log: bool


def plot_training(
    runs: Runs,
    output: Path,
    metrics: Sequence[str] = DEFAULT_METRICS,
    smooth: int | None = None,
    *,
    groups: Sequence[Sequence[str]] | None = None,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    log: bool = False,
    band: Band = "range",
) -> None:
    """Draw a panel per metric and a curve per run or group: the raw line pale, its average over it.

    Of a group, each run is a thin line, and their mean a strong one in a band. The mean is of the
    steps that all runs of the group have. What a panel cannot show is said in it.

    Args:
        runs: metrics of each run.
        output: `.png`, `.svg` or `.pdf`.
        metrics: keys of the metrics.
        smooth: steps in the moving average; None for a twentieth of the longest run.
        groups: names of the runs that differ in the seed alone, group by group; None for each run
            alone.
        labels: of the groups; None for what tells the names of the runs apart.
        title: over the panels.
        log: draw values logarithmically; near 0 linearly, where some are not above 0.
        band: edges of the band.

    Raises:
        UsageError: another ending, a metric that no run has, or labels that do not fit.
    """
    shown = group_runs(runs, groups, labels)
    panels = {metric: curves_of(shown, metric) for metric in dict.fromkeys(metrics)}
    curves = [c for own in panels.values() for group in own for c in group]
    longest = max(len(curve.steps) for curve in curves)
    window = min(smooth or max(longest // 20, 1), longest)
    columns = _columns(len(panels))
    rows = math.ceil(len(panels) / columns)
    about = _description(shown, panels)
    width, height = PANEL_WIDTH * columns, PANEL_HEIGHT * rows
    with drawing(output, width, height, title or "Metrics of PPO training", about) as figure:
        add_title(figure, title)
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for (metric, found), panel in zip(panels.items(), axes, strict=False):
            own_window = (smooth or 1) if metric.startswith(SPARSE) else window
            _draw_panel(panel, metric, shown, found, _Drawing(own_window, band, log))
            first, last = min(c.steps[0] for c in curves), max(c.steps[-1] for c in curves)
            margin = max((last - first) * (0.04 if last - first < FEW else 0.01), 0.5)
            panel.set_xlim(first - margin, last + margin)
        for panel in axes:  # more places than metrics
            panel.remove()
        add_footer(figure, _legend(figure, shown), _caption(shown, window, band))


def _columns(panels: int) -> int:
    """Panels abreast."""
    return panels if panels < 3 else 2 if panels == 4 else 3


def _draw_panel(
    panel: Any, metric: str, groups: Sequence[Group], found: list[list[Curve]], how: _Drawing
) -> None:
    from matplotlib.ticker import MaxNLocator

    shown = escape_controls(metric)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    everything = np.concatenate([c.values for curves in found for c in curves])
    is_known = np.isfinite(everything).any()
    notes = [_missing(groups, found) if is_known else ""]
    faint = 0.3 if len(groups) <= CROWD else 0.12
    for group, curves, look in zip(groups, found, looks(), strict=False):
        marked = metric.startswith(SPARSE)
        if len(group.runs) > 1 and len(curves) > 1:
            notes.append(_draw_group(panel, group, curves, look, how, marked))
        for curve in curves if len(group.runs) == 1 or len(curves) == 1 else ():
            smoothed = curve.smoothed(how.window)
            if how.window > 1:
                _draw(panel, curve, look, linewidth=1, alpha=faint)
            _draw(panel, smoothed, look, marked, linewidth=2, label=group.label)
        style = "--" if len(groups) <= CROWD else "none"
        _draw_companion(panel, metric, group, color=look["color"], linestyle=style)
    if not is_known:
        panel.text(0.5, 0.5, "no finite value", transform=panel.transAxes, ha="center", color=GREY)
        panel.set_yticks([])
    elif len(values := np.unique(everything[np.isfinite(everything)])) == 1:
        if panel.dataLim.height == 0:  # the default would show digits that mean nothing
            room = abs(values[0]) / 2 or 0.5
            panel.set_ylim(values[0] - room, values[0] + room)
        notes.append(f"constant: {values[0]:.6g}" if len(everything) > 1 else "")
    if how.log and is_known:
        notes.append(_set_log_scale(panel, everything))
    title, label = TITLES.get(metric, (f"{shown} over time", shown))
    name_axes(panel, title, "PPO step", label, "; ".join(filter(None, notes)))


def _draw(
    panel: Any,
    curve: Curve,
    look: dict[str, Any],
    marked: bool = False,
    few: int = FEW,
    **how: Any,
) -> None:
    """Draw a curve; mark its values where they are few, or where one stands alone in a gap."""
    known = np.isfinite(np.pad(curve.values, 1, constant_values=np.nan))
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    marker = "o" if marked or known.sum() <= few or alone.any() else None
    panel.plot(curve.steps, curve.values, marker=marker, markersize=4, **look, **how)


def _draw_group(
    panel: Any,
    group: Group,
    curves: Sequence[Curve],
    look: dict[str, Any],
    how: _Drawing,
    marked: bool,
) -> str:
    """Draw runs that differ in the seed: each a thin line, their mean strong, in a band.

    Returns:
        A note if there is no mean.
    """
    smoothed = [curve.smoothed(how.window) for curve in curves]
    for curve in smoothed:
        _draw(panel, curve, look, few=1, linewidth=0.8, alpha=0.45)
    mean, edges = mean_and_band(smoothed, how.band)
    _draw(panel, mean, look, marked, linewidth=2.2, label=group.label)
    if not len(mean.steps):
        return f"no mean: {group.label} have no step in common"
    # of each stretch the outermost edges
    starts = np.unique(np.linspace(0, len(mean.steps), MANY, endpoint=False).astype(int))
    low, high = np.fmin.reduceat(edges[0], starts), np.fmax.reduceat(edges[1], starts)
    steps = mean.steps[starts]
    panel.fill_between(steps, low, high, color=look["color"], alpha=0.15, linewidth=0)
    return ""


def _draw_companion(panel: Any, metric: str, group: Group, **look: Any) -> None:
    """Draw the companion of a metric as hollow points; of several seeds their mean."""
    key, label = COMPANIONS.get(metric, ("", ""))
    if curves := group.curves(key):
        mean, _ = mean_and_band(curves, "range")
        named = {"label": f"{group.label}, {label}", "zorder": 3}
        panel.plot(mean.steps, mean.values, **HOLLOW, **look, **named)


def _set_log_scale(panel: Any, values: np.ndarray) -> str:
    """Draw the panel's values logarithmically; return a note on the scale."""
    from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter

    drawn = [line.get_ydata() for line in panel.get_lines()]
    bands = [path.vertices[:, 1] for part in panel.collections for path in part.get_paths()]
    linear = linear_below(np.concatenate([values, *drawn, *bands]).astype(float))
    if linear is not None:
        panel.set_yscale("symlog", linthresh=linear)
        return f"log scale; linear within ±{linear:g}, as there are values of 0 or less"
    known = values[np.isfinite(values)]
    if not known.any():
        return "linear scale: all values are 0"
    panel.set_yscale("log")
    if known.max() < 10 * known.min():  # there may be no power of ten to label
        panel.yaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10]))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_locator(NullLocator())
    return "log scale"


def _missing(groups: Sequence[Group], found: list[list[Curve]]) -> str:
    """Which groups have no value of a metric to draw."""
    absent = [
        group.label
        for group, curves in zip(groups, found, strict=True)
        if not any(np.isfinite(curve.values).any() for curve in curves)
    ]
    return f"no values: {', '.join(absent)}" if absent else ""


def _legend(figure: Any, groups: Sequence[Group]) -> list[Any]:
    """One entry per group, one per companion."""
    from matplotlib.lines import Line2D

    lines = {line.get_label() for panel in figure.axes for line in panel.get_lines()}
    keys = [
        Line2D([], [], linewidth=2, label=wrapped(group.label), **look)
        for group, look in zip(groups, looks(), strict=False)
    ]
    for _, label in COMPANIONS.values():
        if any(f"{group.label}, {label}" in lines for group in groups):
            style = "--" if len(groups) <= CROWD else "none"
            keys.append(Line2D([], [], color=GREY, linestyle=style, label=label, **HOLLOW))
    return keys


def _caption(groups: Sequence[Group], window: int, band: Band) -> str:
    """What pale and strong lines and bands are, and where a mean ends before its runs."""
    several = [group for group in groups if len(group.runs) > 1]
    parts = []
    if window > 1 and len(several) < len(groups):
        parts.append(f"Pale: each step; strong: mean of the last {window} steps.")
    if several:
        edges = {"range": "from the lowest to the highest seed", "se": "mean ± standard error"}
        smoothed = f" Each is a mean of the last {window} steps." if window > 1 else ""
        parts.append(
            f"Of several seeds: thin, each seed; strong, their mean; band, {edges[band]}.{smoothed}"
        )
    for group in several:
        ends = group.last_steps()
        if min(ends) < max(ends):
            parts.append(
                f"The mean of {group.label} ends with its shortest run, at step {min(ends)}."
            )
    return " ".join(parts)


def _description(groups: Sequence[Group], panels: dict[str, list[list[Curve]]]) -> str:
    """The picture in words: the last value of each curve."""
    sentences = []
    for metric, found in panels.items():
        ends = []
        for group, curves in zip(groups, found, strict=True):
            last = [f"{curve.values[-1]:.4g} at step {curve.steps[-1]}" for curve in curves]
            ends += [f"{group.label}: {', '.join(last)}"] if last else []
        sentences.append(f"{escape_controls(metric)}. {'; '.join(ends)}.")
    return f"Curves over PPO steps; their last values. {' '.join(sentences)}"
