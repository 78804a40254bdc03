"""What a step knows of its batch before the first update: probabilities, penalties, advantages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppo_cli.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.ppo import advantages as adv
from ppo_cli.ppo import losses
from ppo_cli.ppo.config import PPOSettings
from ppo_cli.ppo.packing import TokenBatch


@dataclass(frozen=True)
class Experience:
    """A batch as the policy that sampled it saw it. Grids are (B, R), see `TokenBatch`.

    Attributes:
        tokens: the sequences.
        logprobs: of the response tokens under the policy that sampled them.
        ref_logprobs: the same under the reference.
        values: the value head's before each token.
        penalties: KL penalty of each token before the coefficient.
        non_score_reward: minus the coefficient times the penalty.
        advantages: whitened.
        returns: targets of the value head.
    """

    tokens: TokenBatch
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    penalties: Tensor
    non_score_reward: Tensor
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class Probabilities:
    """What the models say of a batch, (B, R) each; fields as in `Experience`."""

    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    penalties: Tensor


@torch.no_grad()
def read_probabilities(
    tokens: TokenBatch,
    *,
    policy: Any,
    reference: Any,
    as_reference: Callable[[], AbstractContextManager[None]],
    config: PPOSettings,
) -> Probabilities:
    """Policy and reference over the batch, `mini_batch_size` sequences at a time.

    Args:
        tokens: the sequences.
        policy: the model with a value head, as accelerate prepared it.
        reference: model that is compared with; the policy itself if its adapter can be off.
        as_reference: entered around the reference's forward: turns the adapter off.
        config: `kl_penalty` and `mini_batch_size` are read.
    """
    parts: list[tuple[Tensor, ...]] = []
    for indices in torch.arange(len(tokens)).split(config.mini_batch_size):
        chunk = tokens.select(indices)
        targets = chunk.flat_targets
        logits, values = token_forward(policy, chunk)
        with as_reference():
            ref_logits, _ = token_forward(reference, chunk)
        logprobs = losses.token_logprobs(logits, targets)
        ref_logprobs = losses.token_logprobs(ref_logits, targets)
        if config.kl_penalty == "full":
            penalties = losses.full_kl(logits, ref_logits)
        else:
            penalties = losses.kl_penalty(logprobs, ref_logprobs, config.kl_penalty)
        parts.append((logprobs, ref_logprobs, values, penalties))
    flat = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    return Probabilities(*(tokens.to_grid(tensor) for tensor in flat))


def token_rewards(
    tokens: TokenBatch,
    probabilities: Probabilities,
    scores: Tensor,
    kl_coef: float,
    config: PPOSettings,
) -> tuple[Tensor, Tensor]:
    """Rewards (B, R), whitened where `config` says so, and their part without the score (B, R).

    Args:
        tokens: the sequences.
        probabilities: what `read_probabilities` gave.
        scores: (B,) scaled and clipped.
        kl_coef: the KL coefficient.
        config: `whiten_rewards` is read.
    """
    rewards, non_score = adv.token_rewards(scores, probabilities.penalties, tokens.mask, kl_coef)
    if config.whiten_rewards:
        rewards = adv.masked_whiten(rewards, tokens.mask, shift_mean=False)
    return rewards, non_score


def make_experience(
    tokens: TokenBatch,
    probabilities: Probabilities,
    rewards: Tensor,
    non_score_reward: Tensor,
    config: PPOSettings,
) -> Experience:
    """Advantages and returns of rewards (B, R); `gamma` and `lam` of `config` are read."""
    estimates, returns = adv.generalized_advantages(
        probabilities.values, rewards, tokens.mask, config.gamma, config.lam
    )
    return Experience(
        tokens=tokens,
        **vars(probabilities),
        non_score_reward=non_score_reward,
        advantages=adv.masked_whiten(estimates, tokens.mask),
        returns=returns,
    )


def token_forward(model: Any, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
    """Logits (N, V) and values (N,) where response tokens are predicted, float32.

    `model` may lack a value head, as a reference does; then values are zero.
    """
    inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    positions = tokens.flat_sources
    if isinstance(getattr(model, "module", model), AutoModelForCausalLMWithValueHead):
        logits, _, values = model(**inputs, positions=positions)
        return logits, values.float()
    logits = model(**inputs).logits.flatten(0, 1)[positions].float()
    return logits, logits.new_zeros(len(positions))
