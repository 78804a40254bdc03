"""Which label of a classifier a word such as `positive` names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ppo_cli.errors import UsageError, did_you_mean

POSITIVE_NAMES = ("positive", "pos", "good", "favorable", "favourable", "5 stars", "very positive")
NEGATIVE_NAMES = (
    "negative",
    "neg",
    "bad",
    "unfavorable",
    "unfavourable",
    "1 star",
    "very negative",
)


def resolve_label(sentiment: str, labels: Sequence[str]) -> int:
    """Index of the label that `sentiment` names.

    In this order, ignoring case: a label's name; its index; for a word that means positive or
    negative, a label with the same meaning; of two labels without a meaning (`LABEL_0`, `LABEL_1`)
    the second as positive and the first as negative, which `SentimentReward.probe` checks. The
    single output of a reward model is positive, unless its name means negative.

    Raises:
        UsageError: no label matches, or several have that name; the message lists the labels.
    """
    wanted = _normal(sentiment)
    names = [_normal(label) for label in labels]
    if names.count(wanted) > 1:
        raise UsageError(
            f"the classifier has {names.count(wanted)} labels named '{sentiment}'; its labels are "
            f"{', '.join(labels)}. Choose one by its index, 0 to {len(labels) - 1}"
        )
    if wanted in names:
        return names.index(wanted)
    index = sentiment.strip()
    if index.isascii() and index.isdigit() and int(index) < len(labels):
        return int(index)
    sign = polarity(sentiment)
    if len(labels) == 1 and sign:
        if sign * polarity(labels[0]) > 0 or (sign > 0 and not polarity(labels[0])):
            return 0
        raise UsageError(
            f"the classifier has no label '{sentiment}': its single output is {labels[0]}, which "
            f"is not inverted. Choose it with --sentiment {labels[0]}, or another classifier"
        )
    if sign:
        synonyms = POSITIVE_NAMES if sign > 0 else NEGATIVE_NAMES
        for synonym in synonyms:
            if synonym in names:
                return names.index(synonym)
        if _nameless(labels):
            return 1 if sign > 0 else 0
    raise UsageError(
        f"the classifier has no label '{sentiment}'; its labels are "
        f"{', '.join(labels)}.{did_you_mean(sentiment, labels) or ' Choose one with --sentiment'}"
    )


def _normal(name: str) -> str:
    return " ".join(str(name).lower().replace("_", " ").replace("-", " ").split())


def polarity(name: str) -> int:
    """1 for a word that means positive, -1 for negative, 0 for neither."""
    normal = _normal(name)
    return (normal in POSITIVE_NAMES) - (normal in NEGATIVE_NAMES)


def polarity_of_index(index: int, labels: Sequence[str]) -> int:
    """The usual polarity of two labels without a meaning: first negative, second positive."""
    if not _nameless(labels):
        return 0
    return 1 if index == 1 else -1


def _nameless(labels: Sequence[str]) -> bool:
    return len(labels) == 2 and all(re.fullmatch(r"label \d", _normal(name)) for name in labels)
