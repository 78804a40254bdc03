"""Score against KL: a run's evaluations, and best-of-n from its reference for comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from ppo_cli.config.schema import RunSettings
from ppo_cli.errors import UsageError
from ppo_cli.evaluation.best_of_n import BestOfN
from ppo_cli.evaluation.history import Evaluation, EvaluationHistory
from ppo_cli.reporting.curves import LABEL_WIDTH, group_labels
from ppo_cli.reporting.figures import (
    GREY,
    add_footer,
    add_title,
    drawing,
    looks,
    name_axes,
    wrapped,
)
from ppo_cli.utils.files import refuse_stream, write_text
from ppo_cli.utils.text import json_text

CURVE_FILE = "frontier.json"
PICTURE = "frontier.png"
KEYS = ("eval/score", "eval/kl", "eval/reference_score")
BLACK: dict[str, Any] = {"color": "black"}
BEST: dict[str, Any] = {
    "marker": "*",
    "markersize": 14,
    "markeredgecolor": "white",
    "linestyle": "none",
}
# hollow: the best evaluation may be the last, too
LAST: dict[str, Any] = {
    "marker": "s",
    "markersize": 11,
    "markerfacecolor": "none",
    "markeredgewidth": 1.5,
    "linestyle": "none",
}
SEEDS_CAPTION = (
    "Of several seeds: thin, each seed, with its best and last evaluation; strong, the mean of "
    "their evaluations after the same step."
)
LABEL_GAP = 24  # between labels of the curve, in points (1/72 inch)
HOW_TO_GET_IT = (
    "train with --set 'run.best_of_n=[1,2,4,8,16,32,64]' for it, or with that and --resume add it "
    "to a run"
)


@dataclass(frozen=True)
class Trail:
    """A run's evaluations in order of step.

    Attributes:
        name: the run's.
        evaluations: those with finite score and KL.
        best: the best within the limits of KL; None where there is none.
        reference_score: mean score of the reference on the same prompts, at KL 0.
    """

    name: str
    evaluations: list[Evaluation]
    best: Evaluation | None
    reference_score: float


def trail(name: str, metrics: Sequence[Mapping[str, Any]], settings: RunSettings) -> Trail:
    """Read the trail of a run.

    Args:
        name: the run's.
        metrics: one dictionary a step, oldest first.
        settings: the run's; their limits of KL decide which evaluation can be the best.

    Raises:
        UsageError: its metrics hold no evaluation.
    """
    rows = [row for row in metrics if all(math.isfinite(row.get(k, math.nan)) for k in KEYS)]
    if not rows:
        raise UsageError(
            f"{name} has no evaluation in its metrics, so no score at a KL: train with "
            "run.eval_every above 0, or leave --frontier out to draw its other metrics"
        )
    history = EvaluationHistory()
    evaluations = [Evaluation(row["step"], row[KEYS[0]], row[KEYS[1]]) for row in rows]
    for evaluation in evaluations:
        history = history.after(evaluation, settings)
    return Trail(name, evaluations, history.best, rows[-1][KEYS[2]])


def write_curve(folder: Path, curve: BestOfN) -> None:
    """Write best-of-n into a run directory."""
    write_text(folder / CURVE_FILE, json_text(curve.as_dict(), indent=2) + "\n")


def read_curve(folders: Sequence[Path]) -> BestOfN | None:
    """Read best-of-n from the first run directory that has it; None where none has.

    Raises:
        UsageError: the file is damaged.
    """
    for folder in folders:
        path = folder / CURVE_FILE
        refuse_stream(path)
        if not path.is_file():
            continue
        try:
            curve = TypeAdapter(BestOfN).validate_json(path.read_bytes())
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise UsageError(
                f"{path} is damaged ({where or 'no JSON'}: {error.errors()[0]['msg']}): delete it, "
                f"and {HOW_TO_GET_IT}"
            ) from error
        if not curve.points:
            raise UsageError(f"{path} is damaged: it holds no points; delete it")
        return curve
    return None


def plot_frontier(
    trails: Sequence[Trail],
    curve: BestOfN | None,
    output: Path,
    *,
    groups: Sequence[Sequence[str]] | None = None,
    labels: Sequence[str] | None = None,
    title: str | None = None,
) -> None:
    """Draw each run's evaluations, from the reference on; mark the best and the last.

    Of runs that differ in the seed alone, each is thin, and the mean of their evaluations after the
    same step is strong.

    Args:
        trails: of the runs.
        curve: best-of-n; None without it.
        output: `.png`, `.svg` or `.pdf`.
        groups: names of the runs that differ in the seed alone, group by group; None for each run
            alone.
        labels: of the groups; None for what tells the names of the runs apart.
        title: over the picture.

    Raises:
        UsageError: `output` has no ending of a picture, or the labels do not fit.
    """
    from matplotlib.lines import Line2D

    groups = [[one.name] for one in trails] if groups is None else groups
    named = {one.name: one for one in trails}
    members = [[named[name] for name in names] for names in groups]
    shown = group_labels(groups, labels)
    about = _description(members, shown)
    with drawing(output, 7.2, 4.6, title or "Score against KL", about) as figure:
        add_title(figure, title)
        panel = figure.subplots()
        name_axes(
            panel,
            "Score against KL on held-out prompts",
            "KL from the reference (nats per response)",
            "mean score",
        )
        keys = []
        for runs, label, look in zip(members, shown, looks(), strict=False):
            for one in runs:
                _draw_trail(panel, one, look, thin=len(runs) > 1)
            if len(runs) > 1:
                _draw_mean(panel, runs, look)
            text = wrapped(f"{label}: {_best_and_last(runs)}", LABEL_WIDTH + 10)
            keys.append(Line2D([], [], linewidth=2, label=text, **look))
        start = sorted({one.reference_score for one in trails})
        keys += panel.plot([0.0] * len(start), start, "D", label="reference", zorder=5, **BLACK)
        if curve is not None:
            keys.append(_draw_curve(panel, curve))
        for mark, label in ((BEST, "best evaluation"), (LAST, "last evaluation")):
            keys.append(Line2D([], [], color=GREY, label=label, **mark))
        several = any(len(runs) > 1 for runs in members)
        add_footer(figure, keys, SEEDS_CAPTION if several else "")
        if curve is not None:
            _label_points(figure, panel, curve)


def _best_and_last(runs: Sequence[Trail]) -> str:
    """The steps of the best and the last evaluation of one run, or the range of several."""
    best = [one.best.step for one in runs if one.best is not None]
    last = [one.evaluations[-1].step for one in runs]
    parts = [
        f"{name} at step"
        + (f"s {min(steps)} to {max(steps)}" if min(steps) < max(steps) else f" {steps[0]}")
        for name, steps in (("best", best), ("last", last))
        if steps
    ]
    return ", ".join(parts)


def _description(members: Sequence[Sequence[Trail]], labels: Sequence[str]) -> str:
    """The picture in words: score and KL of each run's last evaluation."""
    sentences = []
    for runs, label in zip(members, labels, strict=True):
        ends = [f"score {e.score:.3g} at KL {e.kl:.3g}" for e in (r.evaluations[-1] for r in runs)]
        sentences.append(f"{label}: {_best_and_last(runs)}, {'; '.join(ends)}.")
    return f"Mean score against KL from the reference, at each evaluation. {' '.join(sentences)}"


