"""Rich tables and lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from ppo_cli.evaluation.samples import Generated, Sample, has_probability
from ppo_cli.utils.text import escape_controls

if TYPE_CHECKING:
    from ppo_cli.evaluation.best_of_n import BestOfN
    from ppo_cli.reporting.frontier import Trail
    from ppo_cli.reporting.summary import TrainingSummary


def summary_table(summary: TrainingSummary) -> Group:
    """Reference and tuned model on the held-out prompts."""
    table = titled_table(None)
    for heading in ("", "reference", summary.run, "change"):
        table.add_column(cell(heading), justify="left" if heading == "" else "right")
    before = summary.before.rows(summary.label)
    for name, (high, form, _) in summary.after.rows(summary.label).items():
        low = before[name][0]
        table.add_row(cell(name), f"{low:{form}}", f"{high:{form}}", f"{high - low:+{form}}")
    prompts = len(summary.after_samples)
    return below(f"{prompts} held-out prompts, weights of {summary.weights}", table)


def sample_lines(samples: Sequence[Sample], count: int) -> list[Text]:
    """One line per sample: score, query, response; at most `count`."""
    return [sample_line(sample) for sample in samples[:count]]


def sample_line(sample: Sample) -> Text:
    """`+1.23  query│response`, the response in bold."""
    score = "" if sample.score is None else f"{sample.score:+6.2f}  "
    line = Text(score, style="cyan")
    line.append(escape_controls(sample.query + sample.gap), style="default")
    line.append(escape_controls(sample.response), style="bold")
    return line


def statistics_tables(
    groups: Mapping[str, Sequence[tuple[str, float, str]]], title: str
) -> list[RenderableType]:
    """One table per heading: key, value and meaning of each statistic."""
    parts: list[RenderableType] = [cell(title, style="italic"), Text("")]
    for heading, entries in groups.items():
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, min_width=28)
        table.add_column(justify="right", no_wrap=True, min_width=10)
        table.add_column(style="dim")
        for key, value, meaning in entries:
            table.add_row(cell(key), f"{value:.5g}", Text(meaning))
        parts += [Text(heading, style="bold"), table, Text("")]
    return parts


def generation_table(models: Sequence[Generated], scored: bool) -> Table:
    """Every sample of every model, grouped by prompt."""
    table = titled_table(None)
    table.add_column("prompt", ratio=2)
    table.add_column("model", ratio=2)
    table.add_column("response", ratio=6)
    has_chances = any(has_probability(model.samples) for model in models)
    if scored:
        table.add_column("score", justify="right", min_width=6)
        if has_chances:
            table.add_column("P", justify="right", min_width=5)
    total = len(models[0].samples)
    for i in range(total):
        for n, model in enumerate(models):
            sample = model.samples[i]
            repeats = n > 0 or (i > 0 and models[0].samples[i - 1].query == sample.query)
            cells: list[Text | str] = [
                "" if repeats else cell(sample.query),
                cell(model.model),
                cell(sample.response.strip()),
            ]
            if scored:
                cells.append(f"{sample.score:.2f}")
                if has_chances:
                    cells.append(f"{sample.probability:.2f}")
            last = n == len(models) - 1
            table.add_row(*cells, end_section=last and i < total - 1)
    return table


def frontier_table(trail: Trail, curve: BestOfN | None) -> Group:
    """A run's evaluations: step, KL, score, and the score of best-of-n at the same KL."""
    table = titled_table(None)
    for heading in ("step", "KL", "score", "best-of-n there", "share", ""):
        table.add_column(heading, justify="right" if heading else "left")
    start = "-" if curve is None else f"{curve.reference_score:.3f}"
    table.add_row("reference", "0.00", f"{trail.reference_score:.3f}", start, "-", "")
    for evaluation in trail.evaluations:
        kl, score = evaluation.kl, evaluation.score
        reached = None if curve is None else curve.score_at(kl)
        share = None if curve is None else curve.share_at(kl, score)
        marks = [
            "best" if evaluation == trail.best else "",
            "last" if evaluation is trail.evaluations[-1] else "",
        ]
        table.add_row(
            str(evaluation.step),
            f"{kl:.2f}",
            f"{score:.3f}",
            "-" if reached is None else f"{reached:.3f}",
            "-" if share is None else f"{share:.2f}",
            ", ".join(mark for mark in marks if mark),
        )
    return below(f"{trail.name}: score against KL on held-out prompts", table)


def upload_table(sizes: Mapping[str, int], stay: Mapping[str, str], target: str) -> Group:
    """The files that are for others, with their sizes in bytes, and those that stay, with why."""
    table = titled_table(None)
    table.add_column("file")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("")
    for name, size in sizes.items():
        table.add_row(cell(name), decimal(size), "")
    table.add_row("together", decimal(sum(sizes.values())), "", style="bold")
    for number, (name, why) in enumerate(stay.items()):
        if not number:
            table.add_section()
        table.add_row(cell(name), "", f"stays: {why}", style="dim")
    return below(f"for {target}", table)


def cell(text: str, style: str = "") -> Text:
    """A cell of untrusted text: no markup, control characters escaped."""
    return Text(escape_controls(text), style=style, overflow="fold")


def below(title: str, table: Table) -> Group:
    """A title above `table`; it may be wider than the table."""
    return Group(cell(title, style="italic"), table)


def titled_table(title: str | None) -> Table:
    """An empty table in the style of all tables."""
    return Table(
        title=None if title is None else cell(title, style="italic"),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        header_style="bold",
    )
