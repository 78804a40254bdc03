"""Best-of-n: against every subset, closed forms and integrals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from ppo_cli.errors import UsageError
from ppo_cli.evaluation.best_of_n import (
    best_of_n,
    expected_best,
    kl_bound,
    needed_n,
    parse_counts,
    share,
    win_rate,
)
from ppo_cli.evaluation.bootstrap import bootstrap_interval


@pytest.mark.parametrize("n", range(1, 8))
def test_the_expected_best_is_the_mean_over_all_subsets(n: int) -> None:
    scores = np.random.RandomState(0).randn(3, 7)
    scores[2, :4] = scores[2, 5]  # ties
    every = [[max(draw) for draw in itertools.combinations(row, n)] for row in scores]
    np.testing.assert_allclose(expected_best(scores, n), np.mean(every, axis=1))


@pytest.mark.parametrize("n", [1, 2, 64, 2048, 4095, 4096])
def test_many_samples_keep_their_precision(n: int) -> None:
    total = 4096  # of 1 ... M, the best of n is n (M+1) / (n+1)
    scores = np.random.RandomState(0).permutation(total)[None] + 1.0
    assert expected_best(scores, n)[0] == pytest.approx(n * (total + 1) / (n + 1), rel=1e-10)


@pytest.mark.parametrize("n", [0, 5])
def test_more_than_was_drawn_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match="of 4 scores"):
        expected_best(np.zeros((2, 4)), n)


@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_the_bound_is_the_divergence_of_the_best_of_n_continuous_scores(n: int) -> None:
    # The best of n has density n u^(n-1) over the quantiles u of the reference.
    u = (np.arange(2_000_000) + 0.5) / 2_000_000
    log_density = math.log(n) + (n - 1) * np.log(u)
    found = float(np.mean(np.exp(log_density) * log_density))
    assert kl_bound(n) == pytest.approx(found, abs=1e-4)


@pytest.mark.parametrize("kl", [0.0, 0.1, 0.19, 1.0, 5.24, 13.2])
def test_the_needed_n_is_the_smallest_that_reaches(kl: float) -> None:
    n = needed_n(kl)
    assert n is not None
    assert kl_bound(n) >= kl
    assert n == 1 or kl_bound(n - 1) < kl
    assert needed_n(1000.0) is None


def test_points_of_the_curve() -> None:
    drawn = np.array([[0.0, 1.0], [2.0, 6.0]])
    curve = best_of_n(drawn, [2], label="POSITIVE", seed=3)
    assert [point.n for point in curve.points] == [1, 2]
    assert [point.score for point in curve.points] == pytest.approx([2.25, 3.5])
    assert [point.kl for point in curve.points] == pytest.approx([0, math.log(2) - 0.5])
    assert curve.points[1].score_interval == bootstrap_interval([1.0, 6.0])
    assert (curve.prompts, curve.samples, curve.reference_score) == (2, 2, 2.25)


def model(score: float, kl: float, prompts: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """A model that is everywhere the same."""
    return np.full(prompts, score), np.full(prompts, kl)


DRAWN = np.array([[0.0, 2.0, 4.0, 6.0]] * 2)  # best of 1, 2, 4: 3, 14/3, 6


def test_a_share_is_of_the_gain_at_the_same_divergence() -> None:
    low, high = kl_bound(2), kl_bound(4)
    found = share("m", *model(4.0, (low + high) / 2), DRAWN, [4, 2])
    there = (14 / 3 + 6) / 2
    assert found.best_of_n_score == pytest.approx(there)
    assert found.share == pytest.approx(1 / (there - 3))
    assert found.share_interval is not None  # prompts that are all alike
    assert found.share_interval.low == pytest.approx(found.share_interval.high)
    below = share("m", *model(4.0, low / 4), DRAWN, [2])
    assert below.best_of_n_score == pytest.approx(3 + (14 / 3 - 3) / 4)


def test_beyond_the_largest_n_there_is_a_bound_and_what_would_do() -> None:
    found = share("m", *model(4.5, 2.0), DRAWN, [4])
    assert found.share is None and found.best_of_n_score is None and found.share_interval is None
    assert found.share_at_most == pytest.approx(0.5)
    assert found.needed_n is not None and kl_bound(found.needed_n) >= 2.0 > kl_bound(4)
    assert share("m", *model(4.5, 500.0), DRAWN, [4]).needed_n is None


def test_the_ratio_is_to_the_divergence_of_best_of_n_with_the_same_score() -> None:
    low, high = kl_bound(2), kl_bound(4)
    found = share("m", *model(16 / 3, 1.5), DRAWN, [2, 4])  # halfway from best of 2 to best of 4
    assert found.best_of_n_kl == pytest.approx((low + high) / 2)
    assert found.kl_ratio == pytest.approx(1.5 / found.best_of_n_kl)
    assert found.kl_ratio_interval is not None and found.kl_ratio_at_most is None
    # Prompts whose KL differs: the interval is that of the mean KL.
    spread = share("m", np.full(2, 16 / 3), np.array([1.0, 2.0]), DRAWN, [2, 4])
    assert spread.kl_ratio == pytest.approx(found.kl_ratio)
    assert spread.kl_ratio_interval.low == pytest.approx(1.0 / found.best_of_n_kl)
    beyond = share("m", *model(6.5, 1.5), DRAWN, [2, 4])
    assert beyond.kl_ratio is None and beyond.best_of_n_kl is None
    assert beyond.kl_ratio_at_most == pytest.approx(1.5 / high)
    no_gain = share("m", *model(2.9, 1.5), DRAWN, [2, 4])
    assert no_gain.kl_ratio is None and no_gain.kl_ratio_at_most is None


@pytest.mark.parametrize("n", [1, 2, 5, 1000])
def test_best_of_n_beats_one_response_in_n_of_n_plus_one(n: int) -> None:
    assert win_rate(kl_bound(n)) == pytest.approx(n / (n + 1), abs=1e-6)
    assert win_rate(1e6) == 1


def test_without_a_divergence_there_is_no_share() -> None:
    unknown = share("m", np.zeros(2), None, DRAWN, [4])
    assert unknown.kl is None and unknown.share is None and unknown.share_at_most is None
    same = share("m", *model(3.0, 0.0), DRAWN, [4])
    assert same.share is None and same.best_of_n_score == 3.0


def test_best_of_four_itself_has_a_share_of_one_within_the_interval() -> None:
    random = np.random.RandomState(1)
    prompts = 400
    ease = random.randn(prompts, 1)  # some prompts are easier
    drawn = ease + random.randn(prompts, 16)
    scores = (ease + random.randn(prompts, 4)).max(axis=1)
    found = share("m", scores, np.full(prompts, kl_bound(4)), drawn, [1, 2, 4, 8, 16])
    assert found.share == pytest.approx(1, abs=0.15)
    assert found.share_interval is not None
    assert found.share_interval.low < 1 < found.share_interval.high
    assert found.share_interval.high - found.share_interval.low < 0.4  # paired: ease cancels


def test_counts_are_read_and_anything_else_is_refused() -> None:
    assert parse_counts("1, 2,64") == [1, 2, 64]
    for text in ("", "0", "1,,2", "two", "1.5", "-1", "65537", "٣"):
        with pytest.raises(UsageError, match="1,2,4,8,16"):
            parse_counts(text)
