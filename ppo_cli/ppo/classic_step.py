"""A step of a trainer that replaces methods of TRL 0.11.4: it calls them as 0.11.4 does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ppo_cli.errors import UsageError
from ppo_cli.ppo.advantages import masked_whiten, mean_of_others
from ppo_cli.ppo.optimizer_step import clear_other_gradients
from ppo_cli.ppo.statistics import is_array
from ppo_cli.ppo.step_statistics import Stopwatch
from ppo_cli.utils import processes

Statistics = dict[str, Tensor]


@dataclass(frozen=True)
class _Batch:
    """The samples of all processes, and what the methods said of them, (B, T - 1) each."""

    queries: Sequence[Tensor]
    responses: Sequence[Tensor]
    inputs: Mapping[str, Tensor]
    logprobs: Tensor
    values: Tensor
    masks: Tensor
    advantages: Tensor
    returns: Tensor


def refuse_beside_methods(trainer: Any, replaced: Sequence[str], potentials: Any) -> None:
    """Raise `UsageError` for what a step by replaced methods does not do."""
    config = trainer.config
    unserved = {
        "potentials": potentials is not None,
        "kl_in_loss": config.kl_in_loss,
        "max_approx_kl": config.max_approx_kl is not None,
        "an encoder-decoder": bool(config.is_encoder_decoder),
        "value_warmup_steps in several processes": bool(config.value_warmup_steps)
        and processes.count() > 1,
    }
    for name in (name for name, is_asked in unserved.items() if is_asked):
        raise UsageError(
            f"{type(trainer).__name__} replaces {', '.join(replaced)}, and a step by methods of "
            f"TRL 0.11.4 does not do {name}: leave one of them out"
        )


def classic_step(
    trainer: Any,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    response_masks: Sequence[Tensor] | None,
    scores: Tensor,
    clock: Stopwatch,
) -> dict[str, Any]:
    """The update of `PPOTrainer.step`, by the trainer's methods.

    Args:
        trainer: a `PPOTrainer`, in the modes of a step.
        queries, responses, response_masks: of this process, as in `step`.
        scores: (B,) of all processes, scaled and clipped.
        clock: measures the parts.

    Returns:
        What `record_step_stats` returned.

    Raises:
        UsageError: the KL is missing in it.
    """
    config, kl_coef = trainer.config, trainer.kl_ctl.value
    queries, responses = map(processes.gather_tensors, (queries, responses))
    queries, responses = ([t.to(scores.device) for t in part] for part in (queries, responses))
    inputs = trainer.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        policy, reference, values, masks = _before(
            trainer, queries, responses, response_masks, inputs
        )
        clock.lap("forward_pass")
        compared = scores - mean_of_others(scores, config.responses_per_query)
        rewards, kl_rewards, kls = trainer.compute_rewards(
            compared, policy.compared, reference.compared, masks
        )
        clock.lap("compute_rewards")
        values, advantages, returns = trainer.compute_advantages(values, rewards, masks)
        clock.lap("compute_advantages")
    logprobs, values = policy.logprobs.float(), values.float()
    batch = _Batch(queries, responses, inputs, logprobs, values, masks, advantages, returns)
    updates = _update(trainer, batch)
    clock.lap("optimize_step")
    stats: dict[str, Any] = trainer.record_step_stats(
        scores=scores,
        logprobs=policy.logprobs,
        ref_logprobs=reference.logprobs,
        non_score_reward=kl_rewards,
        train_stats=updates,
        kl_coef=kl_coef,
        masks=masks,
        queries=queries,
        responses=responses,
        kls=kls,
    )
    if "objective/kl" not in stats:
        raise UsageError(
            "record_step_stats returned no 'objective/kl', which moves the KL coefficient: begin "
            "with super().record_step_stats(kl_coef, **data)"
        )
    return stats


@dataclass(frozen=True)
class _Outputs:
    """Log-probabilities (B, T - 1), and what rewards compare: these, or whole distributions."""

    logprobs: Tensor
    compared: Tensor


def _before(
    trainer: Any,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    response_masks: Sequence[Tensor] | None,
    inputs: Mapping[str, Tensor],
) -> tuple[_Outputs, _Outputs, Tensor, Tensor]:
    """Outputs of policy and reference, values and masks; each process reads its own samples."""
    full = trainer.config.kl_penalty == "full"
    own = processes.rows(len(queries))
    arguments = queries[own], responses[own], {key: value[own] for key, value in inputs.items()}

    def outputs(logprobs: Tensor, logits: Tensor | None) -> _Outputs:
        everyone = processes.gather_rows(logprobs)
        if not full or logits is None:
            return _Outputs(everyone, everyone)
        return _Outputs(everyone, processes.gather_rows(logits.log_softmax(-1)))

    logprobs, logits, values, masks = trainer.batched_forward_pass(
        trainer.model, *arguments, return_logits=full, response_masks=response_masks
    )
    with trainer.reference_active() as reference:
        ref_logprobs, ref_logits, _, _ = trainer.batched_forward_pass(
            reference, *arguments, return_logits=full
        )
    return (
        outputs(logprobs, logits),
        outputs(ref_logprobs, ref_logits),
        processes.gather_rows(values),
        processes.gather_rows(masks),
    )


def _update(trainer: Any, batch: _Batch) -> Statistics:
    """All epochs: statistics of the mini-batches, stacked, arrays joined."""
    config = trainer.config
    collected: list[Statistics] = []
    for _ in range(config.ppo_epochs):
        order = torch.from_numpy(trainer._shuffle.permutation(len(batch.queries)))
        for indices in order.split(config.backward_batch_size * processes.count()):
            parts = indices.split(config.mini_batch_size * processes.count())
            for i, part in enumerate(parts):
                collected.append(_minibatch(trainer, batch, part, len(parts), i == len(parts) - 1))
        if config.early_stopping:
            policykl = collected[-1].get("policy/policykl")
            if policykl is not None and policykl.item() > 1.5 * config.target_kl:
                break
    trainer.optimizer.zero_grad(set_to_none=True)
    joined = {key: [stats[key] for stats in collected] for key in collected[0]}
    return {
        key: torch.cat(values).unsqueeze(0)
        if is_array(f"ppo/{key}")
        else pad_sequence(values, True, -1)
        for key, values in joined.items()
    }


def _minibatch(
    trainer: Any, batch: _Batch, indices: Tensor, count: int, is_last: bool
) -> Statistics:
    """Train on the samples at `indices`, one of `count` mini-batches of an optimizer step."""
    own = indices[processes.rows(len(indices))]
    masks, advantages = batch.masks[own], batch.advantages[own]
    if trainer.config.advantage_norm == "mini_batch":
        whole = masked_whiten(batch.advantages[indices], batch.masks[indices].bool())
        advantages = whole[processes.rows(len(indices))]
    share = 1.0
    if processes.count() > 1:
        share = float(masks.sum() / batch.masks[indices].sum().clamp(min=1))
    with _accumulating(trainer, count, is_last, share):
        logprobs, logits, vpreds, _ = trainer.batched_forward_pass(
            trainer.model,
            [batch.queries[i] for i in own],
            [batch.responses[i] for i in own],
            {key: value[own] for key, value in batch.inputs.items()},
            return_logits=True,
        )
        stats = trainer.train_minibatch(
            batch.logprobs[own],
            batch.values[own],
            logprobs,
            logits,
            vpreds,
            masks,
            advantages,
            batch.returns[own],
        )
    if is_last:
        clear_other_gradients(trainer.model, trainer.optimizer)
    device = masks.device
    flat = {k: torch.as_tensor(v, device=device).detach().float() for k, v in stats.items()}
    return {
        key: processes.gather_rows(value.flatten())
        if is_array(f"ppo/{key}")
        else processes.total(value.flatten() * share)
        for key, value in flat.items()
    }


@contextmanager
def _accumulating(trainer: Any, count: int, is_last: bool, share: float) -> Iterator[None]:
    """Let `accelerator.backward` and `optimizer.step` inside the block accumulate gradients.

    Args:
        trainer: has the accelerator.
        count: mini-batches of an optimizer step; the loss is divided by their number.
        is_last: of them; before it `optimizer.step()` does nothing.
        share: the part of the mini-batch's tokens that this process has. Gradients are averaged
            over the processes, so each loss is weighted by it.
    """
    accelerator = trainer.accelerator
    weight = share * processes.count() / count
    before = accelerator.gradient_accumulation_steps
    accelerator.gradient_accumulation_steps = 1 / weight if weight else float("inf")
    # As `accelerator.accumulate` does, which would step early at the end of the dataloader.
    accelerator.gradient_state._set_sync_gradients(is_last)
    try:
        if is_last:
            yield
        else:
            with accelerator.no_sync(trainer.model):
                yield
    finally:
        accelerator.gradient_accumulation_steps = before
        accelerator.gradient_state._set_sync_gradients(True)
