"""Settings for `PPOTrainer.generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppo_cli.errors import UsageError
from ppo_cli.models.encoder_decoder import decoder_start
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.models.stop_tokens import end_tokens
from ppo_cli.models.transformers_generate import (
    GenerateSettings,
    from_generation_kwargs,
    keywords,
    without_lengths,
)


def generation_settings(
    given: Mapping[str, Any], *, tokenizer: Any, policy: Any, temperature: float
) -> SamplingParams | GenerateSettings:
    """The caller's keywords of `transformers`' `generate`, completed.

    Args:
        given: the caller's settings; they win over those in their `generation_config`.
        tokenizer: its pad and end tokens are used; it decodes for `stop_strings`.
        policy: the model itself; its end tokens are used.
        temperature: the sampling temperature, unless one is given.

    Raises:
        UsageError: a setting is none of sampling, has no effect here, or would begin responses with
            other tokens than the model's own.
    """
    settings = {
        "pad_token_id": tokenizer.pad_token_id,
        "tokenizer": tokenizer,
        "temperature": temperature,
    }
    settings |= keywords(given)
    start = decoder_start(policy)
    if (own := settings.pop("decoder_start_token_id", start)) != start:
        raise UsageError(
            f"decoder_start_token_id is {own} here and {start} in the model's generation_config, "
            "by which `step` computes: set it there"
        )
    if "decoder_input_ids" in settings:
        raise UsageError("decoder_input_ids cannot be given: put the text into the queries")
    if "eos_token_id" not in settings:
        settings["eos_token_id"] = end_tokens(tokenizer, model=policy) or None
    return from_generation_kwargs(**without_lengths(settings))


def with_start(rows: Sequence[Tensor], start: float | None) -> list[Tensor]:
    """Rows with a number for each token, with `start` in front; as they are where it is None."""
    if start is None:
        return list(rows)
    return [torch.cat([row.new_tensor([start]), row]) for row in rows]
