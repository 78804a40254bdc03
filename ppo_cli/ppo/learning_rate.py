"""The learning rate over a run: schedules, and a rate that finds itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ppo_cli.ppo.config import PPOConfig

ADAPTATION = 1.5  # factor by which the rate is raised or lowered


def make_scheduler(
    config: PPOConfig, optimizer: torch.optim.Optimizer, processes: int
) -> LambdaLR | None:
    """The schedule that `lr_scheduler_type` and `warmup_steps` name; None where none is needed.

    It ends after `steps` samples. accelerate steps it once a process.
    """
    kind = config.lr_scheduler_type
    if kind == "adaptive" or (kind == "constant" and not config.warmup_steps):
        return None
    return LambdaLR(optimizer, lambda calls: learning_rate_factor(config, calls // processes))


def learning_rate_factor(config: PPOConfig, step: int) -> float:
    """What the learning rate is multiplied with in a step, counted from 0."""
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
    """Set the learning rates that a schedule has for its next step.

    When its state is loaded they are those of the schedule that was saved, which may have had
    another number of steps.
    """
    for group, base, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(schedule.last_epoch)


class AdaptiveLearningRate:
    """A learning rate that steps move the policy by `desired_kl` with, falling over the run.

    The rate is lowered after a step that moved over twice as far as it should, and raised after a
    timid one. Meanwhile it falls as `linear` does, after a warm-up if there is one, and what a step
    should move falls with its square: KL grows with the square of a small step.

    Args:
        optimizer: its groups' rates are those to begin with.
        config: `desired_kl`, `warmup_steps`, `min_lr_ratio` and the number of steps are read.

    Source: Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), section 4, does so with the KL
    coefficient; Rudin et al. 2022 (https://arxiv.org/abs/2109.11978) with the learning rate.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: PPOConfig) -> None:
        self._optimizer = optimizer
        self._config = config
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._desired_kl = config.desired_kl
        self._set(step=0)

    def update(self, moved: float, step: int) -> None:
        """Set the rate of the step that follows.

        Args:
            moved: what the step just made moved the policy by, nats per token.
            step: its number, counted from 0.
        """
        desired = self._desired_kl * learning_rate_factor(self._config, step) ** 2
        factor = 1.0
        if moved > 2 * desired:
            factor = 1 / ADAPTATION
        elif moved < desired / 2:
            factor = ADAPTATION
        self._rates = [rate * factor for rate in self._rates]
        self._set(step + 1)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"rates": self._rates, "desired_kl": self._desired_kl}

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from a `state_dict` with a step, counted from 0; there may be more than planned."""
        self._rates, self._desired_kl = list(state["rates"]), state["desired_kl"]
        self._set(step)

    def _set(self, step: int) -> None:
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * learning_rate_factor(self._config, step)
