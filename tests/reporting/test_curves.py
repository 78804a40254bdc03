"""Curves, the means of several seeds, and labels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ppo_cli.errors import UsageError
from ppo_cli.reporting.curves import (
    Curve,
    Group,
    curves_of,
    group_labels,
    linear_below,
    mean_and_band,
    moving_average,
)


@pytest.mark.parametrize("window", [1, 2, 5, 40, 100])
def test_moving_average_is_numpys_convolution_with_a_shorter_start(window: int) -> None:
    values = np.random.RandomState(0).randn(40) * 3 + 1
    smooth = moving_average(values.tolist(), window)
    assert smooth.shape == values.shape
    if window <= 40:
        inside = np.convolve(values, np.ones(window) / window, mode="valid")
        np.testing.assert_allclose(smooth[window - 1 :], inside)
    for i in range(min(window - 1, 40)):
        assert smooth[i] == pytest.approx(values[: i + 1].mean())


def test_a_value_that_is_not_finite_spoils_only_the_means_that_hold_it() -> None:
    values = [1.0, 2.0, math.nan, 4.0, 5.0, 6.0, math.inf, 8.0, 9.0, 10.0]
    smooth = moving_average(values, 2)
    assert smooth[[0, 1, 4, 5, 8, 9]].tolist() == pytest.approx([1, 1.5, 4.5, 5.5, 8.5, 9.5])


def curve(steps: list[int], values: list[float]) -> Curve:
    return Curve(np.array(steps), np.array(values, dtype=float))


SEEDS = [
    curve([1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0]),
    curve([1, 2, 3], [2.0, 2.0, math.nan]),
    curve([2, 3, 5, 1], [5.0, 6.0, 7.0, 6.0]),
]


def test_the_mean_is_of_the_steps_that_all_seeds_have() -> None:
    rows = [
        [{"step": int(s), "x": v} for s, v in zip(c.steps, c.values, strict=True)] for c in SEEDS
    ]
    mean, (low, high) = mean_and_band(Group("g", rows).curves("x"), "range")
    assert mean.steps.tolist() == [1, 2, 3]
    np.testing.assert_allclose(mean.values, [3.0, 3.0, math.nan])  # of all seeds or of none
    np.testing.assert_allclose([low, high], [[1, 2, math.nan], [6, 5, math.nan]])
    mean, (low, high) = mean_and_band([SEEDS[0], curve([2, 4], [4.0, 8.0])], "se")
    assert mean.steps.tolist() == [2, 4] and mean.values.tolist() == [3.0, 6.0]
    # n = 2: the standard error is half the difference
    np.testing.assert_allclose([low, high], [[2, 4], [4, 8]])
    nowhere, _ = mean_and_band([curve([1], [1.0]), curve([2], [1.0])], "range")
    assert not len(nowhere.steps)


@pytest.mark.parametrize(
    ("values", "linear"),
    [
        ([1.0, 5.0], None),
        ([0.0, 0.03, 5.0], 0.01),
        ([-0.2, 3.0, math.nan], 0.1),
        ([-1e-9, 40.0], 0.01),  # 0.04 is three decades below 40
        ([0.0, 0.0], None),
        ([math.nan], None),
    ],
)
def test_where_a_logarithmic_scale_has_to_be_linear(
    values: list[float], linear: float | None
) -> None:
    assert linear_below(np.array(values)) == pytest.approx(linear)


def test_runs_are_called_by_what_tells_them_apart() -> None:
    names = ["/x/a/good", "/x/b/good", "/x/b/bad", "good", "été/日本"]
    assert group_labels([[n] for n in names]) == ["a/good", "b/good", "bad", "good", "日本"]
    assert group_labels([["."]]) != ["."]  # the folder's own name


def test_a_long_label_is_cut_in_the_middle_unless_that_makes_two_equal() -> None:
    (label,) = group_labels([["a/begin-" + "word-" * 30 + "end"]])
    assert len(label) == 40 and label.startswith("begin-") and label.endswith("-end")
    assert "..." in label
    same = "x" * 50
    one, other = group_labels([[f"{same}1{same}"], [f"{same}2{same}"]])
    assert one == f"{same}1{same}" and other == f"{same}2{same}"


@pytest.mark.parametrize(
    ("groups", "labels"),
    [
        ([["r/tiny-seed-0", "r/tiny-seed-1"], ["r/big"]], ["tiny (2 seeds)", "big"]),
        ([["tiny/seed_0", "tiny/seed_1"], ["big/seed_0"]], ["tiny (2 seeds)", "big/seed_0"]),
        ([["seed0/ppo-good", "seed1/ppo-good", "seed2/ppo-good"]], ["ppo-good (3 seeds)"]),
        ([["gpt2-0", "gpt2-1"], ["gpt2-2", "gpt2-3"]],
         ["gpt2-0, gpt2-1 (2 seeds)", "gpt2-2, gpt2-3 (2 seeds)"]),
        ([["a", "b"]], ["a, b (2 seeds)"]),
    ],
)  # fmt: skip
def test_a_group_is_called_by_what_its_runs_share(
    groups: list[list[str]], labels: list[str]
) -> None:
    assert group_labels(groups) == labels


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["one"], r"1 for 2 curves \(a, b\)"),
        (["one", " "], "an empty label"),
        (["one", "one "], "'one' twice"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        group_labels([["a"], ["b"]], labels)
    assert group_labels([["a"], ["b"]], ["x\x1b", " y "]) == ["x\\x1b", "y"]
    assert group_labels([["a", "b"]], ["x"]) == ["x (2 seeds)"]


def test_a_metric_that_no_run_has_is_refused_with_the_nearest_one() -> None:
    rows: list[dict[str, Any]] = [{"step": 1, "env/reward_mean": 1.0, "objective/kl": 2.0}]
    good, bad = Group("good", [rows]), Group("bad", [[{"step": 1, "eval/kl": 3.0}]])
    with pytest.raises(UsageError, match=r"good has no metric 'env/reward_men'.*env/reward_mean"):
        curves_of([good], "env/reward_men")
    with pytest.raises(UsageError, match=r"the 2 runs have no metric 'zzz'. Known: .*eval/kl"):
        curves_of([good, bad], "zzz")
    assert [len(curves) for curves in curves_of([good, bad], "eval/kl")] == [0, 1]
