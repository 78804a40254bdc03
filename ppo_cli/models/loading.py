"""Loading the tokenizer and the policy that a configuration names.

`trusted` are the models, by their names in the configuration, whose own code may run.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ppo_cli.config.policy import PolicyConfig
from ppo_cli.data.embedded import policy_folder
from ppo_cli.data.sources import EMBEDDED
from ppo_cli.errors import ModelError, PPOCliError, UsageError
from ppo_cli.models.adapter import name_base, new_adapter
from ppo_cli.models.encoder_decoder import is_encoder_decoder, plain_inputs
from ppo_cli.models.frozen_layers import freeze_layers
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.models.pretrained import (
    HUB_KEYWORDS,
    check_attention,
    find_adapter,
    find_config,
    tokenizer_of,
)
from ppo_cli.models.quantization import quantization_keywords, refuse_without_quantized_layers
from ppo_cli.models.seq2seq import policy_class
from ppo_cli.utils.device import modes_kept
from ppo_cli.utils.hub import loading_errors, trial_errors
from ppo_cli.utils.model_checks import refuse_empty, refuse_nan, refuse_unusable

CPU = torch.device("cpu")


def check_trusted(trusted: Collection[str], names: Collection[str]) -> None:
    """Raise `UsageError` where `trusted` names none of the models that are to be loaded."""
    for name in trusted:
        if name not in names:
            raise UsageError(
                f"--trust-remote-code {name}: no such model is loaded here. Name one as it is "
                f"given: {', '.join(dict.fromkeys(names))}"
            )


def load_tokenizer(name: str, revision: str | None = None, trusted: Collection[str] = ()) -> Any:
    """The tokenizer of a model; its pad token is the end-of-text token where it has none."""
    source = str(policy_folder()) if name == EMBEDDED else name
    with loading_errors(source):
        tokenizer = tokenizer_of(source, **source_keywords(name, revision, trusted))
        refuse_empty(name, tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        refuse_unusable(name, tokenizer)
    return tokenizer


def reads_whole_texts(
    name: str, revision: str | None = None, trusted: Collection[str] = ()
) -> bool:
    """Whether a model is an encoder-decoder, whose encoder reads the queries with their end tokens.

    Raises:
        ModelError: the hub does not have its configuration, or does not answer.
    """
    if name == EMBEDDED:
        return False
    return is_encoder_decoder(_config_of(name, source_keywords(name, revision, trusted)))


def _config_of(source: str, place: dict[str, Any]) -> Any:
    """A model's configuration; None of a folder that has none to read: loading it says why."""
    try:
        return find_config(source, **place)[0]
    except PPOCliError:
        if not Path(source).is_dir():
            raise
        return None


def load_policy(
    config: PolicyConfig,
    tokenizer: Any = None,
    trusted: Collection[str] = (),
    device: torch.device = CPU,
) -> AutoModelForCausalLMWithValueHead:
    """The model to tune, with its value head and, where configured, a new adapter.

    Args:
        config: the policy's settings.
        tokenizer: its ids are checked against the model's.
        trusted: models whose own code may run.
        device: where weights that are quantised are put; others stay on the CPU.

    Raises:
        ModelError: the model cannot be run, `tokenizer` has ids without an embedding in the
            model, or a package is missing.
        UsageError: the model is not causal, or a setting does not fit it.
    """
    source = str(policy_folder()) if config.model == EMBEDDED else config.model
    place = source_keywords(config.model, config.revision, trusted)
    head: dict[str, Any] = {
        "v_head_init_strategy": config.v_head_init_strategy,
        "v_head_initializer_range": config.v_head_initializer_range,
        "summary_dropout_prob": config.summary_dropout_prob,
    }
    adapter = None if config.adapter is None else new_adapter(config.adapter, source, **place)
    weights = weight_keywords(config, source, place, device)
    with trial_errors(config.model):
        policy = policy_class(_config_of(source, place)).from_pretrained(
            source, peft_config=adapter, **head, **place, **weights
        )
        refuse_nan(config.model, policy)
        with modes_kept(policy), torch.no_grad():
            query = torch.zeros(1, dtype=torch.long, device=policy.device)
            inputs = plain_inputs(policy, query, query[:0])
            policy.eval().pretrained_model(**inputs, use_cache=False)
    if config.quantization is not None:
        refuse_without_quantized_layers(config.model, policy.pretrained_model)
    if config.freeze_layers is not None:
        freeze_layers(policy.pretrained_model, config.freeze_layers)
    if policy.is_peft_model:
        name_base(policy.pretrained_model, source, config.revision)
    rows = policy.pretrained_model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None and len(tokenizer) > rows:
        raise ModelError(
            f"{config.model}: the tokenizer has {len(tokenizer)} tokens, the model embeddings for "
            f"{rows}: they do not belong together"
        )
    return policy


def weight_keywords(
    config: PolicyConfig, source: str, place: Mapping[str, Any], device: torch.device = CPU
) -> dict[str, Any]:
    """Keywords of `from_pretrained` by the settings of dtype, attention and quantisation.

    Args:
        config: the policy's settings.
        source: folder or hub id of the model.
        place: `source_keywords` of the model.
        device: where weights that are quantised are put.

    Raises:
        UsageError: the model does not have that attention, or cannot be quantised here.
        MissingPackageError: a package is missing.
    """
    dtype = config.dtype
    keywords: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if config.attn_implementation is not None:
        check_attention(config.attn_implementation, source, **place)
        keywords["attn_implementation"] = config.attn_implementation
    return keywords | quantization_keywords(config, device)


def refuse_quantized_weights(config: PolicyConfig, trusted: Collection[str] = ()) -> None:
    """Raise `UsageError` where a policy would be quantised that has no adapter to train."""
    if config.quantization is None or config.adapter is not None:
        return
    if config.model != EMBEDDED:
        with loading_errors(config.model):
            place = source_keywords(config.model, config.revision, trusted)
            if find_adapter(config.model, **{k: place[k] for k in place if k in HUB_KEYWORDS}):
                return
    raise UsageError(
        "policy.quantization needs an adapter: quantised weights cannot be trained. Give one, "
        "with policy.adapter.r=16 for example, or leave policy.quantization out"
    )


def refuse_untrainable(policy: AutoModelForCausalLMWithValueHead) -> None:
    """Raise `UsageError` where float16 weights would be trained; warn where bfloat16 ones would."""
    model = policy.pretrained_model
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if torch.float16 in dtypes:
        raise UsageError(
            "policy.dtype float16 is for weights that are not trained: their updates would be lost "
            "or overflow. Train an adapter (policy.adapter), or set policy.dtype=float32; "
            "policy.precision=fp16 computes in float16 with float32 weights"
        )
    if torch.bfloat16 in dtypes:
        warnings.warn(
            "weights of bfloat16 are trained (policy.dtype): updates of less than 0.4 % of a "
            "weight are lost. Train an adapter, whose weights are float32, or set "
            "policy.dtype=float32",
            stacklevel=2,
        )


def source_keywords(name: str, revision: str | None, trusted: Collection[str]) -> dict[str, Any]:
    """Keywords of `from_pretrained`. Without `trust_remote_code` it would ask on the terminal."""
    settings: dict[str, Any] = {"trust_remote_code": name in trusted}
    return settings if revision is None else settings | {"revision": revision}
