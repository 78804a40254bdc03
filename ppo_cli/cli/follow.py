"""`ppo-cli stats --follow`: shows a run that another process writes, until the run ends."""

from __future__ import annotations

import math
import shlex
import signal
import sys
import time
from collections.abc import Collection, Sequence
from types import FrameType
from typing import NoReturn, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from ppo_cli.cli.console import console, is_plain, note, write_json
from ppo_cli.cli.display import (
    SHOWN_SAMPLES,
    ShownEvaluation,
    clock,
    columns,
    cut,
    evaluation_figures,
    evaluation_line,
    head,
    score_of,
    step_figures,
    step_line,
)
from ppo_cli.cli.signals import handling
from ppo_cli.cli.streams import has_reader
from ppo_cli.errors import Interrupted
from ppo_cli.reporting.summary import StepReport
from ppo_cli.reporting.tables import sample_lines
from ppo_cli.reporting.terminal_chart import terminal_chart
from ppo_cli.training.follow import ABSENT, INTERRUPTED, RUNNING, STARTING, FollowedRun, News, Row
from ppo_cli.utils.text import escape_controls

POLL = 1.0  # seconds between two looks
QUIET_SECONDS, QUIET_STEPS = 60.0, 5  # a run without news for longer is said to be quiet
RECENT = 20  # steps from which the time that is left is estimated
CHARTED, MAX_CHART_WIDTH, CHART_HEIGHT = "env/reward_mean", 72, 4
SHOWN_WARNINGS = 2
UNITS = ((86400, "days"), (3600, "h"), (60, "min"))  # in seconds


class Screen(Protocol):
    """Shows what a look at a run has found; a context manager."""

    def __enter__(self) -> Screen:
        """Start."""

    def __exit__(self, *error: object) -> None:
        """Finish."""

    def show(self, run: FollowedRun, news: News) -> None:
        """Show the run after a look at it."""


def follow(path: str, *, as_json: bool, keys: Collection[str] | None = None) -> None:
    """Show a run step by step until it has ended, or nobody reads standard output any more.

    Args:
        path: the run directory, which may not be there yet.
        as_json: print a JSON object a step.
        keys: beginnings of the keys in it; None for all.

    Raises:
        UsageError: another file or folder is at `path`, or the run's files are damaged.
        Interrupted: by SIGTERM.
    """
    run = FollowedRun(path)
    screen: Screen
    if as_json:
        screen = JSONLines(keys)
    else:
        screen = PlainLines() if is_plain(sys.stdout) else LiveScreen(console(stderr=False))
    term = [signal.SIGTERM]  # a live screen has hidden the cursor
    with handling(_stop, term, always=term), screen:
        while True:
            screen.show(run, run.look())
            if run.has_ended or not has_reader(sys.stdout):
                return
            time.sleep(POLL)


class PlainLines:
    """Prints a line a step, without control codes; what is not about a step to standard error."""

    def __init__(self) -> None:
        self._console = console(stderr=False)
        self._has_looked = False
        self._step = 0  # the newest that was printed
        self._told: set[str] = set()  # the warnings that were printed
        self._kind = "", -1, False  # of what was said last: state, age, whether there are steps

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def show(self, run: FollowedRun, news: News) -> None:
        """Print the steps that are new; of those before the first look only the newest."""
        if news.back_to is not None:
            note(f"the run went back to step {news.back_to}" if news.back_to else "a new run began")
            self._step = news.back_to
        for row in news.rows if self._has_looked else news.rows[-1:]:
            self.print_step(run, row)
            self._step = row["step"]
        self._has_looked = True
        note(*(f"warning: {text}" for text in run.warnings if text not in self._told))
        self._told.update(run.warnings)
        age = max(run.seconds_unchanged / QUIET_SECONDS, 1.0)
        # Of a run that stands still something is said each time its age has doubled.
        kind = run.state, int(math.log2(age)) if _is_quiet(run) else -1, bool(run.rows)
        if kind != self._kind and (status := _status(run)):
            note(status)
        self._kind = kind

    def print_step(self, run: FollowedRun, row: Row) -> None:
        """Print a step, and its evaluation; the evaluation alone where it came later."""
        report = _report(run, row)
        if row["step"] > self._step:
            self._console.print(step_line(report, _time_left(run, row)), soft_wrap=True)
        if (evaluation := ShownEvaluation.of(report)) is not None:
            self._console.print(evaluation_line(evaluation), soft_wrap=True)


class JSONLines(PlainLines):
    """Prints a JSON object a step; again for a step that was evaluated later, or made anew."""

    def __init__(self, keys: Collection[str] | None) -> None:
        super().__init__()
        self._keys = keys

    def print_step(self, run: FollowedRun, row: Row) -> None:
        """Print the step's metrics."""
        wanted = ("",) if self._keys is None else tuple(self._keys)
        write_json({k: v for k, v in row.items() if k == "step" or k.startswith(wanted)})


