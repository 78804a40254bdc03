"""Sharded models (FSDP2): each process holds a part of each weight; layers are gathered for use.

`ppo_cli.ppo.sharding` has what is asked of accelerate, which shards them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ppo_cli.utils import processes

# Sharded modules, and whether their weights are freed after a forward pass until the backward pass.
_freed_after_forward: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_gathered: list[nn.Module] = []


def is_sharded(model: Any) -> bool:
    """Whether a model is sharded: its parameters are `DTensor`s, each process has a part."""
    return hasattr(model, "unshard")


def local_part(weight: Tensor) -> Tensor:
    """This process's part of a weight; the weight itself where it is whole."""
    part: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return part


def set_freeing(model: Any, *, layers: bool, root: bool) -> None:
    """Say whether layers, and what is outside of them, are freed between forward and backward."""
    for module in _sharded_modules(model):
        _freed_after_forward[module] = root if module is model else layers
        module.set_reshard_after_forward(_freed_after_forward[module], recurse=False)
        module.reshard()


@contextmanager
def gathered(*models: Any) -> Iterator[None]:
    """Hold the whole weights of sharded models inside the block; do nothing for others.

    All processes come to it. Inside the block processes may make different forward passes, without
    gradients, through any part of the models. Weights must not move.
    """
    roots = [model for model in models if is_sharded(model) and model not in _gathered]
    modules = [module for root in roots for module in _sharded_modules(root)]
    _gathered.extend(roots)
    try:
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(_freed_after_forward[module], recurse=False)
            module.reshard()
        for root in roots:
            _gathered.remove(root)


def free(model: Any) -> None:
    """Give up what a sharded model has gathered, unless it is `gathered`; do nothing to others.

    The weights of a model are other tensors while it is gathered. Where `requires_grad` of some is
    set and then set back, it has to be in the same state.
    """
    if is_sharded(model) and model not in _gathered:
        for module in _sharded_modules(model):
            module.reshard()


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of a whole model whose weights take no memory, for `whole_copy`."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def whole_copy(model: nn.Module, skeleton: nn.Module) -> Any:
    """A copy of a sharded model with its whole weights, in the main process's memory.

    All processes call it; the others get None. One weight after the other is gathered.

    Args:
        model: the sharded model.
        skeleton: what `without_weights` made of it before it was sharded.
    """
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            if processes.is_main():
                parameter = nn.Parameter(whole.cpu(), requires_grad=weight.requires_grad)
                memo[id(skeleton.get_parameter(name))] = parameter
    return copy.deepcopy(skeleton, memo) if processes.is_main() else None


def _sharded_modules(model: Any) -> list[Any]:
    return [module for module in model.modules() if is_sharded(module)]
