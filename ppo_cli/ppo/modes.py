"""The policy's state during a step: no dropout, and in the warm-up only the value head learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.dropout import _DropoutNd

from ppo_cli.utils.device import modes_kept


@contextmanager
def dropout_off(model: torch.nn.Module, *, keep_training_mode: bool) -> Iterator[None]:
    """Switch dropout off inside the block, so that ratios compare equals.

    Eval mode does that. Gradient checkpointing needs training mode: with `keep_training_mode` the
    checkpointed modules keep it, and the rates of their dropout, jitter and noise, in their own
    attributes or their configuration, are 0 meanwhile. Everything is restored afterwards.
    """
    checkpointed = []
    if keep_training_mode:
        checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    with modes_kept(model), _rates_of_0(checkpointed):
        model.eval()
        for module in checkpointed:
            module.training = True
        yield


@contextmanager
def dropout_off_in_all_modes(model: torch.nn.Module) -> Iterator[None]:
    """No dropout, jitter or noise inside the block, even where somebody calls `model.train()`."""
    with modes_kept(model), _rates_of_0(list(model.modules())):
        yield


@contextmanager
def head_alone(model: torch.nn.Module) -> Iterator[None]:
    """Let only the value head learn inside the block."""
    others = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and "v_head." not in name
    ]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


@contextmanager
def _rates_of_0(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """The rates of dropout, jitter and noise of the modules are 0 inside the block."""
    rates = _noise_rates(modules)
    for owner, name, _ in rates:
        setattr(owner, name, 0.0)
    try:
        yield
    finally:
        for owner, name, value in rates:
            setattr(owner, name, value)


def _noise_rates(modules: Sequence[torch.nn.Module]) -> list[tuple[Any, str, float]]:
    """Owner, attribute and value of every rate of dropout, jitter or noise of the modules."""
    configs = {id(m.config): m.config for m in modules if hasattr(m, "config")}
    return [
        (owner, name, value)
        for owner in (*modules, *configs.values())
        for name, value in vars(owner).items()
        if isinstance(value, float)
        and (
            any(word in name for word in ("drop", "jitter", "noise"))
            or (name == "p" and isinstance(owner, _DropoutNd))
        )
    ]
