"""A sweep's results: order, table, words, CSV and pictures, of trials made by hand."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from ppo_cli.config.sweep import SweepConfig
from ppo_cli.reporting.sweep_plots import pareto_front, plot_importance, plot_sweep_frontier
from ppo_cli.reporting.sweep_tables import (
    SweepSummary,
    TrialResult,
    best_first,
    ranges_table,
    time_left,
    trial_table,
    trials_csv,
    words,
)

SPACE = {
    "ppo.init_kl_coef": {"low": 0.01, "high": 0.2, "log": True},
    "run.steps": {"low": 2, "high": 8, "step": 2},
    "ppo.lr_scheduler_type": ["linear", "cosine"],
}


def make(number: int, state: str, value: float | None, kl: float | None, **more: Any) -> Any:
    values = {"ppo.init_kl_coef": 0.0123456, "run.steps": 4, "ppo.lr_scheduler_type": "linear"}
    known = {"step": 4, "steps": 4, "wall": 10.0, "reference_score": -1.0, **more}
    return TrialResult(number, values, f"s/trial-{number:03}", state, value, kl, **known)


TRIALS = [
    make(0, "finished", 1.0, 2.0),
    make(1, "finished", 3.0, 9.0),
    make(2, "failed", None, None, why="\x1b[31mout of memory", step=None),
    make(3, "finished", 2.0, 4.0),
    make(4, "pruned", 0.5, 1.0, step=2),
    make(5, "finished", 0.5, 3.0),
]


def summary(trials: Any = TRIALS, importances: Any = None, **keys: Any) -> SweepSummary:
    sweep = SweepConfig.model_validate({"parameters": SPACE, "max_kl": 5.0, **keys})
    return SweepSummary("s", sweep, 6, best_first(trials, sweep), importances or {})


def shown(table: Any, width: int = 80) -> str:
    screen = Console(width=width, color_system=None)
    with screen.capture() as text:
        screen.print(table)
    return text.get()


def test_the_best_comes_first_and_what_is_over_the_limit_behind() -> None:
    assert [t.number for t in summary().trials] == [3, 0, 5, 1, 4, 2]
    assert summary().best == TRIALS[3]
    assert [t.number for t in summary(max_kl=None).trials] == [1, 3, 0, 5, 4, 2]
    low = summary(objective="eval/kl", direction="minimize", max_kl=None)
    assert [t.number for t in low.trials] == [5, 0, 3, 1, 4, 2]
    assert summary(max_kl=1.0).best is None
    assert summary([TRIALS[2]]).best is None


def test_the_table_says_values_limits_and_faults() -> None:
    found = summary()
    text = shown(trial_table(found.trials, found.sweep, "s"))
    assert max(map(len, text.splitlines())) <= 80 and "\x1b" not in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "3 2.000 4.00 0.01235 4 linear finished" in rows
    assert "1 3.000 9.00 0.01235 4 linear over max_kl" in rows
    assert "4 0.500 1.00 0.01235 4 linear pruned at 2" in rows
    assert r"trial 2: \x1b[31mout of memory" in text
    repeated = [dataclasses.replace(TRIALS[0], by_seed={"0": 0.5, "1": 1.5})]
    assert "1.000 ±0.5" in shown(trial_table(repeated, found.sweep, "s"))
    text = shown(ranges_table(found.sweep, frozenset({"run.steps"})))
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "ppo.init_kl_coef 0.01 to 0.2 (by its logarithm)" in rows
    assert "run.steps 2 to 8 (whole, in steps of 2)" in rows
    assert "ppo.lr_scheduler_type linear, cosine" in rows


def test_the_result_in_words() -> None:
    text = "\n".join(words(summary(importances={"run.steps": 0.75, "ppo.init_kl_coef": 0.25})))
    assert "6 of 6 trials: 4 finished, 1 pruned, 1 failed" in text
    assert "best: trial 3 with eval/score 2.000 at a KL of 4.00, within max_kl (5)" in text
    assert "run.steps 75%, ppo.init_kl_coef 25%; 4 trials are few for that" in text
    assert "highest of 4 on the same held-out prompts" in text
    assert "none of the 4 finished trials keeps max_kl (1); the lowest KL is 2.000, of trial 0" in (
        "\n".join(words(summary(max_kl=1.0)))
    )
    near = [dataclasses.replace(TRIALS[3], by_seed={"0": 1.0, "1": 3.0}), *TRIALS[:3]]
    assert "trials 0 are not worse than its own seeds differ (±1)" in "\n".join(
        words(summary(near))
    )
    assert time_left(TRIALS, 9, 3) == "10 s" and time_left([], 9, 3) is None


def test_csv_has_a_line_a_trial_and_no_formula() -> None:
    odd = dataclasses.replace(TRIALS[0], why="=1+1", by_seed={"0": 0.5, "1": 1.5})
    rows = list(csv.DictReader(trials_csv([TRIALS[3], odd], summary().sweep).splitlines()))
    assert [row["trial"] for row in rows] == ["0", "3"]
    assert rows[0]["why"] == "'=1+1" and float(rows[0]["ppo.init_kl_coef"]) == 0.0123456
    assert (rows[0]["eval/score seed 1"], rows[1]["within_max_kl"]) == ("1.5", "True")


def test_the_front_holds_what_no_other_trial_beats() -> None:
    assert [t.number for t in pareto_front(TRIALS, True)] == [0, 3, 1]
    assert [t.number for t in pareto_front(TRIALS, False)] == [0, 5]


def ink(picture: Path) -> Any:
    return imread(picture)[..., :3]


@pytest.mark.parametrize(
    "change",
    [
        lambda s: dataclasses.replace(s, sweep=s.sweep.model_copy(update={"max_kl": None})),
        lambda s: dataclasses.replace(s, trials=[t for t in s.trials if t.number != 4]),
        lambda s: dataclasses.replace(s, trials=[t for t in s.trials if t.number != 5]),
        lambda s: dataclasses.replace(
            s, trials=[dataclasses.replace(t, reference_score=None) for t in s.trials]
        ),
    ],
    ids=["limit", "pruned", "finished", "reference"],
)
def test_the_frontier_shows_limit_reference_and_each_trial(
    change: Callable[[SweepSummary], SweepSummary], tmp_path: Path
) -> None:
    assert plot_sweep_frontier(summary(), tmp_path / "a.png")
    assert plot_sweep_frontier(change(summary()), tmp_path / "b.png")
    one, other = ink(tmp_path / "a.png"), ink(tmp_path / "b.png")
    assert one.shape != other.shape or np.abs(one - other).max() > 0.3
    assert not plot_sweep_frontier(summary([TRIALS[2]]), tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_importance_is_drawn_where_it_is_known(tmp_path: Path) -> None:
    known = summary(importances={"run.steps": 0.75, "ppo.init_kl_coef": 0.25})
    assert plot_importance(known, tmp_path / "a.png") and (tmp_path / "a.png").stat().st_size
    assert not plot_importance(summary(), tmp_path / "b.png")
