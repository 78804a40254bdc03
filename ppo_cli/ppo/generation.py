"""Settings for `PPOTrainer.generate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.models.stop_tokens import end_tokens
from ppo_cli.models.transformers_generate import GenerateSettings, from_generation_kwargs


def generation_settings(
    given: Mapping[str, Any], *, tokenizer: Any, policy: Any, temperature: float
) -> SamplingParams | GenerateSettings:
    """The caller's keywords of `transformers`' `generate`, completed.

    Args:
        given: the caller's settings; they win.
        tokenizer: its pad and end tokens are used; it decodes for `stop_strings`.
        policy: the model itself; its end tokens are used.
        temperature: the sampling temperature, unless a `generation_config` is given.
    """
    settings = {"pad_token_id": tokenizer.pad_token_id, "tokenizer": tokenizer, **given}
    if "generation_config" not in given:
        settings.setdefault("temperature", temperature)
    ends = getattr(given.get("generation_config"), "eos_token_id", None)
    if "eos_token_id" in given:
        ends = given["eos_token_id"]
    elif ends is None:
        ends = end_tokens(tokenizer, model=policy) or None
    return from_generation_kwargs(**settings | {"eos_token_id": ends})
