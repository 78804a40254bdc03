"""The KL coefficient that keeps to a budget; the constant and Ziegler's are in test_parity.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from ppo_cli.ppo.kl_controller import LEAST, MOST, BudgetKLController
from tests.conftest import make_batch, make_trainer


def follow(controller: BudgetKLController, steps: int, pull: float) -> list[float]:
    """KL of a made-up policy that drifts away by `pull`, and back by its coefficient times KL."""
    kl, course = 0.0, []
    for _ in range(steps):
        controller.update(kl, 128)
        kl = max(kl + 0.3 * (pull - controller.value * kl), 0.0)
        course.append(kl)
    return course


@pytest.mark.parametrize(
    ("budget", "pull"), [(1, 0.3), (4, 0.3), (1, 1), (4, 1), (10, 1), (4, 3), (10, 3)]
)
def test_kl_settles_at_the_budget_whatever_pulls(budget: float, pull: float) -> None:
    course = follow(BudgetKLController(0.1, budget), 128, pull)
    assert course[-10:] == pytest.approx([budget] * 10, rel=0.1)
    assert max(course) < 2 * budget


def test_below_a_ceiling_the_coefficient_stays_and_above_it_grows() -> None:
    below = BudgetKLController(0.5, 4.0, is_ceiling=True)
    assert max(follow(below, 128, 0.3)) < 1
    assert below.value == 0.5
    above = BudgetKLController(0.05, 4.0, is_ceiling=True)
    assert follow(above, 128, 1.0)[-10:] == pytest.approx([4.0] * 10, rel=0.1)
    assert above.value > 0.2
    before = above.state_dict()
    above.calibrate(6.0)  # learning depends on evaluations only where there is a budget
    assert above.state_dict() == before


def test_an_evaluation_says_what_the_steps_measure_too_low() -> None:
    controller = BudgetKLController(0.1, 4.0)
    for _ in range(3):
        controller.update(4.0, 128)
    controller.calibrate(6.0)
    before = controller.value
    controller.update(8 / 3, 128)  # of which the evaluation makes 4: at the budget
    assert controller.value == pytest.approx(before)
    controller.update(4.0, 128)
    assert controller.value > 2 * before


def test_the_coefficient_stays_within_bounds_and_recovers() -> None:
    controller = BudgetKLController(0.0, 4.0)  # a coefficient of nothing can grow, too
    for _ in range(500):
        controller.update(0.0, 128)
    assert controller.value == LEAST
    for _ in range(500):
        controller.update(1e6, 128)
    assert controller.value == MOST


def test_the_trainer_follows_its_budget_and_goes_on_from_its_state() -> None:
    settings: dict[str, Any] = {"kl_budget": 1e-3, "kl_penalty": "k3", "learning_rate": 1e-2}
    trainer, resumed = make_trainer(**settings), make_trainer(**settings)
    for seed in range(3):
        trainer.step(*make_batch(seed=seed))
    trainer.kl_ctl.calibrate(3e-3)
    assert trainer.kl_ctl.value > 0.2  # over the budget
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for one in (trainer, resumed):
        one.kl_ctl.update(2e-3, 8)
    assert resumed.kl_ctl.value == trainer.kl_ctl.value
