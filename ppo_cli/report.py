"""Data -> what people and programs read: rich tables, Markdown, CSV, HTML."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ppo_cli.evaluation import Generated, Sample, mean_probability, mean_score
from ppo_cli.quality import MEASURES
from ppo_cli.text import escape_controls, markdown_text, spreadsheet_text

if TYPE_CHECKING:
    from ppo_cli.comparison import Comparison
    from ppo_cli.summary import TrainingSummary


def summary_table(summary: TrainingSummary) -> Table:
    """Reference and tuned model on the held-out prompts."""
    table = _table(f"{len(summary.after_samples)} held-out prompts, weights of {summary.weights}")
    for heading in ("", "reference", summary.run, "change"):
        table.add_column(_cell(heading), justify="left" if heading == "" else "right")
    before, after = summary.before, summary.after
    for field, measure in MEASURES.items():
        low, high, places = getattr(before, field), getattr(after, field), measure.places
        numbers = f"{low:.{places}f}", f"{high:.{places}f}", f"{high - low:+.{places}f}"
        table.add_row(_cell(measure.name.format(label=summary.label)), *numbers)
    return table


def sample_lines(samples: Sequence[Sample], count: int) -> list[Text]:
    """A line a sample: score, query, response, as many as `count`."""
    return [sample_line(sample) for sample in samples[:count]]


def sample_line(sample: Sample) -> Text:
    """`+1.23  query│response`, the response in bold."""
    score = "" if sample.score is None else f"{sample.score:+6.2f}  "
    line = Text(score, style="cyan")
    line.append(escape_controls(sample.query), style="default")
    line.append(escape_controls(sample.response), style="bold")
    return line


def statistics_tables(
    groups: Mapping[str, Sequence[tuple[str, float, str]]], title: str
) -> list[RenderableType]:
    """A table a heading: key, value and meaning of each statistic."""
    parts: list[RenderableType] = [_cell(title, style="italic"), Text("")]
    for heading, entries in groups.items():
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, min_width=28)
        table.add_column(justify="right", no_wrap=True, min_width=10)
        table.add_column(style="dim")
        for key, value, meaning in entries:
            table.add_row(_cell(key), f"{value:.5g}", Text(meaning))
        parts += [Text(heading, style="bold"), table, Text("")]
    return parts


def generation_table(models: Sequence[Generated], scored: bool) -> Table:
    """Every sample of every model, grouped by prompt."""
    table = _table(None)
    table.add_column("prompt", ratio=2)
    table.add_column("model", ratio=2)
    table.add_column("response", ratio=6)
    if scored:
        table.add_column("score", justify="right", min_width=6)
        table.add_column("P", justify="right", min_width=5)
    total = len(models[0].samples)
    for i in range(total):
        for n, model in enumerate(models):
            sample = model.samples[i]
            repeats = n > 0 or (i > 0 and models[0].samples[i - 1].query == sample.query)
            cells: list[Text | str] = [
                "" if repeats else _cell(sample.query),
                _cell(model.model),
                _cell(sample.response.strip()),
            ]
            if scored:
                cells += [f"{sample.score:.2f}", f"{sample.probability:.2f}"]
            last = n == len(models) - 1
            table.add_row(*cells, end_section=last and i < total - 1)
    return table


def comparison_tables(comparison: Comparison, rows: int) -> list[Table]:
    """Responses side by side, the first `rows` prompts; then means; then paired differences."""
    total = len(comparison.queries)
    shown = min(rows, total)
    side = _table(f"score of '{comparison.label}'; {shown} of {total} prompts")
    side.add_column("query", ratio=3)
    for model in comparison.models:
        side.add_column(_cell(model.model), ratio=4)
    for i in range(shown):
        cells = [_cell(comparison.queries[i])]
        for model in comparison.models:
            sample = model.samples[i]
            cell = _cell(sample.response.strip() + " ")
            cells.append(cell.append(f"{sample.score:.2f}", style="bold cyan"))
        side.add_row(*cells, end_section=i < shown - 1)

    means = _table(f"means over {total} prompts")
    for heading in ("model", "mean score", f"mean P({comparison.label})"):
        means.add_column(_cell(heading), justify="left" if heading == "model" else "right")
    for model in comparison.models:
        means.add_row(
            _cell(model.model),
            f"{mean_score(model.samples):.3f}",
            f"{mean_probability(model.samples):.3f}",
        )

    paired = _table("paired differences in score")
    for heading in ("", "mean", "95 % interval", "wins"):
        paired.add_column(heading, justify="left" if heading == "" else "right")
    for item in comparison.differences:
        gap = item.difference
        paired.add_row(
            _cell(f"{item.first} - {item.second}"),
            f"{gap.mean:+.3f}",
            f"{gap.low:+.3f} to {gap.high:+.3f}",
            f"{item.win_rate:.0%}",
        )
    return [side, means, paired] if shown else [means, paired]


def comparison_markdown(comparison: Comparison) -> str:
    """All prompts side by side and the means, as Markdown tables."""
    names = [model.model for model in comparison.models]
    lines = [_markdown_row(["query", *names]), _markdown_row(["---"] * (len(names) + 1))]
    for i, query in enumerate(comparison.queries):
        cells = [query]
        for model in comparison.models:
            sample = model.samples[i]
            cells.append(f"{sample.response.strip()} ({sample.score:.2f})")
        lines.append(_markdown_row(cells))
    lines += ["", _markdown_row(["model", "mean score", f"mean P({comparison.label})"])]
    lines.append(_markdown_row(["---", "---:", "---:"]))
    for model in comparison.models:
        score, chance = mean_score(model.samples), mean_probability(model.samples)
        lines.append(_markdown_row([model.model, f"{score:.3f}", f"{chance:.3f}"]))
    lines.append("")
    for item in comparison.differences:
        gap = item.difference
        lines.append(
            f"- {markdown_text(item.first)} minus {markdown_text(item.second)}: {gap.mean:+.3f} "
            f"(95 % interval {gap.low:+.3f} to {gap.high:+.3f}), wins {item.win_rate:.0%}"
        )
    return "\n".join(lines)


def comparison_csv(comparison: Comparison) -> str:
    """A line a prompt and model: query, model, response, score, probability.

    A text that a spreadsheet would take for a formula has an apostrophe in front.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["query", "model", "response", "score", "probability"])
    for i, query in enumerate(comparison.queries):
        for model in comparison.models:
            sample = model.samples[i]
            texts = [spreadsheet_text(text) for text in (query, model.model, sample.response)]
            writer.writerow([*texts, sample.score, sample.probability])
    return out.getvalue().rstrip("\n")


