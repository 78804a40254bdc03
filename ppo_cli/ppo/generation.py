"""Settings for `PPOTrainer.generate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
        tokenizer: its pad and end tokens are used.
        policy: the model itself; its end tokens are used.
        temperature: the sampling temperature, unless one is given.

    Raises:
        UsageError: a setting is none of sampling, or has no effect here.
    """
    settings = {"pad_token_id": tokenizer.pad_token_id, "temperature": temperature}
    settings |= keywords(given)
    if "eos_token_id" not in settings:
        settings["eos_token_id"] = end_tokens(tokenizer, model=policy) or None
    return from_generation_kwargs(**without_lengths(settings))
