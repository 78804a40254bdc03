"""Diversity of texts, measured by n-grams of words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

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


def _grams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    words = WORDS.findall(text.lower())
    return zip(*(words[i:] for i in range(n)), strict=False)
