"""The optimisation phase of a step: epochs over the batch in mini-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ppo_cli.ppo import losses
from ppo_cli.ppo.advantages import masked_mean, masked_whiten
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.ppo.experience import Experience, TokenOutputs, token_forward
from ppo_cli.ppo.optimizer_step import OptimizerStep
from ppo_cli.ppo.step_statistics import minibatch_statistics
from ppo_cli.utils.device import modes_kept, send

ARRAYS = ("policy/ratio", "policy/advantages")


@dataclass(frozen=True)
class Update:
    """What the optimisation phase works with.

    Attributes:
        policy: the model with a value head, as `accelerator` prepared it.
        optimizer: likewise.
        accelerator: scales, synchronises and clips gradients.
        shuffle: draws the order of samples in each epoch.
        config: the settings.
        kl_coef: KL coefficient, for `kl_in_loss`.
    """

    policy: Any
    optimizer: Any
    accelerator: Accelerator
    shuffle: np.random.RandomState
    config: PPOConfig
    kl_coef: float = 0.0

    @cached_property
    def optimizer_step(self) -> OptimizerStep:
        """How the weights move."""
        return OptimizerStep(self.policy, self.optimizer, self.accelerator, self.config)

    @property
    def is_one_pass(self) -> bool:
        """Whether an epoch is one forward over the whole batch.

        Then the first of them may be made before the advantages are known.
        """
        return self.config.mini_batch_size == self.config.batch_size

    def run(self, experience: Experience, first: TokenOutputs | None = None) -> dict[str, Tensor]:
        """All epochs over the batch.

        Args:
            experience: the batch.
            first: the first epoch's forward over the whole batch, if it was made already.

        Returns:
            Statistics of the mini-batches in training order, stacked; those named in `ARRAYS`
            joined, one number a token that counts.
        """
        collected: list[dict[str, Tensor]] = []
        for _ in range(self.config.ppo_epochs):
            stats, is_last = self._epoch(experience, first)
            collected += stats
            first = None
            if is_last:
                break
        for each in collected:
            too_far = ~(each.pop("mean_ratio") <= self.config.ratio_threshold)
            each["policy/skipped"] = too_far.float()
        join: dict[str, Callable] = dict.fromkeys(ARRAYS, torch.cat)
        keys = [key for key in collected[0] if key != "moved"]
        return {key: join.get(key, torch.stack)([s[key] for s in collected]) for key in keys}

    def _epoch(
        self, experience: Experience, first: TokenOutputs | None
    ) -> tuple[list[dict[str, Tensor]], bool]:
        """A pass over the batch: its mini-batches' statistics, and whether it is the last."""
        collected: list[dict[str, Tensor]] = []
        order = torch.from_numpy(self.shuffle.permutation(len(experience.tokens)))
        for indices in order.split(self.config.backward_batch_size):
            stats = self._optimizer_step(experience, indices, first)
            collected += stats
            first = None
            if self.config.max_approx_kl is not None and any(map(self._is_past_limit, stats)):
                return collected, True
        is_last = self.config.early_stopping and self._moved_too_far(collected[-1])
        return collected, is_last

    def _optimizer_step(
        self, experience: Experience, indices: Tensor, outputs: TokenOutputs | None
    ) -> list[dict[str, Tensor]]:
        """Accumulate over the mini-batches of `indices`, then move the weights once.

        A mini-batch whose mean ratio exceeds `ratio_threshold`, or whose KL from the old policy
        exceeds `max_approx_kl`, cancels the step. Nothing here waits for a GPU.
        """
        step = self.optimizer_step
        collected: list[dict[str, Tensor]] = []
        cancelled = torch.zeros((), dtype=torch.bool, device=experience.tokens.device)
        parts = indices.split(self.config.mini_batch_size)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            # accelerate's own accumulation would step early at the end of the dataloader.
            with nullcontext() if last else self.accelerator.no_sync(self.policy):
                loss, stats = self._minibatch(experience, part, outputs)
                collected.append(stats)
                too_far = ~(stats["mean_ratio"] <= self.config.ratio_threshold)
                for key in ("loss/policy", "loss/value", "loss/total"):
                    stats[key] = torch.where(too_far, 0.0, stats[key])
                cancelled = cancelled | too_far
                if self.config.max_approx_kl is not None:
                    cancelled = cancelled | self._is_past_limit(stats)
                moves = step.is_within_backward and last
                with step.within_backward(unless=cancelled) if moves else nullcontext():
                    self.accelerator.backward(loss / len(parts))
        if not step.is_within_backward:
            step.after_backward(unless=cancelled)
        self.optimizer.zero_grad(set_to_none=True)
        return collected

    def _minibatch(
        self, experience: Experience, indices: Tensor, outputs: TokenOutputs | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and statistics of the samples at `indices`.

        `outputs`, if given, are the policy's over the whole batch, and `indices` all of it.
        """
        in_order = experience.tokens.select(indices)
        # The whole batch is laid out already, and learning from it knows no order.
        is_whole = len(indices) == len(experience.tokens)
        tokens = experience.tokens if is_whole else in_order
        mask, rows = tokens.mask, send(indices, tokens.device)

        def chosen(grid: Tensor) -> Tensor:
            return grid if is_whole else grid[rows, : mask.shape[1]]

        def reported(grid: Tensor) -> Tensor:
            return in_order.flat(grid[rows] if is_whole else grid)

        old_logprobs, old_values = chosen(experience.logprobs), chosen(experience.values)
        advantages, returns = chosen(experience.advantages), chosen(experience.returns)
        if self.config.advantage_norm == "mini_batch":
            advantages = masked_whiten(advantages, mask)
        if outputs is None:
            outputs = token_forward(self.policy, tokens, self.config.temperature)
        logprobs, entropies, values = map(tokens.to_grid, outputs)
        log_ratio = logprobs - old_logprobs
        ratio = log_ratio.exp()

        policy = losses.policy_loss(ratio, advantages, mask, self.config.cliprange)
        value = losses.value_loss(values, old_values, returns, mask, self.config.cliprange_value)
        loss = policy.loss + self.config.vf_coef * value.loss
        if self.config.ent_coef:
            loss = loss - self.config.ent_coef * masked_mean(entropies, mask)
        if self.config.kl_in_loss:
            ref_logprobs = chosen(experience.ref_logprobs)
            penalty = losses.kl_penalty(logprobs, ref_logprobs, self.config.kl_penalty)
            loss = loss + self.kl_coef * masked_mean(penalty, mask)
        with torch.no_grad():
            stats = {
                "loss/policy": policy.loss.detach(),
                "loss/value": value.loss.detach(),
                "loss/total": loss.detach(),
                "policy/clipfrac": policy.clipfrac,
                "val/clipfrac": value.clipfrac,
                "policy/advantages": reported(advantages),
                "policy/ratio": reported(ratio.detach()),
                "mean_ratio": self.accelerator.reduce(masked_mean(ratio.detach(), mask), "mean"),
                "moved": self.accelerator.reduce(self._moved(log_ratio.detach(), mask), "mean"),
                **minibatch_statistics(
                    log_ratio=log_ratio.detach(),
                    advantages=advantages,
                    returns=returns,
                    old_values=old_values,
                    values=values.detach(),
                    mask=mask,
                    entropies=entropies.detach(),
                ),
            }
        return loss, stats

    @staticmethod
    def _moved(log_ratio: Tensor, mask: Tensor) -> Tensor:
        """KL of the policy that sampled from the policy now, nats per token, by `k3`."""
        return masked_mean(torch.expm1(log_ratio) - log_ratio, mask)

    def _moved_too_far(self, stats: Mapping[str, Tensor]) -> bool:
        policykl = self.accelerator.reduce(stats["policy/policykl"], "mean")
        return bool(policykl > 1.5 * self.config.target_kl)

    def _is_past_limit(self, stats: Mapping[str, Tensor]) -> Tensor:
        return stats["moved"] > (self.config.max_approx_kl or math.inf)


@contextmanager
def dropout_off(model: torch.nn.Module, *, keep_training_mode: bool) -> Iterator[None]:
    """No dropout inside the block: ratios compare with probabilities that were taken without it.

    Eval mode does that. Gradient checkpointing works in training mode alone; with
    `keep_training_mode` the modules that are checkpointed keep it, and what they drop or add at
    random, by their own settings or the configuration's, is set to zero. All is as before
    afterwards.
    """
    checkpointed = []
    if keep_training_mode:
        checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    noises = _noises(checkpointed)
    with modes_kept(model):
        model.eval()
        for module in checkpointed:
            module.training = True
        for owner, name, _ in noises:
            setattr(owner, name, 0.0)
        try:
            yield
        finally:
            for owner, name, value in noises:
                setattr(owner, name, value)


@contextmanager
def head_alone(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block only the value head learns."""
    others = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "v_head." not in name
    ]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _noises(modules: Sequence[torch.nn.Module]) -> list[tuple[Any, str, float]]:
    """Owner, attribute and value of every share that modules drop, or scale of noise they add."""
    configs = {id(m.config): m.config for m in modules if hasattr(m, "config")}
    return [
        (owner, name, value)
        for owner in (*modules, *configs.values())
        for name, value in vars(owner).items()
        if isinstance(value, float) and any(word in name for word in ("drop", "jitter", "noise"))
    ]
