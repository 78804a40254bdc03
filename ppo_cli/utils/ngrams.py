"""Diversity of texts, measured by n-grams of words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

WORDS = re.compile(r"\w+(?:'\w+)?|[^\w\s]")

REPEATED = 2  # words of an n-gram in `repetition`


def distinct(texts: Sequence[str], n: int) -> float:
    """Share of different n-grams among all n-grams of the texts (distinct-n); 0 without n-grams."""
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(texts: Sequence[str], n: int = REPEATED) -> float:
    """Mean share of a text's n-grams that repeat an earlier one in the text.

    Source: `seq-rep-n` of Welleck et al. 2020 (https://arxiv.org/abs/1908.04319), over words.
    """
    shares = []
    for text in texts:
        grams = list(_grams(text, n))
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return float(np.mean(shares)) if shares else 0.0


def most_common(texts: Sequence[str]) -> float:
    """Share of the most frequent text among the texts."""
    return Counter(texts).most_common(1)[0][1] / len(texts) if texts else 0.0


@dataclass(frozen=True)
class Changed:
    """An n-gram that is in more, or fewer, of the texts than of other texts.

    Attributes:
        gram: its words.
        share, other: shares of the texts, and of the other ones, that contain it.
    """

    gram: str
    share: float
    other: float

    @property
    def change(self) -> float:
        """`share` minus `other`."""
        return self.share - self.other


def most_changed_grams(
    texts: Sequence[str], others: Sequence[str], n: int, count: int
) -> list[Changed]:
    """The n-grams of words whose share of texts differs most.

    Punctuation, and a difference of under two texts, are left out.

    Args:
        texts, others: two lists of equal length.
        n: words of an n-gram.
        count: how many more frequent ones at most, and how many less frequent ones.

    Returns:
        The more frequent ones, the largest change first, then the less frequent ones likewise.
    """
    own, their = (
        Counter(gram for text in part for gram in set(_grams(text, n))) for part in (texts, others)
    )
    found = [
        Changed(" ".join(gram), own[gram] / len(texts), their[gram] / len(others))
        for gram in own.keys() | their.keys()
        if abs(own[gram] - their[gram]) > 1 and all(word[0].isalnum() for word in gram)
    ]
    found.sort(key=lambda one: (-abs(one.change), one.gram))
    more = [one for one in found if one.change > 0]
    return more[:count] + [one for one in found if one.change < 0][:count]


def _grams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    words = WORDS.findall(text.lower())
    return zip(*(words[i:] for i in range(n)), strict=False)
