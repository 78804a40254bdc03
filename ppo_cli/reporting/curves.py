"""Curves of metrics, of single runs and of runs that differ in the seed alone, and their labels."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from ppo_cli.errors import UsageError, did_you_mean
from ppo_cli.utils.text import cut_middle, escape_controls

Rows = Sequence[Mapping[str, Any]]
"""Metrics of a run, one dictionary a step."""
Runs = Mapping[str, Rows]
"""Name of a run -> its metrics."""
Band = Literal["range", "se"]
"""Of several seeds: from the lowest to the highest, or one standard error about their mean."""

LABEL_WIDTH = 40  # characters of a legend's line
MAX_DECADES = 3  # of a logarithmic scale that has to show values of 0 and below
SEPARATORS = re.compile(r"([-_./ =]+)")
# What ends the name that runs share before their seed: "tiny-seed-", "tiny/run_".
SEED_ENDING = re.compile(r"(?:(?:^|[-_./ =]+)(?:seeds?|runs?))?[-_./ =]*$", re.IGNORECASE)


@dataclass(frozen=True)
class Curve:
    """One metric of one run: steps (n,) in order, and values (n,), which need not be finite."""

    steps: np.ndarray
    values: np.ndarray

    def smoothed(self, window: int) -> Self:
        """The same with the moving average of `window` steps."""
        return type(self)(self.steps, moving_average(self.values, window))


@dataclass(frozen=True)
class Group:
    """What a picture shows as one: a run, or runs that differ in the seed alone.

    Attributes:
        label: its name in a legend, on one line, without control characters.
        runs: metrics of each run.
    """

    label: str
    runs: Sequence[Rows]

    def curves(self, metric: str) -> list[Curve]:
        """The metric of each run that has it."""
        found = []
        for rows in self.runs:
            points = {row["step"]: row[metric] for row in rows if metric in row}
            if points:
                steps, values = zip(*sorted(points.items()), strict=True)
                found.append(Curve(np.asarray(steps), np.asarray(values, dtype=np.float64)))
        return found

    def last_steps(self) -> list[int]:
        """The last step of each run."""
        return [rows[-1]["step"] for rows in self.runs if rows]


def group_runs(
    runs: Runs,
    groups: Sequence[Sequence[str]] | None = None,
    labels: Sequence[str] | None = None,
) -> list[Group]:
    """Gather what a picture shows.

    Args:
        runs: metrics of each run.
        groups: names of the runs that make one curve each; None for one curve per run.
        labels: of the groups; None for the shortest distinct ends of their names.

    Raises:
        UsageError: another number of labels than of groups, an empty label or two equal ones.
    """
    groups = [[name] for name in runs] if groups is None else groups
    shown = group_labels(groups, labels)
    return [
        Group(label, [runs[name] for name in names])
        for label, names in zip(shown, groups, strict=True)
    ]


def curves_of(groups: Sequence[Group], metric: str) -> list[list[Curve]]:
    """The metric's curves in each group; an empty list where none of its runs has it.

    Raises:
        UsageError: no run has the metric.
    """
    found = [group.curves(metric) for group in groups]
    if any(found):
        return found
    runs = [rows for group in groups for rows in group.runs]
    keys = [key for key in {k: None for rows in runs for row in rows for k in row} if key != "step"]
    near = did_you_mean(metric, keys)
    who = f"{groups[0].label} has" if len(runs) == 1 else f"the {len(runs)} runs have"
    known = "" if near else f" Known: {', '.join(keys)}"
    raise UsageError(f"{who} no metric '{metric}'.{near}{known}")


def mean_and_band(
    curves: Sequence[Curve], band: Band
) -> tuple[Curve, tuple[np.ndarray, np.ndarray]]:
    """Mean of curves at the steps that all have, with the lower and upper edge of its band.

    A value that is not finite leaves a gap: the mean of the other runs would be another quantity.
    """
    steps = curves[0].steps
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve.steps)
    values = np.array([curve.values[np.searchsorted(curve.steps, steps)] for curve in curves])
    values[~np.isfinite(values)] = np.nan
    mean = values.mean(axis=0)
    if band == "range":
        return Curve(steps, mean), (values.min(axis=0), values.max(axis=0))
    error = values.std(axis=0, ddof=1) / len(curves) ** 0.5
    return Curve(steps, mean), (mean - error, mean + error)


def moving_average(values: Sequence[float] | np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each place, of fewer at the start; skips NaN and inf."""
    array = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(array)

    def window_sums(terms: np.ndarray) -> np.ndarray:
        sums = np.cumsum(np.insert(terms, 0, 0.0))
        ends = np.arange(1, len(terms) + 1)
        return sums[ends] - sums[np.maximum(ends - window, 0)]

    counts = window_sums(finite.astype(np.float64))
    sums = window_sums(np.where(finite, array, 0.0))
    return np.divide(sums, counts, out=np.full(len(array), np.nan), where=counts > 0)


