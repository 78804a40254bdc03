"""A new low-rank adapter: the choice of its modules, checked before weights are loaded."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ppo_cli.config.schema import AdapterConfig
from ppo_cli.errors import ModelError, UsageError, did_you_mean
from ppo_cli.models.pretrained import HUB_KEYWORDS, find_adapter, refuse_if_not_causal
from ppo_cli.utils.hub import first_line, loading_errors
from ppo_cli.utils.model_checks import implementations
from ppo_cli.utils.text import shortened

KEY = "policy.adapter.target_modules"
ALL_LINEAR = "all-linear"


def new_adapter(settings: AdapterConfig, name: str, **kwargs: Any) -> Any:
    """The `peft.LoraConfig` of a new adapter.

    Without `target_modules` it adapts peft's choice for the architecture; where peft has none,
    every linear layer of the language model but the output layer.

    Args:
        settings: the configuration's.
        name: folder or hub id of the model.
        kwargs: passed to `AutoConfig.from_pretrained`.

    Raises:
        ModelError: peft is missing, or the model's configuration cannot be read.
        UsageError: a name in `target_modules` is no module's, or peft cannot adapt it.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ModelError(
            f"policy.adapter needs peft: pip install 'ppo-cli[peft]' ({error})"
        ) from error
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
    )
    hub = {key: kwargs[key] for key in HUB_KEYWORDS if key in kwargs}
    with loading_errors(name):
        if find_adapter(name, **hub) is not None:
            return lora  # it is ignored, with a warning: the model has one
        plan = _plan(name, **kwargs)
    wanted = settings.target_modules
    if wanted is None:
        lora.target_modules = _chosen_by_peft(lora, plan) or _language_layers(plan)
    elif wanted == [ALL_LINEAR]:
        lora.target_modules = _language_layers(plan)
    elif len(wanted) == 1 and _is_pattern(wanted[0]):
        lora.target_modules = wanted[0]
    else:
        _check_names(wanted, name, plan)
        lora.target_modules = set(wanted)
    if (refusal := _refusal(lora, plan)) is not None:
        raise UsageError(f"{KEY}: peft refuses it for {name}: {refusal}. {_offer(plan)}")
    return lora


def _plan(name: str, **kwargs: Any) -> Any:
    """The model with weights on the meta device, which take no memory."""
    config = AutoConfig.from_pretrained(name, **kwargs)
    trust = kwargs.get("trust_remote_code", False)
    if not trust:
        refuse_if_not_causal(config)
    with warnings.catch_warnings():  # it warns where the model itself is loaded
        warnings.simplefilter("ignore")
        implementations(name, config, is_trusted=False)  # a plan runs none of them
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)


def _refusal(lora: Any, plan: Any) -> str | None:
    """Why peft cannot adapt a model so; None where it can."""
    from peft import get_peft_model

    # What happens to a copy does not count, its warnings neither.
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            get_peft_model(copy.deepcopy(plan), copy.deepcopy(lora))
        except (ValueError, NotImplementedError) as error:
            return first_line(error).rstrip(". ")
    return None


def _chosen_by_peft(lora: Any, plan: Any) -> set[str] | str | None:
    """The modules that peft adapts in this architecture by default, None for none."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICES

    choice = CHOICES.get(plan.config.model_type)
    if choice is None:
        return None
    tried = copy.deepcopy(lora)
    tried.target_modules = choice if isinstance(choice, str) else set(choice)
    return tried.target_modules if _refusal(tried, plan) is None else None


def _language_layers(plan: Any) -> set[str]:
    """Names of the language model's linear layers, without the output layer.

    Left out: layers for pictures and sounds, and layers of Mamba blocks whose weights are used
    without calling the layer, and so without its adapter.
    """
    head, language = plan.get_output_embeddings(), plan.get_decoder()
    if not isinstance(language, PreTrainedModel):
        language = plan.base_model  # some call their output layer a decoder
    kept = {id(module) for module in language.modules()} - {id(head)}
    words = plan.get_input_embeddings()
    for part in plan.modules():
        if isinstance(part, PreTrainedModel) and words not in list(part.modules()):
            kept -= {id(module) for module in part.modules()}
    for block in plan.modules():
        if isinstance(getattr(block, "conv1d", None), nn.Module):
            kept -= {id(getattr(block, layer, None)) for layer in ("out_proj", "dt_proj")}
    return {
        name
        for name, module in plan.named_modules()
        # Some routers are linear layers that return more than a linear layer does.
        if type(module).forward in (nn.Linear.forward, Conv1D.forward) and id(module) in kept
    }


def _is_pattern(name: str) -> bool:
    """Whether `name` can only be a regular expression, not a module's name."""
    return re.search(r"[^\w.-]", name) is not None


def _check_names(wanted: Sequence[str], model: str, plan: Any) -> None:
    """Raise `UsageError` for a name that is no module's; peft would ignore it silently."""
    names = [f".{name}" for name, _ in plan.named_modules()]
    for one in wanted:
        if not any(name.endswith(f".{one}") for name in names):
            offer = did_you_mean(one, _last_parts(plan)) or f" {_offer(plan)}"
            raise UsageError(f"{KEY}: {model} has no module '{shortened(one, 40)}'.{offer}")


def _offer(plan: Any) -> str:
    names = _last_parts(plan)
    return f"Choose among {', '.join(names[:8])}" if names else "It has no linear layers"


def _last_parts(plan: Any) -> list[str]:
    """Names of the language model's linear layers within their blocks."""
    return sorted({name.rpartition(".")[2] for name in _language_layers(plan)})