class LiveScreen:
    """Draws the state of the run in place."""

    def __init__(self, target: Console) -> None:
        self._console = target
        self._live = Live(console=target, auto_refresh=False)
        self._chart: list[RenderableType] = []
        self._samples: list[RenderableType] = []

    def __enter__(self) -> Screen:
        self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.__exit__(None, None, None)

    def show(self, run: FollowedRun, news: News) -> None:
        """Draw the run; chart and samples change with its steps alone."""
        if news.rows or news.back_to is not None:
            self._chart, self._samples = self._draw_chart(run), self._draw_samples(run)
        self._live.update(self._view(run), refresh=True)

    def _view(self, run: FollowedRun) -> RenderableType:
        """What is most important stands first in `parts`; what has no room is left out."""
        status = Text(
            escape_controls(_status(run)), style="dim" if not _is_quiet(run) else "yellow"
        )
        warnings = [
            Text(escape_controls(w), style="yellow") for w in run.warnings[-SHOWN_WARNINGS:]
        ]
        if not run.rows:
            return Group(*warnings, status)
        report = _report(run, run.rows[-1])
        state = run.state if run.has_ended or run.state == RUNNING else "not running"
        title = Text(f"{escape_controls(run.path)}: {state}", style="italic")
        left = _time_left(run, run.rows[-1])
        top = [
            title,
            head(report, left, self._console),
            columns(step_figures(report, score_of(run.rows[0])), self._console),
        ]
        evaluation = _newest_evaluation(run)
        parts: list[tuple[int, RenderableType]] = [(0, Group(*top))]
        if evaluation is not None:
            parts.append((2, columns(evaluation_figures(evaluation), self._console)))
        parts += [(4, Group(*self._chart)), (3, Group(*self._samples)), (1, Group(*warnings))]
        parts.append((0, status))
        return self._fitted(parts)

    def _fitted(self, parts: Sequence[tuple[int, RenderableType]]) -> RenderableType:
        """The parts, without those of the highest numbers as far as the screen is too low."""
        room = self._console.height - 1
        for limit in sorted({rank for rank, _ in parts}, reverse=True):
            shown = Group(*(part for rank, part in parts if rank <= limit))
            if len(self._console.render_lines(shown)) <= room:
                break
        return shown

    def _draw_chart(self, run: FollowedRun) -> list[RenderableType]:
        rows = [row for row in run.rows if CHARTED in row]
        if len(rows) < 2:
            return []
        lines = terminal_chart(
            {run.path: rows},
            CHARTED,
            min(self._console.width - 1, MAX_CHART_WIDTH),
            CHART_HEIGHT,
            self._console.options.ascii_only,
        )
        return [cut(line, self._console) for line in lines]

    def _draw_samples(self, run: FollowedRun) -> list[RenderableType]:
        samples = run.samples(SHOWN_SAMPLES)
        return [cut(line, self._console) for line in sample_lines(samples, SHOWN_SAMPLES)]


def _report(run: FollowedRun, row: Row) -> StepReport:
    """A step for the functions that show one of a run of this process."""
    steps = row["step"] if run.config is None else run.config.run.steps
    best = run.history.best
    return StepReport(row["step"], steps, dict(row), [], best.step if best else None)


def _newest_evaluation(run: FollowedRun) -> ShownEvaluation | None:
    newest = run.history.newest
    rows = (row for row in reversed(run.rows) if newest and row["step"] == newest.step)
    row = next(rows, None)
    return None if row is None else ShownEvaluation.of(_report(run, row))


def _time_left(run: FollowedRun, row: Row) -> str:
    """The time from a step to the run's last one, by the newest steps; `-:--` if it stands."""
    steps = 0 if run.config is None else run.config.run.steps
    if run.has_ended or run.state != RUNNING or not steps:
        return clock(0) if run.has_ended else "-:--"
    left = _seconds_a_step(run) * (steps - row["step"])
    waited = run.seconds_unchanged if row is run.rows[-1] else 0.0
    return clock(max(left - waited, 0.0))


def _seconds_a_step(run: FollowedRun) -> float:
    recent = run.rows[-RECENT:]
    total = sum(row.get("time/step", 0.0) + row.get("time/evaluating", 0.0) for row in recent)
    return float(total / max(len(recent), 1))


def _is_quiet(run: FollowedRun) -> bool:
    """Whether nothing has changed for so long that it is worth a word."""
    if run.state == INTERRUPTED:
        return not run.has_ended
    patience = max(QUIET_SECONDS, QUIET_STEPS * _seconds_a_step(run))
    return run.state == RUNNING and run.seconds_unchanged >= patience


def _status(run: FollowedRun) -> str:
    """What is to be said of a run besides its newest step."""
    if run.state == ABSENT:
        return f"waiting for {run.path}: there is no such run directory yet"
    if run.state == STARTING:
        return f"waiting for {run.path}: the run has not begun yet"
    resume = f"ppo-cli train --output {shlex.quote(run.path)} --resume"
    if run.has_ended:
        planned = "" if run.config is None else f" of {run.config.run.steps}"
        how = {"interrupted": "was interrupted", "finished": "has finished"}.get(
            run.state, run.state
        )
        why = f": {run.note}" if run.note else ""
        more = f"; go on with: {resume}" if run.state == INTERRUPTED else ""
        return f"{run.path} {how}, after {run.steps}{planned} steps{why}{more}"
    waiting = "" if run.rows else f"waiting for the first step of {run.path}"
    if not _is_quiet(run):
        return waiting
    unchanged = f"nothing has changed for {_duration(run.seconds_unchanged)}"
    holder = "a process holds the run's lock: it makes a long step, or it hangs"
    if run.state == INTERRUPTED:
        holder = f"no process holds the run's lock: it failed or was killed; go on with: {resume}"
    return "; ".join(filter(None, (waiting, unchanged, holder)))


def _duration(seconds: float) -> str:
    """`12 s`, `5 min`, `3 h` or `2 days`."""
    for size, unit in UNITS:
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)
