"""What sets encoder-decoders apart: the encoder reads the query, the decoder writes the response.

The decoder reads a start token, which its configuration names, and then the response.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

from ppo_cli.errors import ModelError, UsageError

TASKS = {AutoModelForCausalLM: "CAUSAL_LM", AutoModelForSeq2SeqLM: "SEQ_2_SEQ_LM"}
"""peft's name of what a model of each class does."""


def is_encoder_decoder(model: Any) -> bool:
    """Whether a model, or a model's configuration, is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", model), "is_encoder_decoder", False))


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model with this configuration."""
    own_code = getattr(config, "auto_map", None) or {}
    is_known = type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    if is_encoder_decoder(config) and (is_known or AutoModelForSeq2SeqLM.__name__ in own_code):
        return AutoModelForSeq2SeqLM
    return AutoModelForCausalLM


def refuse_if_not_seq2seq(config: Any, model_class: type | None = None) -> None:
    """Raise `UsageError`, naming the architecture, unless a model is an encoder-decoder of texts.

    Args:
        config: the model's; its `architectures` are used where there is no class.
        model_class: the model's class.
    """
    mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    known = mapping[type(config)].__name__ if type(config) in mapping else None
    named = list(config.architectures or [known]) if model_class is None else []
    named += [] if model_class is None else [kind.__name__ for kind in model_class.__mro__]
    if not is_encoder_decoder(config) or known not in named:
        raise UsageError(
            f"{named[0] or config.model_type} is not an encoder-decoder with a language model head:"
            " choose one that AutoModelForSeq2SeqLM loads, such as t5-small; a causal model goes "
            "into AutoModelForCausalLMWithValueHead"
        )


def decoder_start(model: Any) -> int | None:
    """The token that the decoder reads first; None for a causal model.

    It is the one with which transformers' `generate` begins.

    Raises:
        ModelError: the configuration of an encoder-decoder names none.
    """
    if not is_encoder_decoder(model):
        return None
    configs = (getattr(model, "generation_config", None), model.config)
    for key in ("decoder_start_token_id", "bos_token_id"):
        for config in configs:
            if isinstance(token := getattr(config, key, None), int):
                return token
    name = getattr(model.config, "_name_or_path", "") or type(model.config).__name__
    raise ModelError(
        f"{name}: its configuration names no decoder_start_token_id, with which its decoder "
        "begins: set it in config.json (T5 begins with its pad token)"
    )


def plain_inputs(model: Any, query: Tensor, response: Tensor) -> dict[str, Tensor]:
    """Inputs of a plain forward pass of one sequence, (Q,) and (R,) token ids.

    The last R + 1 logits are those of the response's tokens and of what follows it.
    """
    start = decoder_start(model)
    if start is None:
        return {"input_ids": torch.cat([query, response]).unsqueeze(0)}
    decoder = torch.cat([response.new_tensor([start]), response])
    return {"input_ids": query.unsqueeze(0), "decoder_input_ids": decoder.unsqueeze(0)}
