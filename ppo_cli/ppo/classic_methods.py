"""The methods that a step of TRL 0.11.4's `PPOTrainer` is made of, for classes that replace some.

Names, arguments and shapes are those of 0.11.4, the numbers those of this project's own step, which
does not call them (`classic_step.py` does, where one is replaced).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ppo_cli.errors import UsageError
from ppo_cli.kernels.lm_head import entropy, token_logprobs
from ppo_cli.ppo import advantages as adv
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.ppo.experience import Experience
from ppo_cli.ppo.forward import TokenOutputs, logits_and_values, token_forward
from ppo_cli.ppo.losses import kl_penalty, minibatch_loss
from ppo_cli.ppo.optimizer_step import OptimizerStep
from ppo_cli.ppo.packing import TokenBatch
from ppo_cli.ppo.statistics import is_array
from ppo_cli.ppo.step_statistics import (
    MEAN_RATIO,
    minibatch_arrays,
    minibatch_statistics,
    output_means,
    step_statistics,
)
from ppo_cli.utils import processes

NEVER_CALLED = {
    "_step_safety_checker": "check the batch before step",
    "_early_stop": "set early_stopping and target_kl",
    "gather_stats": "replace record_step_stats",
    "_generate_batched": "replace generate",
    "_remove_unused_columns": "replace prepare_dataloader",
    "_set_signature_columns_if_needed": "replace prepare_dataloader",
    "_save_pretrained": "replace save_pretrained",
    "_prepare_deepspeed": "leave it out: models are sharded by FSDP2",
}
"""Methods of TRL 0.11.4's trainer that nothing calls here, and what serves instead."""


@dataclass(frozen=True)
class _Grids:
    """What functions of an `Experience` read of a `TokenBatch`, for grids of another layout.

    `mask` is True where a token counts.
    """

    mask: Tensor

    def flat(self, grid: Tensor) -> Tensor:
        """The numbers that count, row by row."""
        return grid[self.mask]

    def to_rows(self, grid: Tensor) -> Tensor:
        """Grids have the layout of the statistics already."""
        return grid * self.mask


