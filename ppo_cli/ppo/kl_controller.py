"""The KL coefficient: constant, adapted towards a target KL, or kept at a budget of KL.

Source of the adaptive one: Ziegler et al. 2019, "Fine-Tuning Language Models from Human
Preferences" (https://arxiv.org/abs/1909.08593), section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ppo_cli.ppo.config import PPOConfig

PROPORTIONAL = 2.0  # a KL of twice the budget multiplies the coefficient by e squared
INTEGRAL = 0.2  # and an error of 0.1 by another 2 % a step for as long as it lasts
SUMMED = (-0.25, 1.0)  # the long way up to the budget is no error that has to be made good
RECENT = 0.8  # weight of a KL one step later
SCALES = (0.5, 2.0)
LEAST, MOST = 1e-4, 1e2


class FixedKLController:
    """A constant coefficient."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, current: float, n_steps: int) -> None:
        """Change nothing; arguments as in `AdaptiveKLController.update`."""

    def calibrate(self, kl: float) -> None:
        """Change nothing; argument as in `BudgetKLController.calibrate`."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs besides the coefficient."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from a `state_dict`."""


class AdaptiveKLController(FixedKLController):
    """A coefficient that grows while KL is above `target` and shrinks while it is below.

    Args:
        init_kl_coef: coefficient at the start.
        target: KL per sequence, nats.
        horizon: samples over which a 20 % error changes the coefficient by 20 %.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        super().__init__(init_kl_coef)
        self.target = target
        self.horizon = horizon

    def update(self, current: float, n_steps: int) -> None:
        """Scale by `1 + clip(current / target - 1, -0.2, 0.2) * n_steps / horizon`.

        Args:
            current: `objective/kl` of the step.
            n_steps: number of samples of the step.
        """
        error = min(max(current / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon


class BudgetKLController(FixedKLController):
    """A coefficient that brings KL to a budget and holds it there, or keeps it below.

    Its logarithm is the sum of a part that follows the error at once and one that adds the errors
    up. The first is needed: KL adds up over the steps, too, and a coefficient that only adds up
    errors swings ever further around its target.

    Args:
        init_kl_coef: coefficient at the budget, at the start.
        budget: KL per sequence, nats.
        is_ceiling: never go below `init_kl_coef`: KL may stay under the budget.

    Source: Stooke et al. 2020, "Responsive Safety in Reinforcement Learning by PID Lagrangian
    Methods" (https://arxiv.org/abs/2007.03964).
    """

    def __init__(self, init_kl_coef: float, budget: float, is_ceiling: bool = False) -> None:
        super().__init__(init_kl_coef)
        self.budget = budget
        self._is_ceiling = is_ceiling
        self._least = max(init_kl_coef if is_ceiling else 0.0, LEAST)
        self._base = max(init_kl_coef, LEAST)  # the part that adds errors up
        self._recent = 0.0
        self._scale = 1.0

    def update(self, current: float, n_steps: int) -> None:
        """Move the coefficient; arguments as in `AdaptiveKLController.update`.

        Every step counts alike, whatever `n_steps` is.
        """
        self._recent = RECENT * self._recent + (1 - RECENT) * current if self._recent else current
        error = _clip(self._scale * current / self.budget - 1, (-1.0, 1.0))
        limits = (self._least, MOST)
        self._base = _clip(self._base * math.exp(INTEGRAL * _clip(error, SUMMED)), limits)
        self.value = _clip(self._base * math.exp(PROPORTIONAL * error), limits)

    def calibrate(self, kl: float) -> None:
        """Learn how the KL that the budget is of compares with `objective/kl`.

        A ceiling is of `objective/kl` itself: then learning does not depend on evaluations.

        Args:
            kl: of an evaluation just after a step. Its responses may be longer than the steps'.
        """
        if self._recent > 0 and not self._is_ceiling:
            self._scale = _clip(kl / self._recent, SCALES)

    def state_dict(self) -> dict[str, float]:
        """Base, recent KL and scale, for a checkpoint."""
        return {"base": self._base, "recent": self._recent, "scale": self._scale}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Continue from a `state_dict`; an empty one, of an earlier release, changes nothing."""
        self._base = state.get("base", self._base)
        self._recent = state.get("recent", self._recent)
        self._scale = state.get("scale", self._scale)


def make_kl_controller(config: PPOConfig) -> FixedKLController:
    """The controller that `kl_budget`, `kl_ceiling` or `adap_kl_ctrl` asks for."""
    if config.kl_budget is not None:
        return BudgetKLController(config.init_kl_coef, config.kl_budget)
    if config.kl_ceiling is not None:
        return BudgetKLController(config.init_kl_coef, config.kl_ceiling, is_ceiling=True)
    if config.adap_kl_ctrl:
        return AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
    return FixedKLController(config.init_kl_coef)


def _clip(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])
