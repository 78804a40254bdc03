"""Run directories in a table, and how some of them differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType

from ppo_cli.evaluation.quality import MEASURES
from ppo_cli.reporting.layout import FittingTable, cell
from ppo_cli.reporting.tables import below
from ppo_cli.utils.text import shortened

MAX_VALUE = 60  # characters of a setting in a table


@dataclass(frozen=True)
class RunSummary:
    """What is known of a run directory.

    Attributes:
        path: of the directory.
        state: `finished`, `ended early`, `interrupted`, `running`, `diverged` or `damaged`.
        steps, planned_steps: made, and asked for; None where that cannot be read.
        label: the label that the run trains towards.
        step: the step whose evaluation `results` are, None without an evaluation.
        results: measures on the held-out prompts, by key of `MEASURES`.
        seconds: time spent in steps.
        note: why the run is in that state, where the state does not say it.
    """

    path: str
    state: str
    steps: int = 0
    planned_steps: int | None = None
    label: str | None = None
    step: int | None = None
    results: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RunDifferences:
    """How runs differ.

    Attributes:
        runs: them.
        settings: dotted key -> its value in each run, for keys with different values; None where a
            run has no such key.
        code: likewise for versions, git commit, machine and fast paths.
    """

    runs: Sequence[RunSummary]
    settings: Mapping[str, Sequence[Any]]
    code: Mapping[str, Sequence[Any]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


def run_table(runs: Sequence[RunSummary]) -> Group:
    """One row a run, and the notes below."""
    lines = []
    for run in runs:
        planned = "?" if run.planned_steps is None else str(run.planned_steps)
        lines.append(
            (
                run.path,
                run.label or "-",
                f"{run.steps}/{planned}",
                _shown(run.results.get("score"), 2),
                _shown(run.results.get("kl"), 2),
                f"{run.state} at step {run.steps}" if _is_cut(run) else run.state,
            )
        )
    heads = ("run", "label", "steps", "score", "KL", "state")
    table = FittingTable(heads, lines, by_row=True, texts=(1, 5))
    notes = [cell(f"{run.path}: {run.note}") for run in runs if run.note]
    return Group(table, *notes)


def difference_tables(found: RunDifferences) -> list[RenderableType]:
    """Settings that differ, code and machine if they differ, and results."""
    tables: list[RenderableType] = []
    for title, differing in (("settings", found.settings), ("code and machine", found.code)):
        if differing:
            missing = "-" if differing is found.code else "null"
            rows = {key: [_value(v, missing) for v in row] for key, row in differing.items()}
            tables.append(below(f"{title} that differ", _columns(found.runs, rows)))
    if not found.settings:
        tables.insert(0, cell("all settings are equal", style="italic"))
    results = {
        "state": [run.state for run in found.runs],
        "steps": [str(run.steps) for run in found.runs],
        "seconds": [f"{run.seconds:.0f}" for run in found.runs],
        "evaluated step": ["-" if run.step is None else str(run.step) for run in found.runs],
    }
    for measure in MEASURES:
        values = [run.results.get(measure.key) for run in found.runs]
        if any(value is not None for value in values):
            labels = {run.label for run in found.runs}
            name = measure.name.format(label=labels.pop() if len(labels) == 1 else "label")
            results[name] = [_shown(value, measure.places) for value in values]
    return [*tables, below("results", _columns(found.runs, results))]


def _is_cut(run: RunSummary) -> bool:
    return run.state in ("interrupted", "diverged", "running")


def _columns(runs: Sequence[RunSummary], rows: Mapping[str, Sequence[str]]) -> FittingTable:
    heads = ("", *(run.path for run in runs))
    return FittingTable(heads, [(key, *values) for key, values in rows.items()])


def _shown(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def _value(value: Any, missing: str) -> str:
    """A setting as it is written in YAML, shortened; `missing` for None."""
    if value is None:
        return missing
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shortened(text, MAX_VALUE)
