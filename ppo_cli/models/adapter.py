"""A new adapter: its settings and modules, checked before weights are loaded."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ppo_cli.config.policy import AdapterConfig
from ppo_cli.errors import ModelError, UsageError, did_you_mean
from ppo_cli.models.encoder_decoder import TASKS, auto_class, is_encoder_decoder
from ppo_cli.models.pretrained import HUB_KEYWORDS, find_adapter, refuse_other_kinds
from ppo_cli.utils.hub import first_line, loading_errors
from ppo_cli.utils.model_checks import implementations
from ppo_cli.utils.text import shortened

KEY = "policy.adapter.target_modules"
ALL_LINEAR = "all-linear"
# Keys of peft's configuration classes that are not the user's.
SET_HERE = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "megatron_core",
}
UNSUPPORTED = {
    "layer_replication": "it changes the base, which the reference and the saved adapter need as "
    "it is: leave it out",
    "alora_invocation_tokens": "such an adapter works behind certain tokens of a prompt alone: "
    "leave it out",
}
NAMES_OF_MODULES = ("modules_to_save", "exclude_modules", "feedforward_modules")


def new_adapter(settings: AdapterConfig, name: str, **kwargs: Any) -> Any:
    """The `peft.PeftConfig` of a new adapter.

    Without `target_modules` it adapts peft's choice for the architecture; where peft has none,
    every linear layer of the language model but the output layer.

    Args:
        settings: the configuration's.
        name: folder or hub id of the model.
        kwargs: passed to `AutoConfig.from_pretrained`.

    Raises:
        ModelError: peft is missing, or the model's configuration cannot be read.
        UsageError: peft has no such key, a name of a module is none's, or peft cannot adapt it.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"policy.adapter needs peft: pip install 'ppo-cli[peft]' ({error})"
        ) from error
    adapter = peft_config(settings)
    hub = {key: kwargs[key] for key in HUB_KEYWORDS if key in kwargs}
    with loading_errors(name):
        if find_adapter(name, **hub) is not None:
            return adapter  # it is ignored, with a warning: the model has one
        plan = _plan(name, **kwargs)
    adapter.task_type = TASKS[auto_class(plan.config)]
    _check_modules(settings, name, plan)
    wanted = settings.target_modules
    if wanted is None:
        if _refusal(adapter, plan) is not None and settings.peft_type != "LN_TUNING":
            adapter.target_modules = _language_layers(plan)
    elif wanted == [ALL_LINEAR]:
        adapter.target_modules = _language_layers(plan)
    elif len(wanted) == 1 and _is_pattern(wanted[0]):
        adapter.target_modules = wanted[0]
    else:
        _check_names("target_modules", wanted, name, plan)
        adapter.target_modules = set(wanted)
    if (refusal := _refusal(adapter, plan)) is not None:
        if wanted is None and settings.peft_type != "LORA":
            raise UsageError(
                f"policy.adapter: peft refuses {settings.peft_type} for {name}: {refusal}. Change "
                "its settings, name other modules in target_modules, or choose LORA"
            )
        raise UsageError(f"{KEY}: peft refuses it for {name}: {refusal}. {_offer(plan)}")
    _check_patterns(adapter, plan)
    return adapter


def name_base(model: Any, source: str, revision: str | None) -> None:
    """Name a model's base in the settings of its adapter, so that it is found from anywhere.

    Args:
        model: a `peft.PeftModel`.
        source: folder or hub id that it was loaded from: its base, or the adapter itself.
        revision: of the hub model.
    """
    for config in model.peft_config.values():
        base = config.base_model_name_or_path
        if base == source and revision is not None:
            config.revision = revision
        if base and os.path.isdir(base):
            config.base_model_name_or_path = os.path.abspath(base)


