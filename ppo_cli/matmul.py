"""Float32 matrix products by oneDNN where that is faster than torch's own choice.

On x86 torch multiplies float32 matrices with MKL, which uses AVX-512 on Intel's processors alone:
on an AMD EPYC (Zen 5) it makes 220 GFLOP/s on two cores, where oneDNN, which torch brings along,
reaches 470 in the same precision. `fast_matmul` sends linear layers there. Where a processor has
AVX2 at most, MKL is the faster of the two (Zen 3: by a fifth to a half), and stays.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

# oneDNN compiles a kernel for each shape and keeps about a thousand of them: some 400 MB in a run
# whose batches differ in length. Small models, whose whole process is smaller, do without.
SMALLEST_WEIGHT = 2**19
TILE_BYTES = 2**22  # of a wide matrix that MKL multiplies by at a time
FEW_ROWS = 32


def product(a: Tensor, b: Tensor, bias: Tensor | None = None, *, worthwhile: bool = True) -> Tensor:
    """`a @ b.T + bias` for a (M, K), b (N, K) and bias (N,), of any strides; not differentiable.

    By oneDNN where it is the faster library, unless it is not `worthwhile`, see `is_worthwhile`.
    """
    if worthwhile and a.dtype == torch.float32 and a.device.type == "cpu" and prefers_onednn():
        return _by_onednn(a, b, bias)
    return torch.nn.functional.linear(a, b, bias)


def wide_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`product` for a b (N, K) that is far larger than the processor's cache.

    Measured with AVX2: MKL multiplies by a piece of b that the cache holds a fifth to a third
    faster than by the whole, and oneDNN multiplies a few rows of a a sixth faster still.
    """
    worthwhile = is_worthwhile(b)
    tiles = row_slices(len(b), b.shape[1], TILE_BYTES)
    by_mkl = a.device.type == "cpu" and not (worthwhile and prefers_onednn())
    if not by_mkl or 4 * b.shape[1] > TILE_BYTES or len(tiles) <= 2:
        return product(a, b, bias, worthwhile=worthwhile)
    if len(a) <= FEW_ROWS and a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return _by_onednn(a, b, bias)
    result = a.new_empty(len(a), len(b))
    for tile in tiles:
        torch.mm(a, b[tile].t(), out=result[:, tile])
    return result if bias is None else result.add_(bias)


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return result


def row_slices(count: int, width: int, limit: int) -> list[slice]:
    """Rows 0..count in slices of at most `limit` bytes of float32 at `width` numbers a row."""
    step = max(limit // (4 * width), 1)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def is_worthwhile(weight: Tensor) -> bool:
    """Whether products with a weight are large enough for oneDNN to be worth its memory."""
    return weight.numel() >= SMALLEST_WEIGHT


class _Linear(torch.autograd.Function):
    """`x @ weight.T + bias`; with `transposed` the weight is (K, N), as in GPT-2's Conv1D."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.transposed = transposed
        return product(x, weight.t() if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if needs_x:
            grad_x = product(grad, weight if ctx.transposed else weight.t())
        if needs_weight and ctx.transposed:
            grad_weight = product(x.t(), grad.t())
        elif needs_weight:
            grad_weight = product(grad.t(), x.t())
        return grad_x, grad_weight, grad.sum(0) if needs_bias else None, None


class _OneDNN(TorchFunctionMode):
    """Replaces the calls that linear layers and GPT-2's Conv1D make."""

    def __torch_function__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.linear:
            return self._linear(func, *args, **(kwargs or {}))
        if func is torch.addmm and not kwargs and args[0].dim() == 1 and _suits(*args):
            bias, x, weight = args
            if not is_worthwhile(weight):
                return func(*args)
            return _Linear.apply(x, weight, bias, True)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _linear(func: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        given = [input, weight] if bias is None else [input, weight, bias]
        if input.dim() < 2 or not is_worthwhile(weight) or not _suits(*given):
            return func(input, weight, bias)
        flat = _Linear.apply(input.flatten(0, -2), weight, bias, False)
        return flat.view(*input.shape[:-1], weight.shape[0])


def fast_matmul() -> AbstractContextManager[Any]:
    """Inside, float32 linear layers on the CPU run on oneDNN where that is the faster library.

    Results differ from torch's in rounding alone, and are the same from run to run.
    """
    return _OneDNN() if prefers_onednn() else nullcontext()


@functools.cache
def prefers_onednn() -> bool:
    """Whether torch multiplies with MKL, but the processor has an AVX-512 that MKL does not use."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _processor()
    )


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")[:4000]
    except OSError:
        return platform.processor()


def _suits(*tensors: Tensor) -> bool:
    return all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.numel() > 0
        for tensor in tensors
    ) and not torch.is_autocast_enabled("cpu")