def comparison_html(comparison: Comparison) -> str:
    """One self-contained page: means, paired differences, all responses side by side."""
    means = "".join(
        f"<tr><td>{_html_text(model.model)}</td><td class=n>{mean_score(model.samples):.3f}</td>"
        f"<td class=n>{mean_probability(model.samples):.3f}</td></tr>"
        for model in comparison.models
    )
    paired = "".join(
        f"<tr><td>{_html_text(item.first)} &minus; {_html_text(item.second)}</td>"
        f"<td class=n>{item.difference.mean:+.3f}</td>"
        f"<td class=n>{item.difference.low:+.3f} to {item.difference.high:+.3f}</td>"
        f"<td class=n>{item.win_rate:.0%}</td></tr>"
        for item in comparison.differences
    )
    heads = "".join(f"<th>{_html_text(model.model)}</th>" for model in comparison.models)
    rows = "".join(
        f"<tr><td>{_html_text(query)}</td>"
        + "".join(
            f"<td>{_html_text(model.samples[i].response)} <b>{model.samples[i].score:.2f}</b></td>"
            for model in comparison.models
        )
        + "</tr>"
        for i, query in enumerate(comparison.queries)
    )
    label = _html_text(comparison.label)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ppo-cli compare</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem;
  padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ border-bottom: 1px solid #ccc; padding: .4rem .8rem; text-align: left;
  vertical-align: top; }}
.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
b {{ color: #0072B2; }}
</style></head><body>
<h1>Score of “{label}”</h1>
<p>Classifier {_html_text(comparison.classifier)}, {len(comparison.queries)} prompts, seed
{comparison.seed}. Every model had the same prompts and random numbers.</p>
<table><tr><th>model</th><th class=n>mean score</th><th class=n>mean P({label})</th></tr>
{means}</table>
<table><tr><th>paired difference in score</th><th class=n>mean</th><th class=n>95 % interval</th>
<th class=n>wins</th></tr>{paired}</table>
<table><tr><th>query</th>{heads}</tr>{rows}</table>
</body></html>
"""


def _markdown_row(cells: Sequence[str]) -> str:
    dashes = {"---", "---:"}
    return "| " + " | ".join(c if c in dashes else markdown_text(c) for c in cells) + " |"


def _html_text(text: str) -> str:
    return html.escape(escape_controls(text.strip()))


def _cell(text: str, style: str = "") -> Text:
    """Text from models, data or files: no markup, no control characters."""
    return Text(escape_controls(text), style=style)


def _table(title: str | None) -> Table:
    return Table(
        title=None if title is None else _cell(title, style="italic"),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        header_style="bold",
    )