def peft_config(settings: AdapterConfig) -> Any:
    """The `peft.PeftConfig` with the configuration's keys, but for `target_modules`.

    Raises:
        UsageError: peft's class does not have a key, or refuses a value.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = PEFT_TYPE_TO_CONFIG_MAPPING[settings.peft_type]
    names = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
    given = {"r": settings.r, "alpha": settings.alpha, "dropout": settings.dropout}
    given = {key: value for key, value in given.items() if value is not None}
    if settings.peft_type == "LORA":
        given = {names.get(key, key): value for key, value in given.items()}
    given |= settings.model_extra or {}
    known = [field.name for field in dataclasses.fields(kind) if field.name not in SET_HERE]
    for key in given:
        if key in UNSUPPORTED:
            raise UsageError(f"policy.adapter.{key}: {UNSUPPORTED[key]}")
        if key not in known or key.endswith("_config"):
            near = did_you_mean(key, known) or f" There are {', '.join(known)}"
            raise UsageError(
                f"policy.adapter: {settings.peft_type} has no key '{shortened(key, 40)}' that can "
                f"be set here.{near}"
            )
    if given.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        raise UsageError(
            f"policy.adapter.init_lora_weights: {shortened(str(given['init_lora_weights']), 40)!r} "
            "changes the weights of the base or needs data, so the adapter would not fit the base: "
            "give true, false, gaussian or orthogonal"
        )
    try:
        return kind(task_type="CAUSAL_LM", **given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"policy.adapter: peft refuses it: {first_line(error)}") from error


def _plan(name: str, **kwargs: Any) -> Any:
    """The model with weights on the meta device, which take no memory."""
    config = AutoConfig.from_pretrained(name, **kwargs)
    trust = kwargs.get("trust_remote_code", False)
    if not trust:
        refuse_other_kinds(auto_class(config), config)
    with warnings.catch_warnings():  # it warns where the model itself is loaded
        warnings.simplefilter("ignore")
        implementations(name, config, is_trusted=False)  # a plan runs none of them
    with torch.device("meta"):
        return auto_class(config).from_config(config, trust_remote_code=trust)


def _refusal(adapter: Any, plan: Any) -> str | None:
    """Why peft cannot adapt a model so; None where it can."""
    from peft import get_peft_model

    # What happens to a copy does not count, its warnings neither.
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        try:
            get_peft_model(copy.deepcopy(plan), copy.deepcopy(adapter))
        except (ValueError, TypeError, NotImplementedError) as error:
            return first_line(error).rstrip(". ")
    return None


def _language_layers(plan: Any) -> set[str]:
    """Names of the language model's linear layers, without the output layer.

    Left out: layers for pictures and sounds, and layers of Mamba blocks whose weights are used
    without calling the layer, and so without its adapter.
    """
    head, language = plan.get_output_embeddings(), plan.get_decoder()
    if is_encoder_decoder(plan) or not isinstance(language, PreTrainedModel):
        language = plan.base_model  # some call their output layer a decoder
    kept = {id(module) for module in language.modules()} - {id(head)}
    words = plan.get_input_embeddings()
    for part in () if is_encoder_decoder(plan) else plan.modules():
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


def _check_modules(settings: AdapterConfig, model: str, plan: Any) -> None:
    """Raise `UsageError` where another key than `target_modules` names what the model lacks.

    peft would ignore it silently.
    """
    extra = settings.model_extra or {}
    for key in NAMES_OF_MODULES:
        if (names := extra.get(key)) and not (isinstance(names, str) and _is_pattern(names)):
            _check_names(key, [names] if isinstance(names, str) else names, model, plan)
    for parameter in extra.get("target_parameters") or ():
        if not any(name.endswith(f".{parameter}") for name, _ in plan.named_parameters()):
            raise UsageError(
                f"policy.adapter.target_parameters: {model} has no parameter "
                f"'{shortened(parameter, 40)}'"
            )
    layers = extra.get("layers_to_transform")
    count = plan.config.get_text_config().num_hidden_layers
    for layer in layers if isinstance(layers, list) else [layers]:
        if isinstance(layer, int) and not 0 <= layer < count:
            raise UsageError(
                f"policy.adapter.layers_to_transform: {model} has the layers 0 to {count - 1}, "
                f"not {layer}"
            )


def _check_patterns(adapter: Any, plan: Any) -> None:
    """Raise `UsageError` where a pattern with a rank or a scale fits no module that is adapted."""
    from peft import get_peft_model

    patterns = {key: getattr(adapter, key, None) or {} for key in ("rank_pattern", "alpha_pattern")}
    if not any(patterns.values()):
        return
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(plan), copy.deepcopy(adapter))
    names = model.base_model.targeted_module_names
    for key, given in patterns.items():
        for pattern in given:
            if not any(re.search(rf"(^|\.){pattern}$", name) for name in names):
                raise UsageError(
                    f"policy.adapter.{key}: '{shortened(pattern, 40)}' fits none of the modules "
                    f"that are adapted, such as {names[0]}"
                )


def _check_names(key: str, wanted: Sequence[str], model: str, plan: Any) -> None:
    """Raise `UsageError` for a name that is no module's; peft would ignore it silently."""
    names = [f".{name}" for name, _ in plan.named_modules()]
    for one in wanted:
        if not any(name.endswith(f".{one}") for name in names):
            offer = did_you_mean(one, _last_parts(plan)) or f" {_offer(plan)}"
            raise UsageError(
                f"policy.adapter.{key}: {model} has no module '{shortened(one, 40)}'.{offer}"
            )


def _offer(plan: Any) -> str:
    names = _last_parts(plan)
    return f"Choose among {', '.join(names[:8])}" if names else "It has no linear layers"


def _last_parts(plan: Any) -> list[str]:
    """Names of the language model's linear layers within their blocks."""
    return sorted({name.rpartition(".")[2] for name in _language_layers(plan)})
