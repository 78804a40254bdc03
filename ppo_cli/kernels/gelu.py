"""GELU's tanh approximation in one kernel."""

from __future__ import annotations

from torch import nn
from transformers.activations import FastGELUActivation, NewGELUActivation

from ppo_cli.kernels.switch import is_enabled

FORMULAS = (NewGELUActivation, FastGELUActivation)
"""transformers' modules that compute it by a formula of several kernels, of which each keeps its
result for the backward pass."""


def fuse_activations(model: nn.Module) -> None:
    """Replace a model's modules for GELU's tanh approximation by torch's, which is one kernel.

    The function is `x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`, see Hendrycks and Gimpel
    2016 (https://arxiv.org/abs/1606.08415), section 2.
    """
    if not is_enabled("gelu"):
        return
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) in FORMULAS:
                setattr(module, name, nn.GELU(approximate="tanh"))


def has_fused_activations(model: nn.Module) -> bool:
    """Whether a model has activations such as `fuse_activations` makes."""
    return any(isinstance(m, nn.GELU) and m.approximate == "tanh" for m in model.modules())
