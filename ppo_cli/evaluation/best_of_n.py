"""Best-of-n from the reference: the score that n draws reach at a known KL, the curve to beat.

Drawing n responses from the reference and keeping the best one is a policy that needs no training.
A tuned model is compared with it at the same KL.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict

from ppo_cli.errors import UsageError
from ppo_cli.evaluation.bootstrap import INTERVAL, Interval, bootstrap_interval, resampled_means

MOST = 65_536
BEYOND = 10**9  # no n as large as this is named


@dataclass(frozen=True)
class BestOfPoint:
    """The best of n responses from the reference."""

    n: int
    """Responses of which the best counts."""
    kl: float
    """log n - (n-1)/n, nats per response: an upper bound on the KL from the reference."""
    score: float
    """Expected best score, mean over the prompts."""
    score_interval: Interval
    """Bootstrap interval over the prompts."""


@dataclass(frozen=True)
class BestOfN:
    """Best-of-n from the reference: a point for each n."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", use_attribute_docstrings=True
    )

    label: str
    """Label that the score is of."""
    seed: int
    """Seed of the sampling."""
    prompts: int
    """How many prompts."""
    samples: int
    """Responses drawn to each prompt: the largest n."""
    reference_score: float
    """The reference's mean score over all of these responses: best of one, at KL 0."""
    points: list[BestOfPoint]
    """By n, from 1 up."""

    def score_at(self, kl: float) -> float | None:
        """Its score at a KL, linear between the points; None beyond the last."""
        bounds = [point.kl for point in self.points]
        if not 0 <= kl <= bounds[-1]:
            return None
        return float(np.interp(kl, bounds, [point.score for point in self.points]))

    def share_at(self, kl: float, score: float) -> float | None:
        """`score` as a share of what best-of-n reaches at `kl`, as `Share` has it; or None."""
        reached = self.score_at(kl)
        if reached is None or reached <= self.reference_score:
            return None
        return (score - self.reference_score) / (reached - self.reference_score)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Share:
    """What a model reached at its KL, as a share of what best-of-n reaches there.

    (its score - the reference's) / (best-of-n's at the same KL - the reference's), with best-of-n
    interpolated linearly in KL between the n that were asked for.
    """

    model: str
    """The model."""
    kl: float | None
    """Its KL from the reference, nats per response; null where that is not known."""
    score: float
    """Its mean score."""
    best_of_n_score: float | None
    """Best-of-n's at this KL; null where the largest n does not reach so far."""
    share: float | None
    """1: as good as best-of-n, 0: as the reference. Null beyond the largest n, or at KL 0."""
    share_interval: Interval | None
    """Bootstrap interval over the prompts; null where a resample has no share."""
    share_at_most: float | None
    """Beyond the largest n: the share of what the largest n reaches, a bound from above."""
    needed_n: int | None
    """Beyond the largest n: the n that would reach this KL; null for a billion and more."""
    best_of_n_kl: float | None
    """KL at which best-of-n has this score; null where the score is not over the reference's, or
    over that of the largest n."""
    kl_ratio: float | None
    """Its KL as a multiple of `best_of_n_kl`; 1: as frugal as best-of-n."""
    kl_ratio_interval: Interval | None
    """Bootstrap interval over the prompts; null where a resample has no ratio."""
    kl_ratio_at_most: float | None
    """With a score over that of the largest n: KL as a multiple of the largest n's, a bound."""


