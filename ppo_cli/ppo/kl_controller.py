"""The KL coefficient: constant, or adapted towards a target KL.

Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences"
(https://arxiv.org/abs/1909.08593), section 2.2.
"""

from __future__ import annotations

from ppo_cli.config.ppo import PPOSettings


class FixedKLController:
    """A constant coefficient."""

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


def make_kl_controller(config: PPOSettings) -> AdaptiveKLController | FixedKLController:
    """The controller that `adap_kl_ctrl` asks for."""
    if not config.adap_kl_ctrl:
        return FixedKLController(config.init_kl_coef)
    return AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
