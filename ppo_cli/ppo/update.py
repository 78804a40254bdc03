"""The optimisation phase of a step: epochs over the batch in mini-batches."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ppo_cli.ppo.config import PPOConfig
from ppo_cli.ppo.experience import Experience
from ppo_cli.ppo.forward import TokenOutputs, token_forward
from ppo_cli.ppo.losses import minibatch_loss
from ppo_cli.ppo.optimizer_step import OptimizerStep, clear_other_gradients
from ppo_cli.ppo.packing import TokenBatch
from ppo_cli.ppo.statistics import is_array
from ppo_cli.ppo.step_statistics import (
    MEAN_K3,
    MEAN_RATIO,
    join_minibatches,
    minibatch_arrays,
    minibatch_statistics,
    output_means,
)
from ppo_cli.utils import processes

Statistics = dict[str, Tensor]


@dataclass
class Update:
    """The optimisation phase of one step.

    Mini-batches are drawn from the samples of all processes. Each process computes the loss of its
    share of a mini-batch, weighted so that the mean of the processes' gradients is the gradient
    of the mean over all tokens of the mini-batch.

    Attributes:
        policy: the model with a value head, as `accelerator` prepared it.
        optimizer: the optimizer, as `accelerator` prepared it.
        accelerator: scales, synchronises and clips gradients.
        shuffle: draws the order of samples in each epoch.
        config: the settings.
        kl_coef: KL coefficient, for `kl_in_loss`.
        head_alone: whether only the value head learns.
    """

    policy: Any
    optimizer: Any
    accelerator: Accelerator
    shuffle: np.random.RandomState
    config: PPOConfig
    kl_coef: float = 0.0
    head_alone: bool = False
    _first_outputs: TokenOutputs | None = field(default=None, init=False, repr=False)

    @cached_property
    def optimizer_step(self) -> OptimizerStep:
        """Moves the weights."""
        return OptimizerStep(
            self.policy, self.optimizer, self.accelerator, self.config, self._averages_itself
        )

    @property
    def _averages_itself(self) -> bool:
        """Whether gradients are averaged over the processes here.

        DistributedDataParallel waits for gradients of all weights that trained when it was made.
        """
        return self.head_alone and isinstance(self.policy, DistributedDataParallel)

    @property
    def is_one_pass(self) -> bool:
        """Whether an epoch is one forward over the whole batch."""
        return self.config.mini_batch_size == self.config.batch_size

    def forward_before(self, tokens: TokenBatch) -> TokenOutputs:
        """The policy's outputs before the update.

        Where one mini-batch is the whole batch, its first epoch would repeat this forward. So it is
        made with gradients, and `run` begins with it.
        """
        with torch.set_grad_enabled(self.is_one_pass), self._synchronising(True):
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
        joined = join_minibatches(collected)
        arrays = {key: value for key, value in joined.items() if is_array(f"ppo/{key}")}
        everyone = processes.gather_rows(torch.stack(list(arrays.values()), dim=1))
        return joined | dict(zip(arrays, everyone.unbind(1), strict=True))

    def _epoch(self, experience: Experience) -> tuple[list[Statistics], bool]:
        """A pass over the batch: its mini-batches' statistics, and whether it is the last."""
        collected: list[Statistics] = []
        order = torch.from_numpy(self.shuffle.permutation(len(experience.tokens)))
        for indices in order.split(self.config.backward_batch_size * processes.count()):
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
        parts = indices.split(self.config.mini_batch_size * processes.count())
        for i, part in enumerate(parts):
            is_last = i == len(parts) - 1
            with self._synchronising(is_last):
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
        clear_other_gradients(self.policy, self.optimizer)
        return collected, is_past_limit

    def _minibatch(
        self, experience: Experience, indices: Tensor
    ) -> tuple[Tensor, Statistics, Tensor, Tensor]:
        """Loss and statistics of the samples at `indices`, and the two flags of `_limits`.

        The loss is that of this process's share, the statistics and flags are of all.
        """
        whole, order = self._samples(experience, indices)
        batch, weight = _share(whole)
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
        means = _pooled(output_means(batch, outputs, loss), weight)
        is_skipped, is_past_limit = self._limits(means)
        stats = minibatch_statistics(whole, means, is_skipped)
        stats |= minibatch_arrays(batch, outputs, order if batch is whole else None)
        total = loss.total if batch is whole else loss.total * (weight * processes.count())
        return total, stats, is_skipped, is_past_limit

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

    def _limits(self, means: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Whether a mini-batch exceeds `ratio_threshold`, and `max_approx_kl`: two bool scalars."""
        # Written so that a mean that is not a number counts as too large.
        is_skipped = ~(means[MEAN_RATIO] <= self.config.ratio_threshold)
        if self.config.max_approx_kl is None:
            return is_skipped, torch.zeros_like(is_skipped)
        return is_skipped, means[MEAN_K3] > self.config.max_approx_kl

    def _exceeds_target_kl(self, stats: Mapping[str, Tensor]) -> bool:
        return bool(stats["policy/policykl"] > 1.5 * self.config.target_kl)

    def _synchronising(self, is_last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward: the last backward of a step averages the gradients."""
        if is_last and not self._averages_itself:
            return nullcontext()
        # accelerate's own accumulation would step early at the end of the dataloader.
        manager: AbstractContextManager[Any] = self.accelerator.no_sync(self.policy)
        return manager


def _share(batch: Experience) -> tuple[Experience, float]:
    """This process's share of a mini-batch, and the part of the tokens that count in it."""
    if processes.count() == 1:
        return batch, 1.0
    rows = processes.rows(len(batch.tokens))
    own = batch.select(torch.arange(len(batch.tokens))[rows])
    return own, int(own.tokens.counts.sum()) / max(int(batch.tokens.counts.sum()), 1)


def _pooled(means: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """Means over the tokens of all processes from those over this one's, a `weight` of all."""
    if processes.count() == 1:
        return dict(means)
    pooled = processes.total(torch.stack([mean.detach() for mean in means.values()]) * weight)
    return dict(zip(means, pooled.unbind(), strict=True))
