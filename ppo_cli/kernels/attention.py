"""Attention over short rows: who may attend to whom, and bfloat16 where torch's kernel is slow.

The fused kernel spares the memory of the scores, (T, T) a head, which rows of some dozen tokens do
not need to be spared: its backward pass takes ten times as long there as plain matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST_ROW = 256  # tokens, beyond which the scores take more memory than they save time


def block_mask(position_ids: Tensor) -> Tensor:
    """(B, T) positions that begin anew with each sequence -> (B, 1, T, T), who may attend to whom.

    That is each token to those of its own sequence that are not behind it.
    """
    sequences = (position_ids == 0).cumsum(1)
    together = sequences.unsqueeze(2) == sequences.unsqueeze(1)
    return together.tril_().unsqueeze(1)


def suits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float) -> bool:
    """Whether `short_attention` takes such inputs, and is the faster way.

    That is self-attention on the CPU in bfloat16, of its own or by autocast, with as many key heads
    as query heads.
    """
    dtypes = {query.dtype, key.dtype, value.dtype}
    if torch.is_autocast_enabled("cpu") and dtypes <= {torch.float32, torch.bfloat16}:
        dtypes = {torch.get_autocast_dtype("cpu")}
    return (
        dtypes == {torch.bfloat16}
        and query.device.type == "cpu"
        and query.dim() == 4
        and query.shape == key.shape == value.shape
        and 1 < query.shape[2] <= LONGEST_ROW
        and query.numel() > 0
        and dropout_p == 0
        and (mask is None or (mask.dtype == torch.bool and mask.dim() == 4))
    )


def short_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """`softmax(scale query key^T) value`, as `scaled_dot_product_attention` defines it.

    Args:
        query, key, value: (B, heads, T, D), used as bfloat16. Scores and probabilities are worked
            out in float32, as the fused kernel does, and multiplied by `value` in bfloat16.
        mask: bool, what may be attended to, broadcastable to (B, heads, T, T); None for all. A
            token that may attend to none attends to all alike.
        is_causal: without a mask: tokens attend to themselves and what is before.
        scale: None for 1 / sqrt(D).

    Returns:
        (B, heads, T, D), bfloat16.
    """
    if mask is None and is_causal:
        mask = query.new_ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
    hidden = None if mask is None else ~mask
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    low = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    output: Tensor = _ShortAttention.apply(*low, hidden, factor)
    return output


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scale: float
    ) -> Tensor:
        shape = query.shape
        query, key, value = (_by_head(tensor) for tensor in (query, key, value))
        scores = torch.bmm(query.float().mul_(scale), key.float().mT)
        if hidden is not None:
            lowest = torch.finfo(scores.dtype).min
            scores.view(*shape[:3], -1).masked_fill_(hidden, lowest)
        p = torch.softmax(scores, -1).to(value.dtype)
        ctx.save_for_backward(query, key, value, p)
        ctx.shape, ctx.scale = shape, scale
        return torch.bmm(p, value).view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, p = ctx.saved_tensors
        grad = _by_head(grad)
        grad_value = torch.bmm(p.mT, grad)
        grad_p = torch.bmm(grad, value.mT)
        grad_scores = torch._softmax_backward_data(grad_p, p, -1, p.dtype).mul_(ctx.scale)
        grad_query, grad_key = torch.bmm(grad_scores, key), torch.bmm(grad_scores.mT, query)
        shaped = (tensor.view(ctx.shape) for tensor in (grad_query, grad_key, grad_value))
        return *shaped, None, None


def _by_head(tensor: Tensor) -> Tensor:
    """(B, heads, T, D) -> (B * heads, T, D)."""
    return tensor.reshape(-1, *tensor.shape[2:])
