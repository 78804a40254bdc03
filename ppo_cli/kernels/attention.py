"""Attention over short rows: the mask of packed rows, and bfloat16 attention on a CPU.

torch's fused kernel does not store the scores, (T, T) per head. For rows of a few dozen tokens that
saves little memory, and its backward pass takes ten times as long as plain matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_ROW_LENGTH = 256  # tokens; the scores of longer rows take too much memory


def block_mask(position_ids: Tensor) -> Tensor:
    """Causal attention mask (B, 1, T, T) of packed rows; True lets a token attend to another.

    A token attends to itself and to the earlier tokens of its own sequence.

    Args:
        position_ids: (B, T), which start at 0 for each sequence of a row.
    """
    sequences = (position_ids == 0).cumsum(1)
    same_sequence = sequences.unsqueeze(2) == sequences.unsqueeze(1)
    return same_sequence.tril_().unsqueeze(1)


def suits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float) -> bool:
    """Whether `short_attention` computes this attention, and is faster than torch.

    So it is for self-attention on a CPU in bfloat16, by type or by autocast, with as many key heads
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
        and 1 < query.shape[2] <= MAX_ROW_LENGTH
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
        query, key, value: (B, heads, T, D), converted to bfloat16. Scores and probabilities are
            computed in float32, as in the fused kernel, and multiplied by `value` in bfloat16.
        mask: bool, broadcastable to (B, heads, T, T), True for pairs that attend; None for all
            pairs. A token whose row is all False attends equally to all tokens.
        is_causal: without a mask, let tokens attend only to themselves and earlier tokens.
        scale: factor of the scores; None for 1 / sqrt(D).

    Returns:
        (B, heads, T, D), bfloat16.
    """
    if mask is None and is_causal:
        mask = query.new_ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
    masked = None if mask is None else ~mask
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    low = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    output: Tensor = _ShortAttention.apply(*low, masked, factor)
    return output


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, masked: Tensor | None, scale: float
    ) -> Tensor:
        shape = query.shape
        query, key, value = (_by_head(tensor) for tensor in (query, key, value))
        scores = torch.bmm(query.float().mul_(scale), key.float().mT)
        if masked is not None:
            lowest = torch.finfo(scores.dtype).min
            scores.view(*shape[:3], -1).masked_fill_(masked, lowest)
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
