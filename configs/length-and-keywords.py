"""Two rewards for film reviews, as plain Python: each takes what it names, and returns a list.

`ppo-cli train --config length-and-keywords` uses them; docs/rewards.md says what a function gets.
"""

from __future__ import annotations

import re

KEYWORDS = {"music", "songs", "soundtrack", "sound", "score", "composer"}
WORDS = 15


def keywords(responses: list[str]) -> list[float]:
    """1 for a response that names one of the keywords, else 0."""
    return [float(not KEYWORDS.isdisjoint(words(response))) for response in responses]


def length(responses: list[str]) -> list[float]:
    """Minus the number of words by which a response's length differs from 15."""
    return [-float(abs(len(words(response)) - WORDS)) for response in responses]


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"\w+", text.lower())
