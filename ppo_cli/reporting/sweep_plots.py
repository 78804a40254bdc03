"""Pictures of a sweep: score against KL, one point a trial, and the parameters' importance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppo_cli.config.sweep import SCORE
from ppo_cli.reporting.figures import COLOURS, GREY, add_footer, drawing, name_axes, plain
from ppo_cli.reporting.plots import TITLES
from ppo_cli.reporting.sweep_tables import (
    FEW_FOR_IMPORTANCE,
    FINISHED,
    PRUNED,
    SweepSummary,
    TrialResult,
)

LABEL_GAP = 18  # between numbers at points, in points (1/72 inch)


def pareto_front(trials: Sequence[TrialResult], maximises: bool) -> list[TrialResult]:
    """The finished trials that no other beats in objective without more KL, by rising KL."""
    sign = 1 if maximises else -1
    points = [t for t in trials if t.state == FINISHED and None not in (t.value, t.kl)]
    front: list[TrialResult] = []
    for trial in sorted(points, key=lambda t: (t.kl, -sign * (t.value or 0.0))):
        if not front or sign * (trial.value or 0.0) > sign * (front[-1].value or 0.0):
            front.append(trial)
    return front


def plot_sweep_frontier(summary: SweepSummary, output: Path) -> bool:
    """Draw each trial's objective against its KL, and the Pareto front; whether there is a point.

    Raises:
        UsageError: `output` has no ending of a picture.
    """
    points = [
        t for t in summary.trials if t.state in (FINISHED, PRUNED) and None not in (t.value, t.kl)
    ]
    if not points:
        return False
    sweep, best = summary.sweep, summary.best
    title, label = TITLES.get(sweep.objective, (sweep.objective, sweep.objective))
    with drawing(output, 7.2, 5.2) as figure:
        panel = figure.subplots()
        x_label = "KL from the reference (nats per response)"
        name_axes(panel, f"{title} against KL, one point a trial", x_label, label)
        for state, name, marker in (
            (FINISHED, "finished", {"markersize": 7}),
            (PRUNED, "pruned (last evaluation)", {"markersize": 6, "markerfacecolor": "white"}),
        ):
            drawn = [t for t in points if t.state == state]
            if drawn:
                panel.plot(
                    [t.kl for t in drawn], [t.value for t in drawn], "o", color=COLOURS[0],
                    label=name, **marker,
                )  # fmt: skip
        front = pareto_front(points, sweep.maximises)
        panel.plot(
            [t.kl for t in front], [t.value for t in front], color=COLOURS[1], linewidth=1.6,
            drawstyle="steps-post", label="Pareto front", zorder=1.5,
        )  # fmt: skip
        if best is not None:
            panel.plot(
                [best.kl], [best.value], "*", color=COLOURS[1], markersize=17,
                markeredgecolor="white", label=f"best: trial {best.number}", zorder=5,
            )  # fmt: skip
        reference = points[0].reference_score
        if sweep.objective == SCORE and reference is not None:
            panel.plot([0], [reference], "D", color="black", markersize=6, label="reference")
        if sweep.max_kl is not None:
            panel.axvline(sweep.max_kl, color=GREY, linestyle="--", linewidth=1.2, label="max_kl")
        panel.set_xlim(left=0 if sweep.objective != SCORE else None)
        add_footer(figure, panel.get_legend_handles_labels()[0], "")
        _number_points(figure, panel, points)
    return True


def _number_points(figure: Any, panel: Any, points: Sequence[TrialResult]) -> None:
    """Write the trials' numbers at their points, the best first; leave out those that overlap."""
    figure.draw_without_rendering()  # sets the limits of the axes
    numbered: list[tuple[float, float]] = []
    for trial in points:
        x, y = panel.transData.transform((trial.kl, trial.value)) * 72 / figure.dpi
        if any(abs(x - a) < LABEL_GAP and abs(y - b) < LABEL_GAP / 2 for a, b in numbered):
            continue
        numbered.append((x, y))
        panel.annotate(
            str(trial.number), (trial.kl, trial.value), xytext=(6, 4), fontsize=8,
            textcoords="offset points", color=GREY,
        )  # fmt: skip


def plot_importance(summary: SweepSummary, output: Path) -> bool:
    """Draw the importance of each parameter as a bar; whether it is known.

    Raises:
        UsageError: `output` has no ending of a picture.
    """
    shares = summary.importances
    if not shares:
        return False
    count = summary.count(FINISHED)
    with drawing(output, 7.2, 1.6 + 0.45 * len(shares)) as figure:
        panel = figure.subplots()
        keys = [*shares][::-1]
        bars = panel.barh([plain(key) for key in keys], [shares[key] for key in keys],
                          color=COLOURS[0], height=0.6)  # fmt: skip
        panel.bar_label(bars, [f"{shares[key]:.0%}" for key in keys], padding=4, fontsize=9)
        few = ": few, so a hint, no more" if count < FEW_FOR_IMPORTANCE else ""
        name_axes(
            panel,
            f"What distinguishes the best tenth of trials in {summary.sweep.objective}",
            "share (PED-ANOVA)",
            "",
            f"{count} finished trials{few}",
        )
        panel.set_xlim(0, max(shares.values()) * 1.15)
        panel.grid(axis="y", visible=False)
    return True
