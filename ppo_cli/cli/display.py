"""Progress of `train`: a live view on a terminal, plain lines elsewhere; see `notebook.py`, too."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ppo_cli.cli.console import console, is_plain
from ppo_cli.reporting.summary import Pace, StepReport
from ppo_cli.reporting.tables import sample_lines

PLAIN_LINES = 20  # at most, of a run without evaluations
SHOWN_SAMPLES = 2
GAP = "  "  # between columns
MIN_FIGURE_WIDTH = 9  # columns of the terminal
MIN_BAR_WIDTH, MAX_BAR_WIDTH = 8, 30


class Display(Protocol):
    """Shows the progress of a run; a context manager."""

    def __enter__(self) -> Display:
        """Start."""

    def __exit__(self, *error: object) -> None:
        """Finish."""

    def status(self, message: str) -> None:
        """Show what is done before the first step or after the last."""

    def show(self, report: StepReport) -> None:
        """Show a step."""


def make_display(quiet: bool) -> Display:
    """Make the display that suits a notebook or standard error."""
    from ppo_cli.cli.notebook import NotebookDisplay, is_notebook

    if quiet:
        return QuietDisplay()
    if is_notebook():
        return NotebookDisplay()
    return PlainDisplay() if is_plain(sys.stderr) else LiveDisplay(console(stderr=True))


class QuietDisplay:
    """Shows nothing."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def status(self, message: str) -> None:
        """Do nothing."""

    def show(self, report: StepReport) -> None:
        """Do nothing."""


