"""What came of a sweep's trials: their results in a table, in words, as CSV and as plain values."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group
from rich.text import Text

from ppo_cli.config.sweep import SCORE, SweepConfig
from ppo_cli.reporting.estimate import seconds as duration
from ppo_cli.reporting.layout import cell, titled_table
from ppo_cli.reporting.tables import below
from ppo_cli.utils.text import escape_controls, shortened, spreadsheet_text

FINISHED, PRUNED, FAILED, RUNNING = "finished", "pruned", "failed", "running"
ORDER = {FINISHED: 0, PRUNED: 1, RUNNING: 2, FAILED: 3}
HEADING_WIDTH = 10  # columns
MAX_WHY = 300  # characters of a reason
FEW_FOR_IMPORTANCE = 50  # PED-ANOVA looks at the best tenth; optuna advises five trials there


@dataclass(frozen=True)
class TrialResult:
    """A trial of a sweep, ended or under way.

    Attributes:
        number: from 0.
        parameters: key -> its value in this trial.
        folder: run directory, or the folder of one for each seed.
        state: finished, pruned, failed or running.
        value: the objective, mean over the seeds; of a pruned trial at its last evaluation.
        kl: eval/kl there, nats per response, mean over the seeds.
        by_seed: seed -> value of each run that ended.
        step, steps: the step that value and kl are of, in the first run; its number of steps.
        reference_score: mean score of the untrained model on the same prompts.
        seconds, wall: time in steps, and from the beginning of its processes to their end, of all
            runs together.
        why: why it failed.
    """

    number: int
    parameters: Mapping[str, Any]
    folder: str
    state: str = RUNNING
    value: float | None = None
    kl: float | None = None
    by_seed: Mapping[str, float] = field(default_factory=dict)
    step: int | None = None
    steps: int | None = None
    reference_score: float | None = None
    seconds: float = 0.0
    wall: float = 0.0
    why: str = ""

    @property
    def spread(self) -> float | None:
        """Half the distance between the best and the worst seed; None with one."""
        values = list(self.by_seed.values())
        return (max(values) - min(values)) / 2 if len(values) > 1 else None

    def keeps(self, max_kl: float | None) -> bool:
        """Whether it is within the limit of KL."""
        return max_kl is None or (self.kl is not None and self.kl <= max_kl)


@dataclass(frozen=True)
class SweepSummary:
    """All that came of a sweep.

    Attributes:
        folder: its directory.
        sweep: what was asked for.
        planned: number of trials that there shall be.
        trials: those there are, best first.
        importances: parameter -> its share in what distinguishes the best trials; empty where there
            are too few.
    """

    folder: str
    sweep: SweepConfig
    planned: int
    trials: Sequence[TrialResult]
    importances: Mapping[str, float]

    @property
    def best(self) -> TrialResult | None:
        """The finished trial with the best objective among those within the limit of KL."""
        first = self.trials[0] if self.trials else None
        is_best = first is not None and first.state == FINISHED and first.keeps(self.sweep.max_kl)
        return first if is_best else None

    def count(self, state: str) -> int:
        """Number of trials in a state."""
        return sum(trial.state == state for trial in self.trials)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        trials = [
            {**dataclasses.asdict(trial), "within_max_kl": trial.keeps(self.sweep.max_kl)}
            for trial in self.trials
        ]
        return {
            "sweep": self.folder,
            "objective": self.sweep.objective,
            "direction": "maximize" if self.sweep.maximises else "minimize",
            "max_kl": self.sweep.max_kl,
            "planned": self.planned,
            "finished": self.count(FINISHED),
            "pruned": self.count(PRUNED),
            "failed": self.count(FAILED),
            "best": self.best.number if self.best else None,
            "importances": dict(self.importances),
            "trials": trials,
        }


def best_first(trials: Sequence[TrialResult], sweep: SweepConfig) -> list[TrialResult]:
    """Finished trials within the limit of KL first, the best of them first; then the others."""

    def rank(trial: TrialResult) -> tuple[Any, ...]:
        value = trial.value if trial.value is not None else float("nan")
        worse = -value if sweep.maximises else value
        is_over = trial.state == FINISHED and not trial.keeps(sweep.max_kl)
        return ORDER[trial.state], is_over, value != value, worse, trial.number

    return sorted(trials, key=rank)


def trial_table(
    trials: Sequence[TrialResult], sweep: SweepConfig, title: str, *, notes: bool = True
) -> Group:
    """One row a trial: number, objective, KL, its parameters and how it stands; then why it failed.

    Args:
        trials: in the order of the rows.
        sweep: they belong to.
        title: above the table.
        notes: whether to say below it why trials failed.
    """
    table = titled_table(None)
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column(_short(sweep.objective, ()), justify="right", no_wrap=True)
    table.add_column("KL", justify="right", no_wrap=True)
    for key in sweep.parameters:
        heading = Text("\n".join(map(escape_controls, _heading(_short(key, sweep.parameters)))))
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("state")
    for trial in trials:
        is_over = trial.state == FINISHED and not trial.keeps(sweep.max_kl)
        spread = "" if trial.spread is None else f" ±{number(trial.spread, 2)}"
        table.add_row(
            str(trial.number),
            f"{number(trial.value)}{spread}",
            "-" if trial.kl is None else f"{trial.kl:.2f}",
            *(cell(shown_value(trial.parameters.get(key))) for key in sweep.parameters),
            Text("over max_kl" if is_over else _state(trial)),
            style="dim" if is_over or trial.state != FINISHED else "",
        )
    why = [cell(f"trial {t.number}: {t.why}") for t in trials if t.why and notes]
    return Group(below(title, table), *why)


def ranges_table(sweep: SweepConfig, whole: frozenset[str]) -> Group:
    """One row a parameter: its range or values."""
    table = titled_table(None)
    table.add_column("parameter")
    table.add_column("values")
    for key, parameter in sweep.parameters.items():
        if parameter.choices is not None:
            values = ", ".join(map(shown_value, parameter.choices))
        else:
            kind = "whole, " if key in whole else ""
            how = f"in steps of {parameter.step:g}" if parameter.step else "evenly"
            low, high = shown_value(parameter.low), shown_value(parameter.high)
            values = f"{low} to {high} ({kind}{'by its logarithm' if parameter.log else how})"
        table.add_row(cell(key), cell(values))
    return Group(table)


def words(summary: SweepSummary) -> list[str]:
    """The result in a few sentences."""
    sweep, best, counts = summary.sweep, summary.best, []
    for state in (FINISHED, PRUNED, FAILED, RUNNING):
        if count := summary.count(state):
            counts.append(f"{count} {'unfinished' if state == RUNNING else state}")
    lines = [f"{len(summary.trials)} of {summary.planned} trials: {', '.join(counts) or 'none'}"]
    limit = "" if sweep.max_kl is None else f", within max_kl ({sweep.max_kl:g})"
    if best is not None:
        settings = ", ".join(f"{key} {shown_value(v)}" for key, v in best.parameters.items())
        at = "" if best.kl is None else f" at a KL of {best.kl:.2f}{limit}"
        lines.append(
            f"best: trial {best.number} with {sweep.objective} {number(best.value)}{at}, "
            f"by {settings}"
        )
        if (close := _within_spread(summary)) and best.spread is not None:
            lines.append(
                f"trials {', '.join(map(str, close))} are not worse than its own seeds differ "
                f"(±{number(best.spread, 2)}): with more seeds they may change places"
            )
        if sweep.objective == SCORE:
            lines.append(
                f"it is the highest of {summary.count(FINISHED)} on the same held-out prompts, so "
                "a little too high: judge the model on others"
            )
    elif finished := summary.count(FINISHED):
        lowest = min((t for t in summary.trials if t.state == FINISHED), key=lambda t: t.kl or 0.0)
        lines.append(
            f"none of the {finished} finished trials keeps max_kl ({sweep.max_kl:g}); the lowest "
            f"KL is {number(lowest.kl)}, of trial {lowest.number}: raise max_kl, or the ranges of "
            "what holds KL down, such as ppo.init_kl_coef"
        )
    if summary.importances:
        shares = ", ".join(f"{k} {share:.0%}" for k, share in summary.importances.items())
        count = summary.count(FINISHED)
        few = f"; {count} trials are few for that: a hint, no more"
        hint = few if count < FEW_FOR_IMPORTANCE else ""
        lines.append(f"what distinguishes the best trials: {shares}{hint}")
    return lines


def trials_csv(trials: Sequence[TrialResult], sweep: SweepConfig) -> str:
    """One line a trial, by number, for a spreadsheet."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    seeds = sorted({seed for trial in trials for seed in trial.by_seed}, key=int)
    by_seed = [f"{sweep.objective} seed {seed}" for seed in seeds] if len(seeds) > 1 else []
    heads = ["trial", "state", sweep.objective, "eval/kl", "within_max_kl", "step", "seconds"]
    writer.writerow([*heads, *by_seed, *sweep.parameters, "folder", "why"])
    for trial in sorted(trials, key=lambda trial: trial.number):
        values = [trial.by_seed.get(seed, "") for seed in seeds] if by_seed else []
        row = [
            trial.number, trial.state, trial.value, trial.kl, trial.keeps(sweep.max_kl), trial.step,
            round(trial.seconds, 3), *values, *map(trial.parameters.get, sweep.parameters),
            trial.folder, trial.why,
        ]  # fmt: skip
        writer.writerow([spreadsheet_text(x) if isinstance(x, str) else x for x in row])
    return out.getvalue()


