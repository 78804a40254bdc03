"""A comparison as tables, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from ppo_cli.evaluation import quality
from ppo_cli.evaluation.best_of_n import BestOfN, Share
from ppo_cli.evaluation.bootstrap import Interval
from ppo_cli.evaluation.comparison_result import (
    Answer,
    Change,
    Comparison,
    ModelResult,
    PairedDifference,
    Row,
)
from ppo_cli.reporting.layout import FittingTable, Said, Texts, cell
from ppo_cli.reporting.tables import below, marked, splits_word
from ppo_cli.utils.text import markdown_text, spreadsheet_text

SHARE_TITLE = "each model beside best-of-n from the reference"
BEST_HEADS = ("n", "KL at most", "score", "95 % interval")
ANSWER_COLUMNS = ("query", "model", "response", "score", "probability", "kl", "tokens")
SHARE_COLUMNS = ("best_of_n_score", "share", "best_of_n_kl", "kl_ratio")
PAIRED_HEADS = ("", "mean", "95 % interval", "wins", "95 % interval", "best-of-n")

Line = tuple[str, ...]


def comparison_tables(comparison: Comparison, rows: int) -> list[RenderableType]:
    """Examples first, means and differences last, where a terminal shows them.

    Args:
        comparison: the result to show.
        rows: number of the first prompts that are shown.
    """
    tables: list[RenderableType] = []
    total = len(comparison.rows)
    if shown := min(rows, total):
        tables.append(_first_rows(comparison, shown))
    for title, changes in changed_parts(comparison):
        tables.append(_changed(comparison, title, changes))
    heads = ("", *(model.model for model in comparison.models))
    means = FittingTable(heads, measures(comparison.label, comparison.models))
    tables.append(below(f"means over {total} prompts", means))
    paired = FittingTable(
        PAIRED_HEADS, [paired_line(item) for item in comparison.differences], by_row=True
    )
    tables.append(below("paired differences in score", paired))
    if comparison.best_of_n is not None:
        curve = comparison.best_of_n
        best = FittingTable(BEST_HEADS, best_of_lines(curve), by_row=True)
        tables.append(below(best_of_title(curve), best))
        shares = FittingTable(share_heads(comparison.shares), share_lines(comparison.shares))
        tables.append(below(SHARE_TITLE, shares))
        if notes := [cell(note) for note in share_notes(comparison)]:
            tables[-1] = Group(tables[-1], *notes)
    return tables


def measures(label: str, models: Sequence[ModelResult]) -> list[Line]:
    """One line per measure: its name, then each model's value."""
    lines: list[Line] = []
    for measure in quality.MEASURES:
        values = [model.quality.values.get(measure.key) for model in models]
        if measure.needs_classifier and all(value is None for value in values):
            continue
        form = f".{measure.places}f"
        lines.append((measure.name.format(label=label), *(_number(v, form) for v in values)))
        if measure.of_each is not None:
            intervals = [_interval(model.intervals.get(measure.key), form) for model in models]
            lines.append(("  95 % interval", *intervals))
    for name in models[0].quality.rewards:
        means = (_number(model.quality.rewards.get(name), ".3f") for model in models)
        lines.append((f"reward {name}", *means))
    return lines


def paired_line(item: PairedDifference) -> Line:
    """Pair of models, mean difference, its interval, win rate, its interval, best-of-n's rate."""
    return (
        f"{item.first} - {item.second}",
        f"{item.difference.mean:+.3f}",
        _interval(item.difference, "+.3f"),
        f"{item.win_rate:.0%}",
        _interval(item.win_rate_interval, ".0%"),
        _number(item.best_of_n_win_rate, ".0%"),
    )


def best_of_title(curve: BestOfN) -> str:
    """Title of the best-of-n table."""
    return f"best of n responses from the reference, to {curve.prompts} prompts"


def best_of_lines(curve: BestOfN) -> list[Line]:
    """One line per n."""
    return [
        (
            f"{point.n:,}",
            f"{point.kl:.2f}",
            f"{point.score:.3f}",
            _interval(point.score_interval, ".3f"),
        )
        for point in curve.points
    ]


