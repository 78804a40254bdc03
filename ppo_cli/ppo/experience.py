"""A batch before its first update: probabilities, KL, rewards, advantages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppo_cli.config.ppo import PPOSettings
from ppo_cli.kernels.lm_head import token_logprobs
from ppo_cli.ppo import advantages as adv
from ppo_cli.ppo import losses
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.ppo.forward import TokenOutputs, logits_and_values, token_forward, token_logits
from ppo_cli.ppo.packing import TokenBatch
from ppo_cli.ppo.step_inputs import StepInputs
from ppo_cli.utils import processes
from ppo_cli.utils.device import send

MINI_BATCHES_AT_ONCE = 4
"""Mini-batches in one forward without gradients."""

Reference = Callable[[], AbstractContextManager[Any]]
"""A context manager that gives the reference model; inside it the policy's adapter may be off."""


@dataclass(frozen=True)
class Probabilities:
    """Outputs of policy and reference before the update; grids (B, R), see `TokenBatch`.

    Attributes:
        logprobs: log-probabilities of the response tokens under the policy that sampled them.
        ref_logprobs: the same under the reference.
        values: the value head's output before each token.
        kl_penalties: KL penalty of each token, before the coefficient.
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    kl_penalties: Tensor


@dataclass(frozen=True)
class Experience:
    """What the update learns from. Grids are (B, R), see `TokenBatch`.

    Attributes:
        tokens: the sequences.
        logprobs, ref_logprobs, values: as in `Probabilities`.
        advantages: whitened over the batch, unless `advantage_norm` says otherwise.
        returns: targets of the value head.
    """

    tokens: TokenBatch
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def select(self, indices: Tensor) -> Experience:
        """The samples at `indices` (b,), grids cut to the longest of them."""
        tokens = self.tokens.select(indices)
        rows, width = send(indices, tokens.device), tokens.targets.shape[1]
        return Experience(
            tokens=tokens,
            logprobs=self.logprobs[rows, :width],
            ref_logprobs=self.ref_logprobs[rows, :width],
            values=self.values[rows, :width],
            advantages=self.advantages[rows, :width],
            returns=self.returns[rows, :width],
        )

    def with_whitened_advantages(self) -> Experience:
        """The same samples, their advantages scaled to mean 0 and variance 1."""
        whitened = adv.masked_whiten(self.advantages, self.tokens.mask)
        return replace(self, advantages=whitened)


@torch.no_grad()
def read_probabilities(
    tokens: TokenBatch,
    *,
    policy: Any,
    reference: Reference,
    forward: Callable[[TokenBatch], TokenOutputs],
    config: PPOConfig,
) -> Probabilities:
    """Policy and reference over the batch, several mini-batches at a time.

    Each process reads its share of the sequences; all get the outputs of all.

    Args:
        tokens: the sequences of all processes.
        policy: the model with a value head, as accelerate prepared it.
        reference: gives the model from which KL is measured.
        forward: the policy's outputs, where whole distributions are not needed.
        config: `kl_penalty`, `mini_batch_size` and `temperature` are read.
    """
    full = config.kl_penalty == "full"
    # Without gradients, and with the logits in pieces, far more fit into the memory.
    size = config.mini_batch_size * (1 if full else MINI_BATCHES_AT_ONCE)
    own = torch.arange(len(tokens))[processes.rows(len(tokens))]
    chunks = [tokens]
    if size < len(own) or len(own) < len(tokens):
        chunks = [tokens.select(indices) for indices in own.split(size)]
    parts = [
        _with_full_kl(chunk, policy, reference, config)
        if full
        else _with_sampled_kl(chunk, forward, reference, config)
        for chunk in chunks
    ]
    flat = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    if processes.count() > 1:
        flat = list(processes.gather_rows(torch.stack(flat, dim=1)).unbind(1))
    return Probabilities(*(tokens.to_grid(tensor) for tensor in flat))


def _with_sampled_kl(
    tokens: TokenBatch,
    forward: Callable[[TokenBatch], TokenOutputs],
    reference: Reference,
    config: PPOConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Probabilities`, (N,) each, with KL from the drawn tokens alone."""
    # The reference comes first: its logits are freed before the policy's activations are kept.
    with reference() as model:
        ref_logprobs = token_forward(model, tokens, config.temperature).logprobs
    outputs = forward(tokens)
    penalties = losses.kl_penalty(outputs.logprobs, ref_logprobs, config.kl_penalty)
    return outputs.logprobs, ref_logprobs, outputs.values, penalties


def _with_full_kl(
    tokens: TokenBatch, policy: Any, reference: Reference, config: PPOConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Probabilities`, (N,) each, with the exact KL of whole distributions."""
    logits, values = logits_and_values(policy, tokens, config.temperature)
    with reference() as model:
        ref_logits = token_logits(model, tokens, config.temperature)
    return (
        token_logprobs(logits, tokens.flat_targets),
        token_logprobs(ref_logits, tokens.flat_targets),
        values,
        losses.full_kl(logits, ref_logits),
    )


def compute_rewards(
    batch: StepInputs, kl_penalties: Tensor, kl_coef: float, config: PPOSettings
) -> tuple[Tensor, Tensor]:
    """Rewards of a batch as configured: score, KL, baseline, potentials, whitening.

    Args:
        batch: its scores and potentials are scaled and clipped already. With potentials, which
            estimate the score before each token, there are shaping rewards.
        kl_penalties: (B, R) KL penalty of each token, before the coefficient.
        kl_coef: the KL coefficient. With `kl_in_loss` the rewards hold no KL.
        config: `whiten_rewards`, `gamma`, `responses_per_query` and `kl_in_loss` are read.

    Returns:
        The rewards (B, R), and the part of them that is KL, (B, R), before whitening.
    """
    scores, potentials, mask = batch.scores, batch.potentials, batch.tokens.mask
    gains = scores if potentials is None else scores - potentials[:, 0]
    scores = scores - adv.mean_of_others(gains, config.responses_per_query)
    if config.kl_in_loss:
        kl_coef = 0.0
    rewards, kl_rewards = adv.token_rewards(scores, kl_penalties, mask, kl_coef)
    if potentials is not None:
        rewards = rewards + adv.shaping_rewards(potentials, mask, config.gamma)
    if config.whiten_rewards:
        rewards = adv.masked_whiten(rewards, mask, shift_mean=False)
    return rewards, kl_rewards


def make_experience(
    tokens: TokenBatch, probabilities: Probabilities, rewards: Tensor, config: PPOSettings
) -> Experience:
    """Advantages and returns of rewards (B, R); `gamma`, `lam`, `advantage_norm` are read."""
    advantages, returns = adv.generalized_advantages(
        probabilities.values, rewards, tokens.mask, config.gamma, config.lam
    )
    experience = Experience(
        tokens=tokens,
        logprobs=probabilities.logprobs,
        ref_logprobs=probabilities.ref_logprobs,
        values=probabilities.values,
        advantages=advantages,
        returns=returns,
    )
    if config.advantage_norm == "batch":
        experience = experience.with_whitened_advantages()
    return experience