def progress_line(what: str, trial: TrialResult, sweep: SweepConfig) -> str:
    """What happened to a trial, in one line: begins, waits, evaluated or ended."""
    state = f"step {trial.step}/{trial.steps}" if what == "evaluated" else what
    line = f"trial {trial.number:>3}  {_state(trial) if what == 'ended' else state}"
    if trial.value is not None:
        line += f"  {sweep.objective} {number(trial.value)}"
        line += "" if trial.kl is None else f"  kl {trial.kl:.2f}"
    if what == "begins":
        values = trial.parameters.items()
        line += "".join(f"  {_short(k, sweep.parameters)} {shown_value(v)}" for k, v in values)
    return f"{line}  {shortened(trial.why, MAX_WHY)}" if trial.why else line


def time_left(trials: Sequence[TrialResult], planned: int, jobs: int) -> str | None:
    """The time that the trials which have not ended will take, as text; None where unknown."""
    taken = [trial.wall for trial in trials if trial.state in (FINISHED, PRUNED)]
    left = planned - sum(trial.state != RUNNING for trial in trials)
    return (
        duration(sum(taken) / len(taken) * left / jobs)
        if left > 0 and sum(taken, 0.0) > 0
        else None
    )


def number(value: float | None, digits: int = 4) -> str:
    """A number to some significant digits; - for none."""
    if value is None:
        return "-"
    return f"{value:.3f}" if digits == 4 and 0.1 <= abs(value) < 1000 else f"{value:.{digits}g}"


