"""What a comparison shows, in one plain sentence, and what limits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ppo_cli.evaluation.quality import MEASURES

if TYPE_CHECKING:
    from ppo_cli.evaluation.comparison_result import Comparison, ModelResult, PairedDifference

REFERENCE = "reference"
FEW = 10  # prompts, under which a bootstrap interval is rough
MOST_NAMED = 3  # models that a sentence lists
NAMES = {measure.key: measure.name for measure in MEASURES}


@dataclass(frozen=True)
class Verdict:
    """The sentence, and further sentences that a reader has to know with it."""

    sentence: str
    remarks: list[str]


def verdict(comparison: Comparison, names: Sequence[str] | None = None) -> Verdict:
    """Put the comparison of the first model with the others into words.

    A difference is called clear where its 95 % interval does not include zero.

    Args:
        comparison: of one model or more.
        names: of its models, as they are to be shown; None for those that they have.
    """
    names = [model.model for model in comparison.models] if names is None else names
    named = ["the reference" if name == REFERENCE else name for name in names]
    if not comparison.differences:
        sentence = f"Nothing was compared: {named[0]} has a {_means(comparison, [0], named)}"
        best = 0
    elif len(comparison.rows) == 1:
        sentence, best = _of_one_prompt(comparison, named), 0
    elif len(comparison.models) == 2:
        sentence, best = _of_two(comparison, named), 0
    else:
        sentence, best = _of_many(comparison, named)
    if best != len(named) - 1 and _repetitive(comparison, best):
        sentence += f", but {'its' if best == 0 else 'their'} text became repetitive"
    if sentence.startswith("the reference"):  # a model's name keeps its own first letter
        sentence = f"T{sentence[1:]}"
    return Verdict(f"{sentence}.", _remarks(comparison, named))


def is_clear(difference: PairedDifference) -> bool:
    """Whether its interval excludes zero."""
    return difference.difference.low > 0 or difference.difference.high < 0


def _of_one_prompt(comparison: Comparison, names: Sequence[str]) -> str:
    means = _means(comparison, [0, *range(1, len(names))], names, of="score")
    return f"One prompt shows nothing in general: on it {names[0]} has a {means}"


def _of_two(comparison: Comparison, names: Sequence[str]) -> str:
    first, second = names
    [item] = comparison.differences
    total = len(comparison.rows)
    if all(a.response == b.response for a, b in (row.responses for row in comparison.rows)):
        return f"{first} and {second} wrote the same responses to all {total} prompts"
    if item.difference.low == item.difference.high == 0:
        return f"{first} and {second} have the same score on each of {total} prompts"
    means = _means(comparison, [0, 1], names)
    if not is_clear(item):
        return (
            f"There is no clear difference between {first} and {second}: {means} over {total} "
            f"prompts, and the 95 % interval of the difference in score, "
            f"{item.difference.low:+.2f} to {item.difference.high:+.2f}, includes zero"
        )
    is_better = item.difference.mean > 0
    does = _comparative(comparison, is_better)
    return f"{first} {does} {second}: {means}, {_wins(comparison, 1)}{_kl(comparison.models[0])}"


def _of_many(comparison: Comparison, names: Sequence[str]) -> tuple[str, int]:
    """The sentence, and which model it is about."""
    scores = [model.quality["score"] for model in comparison.models]
    order = sorted(range(len(names)), key=lambda i: -scores[i])
    best, total = order[0], len(names)
    means = _means(comparison, order, names)
    if best:
        item = comparison.differences[best - 1]
        clear = "a clear difference from" if is_clear(item) else "not clearly different from"
        return (
            f"{names[best]} has the highest mean score of {total} models, {clear} {names[0]}, "
            f"which was named first: {means}"
        ), best
    unclear = [
        names[i] for i, item in enumerate(comparison.differences, start=1) if not is_clear(item)
    ]
    if unclear:
        return (
            f"{names[0]} has the highest mean score of {total} models, but its lead over "
            f"{_listed(unclear)} is not clear: {means}"
        ), 0
    if names[-1] == "the reference":
        wins = f", {_wins(comparison, total - 1, than=' than the reference')}"
    else:
        wins = f", on {len(comparison.rows)} prompts"
    does = _superlative(comparison)
    return f"{names[0]} {does} of {total} models: {means}{wins}{_kl(comparison.models[0])}", 0


def _comparative(comparison: Comparison, is_better: bool) -> str:
    label = comparison.label
    if not comparison.terms and label.lower() in ("positive", "negative"):
        return f"writes {'more' if is_better else 'less'} {label.lower()} text than"
    scored = f" for “{label}”" if not comparison.terms else ""
    return f"scores {'higher' if is_better else 'lower'}{scored} than"


def _superlative(comparison: Comparison) -> str:
    label = comparison.label
    if not comparison.terms and label.lower() in ("positive", "negative"):
        return f"writes the most {label.lower()} text"
    return "has the highest score" + ("" if comparison.terms else f" for “{label}”")


def _means(
    comparison: Comparison, order: Sequence[int], names: Sequence[str], of: str | None = None
) -> str:
    """`mean P(POSITIVE) 0.96 against 0.54`, with the names of the others if there are several."""
    key = of or headline(comparison)
    values = [f"{comparison.models[i].quality[key]:.2f}" for i in order]
    name = NAMES[key].format(label=comparison.label)
    if len(order) == 1:
        return f"{name} of {values[0]} over {len(comparison.rows)} prompts"
    if len(order) == 2:
        return f"{name} {values[0]} against {values[1]}"
    others = [f"{value} ({names[i]})" for i, value in zip(order[1:], values[1:], strict=True)]
    return f"{name} {values[0]}, against {_listed(others)}"


def headline(comparison: Comparison) -> str:
    """Key of the measure that a sentence quotes.

    The label's mean probability, which is easier to read than the score, where there is one label
    and the probability, as it is written, does not deny what the score says.
    """
    known = [
        (-model.quality["score"], round(probability, 2))
        for model in comparison.models
        if (probability := model.quality.values.get("probability")) is not None
    ]
    if comparison.terms or len(known) < len(comparison.models):
        return "score"
    by_score = [probability for _, probability in sorted(known)]
    is_same_order = by_score == sorted(by_score, reverse=True)
    hides = by_score[0] == by_score[-1] and any(map(is_clear, comparison.differences))
    return "probability" if is_same_order and not hides else "score"


def _wins(comparison: Comparison, other: int, than: str = "") -> str:
    item = comparison.differences[other - 1]
    rate, word = item.win_rate, "better"
    if item.difference.mean < 0:
        rate, word = 1 - rate, "worse"
    return f"{word}{than} on {rate:.0%} of {len(comparison.rows)} prompts"


def _kl(model: ModelResult) -> str:
    kl = model.quality.values.get("kl")
    return "" if kl is None else f", at a KL of {kl:.{1 if kl >= 0.1 else 2}f} nats"


def _listed(parts: Sequence[str]) -> str:
    if len(parts) > MOST_NAMED:
        parts = [*parts[: MOST_NAMED - 1], f"{len(parts) - MOST_NAMED + 1} others"]
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _remarks(comparison: Comparison, names: Sequence[str]) -> list[str]:
    remarks = []
    total = len(comparison.rows)
    if 1 < total < FEW:
        remarks.append(f"These are {total} prompts: the intervals are rough.")
    for i, name in enumerate(names[:-1] if len(names) > 1 else names):
        if found := _repetitive(comparison, i):
            remarks.append(f"Repetition, {name}: {found}.")
    return remarks + _best_of_n(comparison, names[0])


def _best_of_n(comparison: Comparison, name: str) -> list[str]:
    """What the first model would have had without training, if that was measured."""
    curve, item = comparison.best_of_n, next(iter(comparison.shares), None)
    if curve is None or item is None:
        return []
    best = "Without training, the best of"
    if item.share is not None:
        return [
            f"{best} n responses from the reference has a mean score of "
            f"{item.best_of_n_score:.2f} at the same KL; {name} has {item.score:.2f}, "
            f"{item.share:.0%} of that gain."
        ]
    last = curve.points[-1]
    if item.share_at_most is None or item.score > last.score:
        return []
    return [
        f"{best} {last.n:,} responses from the reference has a mean score of {last.score:.2f} at "
        f"a lower KL, {last.kl:.1f} nats at most; {name} has {item.score:.2f}."
    ]


def _repetitive(comparison: Comparison, which: int) -> str | None:
    """How a model's text is more repetitive than the last model's; None where it is not."""
    if len(comparison.models) < 2 or len(comparison.rows) < FEW:
        return None
    own, base = comparison.models[which].quality, comparison.models[-1].quality
    if own["most_common"] >= base["most_common"] + 0.1:
        return (
            f"{own['most_common']:.0%} of its responses are one and the same text "
            f"({comparison.models[-1].model}: {base['most_common']:.0%})"
        )
    if own["repetition"] >= base["repetition"] + 0.1:
        return (
            f"{own['repetition']:.0%} of a response's word pairs occur in it before "
            f"({comparison.models[-1].model}: {base['repetition']:.0%})"
        )
    if own["distinct_2"] < base["distinct_2"] / 2:
        return (
            f"{own['distinct_2']:.0%} of its word pairs are different ones "
            f"({comparison.models[-1].model}: {base['distinct_2']:.0%})"
        )
    return None