def parse_counts(text: str) -> list[int]:
    """`1,2,4` -> [1, 2, 4].

    Raises:
        UsageError: anything but numbers from 1 to 65,536 with commas between.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= MOST for part in parts):
        raise UsageError(
            f"--best-of-n '{text}': numbers from 1 to {MOST:,} are needed with commas between, "
            "such as 1,2,4,8,16"
        )
    return [int(part) for part in parts]


def expected_best(scores: np.ndarray, n: int) -> np.ndarray:
    """Expected best of n of a row's M scores, drawn without replacement: (P, M) -> (P,).

    Without bias an estimate of the best of n fresh draws. Of the ascending order statistics, the
    i-th is the best of n in C(i-1, n-1) of C(M, n) draws; these weights follow one from another,
    from the largest down, by factors below 1: w_M = n/M, w_(i-1) = w_i (i-n)/(i-1).

    Source: Hilton and Gao 2022 (https://openai.com/index/measuring-goodharts-law).
    """
    total = scores.shape[1]
    if not 1 <= n <= total:
        raise ValueError(f"n is {n}, of {total} scores")
    i = np.arange(total, 1, -1)
    factors = np.maximum(i - n, 0) / np.maximum(i - 1, 1)
    weights = n / total * np.cumprod(np.concatenate([[1.0], factors]))
    return np.sort(scores, axis=1)[:, ::-1] @ weights


def kl_bound(n: int) -> float:
    """log n - (n-1)/n: an upper bound on best-of-n's KL from the reference, nats.

    It equals that KL where no response comes twice (Stiennon et al. 2020, appendix G.3,
    https://arxiv.org/abs/2009.01325), and above it otherwise (Beirami et al. 2024,
    https://arxiv.org/abs/2401.01879).
    """
    return math.log(n) - (n - 1) / n


def needed_n(kl: float) -> int | None:
    """Smallest n with `kl_bound(n) >= kl`; None where it is a billion or more."""
    low, high = 0, 1
    while kl_bound(high) < kl:
        low, high = high, high * 2
        if low >= BEYOND:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if kl_bound(middle) >= kl else (middle, high)
    return high


def win_rate(kl: float) -> float:
    """How often best-of-n at this KL beats one response of the reference: n/(n+1).

    With continuous scores: of n + 1 draws each is the best equally often. The n is a real number,
    the one whose `kl_bound` is `kl`.
    """
    low, high = 1.0, math.exp(min(kl, 300.0) + 1)  # the bound is over log n - 1
    for _ in range(64):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if math.log(middle) - 1 + 1 / middle >= kl else (middle, high)
    return high / (high + 1)


def best_of_n(scores: np.ndarray, counts: Sequence[int], *, label: str, seed: int) -> BestOfN:
    """The curve from M scores of the reference to each of P prompts.

    Args:
        scores: (P, M).
        counts: the n wanted, none above M; 1 is always among them.
        label: the label that the score is of.
        seed: of the sampling.
    """
    points = []
    for n in wanted(counts):
        interval = bootstrap_interval(expected_best(scores, n).tolist())
        points.append(BestOfPoint(n, kl_bound(n), interval.mean, interval))
    prompts, samples = scores.shape
    return BestOfN(label, seed, prompts, samples, float(scores.mean()), points)


def wanted(counts: Sequence[int]) -> list[int]:
    """The n of a curve: each once, in ascending order, 1 included."""
    return sorted({1, *counts})


def share(
    model: str,
    scores: np.ndarray,
    kl: np.ndarray | None,
    drawn: np.ndarray,
    counts: Sequence[int],
) -> Share:
    """A model compared with best-of-n at its own KL.

    Args:
        model: its name.
        scores: (P,), its score on each prompt.
        kl: (P,), nats per response; None where it is not known.
        drawn: (P, M), the reference's scores.
        counts: the n of the curve.

    Returns:
        The share with an interval over resampled prompts; a prompt's score, KL and part of the
        curve are resampled together. A resample whose KL lies beyond the largest n is compared
        with the largest n.
    """
    score = float(scores.mean())
    if kl is None:
        return Share(model, None, score, *[None] * 9)
    counts = wanted(counts)
    bounds = np.asarray([kl_bound(n) for n in counts])
    rows = np.column_stack([scores, kl, *(expected_best(drawn, n) for n in counts)])
    means = rows.mean(axis=0, keepdims=True)
    at = float(means[0, 1])
    resampled = resampled_means(rows)
    estimate, interval = _interval(_shares(means, bounds), _shares(resampled, bounds))
    ratio, ratio_interval = _interval(_ratios(means, bounds), _ratios(resampled, bounds))
    within, reached = at <= bounds[-1], score <= means[0, -1]
    curve = means[0, 2:]
    return Share(
        model=model,
        kl=at,
        score=score,
        best_of_n_score=float(np.interp(at, bounds, curve)) if within else None,
        share=estimate if within else None,
        share_interval=interval if within else None,
        share_at_most=None if within else estimate,
        needed_n=None if within else needed_n(at),
        best_of_n_kl=float(np.interp(score, curve, bounds)) if ratio and reached else None,
        kl_ratio=ratio if reached else None,
        kl_ratio_interval=ratio_interval if reached else None,
        kl_ratio_at_most=None if reached else ratio,
    )


def _interval(estimate: np.ndarray, resampled: np.ndarray) -> tuple[float | None, Interval | None]:
    """An estimate (1,), and its interval; None for one that is NaN, or has a resample that is."""
    if np.isnan(estimate[0]):
        return None, None
    value = float(estimate[0])
    if np.isnan(resampled).any():
        return value, None
    low, high = np.percentile(resampled, INTERVAL)
    return value, Interval(value, float(low), float(high))


def _ratios(means: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Rows as in `_shares` -> KL over best-of-n's with the same score; NaN without a gain.

    A score over that of the largest n counts as the largest n's.
    """
    needed = np.asarray([np.interp(row[0], row[2:], bounds) for row in means])
    ratios = np.full(len(means), np.nan)
    np.divide(means[:, 1], needed, out=ratios, where=needed > 0)
    return ratios


def _shares(means: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Rows of score, KL and the curve at `bounds` -> shares; NaN where the curve gains nothing."""
    curve = means[:, 2:]
    reached = np.asarray([np.interp(row[1], bounds, row[2:]) for row in means])
    gains = reached - curve[:, 0]
    shares = np.full(len(means), np.nan)
    np.divide(means[:, 0] - curve[:, 0], gains, out=shares, where=gains > 0)
    return shares
