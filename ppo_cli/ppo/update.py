"""The optimisation phase of a step: epochs over the batch in mini-batches."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ppo_cli.ppo.advantages import masked_mean
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.ppo.experience import Experience
from ppo_cli.ppo.forward import TokenOutputs, token_forward
from ppo_cli.ppo.losses import kl_penalty, minibatch_loss
from ppo_cli.ppo.optimizer_step import OptimizerStep
from ppo_cli.ppo.packing import TokenBatch
from ppo_cli.ppo.step_statistics import join_minibatches, minibatch_statistics

Statistics = dict[str, Tensor]


@dataclass
class Update:
    """The optimisation phase of one step.

    Attributes:
        policy: the model with a value head, as `accelerator` prepared it.
        optimizer: the optimizer, as `accelerator` prepared it.
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
    _first_outputs: TokenOutputs | None = field(default=None, init=False, repr=False)

    @cached_property
    def optimizer_step(self) -> OptimizerStep:
        """Moves the weights."""
        return OptimizerStep(self.policy, self.optimizer, self.accelerator, self.config)

    @property
    def is_one_pass(self) -> bool:
        """Whether an epoch is one forward over the whole batch."""
        return self.config.mini_batch_size == self.config.batch_size

    def forward_before(self, tokens: TokenBatch) -> TokenOutputs:
        """The policy's outputs before the update.

        Where one mini-batch is the whole batch, its first epoch would repeat this forward. So it is
        made with gradients, and `run` begins with it.
        """
        with torch.set_grad_enabled(self.is_one_pass):
            outputs = token_forward(self.policy, tokens, self.config.temperature)
        if self.is_one_pass:
            self._first_outputs = outputs
        return outputs

    def run(self, experience: Experience) -> Statistics:
        """All epochs over the batch.

        Returns:
            Statistics of the mini-batches in training order: scalars stacked, arrays joined.
        """
        collected: list[Statistics] = []
        for _ in range(self.config.ppo_epochs):
            stats, is_last = self._epoch(experience)
            collected += stats
            if is_last:
                break
        return join_minibatches(collected)

    def _epoch(self, experience: Experience) -> tuple[list[Statistics], bool]:
        """A pass over the batch: its mini-batches' statistics, and whether it is the last."""
        collected: list[Statistics] = []
        order = torch.from_numpy(self.shuffle.permutation(len(experience.tokens)))
        for indices in order.split(self.config.backward_batch_size):
            stats, is_past_limit = self._optimizer_step(experience, indices)
            collected += stats
            if self.config.max_approx_kl is not None and is_past_limit:
                return collected, True
        is_last = self.config.early_stopping and self._exceeds_target_kl(collected[-1])
        return collected, is_last

    def _optimizer_step(
        self, experience: Experience, indices: Tensor
    ) -> tuple[list[Statistics], Tensor]:
        """Accumulate gradients over the mini-batches of `indices`, then move the weights once.

        A mini-batch whose mean ratio exceeds `ratio_threshold`, or whose KL from the old policy
        exceeds `max_approx_kl`, cancels the step. Nothing here waits for a GPU.

        Returns:
            The mini-batches' statistics, and whether one of them exceeds `max_approx_kl`.
        """
        step = self.optimizer_step
        collected: list[Statistics] = []
        is_cancelled = is_past_limit = experience.tokens.mask.new_zeros(())
        parts = indices.split(self.config.mini_batch_size)
        for i, part in enumerate(parts):
            is_last = i == len(parts) - 1
            # accelerate's own accumulation would step early at the end of the dataloader.
            with nullcontext() if is_last else self.accelerator.no_sync(self.policy):
                loss, stats, is_skipped, is_past = self._minibatch(experience, part)
                collected.append(stats)
                is_past_limit = is_past_limit | is_past
                is_cancelled = is_cancelled | is_skipped | is_past
                moves = step.is_within_backward and is_last
                with step.within_backward(unless=is_cancelled) if moves else nullcontext():
                    self.accelerator.backward(loss / len(parts))
        if not step.is_within_backward:
            step.after_backward(unless=is_cancelled)
        self.optimizer.zero_grad(set_to_none=True)
        return collected, is_past_limit

    def _minibatch(
        self, experience: Experience, indices: Tensor
    ) -> tuple[Tensor, Statistics, Tensor, Tensor]:
        """Loss and statistics of the samples at `indices`, and the two flags of `_limits`."""
        batch, order = self._samples(experience, indices)
        outputs = TokenOutputs(*map(batch.tokens.to_grid, self._forward(batch.tokens)))
        loss = minibatch_loss(
            logprobs=outputs.logprobs,
            entropies=outputs.entropies,
            values=outputs.values,
            old_logprobs=batch.logprobs,
            ref_logprobs=batch.ref_logprobs,
            old_values=batch.values,
            advantages=batch.advantages,
            returns=batch.returns,
            mask=batch.tokens.mask,
            config=self.config,
            kl_coef=self.kl_coef,
        )
        is_skipped, is_past_limit = self._limits(outputs.logprobs, batch)
        stats = minibatch_statistics(batch, outputs, loss, is_skipped, order)
        return loss.total, stats, is_skipped, is_past_limit

    def _samples(self, experience: Experience, indices: Tensor) -> tuple[Experience, Tensor | None]:
        """The samples of a mini-batch, and their order in training where they stand in another.

        The whole batch stays as it is: its rows are laid out already, and the loss has no order.
        """
        batch, order = experience, indices if len(indices) == len(experience.tokens) else None
        if order is None:
            batch = experience.select(indices)
        if self.config.advantage_norm == "mini_batch":
            batch = batch.with_whitened_advantages()
        return batch, order

    def _forward(self, tokens: TokenBatch) -> TokenOutputs:
        """The policy's outputs (N,), the first time those that `forward_before` kept."""
        outputs, self._first_outputs = self._first_outputs, None
        if outputs is None:
            outputs = token_forward(self.policy, tokens, self.config.temperature)
        return outputs

    @torch.no_grad()
    def _limits(self, logprobs: Tensor, batch: Experience) -> tuple[Tensor, Tensor]:
        """Whether a mini-batch exceeds `ratio_threshold`, and `max_approx_kl`: two bool scalars.

        Both are decided by the mean over the processes, so that all do the same.
        """
        mask = batch.tokens.mask
        mean_ratio = masked_mean((logprobs - batch.logprobs).exp(), mask)
        # Written so that a mean that is not a number counts as too large.
        is_skipped = ~(self._process_mean(mean_ratio) <= self.config.ratio_threshold)
        if self.config.max_approx_kl is None:
            return is_skipped, torch.zeros_like(is_skipped)
        approx_kl = masked_mean(kl_penalty(batch.logprobs, logprobs, "k3"), mask)
        return is_skipped, self._process_mean(approx_kl) > self.config.max_approx_kl

    def _exceeds_target_kl(self, stats: Mapping[str, Tensor]) -> bool:
        policy_kl = self._process_mean(stats["policy/policykl"])
        return bool(policy_kl > 1.5 * self.config.target_kl)

    def _process_mean(self, value: Tensor) -> Tensor:
        mean: Tensor = self.accelerator.reduce(value, "mean")
        return mean
