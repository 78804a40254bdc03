"""Groups and prints the statistics that `PPOTrainer.step` returns and `train` records.

To add one: compute it in `step_statistics.py` (`minibatch_statistics` for one that is averaged,
`step_statistics` for another), and give its meaning in `statistic_keys.py`. Tables, plots and
checks follow from the key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ppo_cli.ppo.statistic_keys import RUN_STATISTICS, STATISTICS, TERM, Statistic

__all__ = [
    "RUN_STATISTICS",
    "STATISTICS",
    "TERM",
    "Statistic",
    "grouped",
    "is_array",
    "print_ppo_stats",
    "scalars",
]


def is_array(key: str) -> bool:
    """Whether a statistic of `PPOTrainer.step` is an array; unknown ones are not."""
    return key in STATISTICS and STATISTICS[key].is_array


def scalars(stats: Mapping[str, Any]) -> dict[str, float]:
    """The statistics that are single numbers."""
    return {k: v for k, v in stats.items() if isinstance(v, (int, float))}


GROUPS: dict[bool, dict[str, tuple[str, ...]]] = {
    True: {
        "Objective Statistics": ("objective/",),
        "PPO Losses (Related to Minimizing Objective Function)": ("ppo/loss/",),
        "PPO Policy Statistics": ("ppo/policy/",),
    },
    False: {
        "Reward and Value Function Estimation": (
            "env/",
            "ppo/mean_",
            "ppo/std_",
            "ppo/returns/",
            "ppo/val/",
        ),
        "Evaluation on Held-out Prompts": ("eval/",),
        "Optimizer": ("ppo/learning_rate",),
        "Token Lengths": ("tokens/",),
        "Sampling Engine": ("sampling/",),
        "Time Statistics": ("time/", "perf/"),
        "Run": ("run/",),
    },
}


def grouped(
    stats: Mapping[str, Any],
    related_to_objective: bool,
    evaluation: Mapping[str, Statistic] | None = None,
) -> dict[str, list[tuple[str, float, str]]]:
    """Scalar statistics under their headings: (key, value, meaning) of each.

    Args:
        stats: the statistics; arrays are left out.
        related_to_objective: which half of them.
        evaluation: explains the keys of evaluations, in their order.
    """
    numbers = scalars(stats)
    known = STATISTICS | RUN_STATISTICS | dict(evaluation or {})
    order = list(known)

    def place(key: str) -> tuple[int, str]:
        key = TERM.sub("NAME", key)
        return (order.index(key) if key in known else len(order), key)

    def meaning(key: str) -> str:
        found = known.get(TERM.sub("NAME", key))
        return found.meaning if found else ""

    groups: dict[str, list[tuple[str, float, str]]] = {}
    for title, prefixes in GROUPS[related_to_objective].items():
        rows = [
            (key, numbers[key], meaning(key))
            for key in sorted(numbers, key=place)
            if key.startswith(prefixes)
        ]
        if rows:
            groups[title] = rows
    return groups


def print_ppo_stats(
    stats: Mapping[str, Any],
    related_to_objective: bool = False,
    write: Callable[[str], Any] = print,
) -> None:
    """Print the statistics of `step()` under headings, one per line.

    Args:
        stats: the statistics; arrays are left out.
        related_to_objective: True for those of the optimised losses, False for the others: rewards,
            values, lengths, times.
        write: called with each line.
    """
    write("PPO Training Statistics")
    for title, rows in grouped(stats, related_to_objective).items():
        write("")
        write(f"{title}:")
        for key, value, meaning in rows:
            label = meaning.partition(",")[0] or key
            shown = f"{value:.6g}" if math.isfinite(value) else str(value)
            write(f"  {label[:1].upper()}{label[1:]} ({key}): {shown}")
