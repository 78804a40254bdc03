"""Sampling from an encoder-decoder: the encoder reads once, the decoder a token at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from ppo_cli.kernels.kv_cache import cache_argument
from ppo_cli.models.decode_loop import DROP_SHARE, Drawn, LogitsCallback, draw_uniforms
from ppo_cli.models.encoder_decoder import decoder_start
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.models.sampling_params import SamplingParams


@torch.no_grad()
def decode_encoded(
    policy: AutoModelForCausalLMWithValueHead,
    input_ids: Tensor,
    attention_mask: Tensor,
    limits: Sequence[int],
    params: SamplingParams,
    on_logits: LogitsCallback | None = None,
    uniforms: Tensor | None = None,
    *,
    use_cache: bool = True,
) -> list[Tensor]:
    """Sample a response to each query from an encoder-decoder.

    Args:
        policy: in eval mode.
        input_ids: (B, T) queries, padded on the right.
        attention_mask: (B, T).
        limits: B limits on the new tokens.
        params: how tokens are drawn.
        on_logits: called with each token's logits.
        uniforms: (B, R) random numbers in [0, 1), one for each token; None draws them.
        use_cache: False makes the decoder read the whole rows for each token.

    Returns:
        B tensors of token ids, 1-D, each with its end token if one was drawn, without the
        decoder's start token.

    Raises:
        NumericalError: a probability is not finite.
    """
    given = draw_uniforms(limits, input_ids.device) if uniforms is None else uniforms
    drawn = Drawn(given, limits, params)
    rows = torch.arange(len(limits), device=input_ids.device)
    ids = input_ids.new_full((len(limits), 1), decoder_start(policy) or 0)
    model: Any = policy.pretrained_model
    cache, read = None, {"input_ids": input_ids}
    while True:
        unread = ids if cache is None else ids[:, -1:]
        output = model(
            **read,
            attention_mask=attention_mask,
            decoder_input_ids=unread,
            use_cache=use_cache,
            **cache_argument(model, cache),
        )
        logits = output.logits[:, -1].float()
        if on_logits is not None:
            on_logits(rows, logits)
        tokens = drawn.add(ids, logits, rows)
        left = drawn.rows_left()
        if not left:
            return drawn.responses()
        states = output.encoder_last_hidden_state
        ids = torch.cat([ids, tokens.unsqueeze(1)], 1)
        if use_cache:
            cache = getattr(output, "cache", None) or output.past_key_values
        if left <= (1 - DROP_SHARE) * len(rows):
            kept = drawn.going[rows].nonzero().squeeze(1)
            rows, ids, states, attention_mask = (
                tensor[kept] for tensor in (rows, ids, states, attention_mask)
            )
            if cache is not None:
                cache.batch_select_indices(kept)
        read = {"encoder_outputs": BaseModelOutput(last_hidden_state=states)}
