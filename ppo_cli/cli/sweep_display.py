"""Progress of `sweep`: a table that is redrawn on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from ppo_cli.cli.console import console, is_plain
from ppo_cli.reporting.sweep_tables import (
    FINISHED,
    RUNNING,
    TrialResult,
    best_first,
    number,
    progress_line,
    time_left,
    trial_table,
)

if TYPE_CHECKING:
    from ppo_cli.sweep.run import Progress, Sweep

FURTHER_LINES = 9  # of the terminal, beside the rows of the table


class SweepDisplay:
    """Shows nothing; a context manager, as those that show something."""

    def __init__(self, sweep: Sweep, jobs: int) -> None:
        self._sweep = sweep
        self._jobs = jobs

    def __enter__(self) -> SweepDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, progress: Progress) -> None:
        """Show what happened to a trial."""


class PlainSweepDisplay(SweepDisplay):
    """Prints a line for each begin, evaluation and end, without control codes."""

    def __init__(self, sweep: Sweep, jobs: int) -> None:
        super().__init__(sweep, jobs)
        self._console = console(stderr=True)
        self._best: int | None = None

    def show(self, progress: Progress) -> None:
        """Print a line, and a second one where a trial is the best so far."""
        spec = self._sweep.settings.sweep
        line = progress_line(progress.what, progress.trial, spec)
        if progress.what == "waits":
            line += " for another process, which still writes to it"
        self._console.print(line, soft_wrap=True, markup=False)
        if progress.what != "ended":
            return
        results = self._sweep.results()
        best = _best(self._sweep, results)
        left = time_left(results, self._sweep.planned, self._jobs)
        done = sum(result.state != RUNNING for result in results)
        parts = [f"{done} of {self._sweep.planned} trials ended"]
        parts += [f"about {left} left"] if left and done < self._sweep.planned else []
        if best is not None:
            parts.append(f"best so far: trial {best.number}, {number(best.value)}")
        self._console.print("; ".join(parts), soft_wrap=True)


class LiveSweepDisplay(SweepDisplay):
    """Draws the trials under way, the best of those that have ended, and the time left."""

    def __init__(self, sweep: Sweep, jobs: int, target: Console) -> None:
        super().__init__(sweep, jobs)
        self._console = target
        self._live = Live(console=target, refresh_per_second=4, transient=True)

    def __enter__(self) -> SweepDisplay:
        self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.__exit__(None, None, None)

    def show(self, progress: Progress) -> None:
        """Draw the table anew."""
        self._live.update(self._view())

    def _view(self) -> RenderableType:
        spec, planned = self._sweep.settings.sweep, self._sweep.planned
        results = self._sweep.results()
        under_way = [result for result in results if result.state == RUNNING]
        over = best_first([result for result in results if result.state != RUNNING], spec)
        room = max(self._console.height - FURTHER_LINES - len(under_way), 1)
        title = f"{len(over)} of {planned} trials ended"
        if left := time_left(results, planned, self._jobs):
            title += f", about {left} left"
        best = _best(self._sweep, results)
        foot = "" if best is None else f"best so far: trial {best.number}"
        hidden = f"{len(over) - room} more are not shown" if len(over) > room else ""
        lines = [Text(line, style="dim") for line in (foot, hidden) if line]
        return Group(trial_table([*under_way, *over[:room]], spec, title, notes=False), *lines)


def make_sweep_display(sweep: Sweep, jobs: int, quiet: bool) -> SweepDisplay:
    """Make the display that suits standard error."""
    if quiet:
        return SweepDisplay(sweep, jobs)
    if is_plain(sys.stderr):
        return PlainSweepDisplay(sweep, jobs)
    return LiveSweepDisplay(sweep, jobs, console(stderr=True))


def _best(sweep: Sweep, results: list[TrialResult]) -> TrialResult | None:
    spec = sweep.settings.sweep
    first = next(iter(best_first(results, spec)), None)
    return first if first and first.state == FINISHED and first.keeps(spec.max_kl) else None
