"""The KL coefficient: constant, or adapted towards a target KL.

Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences"
(https://arxiv.org/abs/1909.08593), section 2.2.
"""

from __future__ import annotations

import math

from ppo_cli.ppo.config import PPOConfig

PROPORTIONAL = 2.0  # a KL of twice the budget multiplies the coefficient by e squared
INTEGRAL = 0.1  # and by another 10 % a step for as long as it lasts
LEAST, MOST = 1e-4, 1e2


class FixedKLController:
    """A constant coefficient."""

    error = 0.0  # that of `BudgetKLController`, for a checkpoint

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, current: float, n_steps: int) -> None:
        """Change nothing; arguments as in `AdaptiveKLController.update`."""


class AdaptiveKLController:
    """A coefficient that grows while KL is above `target` and shrinks while it is below.

    Args:
        init_kl_coef: coefficient at the start.
        target: KL per sequence, nats.
        horizon: samples over which a 20 % error changes the coefficient by 20 %.
    """

    error = 0.0

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        self.value = init_kl_coef
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


class BudgetKLController:
    """A coefficient that brings KL to a budget and holds it there.

    Its logarithm is the sum of a part that follows the error at once and one that adds the errors
    up. The first is needed: KL adds up over the steps, too, and a coefficient that only adds up
    errors swings ever further around its target.

    Args:
        init_kl_coef: coefficient at the budget, at the start.
        budget: KL per sequence, nats.

    Source: Stooke et al. 2020, "Responsive Safety in Reinforcement Learning by PID Lagrangian
    Methods" (https://arxiv.org/abs/2007.03964).
    """

    def __init__(self, init_kl_coef: float, budget: float) -> None:
        self.value = init_kl_coef
        self.budget = budget
        self.error = 0.0

    def update(self, current: float, n_steps: int) -> None:
        """Move the coefficient.

        Args:
            current: `objective/kl` of the step.
            n_steps: not used; every step counts alike.
        """
        error = min(max(current / self.budget - 1, -1.0), 1.0)
        change = PROPORTIONAL * (error - self.error) + INTEGRAL * error
        self.error = error
        self.value = min(max(self.value * math.exp(change), LEAST), MOST)


def make_kl_controller(
    config: PPOConfig,
) -> AdaptiveKLController | BudgetKLController | FixedKLController:
    """The controller that `kl_budget` or `adap_kl_ctrl` asks for."""
    if config.kl_budget is not None:
        return BudgetKLController(config.init_kl_coef, config.kl_budget)
    if not config.adap_kl_ctrl:
        return FixedKLController(config.init_kl_coef)
    return AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