class PlainDisplay(QuietDisplay):
    """Prints about twenty lines a run, without control codes, for logs."""

    def __init__(self) -> None:
        self._console = console(stderr=True)
        self._remaining = RemainingTime()
        self._evaluation: ShownEvaluation | None = None  # not printed yet

    def status(self, message: str) -> None:
        """Print a line."""
        self._console.print(message, soft_wrap=True)

    def show(self, report: StepReport) -> None:
        """Print the first step, the last, and some between; after it the newest evaluation."""
        left = self._remaining.after(report)
        self._evaluation = ShownEvaluation.of(report) or self._evaluation
        every = max(report.steps // PLAIN_LINES, 1)
        if report.step % every and not report.is_last and report.step != 1:
            return
        self._console.print(step_line(report, left), soft_wrap=True)
        if self._evaluation is not None:
            self._console.print(evaluation_line(self._evaluation), soft_wrap=True)
            self._evaluation = None


class LiveDisplay:
    """Draws a progress bar, the most important statistics and some samples, in place."""

    def __init__(self, target: Console) -> None:
        self._console = target
        self._live = Live(console=target, refresh_per_second=8, transient=False)
        self._remaining = RemainingTime()
        self._left = "-:--"
        self._status = ""
        self._report: StepReport | None = None
        self._first_score = ""
        self._evaluation: ShownEvaluation | None = None

    def __enter__(self) -> Display:
        self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._status = ""
        self._live.update(self._view())
        self._live.__exit__(None, None, None)

    def status(self, message: str) -> None:
        """Draw a line below the statistics, until the next step."""
        self._status = message
        self._live.update(self._view())

    def show(self, report: StepReport) -> None:
        """Draw a step."""
        self._report, self._status = report, ""
        self._first_score = self._first_score or score_of(report.stats)
        self._evaluation = ShownEvaluation.of(report) or self._evaluation
        self._left = self._remaining.after(report)
        self._live.update(self._view())

    def _view(self) -> RenderableType:
        parts: list[RenderableType] = []
        if (report := self._report) is not None:
            screen = self._console
            figures = step_figures(report, self._first_score)
            parts += [head(report, self._left, screen), columns(figures, screen)]
            if (evaluation := self._evaluation) is not None:
                parts.append(columns(evaluation_figures(evaluation), screen))
            parts += [cut(line, screen) for line in sample_lines(report.samples, SHOWN_SAMPLES)]
        if self._status:
            parts.append(Text(self._status, style="dim"))
        return Group(*parts)


def step_line(report: StepReport, left: str) -> str:
    """The most important statistics of a step on one line, with the time that is left."""
    s = report.stats
    return (
        f"step {report.step:>{len(str(report.steps))}}/{report.steps}  "
        f"score {figure(s, 'env/reward_mean', '+.2f')}  kl {figure(s, 'objective/kl', '.2f')}  "
        f"coef {figure(s, 'objective/kl_coef', '.3f')}  "
        f"loss {figure(s, 'ppo/loss/total', '+.3f')}  "
        f"{figure(s, 'perf/tokens_per_second', '.0f')} tok/s  {left} left"
    )


def evaluation_line(evaluation: ShownEvaluation) -> str:
    """An evaluation on one line."""
    best = "  best" if evaluation.is_best else ""
    return (
        f"held-out {evaluation.step}: score {evaluation.score}  "
        f"P {evaluation.probability}  kl {evaluation.kl}  "
        f"distinct-2 {evaluation.distinct}  ppl {evaluation.perplexity}{best}"
    )


def figure(stats: Mapping[str, float], key: str, form: str) -> str:
    """A statistic as text; `-` where a step has none."""
    return f"{stats[key]:{form}}" if key in stats else "-"


def head(report: StepReport, time_left: str, screen: Console) -> RenderableType:
    """Step, progress bar and time left; on a narrow screen the bar has a second line."""
    step = Text(f"step {report.step}/{report.steps}", style="bold")
    left = Text(f"{time_left} left", style="dim")
    free = screen.width - len(step) - len(left) - 2 * len(GAP)
    width = min(free if free >= MIN_BAR_WIDTH else screen.width - 1, MAX_BAR_WIDTH)
    bar = ProgressBar(total=report.steps, completed=report.step, width=width)
    line = Table.grid(padding=(0, len(GAP)))
    if free < MIN_BAR_WIDTH:
        line.add_row(bar)
        return Group(Text.assemble(step, GAP, left), line)
    line.add_row(step, bar, left)
    return line


def cut(line: Text, screen: Console) -> Text:
    """Cut a line to the width of the screen."""
    room = screen.width - 1
    if line.cell_len > room:
        ellipsis = "..." if screen.options.ascii_only else "…"
        line.truncate(max(room - len(ellipsis), 0))
        line.append(ellipsis)
    return line


def columns(figures: Mapping[str, str], screen: Console) -> RenderableType:
    """Figures below their names, in as many rows as they need to fit the screen."""
    rows: list[dict[str, str]] = []
    used = 0
    for name, value in figures.items():
        width = max(len(name), len(value), MIN_FIGURE_WIDTH) + len(GAP)
        if not rows or used + width > screen.width:
            rows.append({})
            used = 0
        rows[-1][name] = value
        used += width
    if len(rows) == len(figures):  # so narrow a screen has room for one column: name, figure
        return Group(*(Text.assemble((name, "dim"), " ", figures[name]) for name in figures))
    return Group(*map(_figures_table, rows))


def score_of(stats: Mapping[str, float]) -> str:
    """The mean score of a step as text."""
    return figure(stats, "env/reward_mean", "+.2f")


def step_figures(report: StepReport, first_score: str) -> dict[str, str]:
    """The most important statistics of a step, by name; the score with that of the first step."""
    s = report.stats
    pace = Pace.of([s])
    return {
        "mean score": f"{first_score} -> {score_of(s)}",
        "KL": figure(s, "objective/kl", ".2f"),
        "KL coef": figure(s, "objective/kl_coef", ".3f"),
        "loss": figure(s, "ppo/loss/total", "+.4f"),
        "tokens/s": f"{pace.tokens_per_second:,.0f}",
        "sample/score/ppo": f"{pace.sampling:.0%}/{pace.scoring:.0%}/{pace.optimising:.0%}",
    }


def evaluation_figures(evaluation: ShownEvaluation) -> dict[str, str]:
    """An evaluation, by name."""
    best = " (best)" if evaluation.is_best else ""
    return {
        "held-out": f"{evaluation.step}{best}",
        "score": evaluation.score,
        "P": evaluation.probability,
        "KL": evaluation.kl,
        "distinct-2": evaluation.distinct,
        "perplexity": evaluation.perplexity,
    }


@dataclass(frozen=True)
class ShownEvaluation:
    """An evaluation as text; distinct-2 and perplexity as multiples of the reference's."""

    step: int
    score: str
    probability: str
    kl: str
    distinct: str
    perplexity: str
    is_best: bool

    @classmethod
    def of(cls, report: StepReport) -> ShownEvaluation | None:
        """The evaluation of a step; None where it has none."""
        s = report.stats
        if "eval/score" not in s:
            return None

        def multiple(name: str) -> str:
            of_reference = s.get(f"eval/reference_{name}")
            of_policy = s.get(f"eval/{name}")
            return (
                "-" if not of_reference or of_policy is None else f"{of_policy / of_reference:.2f}x"
            )

        return cls(
            report.step,
            figure(s, "eval/score", "+.2f"),
            figure(s, "eval/probability", ".2f"),
            figure(s, "eval/kl", ".2f"),
            multiple("distinct_2"),
            multiple("perplexity"),
            report.best == report.step,
        )


def _figures_table(figures: Mapping[str, str]) -> Table:
    """Figures in one row, below their names."""
    table = Table(box=None, padding=(0, len(GAP), 0, 0), header_style="dim")
    for name in figures:
        table.add_column(name, justify="right", min_width=MIN_FIGURE_WIDTH, overflow="fold")
    table.add_row(*figures.values())
    return table


class RemainingTime:
    """Estimates the time to the last step, from the steps shown so far."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._first_step = 0

    def after(self, report: StepReport) -> str:
        """The time left after a step, as text."""
        now = time.monotonic()
        if self._started is None:
            stats = report.stats
            self._started = now - stats["time/step"] - stats.get("time/evaluating", 0.0)
            self._first_step = report.step - 1
        made = max(report.step - self._first_step, 1)  # a rollback may lead to before the first
        seconds = (now - self._started) / made
        return clock(0 if report.is_last else seconds * (report.steps - report.step))


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
