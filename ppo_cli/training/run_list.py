"""Reads run directories without torch: which there are, how they stand, how they differ."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_cli.config.schema import RunConfig
from ppo_cli.errors import PPOCliError, UsageError
from ppo_cli.evaluation.history import Evaluation, EvaluationHistory
from ppo_cli.reporting.run_tables import RunDifferences, RunSummary
from ppo_cli.training.provenance import flat_record
from ppo_cli.training.resume import learns_alike
from ppo_cli.training.run_directory import CONFIG_FILE, RunDirectory
from ppo_cli.utils.inventory import CHECKPOINTS, MARKER

MAX_DEPTH = 4  # folders below the one that is searched


def find_runs(folder: str | Path) -> list[Path]:
    """The run directories in `folder`, itself included, and below, sorted by name.

    Hidden folders, links and what lies in a run are not searched, nor what lies more than
    `MAX_DEPTH` folders below.

    Raises:
        UsageError: there is no such folder.
    """
    top = Path(folder)
    if not str(folder).strip() or not top.is_dir():
        raise UsageError(f"{folder}: no such folder: give one that holds run directories")
    found = []
    for place, folders, files in os.walk(top):
        here = Path(place)
        is_old = CONFIG_FILE in files and (CHECKPOINTS in folders or RunDirectory(here).is_run())
        if MARKER in files or is_old:
            found.append(here)
            folders.clear()
        elif len(here.relative_to(top).parts) >= MAX_DEPTH:
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return found


def summarise(folder: str | Path) -> RunSummary:
    """Read the summary of a run; what cannot be read makes it a damaged one."""
    directory = RunDirectory(folder)
    try:
        config, rows = directory.config(), directory.records.rows()
        ended = directory.recorded().get("ended")
    except PPOCliError as error:
        return RunSummary(str(folder), "damaged", note=str(error))
    steps = rows[-1]["step"] if rows else 0
    history = _history(rows, config)
    state, note = state_of(directory, config, steps, history, ended)
    chosen = history.newest if config.run.weights == "last" else history.best or history.newest
    row = next((row for row in rows if chosen and row["step"] == chosen.step), {})
    return RunSummary(
        path=str(folder),
        state=state,
        steps=steps,
        planned_steps=config.run.steps,
        label=getattr(config.reward, "sentiment", None),
        step=chosen.step if chosen else None,
        results={
            key.removeprefix("eval/"): value
            for key, value in row.items()
            if key.startswith("eval/") and not key.startswith("eval/reference_")
        },
        seconds=sum(row.get("time/step", 0.0) for row in rows),
        note=note,
    )


def differences(folders: Sequence[str | Path]) -> RunDifferences:
    """Compare the settings, code and results of runs.

    Raises:
        UsageError: a folder is no run directory, or its configuration cannot be read.
    """
    directories = [RunDirectory.existing(folder) for folder in folders]
    settings = [flat(directory.config().model_dump(mode="json")) for directory in directories]
    code = [flat_record(directory.recorded()) for directory in directories]
    return RunDifferences(
        runs=[summarise(folder) for folder in folders],
        settings={k: v for k, v in _differing(settings).items() if k != "run.output"},
        code=_differing(code),
    )


def seed_groups(directories: Sequence[RunDirectory]) -> list[list[RunDirectory]]:
    """Gather runs that differ in the seed alone, in the order of each group's first run.

    Two runs with the same seed are no repeats of each other, and stay apart.
    """
    groups: list[list[RunDirectory]] = []
    for directory in directories:
        for group in groups:
            if all(_differ_in_seed_alone(directory, other) for other in group):
                group.append(directory)
                break
        else:
            groups.append([directory])
    return groups


def _differ_in_seed_alone(a: RunDirectory, b: RunDirectory) -> bool:
    first, second = (run.config() for run in (a, b))
    files = [
        {k: v for k, v in flat(run.recorded().get("inputs") or {}).items() if ".files." in k}
        for run in (a, b)
    ]
    return (
        first.run.seed != second.run.seed and learns_alike(first, second) and files[0] == files[1]
    )


def _history(rows: Sequence[Mapping[str, Any]], config: RunConfig) -> EvaluationHistory:
    history = EvaluationHistory()
    for row in rows:
        history = with_row(history, row, config)
    return history


def with_row(
    history: EvaluationHistory, row: Mapping[str, Any], config: RunConfig
) -> EvaluationHistory:
    """The history with the evaluation of a step, if that has one."""
    if not row.keys() >= {"eval/score", "eval/kl"}:
        return history
    return history.after(Evaluation(row["step"], row["eval/score"], row["eval/kl"]), config.run)


def state_of(
    directory: RunDirectory, config: RunConfig, steps: int, history: EvaluationHistory, ended: Any
) -> tuple[str, str]:
    """State of a run as in `RunSummary`, and a note.

    Args:
        directory: of the run.
        config: its settings.
        steps: the newest step in its records.
        history: its evaluations.
        ended: how it ended, as `run.yaml` has it; runs of earlier releases do not record that.
    """
    if directory.lock.is_held():
        return "running", ""
    # A run that diverged went back to a checkpoint, and its records reach as far as before.
    if isinstance(ended, dict) and ended.get("recorded", ended.get("step")) == steps:
        return str(ended.get("as")), str(ended.get("why") or "")
    has_model = (directory.path / "config.json").is_file()
    if has_model and steps >= config.run.steps:
        return "finished", ""
    early = history.reason_to_stop(config.run) if has_model else None
    if early and history.newest and history.newest.step == steps:
        return "ended early", early
    return "interrupted", ""


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _differing(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Key -> value in each record, for keys whose values are not all equal."""
    keys = dict.fromkeys(key for record in records for key in record)
    rows = {key: [record.get(key) for record in records] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}
