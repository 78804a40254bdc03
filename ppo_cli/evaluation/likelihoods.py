"""Likelihoods of responses under policy and reference: KL, entropy, log-probability of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ppo_cli.evaluation.quality import Likelihoods
from ppo_cli.kernels.lm_head import entropy, token_logprobs
from ppo_cli.kernels.patches import fast_layers
from ppo_cli.models.encoder_decoder import decoder_start
from ppo_cli.ppo.forward import token_logits
from ppo_cli.ppo.losses import full_kl
from ppo_cli.ppo.packing import TokenBatch
from ppo_cli.utils.device import modes_kept

LOGITS_BYTES = 2**26
"""Bytes of float32 logits in memory at once, of each model; a single sequence may have more."""


@torch.no_grad()
def likelihoods(
    policy: Any,
    reference: Any,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    *,
    as_reference: Callable[[], AbstractContextManager[None]] = nullcontext,
    temperature: float = 1.0,
) -> Likelihoods:
    """Likelihoods of B responses under both models, with dropout off.

    The KL of a response is summed over its tokens from whole next-token distributions, which has
    the expectation of the log-ratio of what was sampled, with less noise, and is never negative
    (Amini et al. 2025, https://arxiv.org/abs/2504.10637).

    Args:
        policy: a model with a value head.
        reference: another over the same vocabulary; `policy` itself where `as_reference` makes it
            the reference.
        queries, responses: B tensors of token ids each, 1-D; a query has one token or more, a
            response of an encoder-decoder begins after the decoder's start token.
        as_reference: a context for the reference's forward passes, which turns an adapter off.
        temperature: of the sampling; divides both models' logits.
    """
    device, start = torch.device(policy.device), decoder_start(policy)
    tokens = TokenBatch.from_lists(queries, responses, None, 0, device, start)
    longest = max(tokens.targets.shape[1], 1)
    vocabulary = policy.config.get_text_config().vocab_size
    size = max(LOGITS_BYTES // (4 * vocabulary * longest), 1)
    parts = []
    with modes_kept(policy), modes_kept(reference), fast_layers():
        policy.eval()
        reference.eval()
        for indices in torch.arange(len(tokens)).split(size):
            chunk = tokens.select(indices)
            logits = token_logits(policy, chunk, temperature)
            with as_reference():
                ref_logits = token_logits(reference, chunk, temperature)
            flat = (
                full_kl(logits, ref_logits),
                entropy(logits),
                -token_logprobs(ref_logits, chunk.flat_targets),
            )
            parts.append(torch.stack([chunk.to_grid(row).sum(1) for row in flat]).cpu())
    kl, entropies, nll = torch.cat(parts, dim=1).double().numpy()
    return Likelihoods(kl, entropies, nll, tokens.counts.double().numpy())
