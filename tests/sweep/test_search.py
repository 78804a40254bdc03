"""How values are chosen: samplers, the limit of KL, what matters; trials that take no time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ppo_cli.config.sweep_loading import load_sweep
from ppo_cli.sweep import search

KEY = "ppo.init_kl_coef"
SPACE = (
    "pruner: none\nparameters: {ppo.init_kl_coef: {low: 0.01, high: 0.2}, ppo.lam: [0.9, 1.0]}\n"
)


def values_of(folder: Path, text: str, trials: int, resumed_at: int | None = None) -> Any:
    """The study of a sweep with the best score at a coefficient of 0.1, and its coefficients.

    KL is 0.5 over the coefficient.
    """
    folder.mkdir()
    (folder / "space.yaml").write_text(SPACE + text)
    settings = load_sweep(str(folder / "space.yaml"))
    limit = settings.sweep.max_kl
    study = search.open_study(folder / "study.journal", settings)
    for number in range(trials):
        if number == resumed_at:
            study = search.open_study(folder / "study.journal", settings)
        trial = search.ask(study, settings)
        value = trial.params[KEY]
        excess = None if limit is None else 0.5 / value - limit
        search.tell(study, trial, "finished", {"value": -abs(value - 0.1)}, excess)
    return study, [trial.params[KEY] for trial in study.get_trials(deepcopy=False)]


def distance(values: list[float], middle: float) -> float:
    return sum(abs(value - middle) for value in values) / len(values)


def test_tpe_learns_what_random_does_not_and_keeps_the_limit_of_kl(tmp_path: Path) -> None:
    _, tpe = values_of(tmp_path / "tpe", "sampler: tpe\nstartup_trials: 5", 24)
    _, drawn = values_of(tmp_path / "random", "sampler: random", 24)
    assert distance(tpe[12:], 0.1) < 0.9 * distance(drawn[12:], 0.1)
    _, limited = values_of(tmp_path / "limit", "startup_trials: 5\nmax_kl: 3", 24)
    kept, without = (sum(x >= 0.5 / 3 for x in values[12:]) for values in (limited, tpe))
    assert kept > without
    assert limited[:5] == tpe[:5]  # at random yet
    _, later = values_of(tmp_path / "later", "startup_trials: 24", 8)
    assert later[:5] == tpe[:5] and later[5:] != tpe[5:8]


def test_values_follow_from_the_seed_whether_the_sweep_was_resumed_or_not(tmp_path: Path) -> None:
    _, once = values_of(tmp_path / "once", "startup_trials: 3", 8)
    _, resumed = values_of(tmp_path / "resumed", "startup_trials: 3", 8, resumed_at=5)
    assert once == resumed and len(set(once)) == 8
    _, other = values_of(tmp_path / "other", "startup_trials: 3\nsampler_seed: 1", 8)
    assert not {*other} & {*once}


def test_what_matters_is_found_and_is_unknown_with_few_trials(tmp_path: Path) -> None:
    study, _ = values_of(tmp_path / "few", "sampler: random", 3)
    assert search.importances(study) == {}
    study, _ = values_of(tmp_path / "more", "sampler: random", 30)
    found = search.importances(study)
    assert found[KEY] > 0.8 and sum(found.values()) == pytest.approx(1)