def share_lines(shares: Sequence[Share]) -> list[Line]:
    """One line per number of the verdict: its name, then each model's value."""

    def line(name: str, value: Callable[[Share], str]) -> Line:
        return (name, *(value(item) for item in shares))

    return [
        line("KL", lambda item: _number(item.kl, ".2f")),
        line("score", lambda item: f"{item.score:.3f}"),
        line("best-of-n's score at this KL", lambda item: _number(item.best_of_n_score, ".3f")),
        line("share of its gain", lambda item: _bounded(item.share, item.share_at_most)),
        line("  95 % interval", lambda item: _interval(item.share_interval, ".2f")),
        line("best-of-n's KL at this score", lambda item: _number(item.best_of_n_kl, ".2f")),
        line("ratio of the KLs", lambda item: _bounded(item.kl_ratio, item.kl_ratio_at_most)),
        line("  95 % interval", lambda item: _interval(item.kl_ratio_interval, ".2f")),
    ]


def share_heads(shares: Sequence[Share]) -> Line:
    """The heads of the columns of `share_lines`."""
    return ("", *(item.model for item in shares))


def share_notes(comparison: Comparison) -> list[str]:
    """A sentence for each model whose KL is beyond that of best-of-n."""
    notes = []
    assert comparison.best_of_n is not None
    last = comparison.best_of_n.points[-1]
    for item in comparison.shares:
        if item.kl is None or item.kl <= last.kl:
            continue
        needed = "over a billion" if item.needed_n is None else f"{item.needed_n:,}"
        notes.append(
            f"{item.model}: its KL, {item.kl:.2f}, is beyond that of the best of {last.n:,} "
            f"({last.kl:.2f}); n = {needed} would be needed"
            + ("" if item.share_at_most is None else ", so its share is below the one given")
        )
    return notes


def changed_parts(comparison: Comparison) -> list[tuple[str, list[Change]]]:
    """Titles and changes of the prompts that gained or lost most; empty parts are left out."""
    changes = comparison.changes
    names = f"score of {changes.first} minus {changes.second}'s"
    parts = [
        (f"gained most ({names})", changes.gained),
        (f"lost most ({names})", changes.lost),
    ]
    return [(title, found) for title, found in parts if found]


def changed_line(comparison: Comparison, change: Change) -> tuple[float, str, Answer, Answer]:
    """Change in score, prompt, the first model's answer, the last one's."""
    row = comparison.rows[change.row]
    return change.change, row.query, row.responses[0], row.responses[-1]


def comparison_markdown(comparison: Comparison) -> str:
    """All prompts side by side, then the contents of the tables, as Markdown."""
    names = [model.model for model in comparison.models]
    rows = [
        (row.query, *(f"{a.response.strip()} ({a.score:.2f})" for a in row.responses))
        for row in comparison.rows
    ]
    lines = _markdown_table(("query", *names), rows, right=False)
    for title, found in changed_parts(comparison):
        changed = [
            (f"{by:+.2f}", query, *(f"{a.response.strip()} ({a.score:.2f})" for a in answers))
            for by, query, *answers in (changed_line(comparison, change) for change in found)
        ]
        heads = ("change", "query", names[0], names[-1])
        lines += ["", markdown_text(title), "", *_markdown_table(heads, changed, right=False)]
    means = measures(comparison.label, comparison.models)
    lines += ["", *_markdown_table(("", *names), means)]
    lines.append("")
    for item in comparison.differences:
        gap, wins = item.difference, item.win_rate_interval
        lines.append(
            f"- {markdown_text(item.first)} minus {markdown_text(item.second)}: {gap.mean:+.3f} "
            f"(95 % interval {gap.low:+.3f} to {gap.high:+.3f}), wins {item.win_rate:.0%} "
            f"({_interval(wins, '.0%')})"
            + ("" if (best := item.best_of_n_win_rate) is None else f", best-of-n {best:.0%}")
        )
    if comparison.best_of_n is not None:
        curve = comparison.best_of_n
        lines += ["", markdown_text(best_of_title(curve)), ""]
        lines += _markdown_table(BEST_HEADS, best_of_lines(curve))
        lines += ["", markdown_text(SHARE_TITLE), ""]
        shares = comparison.shares
        lines += _markdown_table(share_heads(shares), share_lines(shares))
        lines += ["", *(f"- {markdown_text(note)}" for note in share_notes(comparison))]
    return "\n".join(lines).rstrip("\n")


