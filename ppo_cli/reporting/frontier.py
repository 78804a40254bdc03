"""Score against KL: a run's evaluations, and best-of-n from its reference for comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ppo_cli.config.schema import RunSettings
from ppo_cli.errors import UsageError
from ppo_cli.evaluation.best_of_n import BestOfN
from ppo_cli.evaluation.history import Evaluation, EvaluationHistory
from ppo_cli.reporting.plots import COLOURS, drawing, legend_labels
from ppo_cli.utils.files import refuse_stream, write_text
from ppo_cli.utils.text import json_text

CURVE_FILE = "frontier.json"
PICTURE = "frontier.png"
KEYS = ("eval/score", "eval/kl", "eval/reference_score")
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


def plot_frontier(trails: Sequence[Trail], curve: BestOfN | None, output: Path) -> None:
    """Draw each run's evaluations, from the reference on; mark the best and the last.

    Raises:
        UsageError: `output` has no ending of a picture.
    """
    with drawing(output, 7.2, 5.2) as figure:
        panel = figure.subplots()
        panel.set_title("Score against KL on held-out prompts", fontsize=12, loc="left")
        panel.set_xlabel("KL from the reference (nats per response)")
        panel.set_ylabel("mean score")
        labels = legend_labels(one.name for one in trails)
        for one, colour in zip(trails, cycle(COLOURS), strict=False):
            _draw_trail(panel, one, labels[one.name], colour)
        start = sorted({one.reference_score for one in trails})
        zeros = [0.0] * len(start)
        panel.plot(zeros, start, "D", color="black", markersize=6, label="reference", zorder=5)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        if curve is not None:
            _draw_curve(panel, curve)
        panel.plot([], [], "*", color="#666666", markersize=13, label="best evaluation")
        panel.plot([], [], "s", color="#666666", markersize=7, label="last evaluation")
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
        if curve is not None:
            _label_points(figure, panel, curve)


def _draw_trail(panel: Any, one: Trail, run: str, colour: str) -> None:
    kl = [0.0, *(e.kl for e in one.evaluations)]
    score = [one.reference_score, *(e.score for e in one.evaluations)]
    last = one.evaluations[-1]
    steps = f"last: step {last.step}"
    if one.best is not None:
        steps = f"best: step {one.best.step}, {steps}"
    panel.plot(kl, score, color=colour, linewidth=1.3, alpha=0.8, label=f"{run}\n({steps})")
    panel.plot(kl[1:], score[1:], "o", color=colour, markersize=4)
    panel.plot(last.kl, last.score, "s", color=colour, markersize=8, zorder=6)
    if one.best is not None:
        panel.plot(
            one.best.kl, one.best.score, "*", color=colour, markersize=16, zorder=7,
            markeredgecolor="white",
        )  # fmt: skip


def _draw_curve(panel: Any, curve: BestOfN) -> None:
    kl = [point.kl for point in curve.points]
    low = [point.score_interval.low for point in curve.points]
    high = [point.score_interval.high for point in curve.points]
    panel.fill_between(kl, low, high, color="black", alpha=0.08, linewidth=0)
    panel.plot(
        kl, [point.score for point in curve.points], color="black", linewidth=1.5, marker="o",
        markersize=4, label="best of n from the reference",
    )  # fmt: skip


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
