"""Bases of 8- and 4-bit weights: how they are loaded, and how they are turned back."""

from __future__ import annotations

import copy
import importlib.util
import logging
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ppo_cli.config.policy import PolicyConfig, QuantizationConfig
from ppo_cli.errors import MissingPackageError, UsageError
from ppo_cli.utils.device import mixed_precision

KEY = "policy.quantization"


def quantization_keywords(config: PolicyConfig, device: torch.device) -> dict[str, Any]:
    """Keywords of `from_pretrained` that quantise a model while it is loaded; none if not asked.

    Args:
        config: the policy's settings.
        device: where the weights are put; they are quantised there.

    Raises:
        MissingPackageError: the library that quantises is missing.
        UsageError: it does not work on this device.
    """
    settings = config.quantization
    if settings is None:
        return {}
    library = settings.quant_method
    if importlib.util.find_spec(library) is None:
        raise MissingPackageError(
            f"{KEY} needs {library}: pip install 'ppo-cli[{library}]', or leave the key out"
        )
    logging.getLogger(library).setLevel(logging.ERROR)  # it logs each cast of each forward pass
    try:
        quantization = _quantization_config(settings, _compute_dtype(config, device))
    except (ImportError, RuntimeError, ValueError) as error:
        raise UsageError(f"{KEY}: {library} does not work here: {error}") from error
    return {"quantization_config": quantization, "device_map": {"": device}}


def _compute_dtype(config: PolicyConfig, device: torch.device) -> torch.dtype:
    """Precision of products with 4-bit weights."""
    assert config.quantization is not None
    if config.quantization.bnb_4bit_compute_dtype is not None:
        return getattr(torch, config.quantization.bnb_4bit_compute_dtype)
    if config.dtype in ("bfloat16", "float16"):
        return getattr(torch, config.dtype)
    precisions = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return precisions.get(mixed_precision(config.precision, device), torch.float32)


def _quantization_config(settings: QuantizationConfig, compute_dtype: torch.dtype) -> Any:
    """The transformers configuration that quantises as the settings say."""
    if settings.quant_method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=settings.load_in_4bit,
        load_in_8bit=settings.load_in_8bit,
        llm_int8_threshold=settings.llm_int8_threshold,
        bnb_4bit_quant_type=settings.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def is_quantized(model: nn.Module) -> bool:
    """Whether bitsandbytes or torchao hold some of a model's weights."""
    return any(_is_quantized_layer(module) for module in model.modules())


def refuse_without_quantized_layers(name: str, model: Any) -> None:
    """Raise `UsageError` where quantisation changed nothing: the library knows none of the layers.

    torchao, for example, leaves layers alone that are not `nn.Linear`, such as those of GPT-2.
    """
    head = model.get_output_embeddings()
    if not any(_is_quantized_layer(m) for m in model.modules() if m is not head):
        raise UsageError(
            f"{KEY}: none of the layers of {name} can be quantised by this library: use the other "
            "one (quant_method), or leave the key out"
        )


def _is_quantized_layer(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or isinstance(module, nn.Embedding):
        return False
    kinds = (type(weight), type(weight.data))
    return any(kind.__module__.startswith(("bitsandbytes", "torchao")) for kind in kinds)


def dequantized(adapted: Any) -> Any:
    """A `peft.PeftModel` like `adapted`, on whole weights with the numbers of the quantised ones.

    Merging into quantised weights would round the sum, so the merged model would not be the policy.

    Args:
        adapted: a `PeftModel` on a quantised base; it is taken apart.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    adapter, settings = get_peft_model_state_dict(adapted), adapted.active_peft_config
    base = adapted.unload()
    dtype = next(p.dtype for p in base.parameters() if p.dtype in FLOATS)
    base = _whole_weights(base, dtype)
    whole = get_peft_model(base, copy.deepcopy(settings))
    set_peft_model_state_dict(whole, adapter)
    return whole.to(base.device)


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _whole_weights(model: Any, dtype: torch.dtype) -> Any:
    """A quantised model with whole weights, in the layers of its architecture."""
    if type(model.hf_quantizer).__name__.startswith("Bnb"):
        model = model.dequantize(dtype)
    else:
        for module in filter(_is_quantized_layer, model.modules()):
            weight: Any = module.weight
            module.weight = nn.Parameter(weight.dequantize().to(dtype), requires_grad=False)
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
    model.to(dtype)  # it has cast biases to the precision of its products
    # bitsandbytes puts linear layers in place of GPT-2's Conv1D, whose weights lie the other way.
    with torch.device("meta"):
        architecture = type(model)(model.config)
    for name, planned in architecture.named_modules():
        layer = model.get_submodule(name)
        if type(planned) is Conv1D and isinstance(layer, nn.Linear):
            planned.weight = nn.Parameter(layer.weight.T.contiguous(), requires_grad=False)
            planned.bias = layer.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, planned)
    return model
