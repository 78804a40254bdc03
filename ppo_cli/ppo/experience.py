"""What a step knows of its batch before the first update: probabilities, penalties, advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_cli.config.ppo import PPOSettings
from ppo_cli.kernels.lm_head import token_logprobs
from ppo_cli.models.capabilities import rope_switch
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.models.self_check import refuse_noise, settle_reading
from ppo_cli.ppo import advantages as adv
from ppo_cli.ppo import losses
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.ppo.packing import TokenBatch

READ_AT_ONCE = 4
"""Mini-batches that are read together before the update."""


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
        advantages: whitened, unless each mini-batch's are or none.
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


class TokenOutputs(NamedTuple):
    """What a policy says of N response tokens, (N,) each, float32."""

    logprobs: Tensor
    entropies: Tensor
    values: Tensor


@torch.no_grad()
def read_probabilities(
    tokens: TokenBatch,
    *,
    policy: Any,
    reference: Any,
    as_reference: Callable[[], AbstractContextManager[None]],
    config: PPOConfig,
) -> Probabilities:
    """Policy and reference over the batch, a few mini-batches of sequences at a time.

    Args:
        tokens: the sequences.
        policy: the model with a value head, as accelerate prepared it.
        reference: model that is compared with; the policy itself if its adapter can be off.
        as_reference: entered around the reference's forward: turns the adapter off.
        config: `kl_penalty`, `mini_batch_size` and `temperature` are read.
    """
    temperature = config.temperature
    parts: list[tuple[Tensor, ...]] = []
    full = config.kl_penalty == "full"
    # Without gradients, and with the logits in pieces, far more fit into the memory.
    size = config.mini_batch_size if full else READ_AT_ONCE * config.mini_batch_size
    for indices in torch.arange(len(tokens)).split(size):
        chunk = tokens.select(indices)
        if full:
            parts.append(_with_full_kl(chunk, policy, reference, as_reference, temperature))
        else:
            ref_logprobs = read_reference(chunk, reference, as_reference, temperature)
            outputs = token_forward(policy, chunk, temperature)
            parts.append(_with_sampled_kl(outputs, ref_logprobs, config))
    flat = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    return Probabilities(*(tokens.to_grid(tensor) for tensor in flat))


@torch.no_grad()
def read_reference(
    tokens: TokenBatch,
    reference: Any,
    as_reference: Callable[[], AbstractContextManager[None]],
    temperature: float,
) -> Tensor:
    """Log-probabilities (N,) under the reference; arguments as in `read_probabilities`."""
    with as_reference():
        return token_forward(reference, tokens, temperature).logprobs


@torch.no_grad()
def known_probabilities(
    tokens: TokenBatch, outputs: TokenOutputs, ref_logprobs: Tensor, config: PPOConfig
) -> Probabilities:
    """What `read_probabilities` returns, of a policy's and the reference's (N,) outputs."""
    flat = _with_sampled_kl(outputs, ref_logprobs, config)
    return Probabilities(*(tokens.to_grid(tensor) for tensor in flat))


def _with_sampled_kl(
    outputs: TokenOutputs, ref_logprobs: Tensor, config: PPOConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of policy and reference, values, and sampled KL, (N,) each."""
    penalties = losses.kl_penalty(outputs.logprobs, ref_logprobs, config.kl_penalty)
    return outputs.logprobs, ref_logprobs, outputs.values, penalties


