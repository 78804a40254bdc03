"""What `train` shows while it works: a live view on a terminal, plain lines elsewhere."""

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

PLAIN_LINES = 20
SHOWN_SAMPLES = 2
GAP = "  "
FIGURE = 9  # columns that the shortest figure is given
SHORTEST_BAR, LONGEST_BAR = 8, 30


class Display(Protocol):
    """Follows a run; a context manager."""

    def __enter__(self) -> Display:
        """Begin."""

    def __exit__(self, *error: object) -> None:
        """End."""

    def status(self, message: str) -> None:
        """Say what goes on outside the steps."""

    def show(self, report: StepReport) -> None:
        """Take in a step."""


def make_display(quiet: bool) -> Display:
    """The display that fits standard error."""
    if quiet:
        return QuietDisplay()
    return PlainDisplay() if is_plain(sys.stderr) else LiveDisplay(console(stderr=True))


class QuietDisplay:
    """Shows nothing."""

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def status(self, message: str) -> None:
        """Nothing."""

    def show(self, report: StepReport) -> None:
        """Nothing."""


class PlainDisplay(QuietDisplay):
    """About twenty lines a run, with no control codes, for logs."""

    def __init__(self) -> None:
        self._console = console(stderr=True)
        self._pace = _Pace()
        self._evaluated: _Evaluated | None = None

    def status(self, message: str) -> None:
        """A line."""
        self._console.print(message, soft_wrap=True)

    def show(self, report: StepReport) -> None:
        """A line every so many steps, for the first and the last; another for an evaluation."""
        left = self._pace.left(report)
        self._evaluated = _Evaluated.of(report) or self._evaluated
        every = max(report.steps // PLAIN_LINES, 1)
        if report.step % every and not report.is_last and report.step != 1:
            return
        s = report.stats
        self._console.print(
            f"step {report.step:>{len(str(report.steps))}}/{report.steps}  "
            f"score {s['env/reward_mean']:+.2f}  kl {s['objective/kl']:.2f}  "
            f"coef {s['objective/kl_coef']:.3f}  loss {s['ppo/loss/total']:+.3f}  "
            f"{s['perf/tokens_per_second']:.0f} tok/s  {left} left",
            soft_wrap=True,
        )
        if (found := self._evaluated) is not None:
            best = "  best" if found.is_best else ""
            self._console.print(
                f"held-out {found.step}: score {found.score}  P {found.probability}  "
                f"kl {found.kl}  distinct-2 {found.distinct}  ppl {found.perplexity}{best}",
                soft_wrap=True,
            )
            self._evaluated = None


class LiveDisplay:
    """A progress bar, the figures that matter, and a sample or two, drawn in place."""

    def __init__(self, target: Console) -> None:
        self._console = target
        self._live = Live(console=target, refresh_per_second=8, transient=False)
        self._pace = _Pace()
        self._status = ""
        self._report: StepReport | None = None
        self._evaluated: _Evaluated | None = None
        self._left = "-:--"

    def __enter__(self) -> Display:
        self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._status = ""
        self._live.update(self._view())
        self._live.__exit__(None, None, None)

    def status(self, message: str) -> None:
        """A line below the figures, until the next."""
        self._status = message
        self._live.update(self._view())

    def show(self, report: StepReport) -> None:
        """Draw the step."""
        self._report, self._status = report, ""
        self._evaluated = _Evaluated.of(report) or self._evaluated
        self._left = self._pace.left(report)
        self._live.update(self._view())

    def _view(self) -> RenderableType:
        parts: list[RenderableType] = []
        if (report := self._report) is not None:
            parts += [self._head(report), self._figures(report)]
            if (found := self._evaluated) is not None:
                best = " (best)" if found.is_best else ""
                figures = {
                    "held-out": f"{found.step}{best}",
                    "score": found.score,
                    "P": found.probability,
                    "KL": found.kl,
                    "distinct-2": found.distinct,
                    "perplexity": found.perplexity,
                }
                parts.append(self._laid_out(figures))
            for line in sample_lines(report.samples, SHOWN_SAMPLES):
                parts.append(self._cut(line))
        if self._status:
            parts.append(Text(self._status, style="dim"))
        return Group(*parts)

    def _head(self, report: StepReport) -> RenderableType:
        """Where the run is; the bar takes what is left of the line, or one of its own."""
        step = Text(f"step {report.step}/{report.steps}", style="bold")
        left = Text(f"{self._left} left", style="dim")
        free = self._console.width - len(step) - len(left) - 2 * len(GAP)
        width = min(free if free >= SHORTEST_BAR else self._console.width - 1, LONGEST_BAR)
        bar = ProgressBar(total=report.steps, completed=report.step, width=width)
        head = Table.grid(padding=(0, len(GAP)))
        if free < SHORTEST_BAR:
            head.add_row(bar)
            return Group(Text.assemble(step, GAP, left), head)
        head.add_row(step, bar, left)
        return head

    def _cut(self, line: Text) -> Text:
        """A line of text from models, no wider than the screen."""
        room = self._console.width - 1
        if line.cell_len > room:
            ellipsis = "..." if self._console.options.ascii_only else "…"
            line.truncate(max(room - len(ellipsis), 0))
            line.append(ellipsis)
        return line

    def _laid_out(self, figures: Mapping[str, str]) -> RenderableType:
        """Figures below their names, in as many rows as it takes to show them in full."""
        rows: list[dict[str, str]] = []
        used = 0
        for name, value in figures.items():
            width = max(len(name), len(value), FIGURE) + len(GAP)
            if not rows or used + width > self._console.width:
                rows.append({})
                used = 0
            rows[-1][name] = value
            used += width
        if len(rows) == len(figures):  # on a screen so narrow, rather beside their names
            return Group(*(Text.assemble((name, "dim"), " ", figures[name]) for name in figures))
        return Group(*map(_figures_table, rows))

    def _figures(self, report: StepReport) -> RenderableType:
        s = report.stats
        pace = Pace.of([s])
        figures = {
            "mean score": f"{s['env/reward_mean']:+.3f}",
            "KL": f"{s['objective/kl']:.2f}",
            "KL coef": f"{s['objective/kl_coef']:.3f}",
            "loss": f"{s['ppo/loss/total']:+.4f}",
            "tokens/s": f"{pace.tokens_per_second:,.0f}",
            "sample/score/ppo": f"{pace.sampling:.0%}/{pace.scoring:.0%}/{pace.optimising:.0%}",
        }
        return self._laid_out(figures)


@dataclass(frozen=True)
class _Evaluated:
    """An evaluation as it is shown; variety and oddness as multiples of the reference's."""

    step: int
    score: str
    probability: str
    kl: str
    distinct: str
    perplexity: str
    is_best: bool

    @classmethod
    def of(cls, report: StepReport) -> _Evaluated | None:
        """That of a step, None where it had none."""
        s = report.stats
        if "eval/score" not in s:
            return None

        def multiple(name: str) -> str:
            of_reference = s[f"eval/reference_{name}"]
            return f"{s[f'eval/{name}'] / of_reference:.2f}x" if of_reference else "-"

        return cls(
            report.step,
            f"{s['eval/score']:+.2f}",
            f"{s['eval/probability']:.2f}",
            f"{s['eval/kl']:.2f}",
            multiple("distinct_2"),
            multiple("perplexity"),
            report.best == report.step,
        )


def _figures_table(figures: Mapping[str, str]) -> Table:
    """Figures in one row, below their names."""
    table = Table(box=None, padding=(0, len(GAP), 0, 0), header_style="dim")
    for name in figures:
        table.add_column(name, justify="right", min_width=FIGURE, overflow="fold")
    table.add_row(*figures.values())
    return table


class _Pace:
    """Time left, from the steps seen so far."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._first = 0

    def left(self, report: StepReport) -> str:
        now = time.monotonic()
        if self._started is None:
            stats = report.stats
            self._started = now - stats["time/step"] - stats.get("time/evaluating", 0.0)
            self._first = report.step - 1
        # A rollback may lead to before the first step that was seen.
        seconds = (now - self._started) / max(report.step - self._first, 1)
        return clock(0 if report.is_last else seconds * (report.steps - report.step))


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
