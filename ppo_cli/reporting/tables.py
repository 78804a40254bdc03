"""Rich tables and lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.text import Text

from ppo_cli.evaluation.samples import Generated, Sample, has_probability
from ppo_cli.reporting.layout import Explained, FittingTable, Said, Texts, cell
from ppo_cli.utils.text import escape_controls

if TYPE_CHECKING:
    from ppo_cli.evaluation.best_of_n import BestOfN
    from ppo_cli.reporting.frontier import Trail
    from ppo_cli.reporting.summary import TrainingSummary


def summary_table(summary: TrainingSummary) -> Group:
    """Reference and tuned model on the held-out prompts."""
    before = summary.before.rows(summary.label)
    lines = []
    for name, (high, form, _) in summary.after.rows(summary.label).items():
        low = before[name][0]
        lines.append((name, f"{low:{form}}", f"{high:{form}}", f"{high - low:+{form}}"))
    table = FittingTable(("", "reference", summary.run, "change"), lines)
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
        shown = [(key, f"{value:.5g}", meaning) for key, value, meaning in entries]
        parts += [Text(heading, style="bold"), Explained(shown), Text("")]
    return parts


def generated_texts(models: Sequence[Generated], scored: bool) -> Texts:
    """Every sample of every model, grouped by prompt."""
    has_chances = any(has_probability(model.samples) for model in models)
    heads = ("score", "P") if has_chances else ("score",)
    groups: list[tuple[str, list[Said]]] = []
    for number, first in enumerate(models[0].samples):
        group = []
        for model in models:
            sample = model.samples[number]
            figures = [sample.score, sample.probability][: len(heads)] if scored else []
            shown = ["-" if value is None else f"{value:.2f}" for value in figures]
            is_split = sample.gap == "" and splits_word(sample.query, sample.response)
            text = marked(sample.response, begins=not is_split, ends=sample.ended)
            group.append(Said(model.model, shown, text))
        heading = marked(first.query, ends=not is_split)
        if groups and number and models[0].samples[number - 1].query == first.query:
            groups[-1][1].extend(group)
        else:
            groups.append((heading, group))
    return Texts(groups, heads if scored else ())


def splits_word(query: str, response: str) -> bool:
    """Whether a query ends within the word that the response begins with."""
    return query[-1:].isalnum() and response[:1].isalnum()


def marked(text: str, *, begins: bool = True, ends: bool = True) -> str:
    """A text without the space around it; an ellipsis marks where it is only a part.

    Args:
        text: of a model, or a prompt.
        begins, ends: whether it is whole at its start, and at its end.
    """
    text = text.strip()
    is_sentence = text.rstrip("\"')]”’»").endswith((".", "!", "?", "…"))
    return f"{'' if begins else '…'}{text}{'' if ends or is_sentence else '…'}"


def frontier_table(trail: Trail, curve: BestOfN | None) -> Group:
    """A run's evaluations: step, KL, score, and the score of best-of-n at the same KL."""
    start = "-" if curve is None else f"{curve.reference_score:.3f}"
    lines = [("reference", "0.00", f"{trail.reference_score:.3f}", start, "-", "")]
    for evaluation in trail.evaluations:
        kl, score = evaluation.kl, evaluation.score
        reached = None if curve is None else curve.score_at(kl)
        share = None if curve is None else curve.share_at(kl, score)
        marks = [
            "best" if evaluation == trail.best else "",
            "last" if evaluation is trail.evaluations[-1] else "",
        ]
        lines.append(
            (
                str(evaluation.step),
                f"{kl:.2f}",
                f"{score:.3f}",
                "-" if reached is None else f"{reached:.3f}",
                "-" if share is None else f"{share:.2f}",
                ", ".join(mark for mark in marks if mark),
            )
        )
    rows: list[tuple[str, ...]] = [("step", "KL", "score", "best-of-n there", "share", "mark")]
    rows += lines
    if curve is None:
        rows = [(*row[:3], row[5]) for row in rows]
    table = FittingTable(rows[0], rows[1:], by_row=True, texts=(len(rows[0]) - 1,))
    return below(f"{trail.name}: score against KL on held-out prompts", table)


def upload_table(sizes: Mapping[str, int], stay: Mapping[str, str], target: str) -> Group:
    """The files that are for others, with their sizes in bytes, and those that stay, with why."""
    lines = [(name, decimal(size)) for name, size in sizes.items()]
    lines.append(("together", decimal(sum(sizes.values()))))
    kept = [cell(f"{name} stays: {why}", style="dim") for name, why in stay.items()]
    return Group(below(f"for {target}", FittingTable(("file", "size"), lines)), *kept)


def below(title: str, table: RenderableType) -> Group:
    """A title above `table`; it may be wider than the table."""
    return Group(cell(title, style="italic"), table)