def _with_full_kl(
    tokens: TokenBatch,
    policy: Any,
    reference: Any,
    as_reference: Callable[[], AbstractContextManager[None]],
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of policy and reference, values, and exact KL, (N,) each."""
    targets = tokens.flat_targets
    logits, values = _forward(policy, tokens, temperature)
    with as_reference():
        ref_logits = token_logits(reference, tokens, temperature)
    penalties = losses.full_kl(logits, ref_logits)
    return (
        token_logprobs(logits, targets),
        token_logprobs(ref_logits, targets),
        values.float(),
        penalties,
    )


def token_rewards(
    tokens: TokenBatch,
    probabilities: Probabilities,
    scores: Tensor,
    potentials: Tensor | None,
    kl_coef: float,
    config: PPOSettings,
) -> tuple[Tensor, Tensor]:
    """Rewards (B, R), whitened where `config` says so, and their part by KL alone (B, R).

    Args:
        tokens: the sequences.
        probabilities: what `read_probabilities` gave.
        scores: (B,) scaled and clipped.
        potentials: (B, R) guesses at them before each token, likewise; None for no shaping.
        kl_coef: the KL coefficient.
        config: `whiten_rewards`, `gamma` and `responses_per_query` are read, and `kl_in_loss`, with
            which the rewards hold no KL.
    """
    gains = scores if potentials is None else scores - potentials[:, 0]
    scores = scores - adv.mean_of_others(gains, config.responses_per_query)
    if config.kl_in_loss:
        kl_coef = 0.0
    rewards, non_score = adv.token_rewards(scores, probabilities.penalties, tokens.mask, kl_coef)
    if potentials is not None:
        rewards = rewards + adv.shaping_rewards(potentials, tokens.mask, config.gamma)
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
    """Advantages and returns of rewards (B, R); `gamma`, `lam`, `advantage_norm` are read."""
    advantages, returns = adv.generalized_advantages(
        probabilities.values, rewards, tokens.mask, config.gamma, config.lam
    )
    if config.advantage_norm == "batch":
        advantages = adv.masked_whiten(advantages, tokens.mask)
    return Experience(
        tokens=tokens,
        **vars(probabilities),
        non_score_reward=non_score_reward,
        advantages=advantages,
        returns=returns,
    )


def token_forward(model: Any, tokens: TokenBatch, temperature: float = 1.0) -> TokenOutputs:
    """A model with a value head over sequences, at the N positions that count.

    Raises:
        UsageError, ModelError: as of `check_reading`.
    """
    check_reading(model)
    return _token_forward(model, tokens, temperature)


def token_logits(model: Any, tokens: TokenBatch, temperature: float = 1.0) -> Tensor:
    """Logits (N, V), float32, of a model with a value head at the N positions that count."""
    return _forward(model, tokens, temperature)[0]


def check_reading(model: Any) -> None:
    """Try how a model with a value head is best read, where that was not tried yet.

    Raises:
        UsageError: it looks ahead, so it is not causal.
        ModelError: what it says of several sequences is not what it says of each alone.
    """
    inner = _unwrapped(model)
    settle_reading(inner, _reader(inner))


def check_noise(model: Any) -> None:
    """See that a model in its present modes is what it is in eval mode, if that is not known yet.

    Raises:
        ModelError: it is not.
    """
    inner = _unwrapped(model)
    refuse_noise(inner, _reader(inner))


def _reader(policy: Any) -> Callable[[Sequence[Tensor], Sequence[Tensor]], TokenOutputs]:
    """Queries and responses -> what `policy` says of each token of the responses."""
    # accelerate puts autocast around the forward of the object itself.
    forward = partial(type(policy).forward, policy)

    def read(queries: Sequence[Tensor], responses: Sequence[Tensor]) -> TokenOutputs:
        device = queries[0].device
        tokens = TokenBatch.from_lists(queries, responses, None, pad_token_id=0, device=device)
        return _token_forward(policy, tokens, 1.0, forward)

    return read


def _token_forward(
    model: Any,
    tokens: TokenBatch,
    temperature: float,
    forward: Callable[..., tuple[Tensor, ...]] | None = None,
) -> TokenOutputs:
    forward = forward or model

    def run(part: TokenBatch) -> tuple[Tensor, ...]:
        inputs, positions = _inputs(model, part)
        targets = part.flat_targets
        outputs = forward(**inputs, positions=positions, targets=targets, temperature=temperature)
        return tuple(output.float() for output in outputs)

    return TokenOutputs(*_together(model, tokens, run))


def _forward(model: Any, tokens: TokenBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits (N, V) and values (N,), float32."""
    check_reading(model)

    def run(part: TokenBatch) -> tuple[Tensor, ...]:
        inputs, positions = _inputs(model, part)
        logits, _, values = model(**inputs, positions=positions, temperature=temperature)
        return logits.float(), values.float()

    logits, values = _together(model, tokens, run)
    return logits, values


def _together(
    model: Any, tokens: TokenBatch, run: Callable[[TokenBatch], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """What `run` says of each token, by as few forwards as the model allows."""
    inner = _unwrapped(model)
    switch, equal = rope_switch(inner.config), inner.reading().rows == "equal"
    if not equal and switch is None:
        return run(tokens)
    groups = tokens.alike(switch, equal=equal)
    if len(groups) == 1:
        return run(tokens)
    places = torch.cat([tokens.flat_places(group) for group in groups])
    parts = [torch.cat(part) for part in zip(*(run(tokens.select(g)) for g in groups), strict=True)]
    return tuple(torch.empty_like(part).index_copy(0, places, part) for part in parts)


def _inputs(model: Any, tokens: TokenBatch) -> tuple[dict[str, Tensor], Tensor]:
    reading = _unwrapped(model).reading()
    if reading.rows != "packed":
        return tokens.padded
    inputs, positions = tokens.packed
    if reading.masked:
        inputs = {**inputs, "attention_mask": tokens.packed_mask}
    return inputs, positions


def _unwrapped(model: Any) -> AutoModelForCausalLMWithValueHead:
    """The policy that accelerate may have wrapped."""
    inner: AutoModelForCausalLMWithValueHead = getattr(model, "module", model)
    return inner
