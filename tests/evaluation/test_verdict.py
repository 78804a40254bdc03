"""The sentence that a comparison comes to, in each situation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ppo_cli.evaluation.verdict import verdict
from tests.reporting.comparisons import comparison

HIGH = [3.0, 3.2, 2.9, 3.1, 3.0, 2.8, 3.3, 3.0, 3.1, 2.9]
MIXED = [3.1, -3.0, 3.2, -2.9, -3.1, 3.0, -3.0, 3.4, -2.8, -3.2]
LOW = [-value for value in HIGH]
NEAR = [value + (-1) ** i * 0.1 for i, value in enumerate(HIGH)]
REPEATED = {"good": ["so good so good"] * 10, "reference": [f"a{i} b{i} c" for i in range(10)]}


def said(scores: dict[str, list[float]], **settings: Any) -> str:
    found = comparison(scores, **settings)
    shown = verdict(found, [model.model for model in found.models])
    return " | ".join([shown.sentence, *shown.remarks])


@pytest.mark.parametrize(
    ("scores", "settings", "expected"),
    [
        (
            {"good": HIGH, "reference": MIXED},
            {},
            "good writes more positive text than the reference: mean P(POSITIVE) 0.95 against "
            "0.41, better on 60% of 10 prompts, at a KL of 3.6 nats.",
        ),
        (
            {"bad": LOW, "reference": HIGH},
            {"kl": 0.04},
            "bad writes less positive text than the reference: mean P(POSITIVE) 0.05 against 0.95, "
            "worse on 100% of 10 prompts, at a KL of 0.04 nats.",
        ),
        (
            {"a": HIGH, "b": MIXED},
            {"kl": None, "label": "joy"},
            "a scores higher for “joy” than b: mean P(joy) 0.95 against 0.41, better on 60% of 10 "
            "prompts.",
        ),
        (
            {"a": HIGH, "b": LOW},
            {"terms": ["brief", "kind"]},
            "a scores higher than b: mean score 3.03 against -3.03, better on 100% of 10 prompts, "
            "at a KL of 3.6 nats.",
        ),
        (
            {"same": HIGH, "reference": NEAR},
            {},
            "There is no clear difference between same and the reference: mean P(POSITIVE) 0.95 "
            "against 0.95 over 10 prompts, and the 95 % interval of the difference in score, -0.05 "
            "to +0.06, includes zero.",
        ),
        (
            {"same": HIGH, "reference": HIGH},
            {"texts": {name: [f"w{i}" for i in range(10)] for name in ("same", "reference")}},
            "same and the reference wrote the same responses to all 10 prompts.",
        ),
        (
            {"a": HIGH, "b": HIGH},
            {},
            "a and b have the same score on each of 10 prompts.",
        ),
        (
            {"a": HIGH[:1], "b": LOW[:1]},
            {},
            "One prompt shows nothing in general: on it a has a mean score 3.00 against -3.00.",
        ),
        (
            {"a": HIGH[:3], "b": LOW[:3]},
            {},
            "a writes more positive text than b: mean P(POSITIVE) 0.95 against 0.05, better on "
            "100% of 3 prompts, at a KL of 3.6 nats. | These are 3 prompts: the intervals are "
            "rough.",
        ),
        (
            {"only": HIGH},
            {},
            "Nothing was compared: only has a mean P(POSITIVE) of 0.95 over 10 prompts.",
        ),
        (
            {"good": HIGH, "bad": LOW, "reference": MIXED},
            {},
            "good writes the most positive text of 3 models: mean P(POSITIVE) 0.95, against 0.41 "
            "(the reference) and 0.05 (bad), better than the reference on 60% of 10 prompts, at a "
            "KL of 3.6 nats.",
        ),
        (
            {"a": HIGH, "b": NEAR, "reference": MIXED},
            {},
            "a has the highest mean score of 3 models, but its lead over b is not clear: mean "
            "P(POSITIVE) 0.95, against 0.95 (b) and 0.41 (the reference).",
        ),
        (
            {"a": LOW, "b": HIGH, "reference": MIXED},
            {},
            "b has the highest mean score of 3 models, a clear difference from a, which was named "
            "first: mean P(POSITIVE) 0.95, against 0.41 (the reference) and 0.05 (a).",
        ),
        (
            {"a": HIGH, **{f"m{i}": [v - i for v in HIGH] for i in range(1, 5)}},
            {},
            "a writes the most positive text of 5 models: mean P(POSITIVE) 0.95, against 0.88 "
            "(m1), 0.74 (m2) and 2 others, on 10 prompts, at a KL of 3.6 nats.",
        ),
        (
            {"good": HIGH, "reference": MIXED},
            {"texts": REPEATED},
            "good writes more positive text than the reference: mean P(POSITIVE) 0.95 against "
            "0.41, better on 60% of 10 prompts, at a KL of 3.6 nats, but its text became "
            "repetitive. | Repetition, good: 100% of its responses are one and the same text "
            "(reference: 10%).",
        ),
    ],
)
def test_it_says_what_the_figures_show(
    scores: dict[str, list[float]], settings: dict[str, Any], expected: str
) -> None:
    assert said(scores, **settings) == expected


def test_it_names_what_best_of_n_reaches_without_training() -> None:
    drawn = np.linspace(-3, 3, 10)[:, None] + np.linspace(0, 3, 8)[None]
    models = {"good": HIGH, "reference": MIXED}
    beyond = said(models, drawn=drawn)
    assert "| " not in beyond, "it is better than the best of 8"
    worse = said({"good": [value - 2 for value in HIGH], "reference": LOW}, drawn=drawn)
    assert worse.endswith(
        "the best of 8 responses from the reference has a mean score of 3.00 at a lower KL, 1.2 "
        "nats at most; good has 1.03."
    )
    within = said(models, drawn=drawn, kl=0.2)
    assert "has a mean score of 2.15 at the same KL; good has 3.03, 236% of that gain." in within


def test_it_quotes_the_score_where_the_probability_says_the_opposite() -> None:
    scores = {"a": [9.0, -0.5, -0.5] * 4, "b": [1.0, 1.0, 1.0] * 4}
    assert "mean score 2.67 against 1.00" in said(scores)
    assert "mean score 9.00 against 7.00" in said({"a": [9.0] * 10, "b": [7.0] * 10})  # P is 1.00