def shown_value(value: Any) -> str:
    """A parameter's value: to four digits, as YAML writes it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(key: str, among: Any) -> str:
    """The last part of a key where no other of `among` ends in it."""
    last = key.replace("/", ".").rpartition(".")[2]
    return key if sum(other.rpartition(".")[2] == last for other in among) > 1 else last


def _heading(key: str) -> list[str]:
    """A key in lines that end after an underscore or a dot, so that its column is narrow."""
    lines = [""]
    for part in re.findall(r"[^_.]*[_.]?", key):
        if lines[-1] and len(lines[-1] + part) > HEADING_WIDTH:
            lines.append("")
        lines[-1] += part
    return lines


def _state(trial: TrialResult) -> str:
    if trial.state == PRUNED and trial.step is not None:
        return f"pruned at {trial.step}"
    return trial.state


def _within_spread(summary: SweepSummary) -> list[int]:
    """The trials that are nearer to the best one than the values of its seeds are to each other."""
    best = summary.best
    if best is None or best.spread is None or best.value is None:
        return []
    return [
        trial.number
        for trial in summary.trials[1:]
        if trial.state == FINISHED
        and trial.keeps(summary.sweep.max_kl)
        and trial.value is not None
        and abs(trial.value - best.value) <= best.spread
    ]