def comparison_csv(comparison: Comparison) -> str:
    """One line per prompt and model: query, model, response, score, probability, KL, tokens.

    A reward of several terms has a column for each, `reward NAME`.
    A text that a spreadsheet would evaluate as a formula begins with an apostrophe. An unknown KL
    is empty. With best-of-n, each line also has the verdict on its model.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    verdicts = SHARE_COLUMNS if comparison.best_of_n is not None else ()
    heads = [f"reward {name}" for name in comparison.terms]
    writer.writerow([*ANSWER_COLUMNS, *heads, *verdicts])
    of_models = {item.model: item for item in comparison.shares}
    for row in comparison.rows:
        for answer in row.responses:
            texts = [spreadsheet_text(t) for t in (row.query, answer.model, answer.response)]
            numbers = [answer.score, answer.probability, answer.kl, answer.tokens]
            terms = [answer.rewards.get(name) for name in comparison.terms]
            verdict = [getattr(of_models.get(answer.model), key, None) for key in verdicts]
            writer.writerow([*texts, *numbers, *terms, *verdict])
    return out.getvalue().rstrip("\n")


def _first_rows(comparison: Comparison, shown: int) -> Group:
    groups = [_group(comparison, row, row.responses) for row in comparison.rows[:shown]]
    title = f"{comparison.title}; {shown} of {len(comparison.rows)} prompts"
    return Group(cell(title, style="italic"), Text(""), Texts(groups), Text(""))


def _changed(comparison: Comparison, title: str, changes: Sequence[Change]) -> Group:
    groups = []
    for change in changes:
        by, _, *answers = changed_line(comparison, change)
        heading, said = _group(comparison, comparison.rows[change.row], answers)
        groups.append((f"{by:+.2f}  {heading}", said))
    return Group(cell(title, style="italic"), Text(""), Texts(groups), Text(""))


def _group(comparison: Comparison, row: Row, answers: Sequence[Answer]) -> tuple[str, list[Said]]:
    """A prompt, and what models answer to it; ellipses mark what is a part."""
    is_split = _continues(comparison) and any(
        splits_word(row.query, answer.response) for answer in answers
    )
    said = []
    for answer in answers:
        begins = not (is_split and splits_word(row.query, answer.response))
        is_whole = answer.tokens < comparison.max_new_tokens
        text = marked(answer.response, begins=begins, ends=is_whole)
        said.append(Said(answer.model, [f"{answer.score:.2f}"], text))
    return marked(row.query, ends=not is_split), said


def _continues(comparison: Comparison) -> bool:
    """Whether responses go on where their queries end: some of them begin with a space then."""
    texts = (answer.response for row in comparison.rows for answer in row.responses)
    return any(text[:1].isspace() for text in texts)


def _markdown_table(heads: Sequence[str], lines: Sequence[Line], right: bool = True) -> list[str]:
    dashes = ["---", *(["---:" if right else "---"] * (len(heads) - 1))]
    body = [[markdown_text(value.strip()) for value in line] for line in (heads, *lines)]
    return ["| " + " | ".join(line) + " |" for line in (body[0], dashes, *body[1:])]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _bounded(value: float | None, at_most: float | None) -> str:
    return _number(value, ".2f") if at_most is None else f"under {at_most:.2f}"


def _interval(interval: Interval | None, form: str) -> str:
    if interval is None:
        return "-"
    return f"{interval.low:{form}} to {interval.high:{form}}"