class ClassicMethods:
    """The parts of a step; where a class replaces one, `step` calls them all.

    In shapes, b samples have T tokens with their padding, and V is the size of the vocabulary.
    Column t of a grid (b, T - 1) belongs to token t + 1. `masks` (b, T - 1) are 1 for the response
    tokens that count and 0 elsewhere, where the grids are zero.
    """

    config: PPOConfig
    accelerator: Any
    model: Any
    optimizer: Any
    kl_ctl: Any
    data_collator: Callable[..., Mapping[str, Tensor]]
    _is_cancelled: Tensor | None = None  # the optimizer step, by one of its mini-batches

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__[: cls.__mro__.index(ClassicMethods)]:
            for name in NEVER_CALLED.keys() & vars(base).keys():
                raise UsageError(
                    f"{base.__name__}.{name}: nothing calls this method of TRL 0.11.4, so it would "
                    f"have no effect; {NEVER_CALLED[name]}"
                )

    @property
    def recomputes_activations(self) -> bool:
        """Whether gradient checkpointing is on, by the configuration or by a call of the model."""
        model = self.accelerator.unwrap_model(self.model)
        return self.config.gradient_checkpointing or bool(model.is_gradient_checkpointing)

    def prepare_model_inputs(
        self, queries: Sequence[Tensor], responses: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (b, T) of queries and responses, by `data_collator`."""
        rows = [
            torch.cat([query, response]) for query, response in zip(queries, responses, strict=True)
        ]
        inputs = self.data_collator(
            [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
        )
        device = self.accelerator.device
        return {key: value.to(device) for key, value in inputs.items() if key != "labels"}

    def batched_forward_pass(
        self,
        model: Any,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        model_inputs: Mapping[str, Tensor],
        return_logits: bool = False,
        response_masks: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """A model's outputs for response tokens, `mini_batch_size` samples at a time.

        The model is in eval mode then, or in training mode for gradient checkpointing.

        Args:
            model: with a value head; the policy or the reference.
            queries, responses: b tensors of token ids, 1-D.
            model_inputs: what `prepare_model_inputs` returned; says where tokens have their column.
            return_logits: whether to return logits.
            response_masks: b tensors, 0 for response tokens that do not count.

        Returns:
            Log-probabilities (b, T - 1), logits (b, T - 1, V) or None, values (b, T - 1), masks.
        """
        tokens = TokenBatch.from_lists(
            queries, responses, response_masks, 0, self.accelerator.device
        )
        # `step` has set the rates of dropout to 0; gradient checkpointing needs training mode.
        model.train(self.recomputes_activations and torch.is_grad_enabled())
        parts = [
            self._read(model, tokens.select(indices), return_logits)
            for indices in torch.arange(len(tokens)).split(self.config.mini_batch_size)
        ]
        place = _to_columns(tokens, model_inputs["attention_mask"])
        grids = [place(torch.cat(flat)) for flat in zip(*parts, strict=True)]
        masks = place(torch.ones_like(tokens.flat_targets))
        return grids[0], grids[2] if return_logits else None, grids[1], masks

    def _read(self, model: Any, tokens: TokenBatch, return_logits: bool) -> tuple[Tensor, ...]:
        """Log-probabilities and values (N,), and logits (N, V) where they are asked for."""
        temperature = self.config.temperature
        if not return_logits:
            outputs = token_forward(model, tokens, temperature)
            return outputs.logprobs, outputs.values
        logits, values = logits_and_values(model, tokens, temperature)
        return token_logprobs(logits, tokens.flat_targets), values, logits

    def _kl_penalty(self, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
        """KL penalty (T - 1,) of one sample; with `full` from log-probabilities (T - 1, V)."""
        if self.config.kl_penalty == "full":
            return (logprob.exp() * (logprob - ref_logprob)).sum(-1)
        return kl_penalty(logprob, ref_logprob, self.config.kl_penalty)

    def compute_rewards(
        self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, masks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards of tokens: the score at the last one, minus the KL coefficient times the penalty.

        Args:
            scores: (b,) scaled and clipped.
            logprobs, ref_logprobs: of policy and reference before the update.
            masks: (b, T - 1).

        Returns:
            Rewards, the part of them that is KL, and KL penalties, (b, T - 1) each.
        """
        pairs = zip(logprobs, ref_logprobs, strict=True)
        kls = torch.stack([self._kl_penalty(*pair) for pair in pairs]) * masks
        non_score_rewards = -self.kl_ctl.value * kls
        is_last = (masks.cumsum(1) == masks.sum(1, keepdim=True)) * masks
        return non_score_rewards + is_last * scores.unsqueeze(1), non_score_rewards, kls

    def compute_advantages(
        self, values: Tensor, rewards: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values, advantages and returns, (b, T - 1) each, of values and rewards (b, T - 1)."""
        config, counts = self.config, mask.bool()
        if config.whiten_rewards:
            rewards = adv.masked_whiten(rewards, counts, shift_mean=False)
        # Tokens that do not count are left out, not passed through: those that do move together.
        order = (~counts).int().argsort(dim=1, stable=True)
        values_left, rewards_left, left = (g.gather(1, order) for g in (values, rewards, counts))
        found = adv.generalized_advantages(
            values_left, rewards_left, left, config.gamma, config.lam
        )
        advantages, returns = (torch.zeros_like(grid).scatter(1, order, grid) for grid in found)
        if config.advantage_norm == "batch":
            advantages = adv.masked_whiten(advantages, counts)
        return values * counts, advantages, returns

    def loss(
        self,
        old_logprobs: Tensor,
        values: Tensor,
        logits: Tensor,
        vpreds: Tensor,
        logprobs: Tensor,
        mask: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Policy loss, value loss times `vf_coef`, and statistics of a mini-batch.

        Args:
            old_logprobs, values: before the update, (b, T - 1).
            logits: now, (b, T - 1, V).
            vpreds, logprobs: values and log-probabilities now, (b, T - 1).
            mask, advantages, returns: (b, T - 1).

        Returns:
            Two scalars, which are 0 where the mean ratio exceeds `ratio_threshold`, and statistics
            under their keys without `ppo/`.
        """
        outputs = TokenOutputs(logprobs, entropy(logits), vpreds)
        batch = _experience(mask, old_logprobs, old_logprobs, values, advantages, returns)
        losses = minibatch_loss(
            logprobs=logprobs,
            entropies=outputs.entropies,
            values=vpreds,
            old_logprobs=old_logprobs,
            ref_logprobs=old_logprobs,  # for kl_in_loss alone, which is refused
            old_values=values,
            advantages=advantages,
            returns=returns,
            mask=batch.tokens.mask,
            config=self.config,
            kl_coef=0.0,
        )
        means = output_means(batch, outputs, losses)
        is_skipped = ~(means[MEAN_RATIO] <= self.config.ratio_threshold)
        stats = minibatch_statistics(batch, means, is_skipped) | minibatch_arrays(batch, outputs)
        value_loss = self.config.vf_coef * losses.value.loss
        both = losses.total - value_loss, value_loss
        policy_loss, value_loss = (torch.where(is_skipped, 0.0, loss) for loss in both)
        return policy_loss, value_loss, stats

    def train_minibatch(
        self,
        old_logprobs: Tensor,
        values: Tensor,
        logprobs: Tensor,
        logits: Tensor,
        vpreds: Tensor,
        mask: Tensor,
        advantages: Tensor,
        returns: Tensor,
    ) -> dict[str, Any]:
        """The backward pass of a mini-batch; after the last one of a step the weights move.

        Arguments and statistics are those of `loss`. `accelerator.backward` divides the loss by the
        number of accumulated mini-batches, and `optimizer.step()` does nothing before the last one.
        """
        policy_loss, value_loss, stats = self.loss(
            old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns
        )
        self.accelerator.backward(policy_loss + value_loss)
        is_skipped = torch.as_tensor(stats.get("policy/skipped", 0.0), device=mask.device) > 0
        if self._is_cancelled is not None:
            is_skipped = is_skipped | self._is_cancelled
        self._is_cancelled = is_skipped
        if self.accelerator.sync_gradients:
            cancelled = processes.total(is_skipped.float()) > 0
            step = OptimizerStep(self.model, self.optimizer, self.accelerator, self.config)
            step.after_backward(unless=cancelled)
            self.optimizer.zero_grad()
            self._is_cancelled = None
        return stats

    def record_step_stats(self, kl_coef: float, **data: Any) -> dict[str, Any]:
        """Statistics of a step, tensors and numbers.

        Args:
            kl_coef: the KL coefficient that the step used.
            data: `scores` (B,); `logprobs`, `ref_logprobs`, `non_score_reward`, `kls` and `masks`
                (B, T - 1); `queries` and `responses`, B tensors each; `train_stats`, what
                `train_minibatch` returned: (M, ...) a row for each of M mini-batches, and of
                arrays (1, N) a number for each token.
        """
        mask = data["masks"].bool()
        logprobs, ref_logprobs, kls, kl_rewards = (
            data[key] * mask for key in ("logprobs", "ref_logprobs", "kls", "non_score_reward")
        )
        batch = _experience(mask, logprobs, ref_logprobs, logprobs, logprobs, logprobs)
        updates = {
            key: value[0] if is_array(f"ppo/{key}") else value
            for key, value in data["train_stats"].items()
        }
        return step_statistics(batch, kls, kl_rewards, data["scores"], kl_coef, updates)


METHODS = (
    "prepare_model_inputs",
    "batched_forward_pass",
    "_kl_penalty",
    "compute_rewards",
    "compute_advantages",
    "loss",
    "train_minibatch",
    "record_step_stats",
)


def replaced_methods(trainer: ClassicMethods) -> list[str]:
    """Names of the `METHODS` that a trainer's class, or somebody at run time, has replaced."""
    return [
        name
        for name in METHODS
        if getattr(getattr(trainer, name), "__func__", None) is not vars(ClassicMethods)[name]
    ]


def pad_right(rows: Sequence[Mapping[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """Rows of `input_ids` and `attention_mask` as (b, T) tensors, padded on the right."""
    fill = {"input_ids": pad_token_id, "attention_mask": 0}
    return {key: pad_sequence([row[key] for row in rows], True, fill[key]) for key in fill}


def _experience(mask: Tensor, *grids: Tensor) -> Experience:
    """Grids of any layout, where functions of an `Experience` read them by their mask."""
    return Experience(cast(TokenBatch, _Grids(mask.bool())), *grids)


def _to_columns(tokens: TokenBatch, attention_mask: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from (N, ...) numbers of the tokens that count to a grid (b, T - 1, ...).

    Args:
        tokens: the samples.
        attention_mask: (b, T) of their rows, which may be padded on either side.
    """
    rows, width = attention_mask.shape[0], attention_mask.shape[1] - 1
    first = (attention_mask.cumsum(1) == 0).sum(1, keepdim=True)
    columns = first + torch.arange(rows, device=first.device).unsqueeze(1) * width
    places = (columns + tokens.sources.to(first.device)).flatten()[tokens.cells]

    def place(flat: Tensor) -> Tensor:
        grid = flat.new_zeros(rows * width, *flat.shape[1:])
        return grid.index_copy(0, places, flat).view(rows, width, *flat.shape[1:])

    return place
