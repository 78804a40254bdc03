"""The reference: a frozen copy of the policy, which may share its lower layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppo_cli.errors import UsageError
from ppo_cli.models.capabilities import precision, same
from ppo_cli.models.encoder_decoder import is_encoder_decoder
from ppo_cli.models.frozen_layers import layer_stack
from ppo_cli.models.plain_forward import language_model, sample_logits
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead


def create_reference_model(
    model: AutoModelForCausalLMWithValueHead,
    num_shared_layers: int | None = None,
    pattern: str | None = None,
) -> AutoModelForCausalLMWithValueHead:
    """A frozen copy of `model`, in eval mode.

    Args:
        model: the policy; any `torch.nn.Module` will do.
        num_shared_layers: this many layers from the bottom, and the embeddings below them, are
            frozen in the policy too and shared: policy and reference hold the same tensors. In an
            encoder-decoder they are the decoder's, and the whole encoder is shared, too.
        pattern: prefix of a layer's parameter names with `{layer}` in it, such as
            `transformer.h.{layer}`, where it cannot be found automatically.

    Raises:
        UsageError: `num_shared_layers` is not in 0..number of layers, or the layers are not found.
    """
    memo: dict[int, Any] = {}
    if num_shared_layers is not None:
        for parameter in _lower_parameters(model, num_shared_layers, pattern):
            parameter.requires_grad_(False)
            memo[id(parameter)] = parameter  # deepcopy takes what is in its memo as it is
    reference = copy.deepcopy(model, memo)
    return reference.requires_grad_(False).eval()


def create_adapter_reference(
    model: AutoModelForCausalLMWithValueHead,
) -> AutoModelForCausalLMWithValueHead:
    """A frozen copy of a policy with its adapter; weights that do not train are shared."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, memo).requires_grad_(False).eval()


@contextmanager
def adapter_off(policy: AutoModelForCausalLMWithValueHead) -> Iterator[None]:
    """Switch a policy's adapter off inside the block. What trains stays what it is.

    peft by itself lets the adapter train after the block, even one that was loaded frozen.
    """
    model = policy.pretrained_model
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter in frozen:
            if parameter.requires_grad:
                parameter.requires_grad_(False)


def starts_as_its_base(policy: AutoModelForCausalLMWithValueHead) -> bool:
    """Whether a policy with its adapter off is and stays the policy as it starts: the reference.

    That is so where the adapter changes nothing yet, and no weight outside of it is trained.
    """

    def base() -> Tensor:
        with adapter_off(policy):
            return sample_logits(policy)

    dtype, before = precision(policy.pretrained_model), base()
    if not same(sample_logits(policy), before, dtype):
        return False
    trained = [p for p in policy.pretrained_model.parameters() if p.requires_grad]
    values = [p.detach().clone() for p in trained]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in trained:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.device, parameter.dtype))
        return same(base(), before, dtype)
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, values, strict=True):
                parameter.copy_(value)


def refuse_shared_weights(model: nn.Module, reference: nn.Module) -> None:
    """Raise `UsageError` where a reference shares weights that are trained."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if any(id(p) in trained for p in reference.parameters()):
        raise UsageError(
            "ref_model holds the very weights that are trained, so KL would stay 0 however far "
            "they move: pass None for a frozen copy, or create_reference_model(model)"
        )


def _lower_parameters(model: nn.Module, num_layers: int, pattern: str | None) -> list[nn.Parameter]:
    """Parameters of the embeddings and the first `num_layers` layers."""
    if pattern is not None:
        prefix, _, _ = pattern.partition("{layer}")
        layers = [
            name for name, _ in model.named_modules() if _layer_index(name, prefix) is not None
        ]
        prefix = layers[0].rpartition(".")[0] if layers else ""
    else:
        prefix = layer_stack(model) or ""
    if not prefix:
        raise UsageError(
            f"cannot find the layers of {type(model).__name__}: pass their pattern, "
            "such as 'transformer.h.{layer}'"
        )
    encoder = set(map(id, _encoder_parameters(model)))
    stack = model.get_submodule(prefix)
    total = len(list(stack.children()))
    if not 0 <= num_layers <= total:
        raise UsageError(f"num_shared_layers is {num_layers}, but the model has {total} layers")
    shared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if name.startswith(prefix + "."):
            if int(name[len(prefix) + 1 :].partition(".")[0]) < num_layers:
                shared.append(parameter)
        elif id(parameter) in encoder or _is_embedding(model, name):
            shared.append(parameter)
    return shared


def _encoder_parameters(model: Any) -> list[nn.Parameter]:
    """Those of an encoder-decoder's encoder; none for a causal model."""
    if not is_encoder_decoder(model):
        return []
    return list(language_model(model).get_encoder().parameters())


def _layer_index(name: str, prefix: str) -> int | None:
    _, found, rest = name.partition(prefix)
    return int(rest) if found and rest.isdigit() else None


def _is_embedding(model: nn.Module, parameter_name: str) -> bool:
    owner = model.get_submodule(parameter_name.rpartition(".")[0])
    return isinstance(owner, nn.Embedding)
