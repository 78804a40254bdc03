"""GELU's tanh approximation in one kernel, or by a faster formula."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation

from ppo_cli.kernels.switch import is_enabled

SAME_FUNCTION = (NewGELUActivation, FastGELUActivation, GELUTanh)
AT_ONCE = 2**20  # numbers that the cache holds
_GELU_BACKWARD = torch.ops.aten.gelu_backward.default  # looked up once: that takes as long as it
CUBE, SCALE = 0.044715, 2 * math.sqrt(2 / math.pi)


def fuse_activations(model: nn.Module) -> None:
    """Replace a model's activations that are GELU's tanh approximation by torch's `GELU`.

    transformers computes most of them by a formula of eight kernels, each of which keeps its result
    for the backward pass.
    """
    if not is_enabled("gelu"):
        return
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) in SAME_FUNCTION:
                by_sigmoid = is_enabled("sigmoid")
                setattr(module, name, TanhGELU() if by_sigmoid else nn.GELU(approximate="tanh"))


def has_fused_activations(model: nn.Module) -> bool:
    """Whether a model has activations such as `fuse_activations` puts there."""
    return any(isinstance(m, nn.GELU) and m.approximate == "tanh" for m in model.modules())


class TanhGELU(nn.GELU):
    """`x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.

    Source: Hendrycks and Gimpel 2016 (https://arxiv.org/abs/1606.08415), section 2. In float32 on
    the CPU by way of `1 + tanh(u) = 2 sigmoid(2 u)`: torch's sigmoid takes a quarter of the time of
    its tanh there.
    """

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, input: Tensor) -> Tensor:
        """`input` and the result have the same shape."""
        if input.device.type != "cpu" or input.dtype != torch.float32:
            return super().forward(input)
        if not (torch.is_grad_enabled() and input.requires_grad):
            return _by_sigmoid(input)
        output: Tensor = _TanhGELU.apply(input)
        return output


def _by_sigmoid(x: Tensor) -> Tensor:
    x = x.contiguous()
    output = torch.empty_like(x)
    parts = zip(x.view(-1).split(AT_ONCE), output.view(-1).split(AT_ONCE), strict=True)
    for part, result in parts:
        torch.mul(part, part, out=result)
        torch.addcmul(part, result, part, value=CUBE, out=result)
        result.mul_(SCALE).sigmoid_().mul_(part)
    return output


class _TanhGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _by_sigmoid(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gradient: Tensor = _GELU_BACKWARD(grad, x, approximate="tanh")
        return gradient
