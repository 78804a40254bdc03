"""The learning rate over a run: schedules, and a rate that adapts to a target KL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ppo_cli.ppo.config import PPOConfig

ADAPTATION = 1.5  # factor by which the rate is raised or lowered


def make_scheduler(config: PPOConfig, optimizer: torch.optim.Optimizer) -> LambdaLR | None:
    """The schedule of `lr_scheduler_type` and `warmup_steps`; None where none is needed.

    It ends after `steps` samples.
    """
    kind = config.lr_scheduler_type
    if kind == "adaptive" or (kind == "constant" and not config.warmup_steps):
        return None
    return LambdaLR(optimizer, lambda step: learning_rate_factor(config, step))


def learning_rate_factor(config: PPOConfig, step: int) -> float:
    """The factor of the learning rate in a step, counted from 0."""
    warmup, total = config.warmup_steps, config.total_ppo_epochs
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    falling = {
        "constant": 1.0,
        "linear": 1 - progress,
        "adaptive": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }[config.lr_scheduler_type]
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * falling


def follow(schedule: LambdaLR) -> None:
    """Set the learning rates to those of a schedule's next step.

    A schedule's loaded state holds the rates of the saved schedule, which may have had another
    number of steps.
    """
    for group, base, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(schedule.last_epoch)


class AdaptiveLearningRate:
    """A learning rate with which each step moves the policy by `desired_kl`; it falls over the run.

    The rate is lowered after a step whose KL is over twice the target, and raised after one whose
    KL is under half of it. It also falls like `linear`, after a warm-up if there is one, and the
    target falls with its square, because KL grows with the square of a small step.

    Args:
        optimizer: the rates of its groups are the first ones.
        config: `desired_kl`, `warmup_steps`, `min_lr_ratio` and the number of steps are read.

    Source: Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), section 4, adapts the KL
    coefficient so; Rudin et al. 2022 (https://arxiv.org/abs/2109.11978) the learning rate.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: PPOConfig) -> None:
        self._optimizer = optimizer
        self._config = config
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._desired_kl = config.desired_kl
        self._set(step=0)

    def update(self, approx_kl: float, step: int) -> None:
        """Set the rate of the next step.

        Args:
            approx_kl: KL by which this step moved the policy, nats per token.
            step: the number of this step, counted from 0.
        """
        desired = self._desired_kl * learning_rate_factor(self._config, step) ** 2
        factor = 1.0
        if approx_kl > 2 * desired:
            factor = 1 / ADAPTATION
        elif approx_kl < desired / 2:
            factor = ADAPTATION
        self._rates = [rate * factor for rate in self._rates]
        self._set(step + 1)

    def state_dict(self) -> dict[str, Any]:
        """Rates and target, for a checkpoint."""
        return {"rates": self._rates, "desired_kl": self._desired_kl}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Continue from a `state_dict` with `step`, counted from 0, which may exceed the plan."""
        self._rates, self._desired_kl = list(state["rates"]), state["desired_kl"]
        self._set(step)

    def _set(self, step: int) -> None:
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * learning_rate_factor(self._config, step)