def _draw_trail(panel: Any, one: Trail, look: Mapping[str, Any], thin: bool) -> None:
    kl = [0.0, *(e.kl for e in one.evaluations)]
    score = [one.reference_score, *(e.score for e in one.evaluations)]
    last = one.evaluations[-1]
    panel.plot(kl, score, **look, linewidth=0.7 if thin else 1.3, alpha=0.4 if thin else 0.8)
    color = look["color"]
    if not thin:
        panel.plot(kl[1:], score[1:], "o", color=color, markersize=4)
    panel.plot(last.kl, last.score, color=color, zorder=8, **LAST)
    if one.best is not None:
        panel.plot(one.best.kl, one.best.score, color=color, zorder=7, **BEST)


def _draw_mean(panel: Any, runs: Sequence[Trail], look: Mapping[str, Any]) -> None:
    """Draw the mean of runs after each step at which all have an evaluation."""
    by_step = [{e.step: (e.kl, e.score) for e in one.evaluations} for one in runs]
    common = sorted(set.intersection(*map(set, by_step)))
    start = [(0.0, one.reference_score) for one in runs]
    points = [start, *([steps[step] for steps in by_step] for step in common)]
    kl, score = np.mean(points, axis=1).T
    panel.plot(kl, score, linewidth=2.2, marker="o", markersize=4, **look)


def _draw_curve(panel: Any, curve: BestOfN) -> Any:
    kl = [point.kl for point in curve.points]
    low = [point.score_interval.low for point in curve.points]
    high = [point.score_interval.high for point in curve.points]
    panel.fill_between(kl, low, high, color="black", alpha=0.08, linewidth=0)
    scores = [point.score for point in curve.points]
    label = "best of n from the reference"
    (line,) = panel.plot(kl, scores, linewidth=1.5, marker="o", markersize=4, label=label, **BLACK)
    return line


def _label_points(figure: Any, panel: Any, curve: BestOfN) -> None:
    """Write n at the points, largest n first; leave out labels that would overlap."""
    figure.draw_without_rendering()  # sets the limits of the axes
    labelled: list[tuple[float, float]] = []
    for point in reversed(curve.points[1:]):
        x, y = panel.transData.transform((point.kl, point.score)) * 72 / figure.dpi
        if any(abs(x - a) < LABEL_GAP and abs(y - b) < LABEL_GAP / 2 for a, b in labelled):
            continue
        labelled.append((x, y))
        panel.annotate(
            f"n={point.n}" if len(labelled) == 1 else f"{point.n}", (point.kl, point.score),
            xytext=(-4, 6), textcoords="offset points", ha="center", fontsize=8,
        )  # fmt: skip
