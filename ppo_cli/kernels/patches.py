"""torch's functions for linear layers and attention, replaced inside `fast_layers` blocks.

Replaced are `torch.nn.functional.linear`, `torch.addmm` (which `Conv1D` of GPT-2 calls) and
`torch.nn.functional.scaled_dot_product_attention`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ppo_cli.kernels import attention, matmul
from ppo_cli.kernels.switch import enabled
from ppo_cli.utils.device import computes_bfloat16

_plain: ContextVar[bool] = ContextVar("plain", default=False)


class _Linear(torch.autograd.Function):
    """`x @ weight.T + bias` computed in `dtype`; if `transposed`, weight is (K, N) as in Conv1D.

    A weight of another type is converted in the forward pass and again in the backward pass, which
    takes little time. Autocast would keep converted copies of all weights in between. Gradients
    have the types of the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.x_dtype, ctx.transposed, ctx.dtype = x.dtype, transposed, dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        right = (weight.t() if transposed else weight).to(dtype)
        return matmul.product(x, right, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if needs_x:
            right = (weight if ctx.transposed else weight.t()).to(ctx.dtype)
            grad_x = matmul.product(grad, right).to(ctx.x_dtype)
        if needs_weight and ctx.transposed:
            grad_weight = matmul.product(x.t(), grad.t()).to(weight.dtype)
        elif needs_weight:
            grad_weight = matmul.product(grad.t(), x.t()).to(weight.dtype)
        # Summed in float32, then rounded. With dtype=float32 the sum takes ten times as long.
        grad_bias = grad.sum(0).to(weight.dtype) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None, None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = None if input.dim() < 2 else _compute_dtype(input, weight, bias)
    if dtype is None:
        return _REPLACED.before["linear"](input, weight, bias)
    flat: Tensor = _Linear.apply(input.flatten(0, -2), weight, bias, False, dtype)
    return flat.view(*input.shape[:-1], weight.shape[0])


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, **kwargs: Any) -> Tensor:
    dtype = None if kwargs or input.dim() != 1 else _compute_dtype(mat1, mat2, input)
    if dtype is None:
        return _REPLACED.before["addmm"](input, mat1, mat2, **kwargs)
    result: Tensor = _Linear.apply(mat1, mat2, input, True, dtype)
    return result


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    if not _plain.get() and attention.suits(query, key, value, attn_mask, dropout_p):
        scale = kwargs.get("scale")
        return attention.short_attention(query, key, value, attn_mask, is_causal, scale)
    plain = _REPLACED.before["scaled_dot_product_attention"]
    return plain(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)


PASSED_ON = {function.__code__ for function in (_linear, _addmm, _attention)}
"""Code of the replacements. An error from here means that a model passed unsuitable inputs."""


class _Replacements:
    """A `with` block in which torch's functions are replaced by those of this module.

    The functions are replaced for the whole process, if they are of use on this processor; on a GPU
    attention by cuDNN is disabled. Blocks of several threads may overlap: the first decides by its
    switch what is replaced, and the last restores everything. Other threads call the replacements
    too, which changes nothing but rounding. A function that a module imported by name is not
    replaced. A `TorchFunctionMode` would do the same by intercepting every call of torch, which
    takes noticeable time in small models.

    Attributes:
        before: name -> the function that was replaced: torch's, or another replacement.
    """

    PLACES: tuple[tuple[str, Any, str, Callable], ...] = (
        ("matmul", torch.nn.functional, "linear", _linear),
        ("matmul", torch, "addmm", _addmm),
        ("attention", torch.nn.functional, "scaled_dot_product_attention", _attention),
    )

    def __init__(self) -> None:
        self.before: dict[str, Callable] = {}
        self._cudnn: bool | None = None
        self._lock = threading.Lock()
        self._inside = 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            paths = enabled()
            if "attention" in paths:
                self._cudnn = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            useful = matmul.prefers_onednn() or computes_bfloat16(torch.device("cpu"))
            for path, home, name, function in self.PLACES:
                if useful and path in paths:
                    self.before[name] = getattr(home, name)
                    setattr(home, name, function)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside > 0:
                return
            for _path, home, name, _function in self.PLACES:
                if name in self.before:
                    setattr(home, name, self.before.pop(name))
            if self._cudnn is not None:
                torch.backends.cuda.enable_cudnn_sdp(self._cudnn)
                self._cudnn = None


_REPLACED = _Replacements()


@contextmanager
def plain_layers() -> Iterator[None]:
    """Use torch's own functions in this thread, also inside a `fast_layers` block."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def fast_layers() -> AbstractContextManager[None]:
    """Return a context manager in which linear layers and attention are faster.

    On a CPU, float32 layers use oneDNN if it is the faster library; under bfloat16 autocast, layers
    that train hold no copy of their weight, and attention over short rows takes less time. On a GPU
    attention does not use cuDNN, which takes 1.5 ms to prepare for each new shape, and every batch
    has a new one. Results differ from torch's in rounding only, and are reproducible.

    If the paths `matmul` and `attention` are off, nothing is replaced.
    """
    return _REPLACED if enabled() & {"matmul", "attention"} else plain_layers()


def _compute_dtype(x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """The type in which `_Linear` computes a layer; None if torch's function computes it."""
    if _plain.get():
        return None
    if torch.is_autocast_enabled("cpu"):
        # Without gradients autocast converts a weight once for all its uses.
        trains = x.requires_grad or weight.requires_grad
        useful, dtype = trains and torch.is_grad_enabled(), torch.get_autocast_dtype("cpu")
    else:
        useful, dtype = matmul.is_large_weight(weight) and matmul.prefers_onednn(), torch.float32
    tensors = (x, weight) if bias is None else (x, weight, bias)
    suits = useful and all(
        tensor.dtype in (torch.float32, dtype)
        and tensor.device.type == "cpu"
        and tensor.numel() > 0
        for tensor in tensors
    )
    return dtype if suits else None
