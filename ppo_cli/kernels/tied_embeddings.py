"""One gradient for tied embeddings, which are both looked up and used as the output layer.

autograd makes a dense (V, H) gradient for each of the two uses: that of the output layer, which is
kept during the whole backward pass, and that of the lookup, almost all zeros, which is added to it.
Here one is made, or none if the optimizer takes the gradient in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ppo_cli.kernels.matmul import is_large_weight, product, row_slices
from ppo_cli.kernels.switch import is_enabled

PIECE_BYTES = 2**23  # of each piece of a gradient

GradientPieces = Iterator[tuple[slice, Tensor]]
"""Yields rows of a weight (V, H) and their gradient (n, H), which the receiver may change."""

_receiver: ContextVar[Callable[[Tensor, GradientPieces], None] | None] = ContextVar(
    "receiver", default=None
)


def add_gradient(
    total: Tensor | None, grad_logits: Tensor, hidden: Tensor, weight: Tensor
) -> Tensor:
    """Add the gradient (V, H) of an output layer to `total` in place; None starts a new one.

    The gradient is `grad_logits^T hidden`, for `grad_logits` (N, V) and `hidden` (N, H).
    """
    part = product(grad_logits.t(), hidden.t(), worthwhile=is_large_weight(weight)).to(weight.dtype)
    return part if total is None else total.add_(part)


class TiedGradient:
    """The output layer's gradient, kept until the lookup's backward pass, which comes later.

    Args:
        weight: (V, H) embeddings.

    Attributes:
        lookups: number of lookups in the forward pass.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.lookups = 0
        self._dense: Tensor | None = None
        self._factors: list[tuple[Tensor, Tensor]] = []

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Add the part of the gradient with factors `grad_logits` (N, V) and `hidden` (N, H).

        The factors are multiplied once they take more memory than their product.
        """
        self._factors.append((grad_logits, hidden))
        held = sum(grad.nbytes for grad, _ in self._factors)
        if held >= self.weight.nbytes:
            self._dense, self._factors = self._rows(slice(None)), []

    def take(self) -> Tensor:
        """Return the gradient (V, H), zeros if there is none, and forget it."""
        gradient = self._rows(slice(None))
        self._factors, self._dense = [], None
        return gradient

    def take_pieces(self, ids: Tensor, rows: Tensor) -> GradientPieces:
        """Yield the gradient in pieces of rows, the lookup's part included, and forget it.

        Args:
            ids: (N,) tokens that were looked up.
            rows: (N, H) gradient of each.
        """
        order = ids.argsort(stable=True)
        ids, rows = ids[order], rows[order]
        pieces = row_slices(len(self.weight), self.weight.shape[1], PIECE_BYTES)
        ends = torch.tensor([piece.stop for piece in pieces], device=ids.device)
        first = 0
        for piece, end in zip(pieces, torch.searchsorted(ids, ends).tolist(), strict=True):
            gradient = self._rows(piece)
            gradient.index_add_(0, ids[first:end] - piece.start, rows[first:end])
            yield piece, gradient
            first = end
        self._factors, self._dense = [], None

    def _rows(self, piece: slice) -> Tensor:
        """The gradient of some rows, added in place to their part that is multiplied already."""
        gradient = None if self._dense is None else self._dense[piece]
        for grad_logits, hidden in self._factors:
            gradient = add_gradient(gradient, grad_logits[:, piece], hidden, self.weight)
        return torch.zeros_like(self.weight[piece]) if gradient is None else gradient


@contextmanager
def gradient_in_pieces(
    take: Callable[[Tensor, GradientPieces], None] | None,
) -> Iterator[None]:
    """Pass the gradient of tied embeddings to `take(weight, pieces)` in backward passes inside.

    The whole gradient is never in memory then, and `weight.grad` does not change. With None the
    gradient is accumulated as usual. On a GPU this waits for the device.
    """
    token = _receiver.set(take)
    try:
        yield
    finally:
        _receiver.reset(token)


@contextmanager
def tied_gradient(model: Any) -> Iterator[TiedGradient | None]:
    """Make lookups of a model's tied embeddings return the output layer's gradient with their own.

    A forward hook on the embeddings does it, inside the block only. Yields the `TiedGradient` that
    the output layer must add its gradient to; None if the path is off, or the embeddings are not
    tied or do not train.
    """
    on = is_enabled("tied_embeddings") and torch.is_grad_enabled()
    if not (on and has_tied_embeddings(model)):
        yield None
        return
    embedding = model.get_input_embeddings()
    gradient = TiedGradient(embedding.weight)

    def look_up(module: nn.Embedding, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        gradient.lookups += 1
        looked_up: Tensor = _Lookup.apply(module.weight, *args, module.padding_idx, gradient)
        return looked_up

    # First, so that the hooks of others receive its result.
    with embedding.register_forward_hook(look_up, prepend=True):
        yield gradient


def has_tied_embeddings(model: Any) -> bool:
    """Whether a model's embeddings are tied, train, and only look tokens up."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return _suits(embedding) and embedding.weight is head.weight


def _suits(embedding: Any) -> bool:
    """Whether `_Lookup` computes the same as a module."""
    return (
        type(embedding) is nn.Embedding
        and "forward" not in vars(embedding)
        and embedding.weight.requires_grad
        and embedding.weight.is_leaf
        and embedding.weight.dtype == torch.float32
        and embedding.weight.device.type in ("cpu", "cuda")
        and embedding.weight.numel() > 0  # 0 if it is sharded
        and embedding.max_norm is None
        and not (embedding.scale_grad_by_freq or embedding.sparse)
    )


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, padding_idx: int | None, gradient: TiedGradient
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.gradient = padding_idx, gradient
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        ids, rows = ids.flatten(), grad.flatten(0, -2)
        if ctx.padding_idx is not None:  # the lookup has no gradient for it
            rows = rows.masked_fill((ids == ctx.padding_idx).unsqueeze(1), 0)
        gradient, take = ctx.gradient, _receiver.get()
        weight = gradient.weight
        # Another lookup, or a hook on the weight, would need the whole gradient.
        if take is not None and gradient.lookups == 1 and not weight._backward_hooks:
            take(weight, gradient.take_pieces(ids, rows))
            return None, None, None, None
        return gradient.take().index_add_(0, ids, rows), None, None, None