def linear_below(values: np.ndarray) -> float | None:
    """Size below which a logarithmic scale has to be linear, to show values of 0 and less.

    It is a power of ten: that of the smallest size, at most `MAX_DECADES` below the largest. None
    if all finite values are above 0, and where none is finite or all are 0.
    """
    finite = values[np.isfinite(values)]
    sizes = np.abs(finite[finite != 0])
    if not len(sizes) or finite.min() > 0:
        return None
    smallest = max(sizes.min(), sizes.max() * 10.0**-MAX_DECADES)
    return float(10.0 ** np.floor(np.log10(smallest)))


def group_labels(groups: Sequence[Sequence[str]], labels: Sequence[str] | None = None) -> list[str]:
    """A label for each group of runs: of `labels`, or what tells the names of the runs apart.

    That of several runs ends in their number.

    Raises:
        UsageError: see `group_runs`.
    """
    counts = [f" ({len(names)} seeds)" if len(names) > 1 else "" for names in groups]
    names = _own_names(groups)
    own = [
        cut_middle(name, LABEL_WIDTH - len(count)) + count
        for name, count in zip(names, counts, strict=True)
    ]
    if len({*own}) < len(own):  # what tells them apart was cut out
        own = [name + count for name, count in zip(names, counts, strict=True)]
    if labels is None:
        return own
    if len(labels) != len(own):
        raise UsageError(
            f"--labels has {len(labels)} for {len(own)} curve{'s' if len(own) > 1 else ''} "
            f"({', '.join(own)}): give one for each, in this order"
        )
    given = [escape_controls(label.strip()) for label in labels]
    for label in given:
        if not label or given.count(label) > 1:
            what = f"'{label}' twice" if label else "an empty label"
            raise UsageError(f"--labels has {what}: give each curve a label of its own")
    return [label + count for label, count in zip(given, counts, strict=True)]


def _own_names(groups: Sequence[Sequence[str]]) -> list[str]:
    """Distinct names of groups: what the names of a group's runs share, or all of them."""
    ends = _shortest_ends(groups)
    lists = [", ".join(names) for names in ends]
    short = [_shared_name(names) or full for names, full in zip(ends, lists, strict=True)]
    return [s if short.count(s) == 1 else full for s, full in zip(short, lists, strict=True)]


def _shortest_ends(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """The shortest ends of paths that no other path has; in a group, of as many folders each."""
    every = [name for names in groups for name in names]
    # "." and ".." are no names to read
    parts = {n: Path(n if Path(n).name.strip(".") else os.path.abspath(n)).parts for n in every}

    def depth(name: str) -> int:
        own, others = parts[name], [part for other, part in parts.items() if other != name]
        counts = range(1, len(own))
        return next((n for n in counts if all(p[-n:] != own[-n:] for p in others)), len(own))

    ends = []
    for names in groups:
        count = max(map(depth, names))
        ends.append([escape_controls(str(Path(*parts[name][-count:]))) for name in names])
    return ends


def _shared_name(names: Sequence[str]) -> str:
    """What the names of runs with different seeds share: their first words, or else their last."""
    if len(names) == 1:
        return names[0]
    words = [SEPARATORS.split(name) for name in names]
    start = _shared_words(words)
    end = _shared_words([own[::-1] for own in words])[::-1]
    return SEED_ENDING.sub("", "".join(start)) or SEPARATORS.sub("", "".join(end), count=1)


def _shared_words(lists: Sequence[Sequence[str]]) -> list[str]:
    """The words with which all lists begin."""
    return [w[0] for w in takewhile(lambda w: len({*w}) == 1, zip(*lists, strict=False))]
