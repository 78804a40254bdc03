"""One gradient for embeddings that look tokens up and, tied, project on the vocabulary.

Left to itself, autograd makes two dense (V, H) tensors, one for each use: the projection's, which
waits for the whole backward pass, and the lookup's, nearly all zeros, which is then added to it.
Here there is one, and none where somebody takes it in pieces.
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

PIECE_BYTES = 2**23  # of a gradient that is handed out in pieces

GradientPieces = Iterator[tuple[slice, Tensor]]
"""Rows of a weight (V, H), and the gradient (n, H) of these n, which is the taker's."""

_taker: ContextVar[Callable[[Tensor, GradientPieces], None] | None] = ContextVar(
    "taker", default=None
)


def add_gradient(
    total: Tensor | None, grad_logits: Tensor, hidden: Tensor, weight: Tensor
) -> Tensor:
    """Gradient (V, H) of a projection by `weight`, added in place to `total`.

    It is the product of (N, V) `grad_logits` and (N, H) `hidden`.
    """
    part = product(grad_logits.t(), hidden.t(), worthwhile=is_large_weight(weight)).to(weight.dtype)
    return part if total is None else total.add_(part)


class TiedGradient:
    """What the projection's backward pass, which comes first, leaves to the lookup's.

    Args:
        weight: (V, H) embeddings.

    Attributes:
        lookups: how often tokens were looked up; each may ask for what is left.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.lookups = 0
        self._dense: Tensor | None = None
        self._factors: list[tuple[Tensor, Tensor]] = []

    def leave(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Hand on a part of the projection's: (N, V) `grad_logits` and (N, H) `hidden`.

        While they take less memory than their product it is left to `take`.
        """
        self._factors.append((grad_logits, hidden))
        held = sum(grad.nbytes for grad, _ in self._factors)
        if held >= self.weight.nbytes:
            self._dense, self._factors = self._multiplied(slice(None)), []

    def take(self) -> Tensor:
        """The projection's gradient, (V, H), zeros if it had none; it is the caller's."""
        gradient = self._multiplied(slice(None))
        self._factors, self._dense = [], None
        return gradient

    def take_pieces(self, ids: Tensor, rows: Tensor) -> GradientPieces:
        """The same in pieces, with (N, H) `rows`, the lookups' of (N,) `ids`, added to it."""
        order = ids.argsort(stable=True)
        ids, rows = ids[order], rows[order]
        pieces = row_slices(len(self.weight), self.weight.shape[1], PIECE_BYTES)
        ends = torch.tensor([piece.stop for piece in pieces], device=ids.device)
        first = 0
        for piece, end in zip(pieces, torch.searchsorted(ids, ends).tolist(), strict=True):
            gradient = self._multiplied(piece)
            gradient.index_add_(0, ids[first:end] - piece.start, rows[first:end])
            yield piece, gradient
            first = end
        self._factors, self._dense = [], None

    def _multiplied(self, piece: slice) -> Tensor:
        """Rows of the projection's gradient; it works them into what is multiplied already."""
        gradient = None if self._dense is None else self._dense[piece]
        for grad_logits, hidden in self._factors:
            gradient = add_gradient(gradient, grad_logits[:, piece], hidden, self.weight)
        return torch.zeros_like(self.weight[piece]) if gradient is None else gradient


@contextmanager
def gradient_in_pieces(
    take: Callable[[Tensor, GradientPieces], None] | None,
) -> Iterator[None]:
    """A backward pass inside gives the gradient of tied embeddings to `take(weight, pieces)`.

    It is never there whole then, and `grad` stays as it is. None for as it would be outside. To
    divide the lookups among the pieces waits for a GPU.
    """
    token = _taker.set(take)
    try:
        yield
    finally:
        _taker.reset(token)


@contextmanager
def tied_gradient(model: Any) -> Iterator[TiedGradient | None]:
    """Inside, the lookups of a causal language model return what is left in the gradient given.

    None where there is nothing to gain: embeddings that are not tied or do not train.
    """
    on = is_enabled("tied_embeddings") and torch.is_grad_enabled()
    if not (on and has_tied_embeddings(model)):
        yield None
        return
    embedding = model.get_input_embeddings()
    gradient = TiedGradient(embedding.weight)

    def look_up(module: nn.Embedding, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # a trial of the architecture: it asks for no gradient
            return output
        gradient.lookups += 1
        looked_up: Tensor = _Lookup.apply(module.weight, *args, module.padding_idx, gradient)
        return looked_up

    with embedding.register_forward_hook(look_up, prepend=True):  # others see what it returns
        yield gradient


def has_tied_embeddings(model: Any) -> bool:
    """Whether a causal model's embeddings train, are tied, and do no more than look up."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return _suits(embedding) and embedding.weight is head.weight


def _suits(embedding: Any) -> bool:
    """Whether `_Lookup` does what a module does."""
    return (
        type(embedding) is nn.Embedding
        and "forward" not in vars(embedding)
        and embedding.weight.requires_grad
        and embedding.weight.is_leaf
        and embedding.weight.dtype == torch.float32
        and embedding.weight.device.type in ("cpu", "cuda")
        and embedding.weight.numel() > 0  # it is elsewhere, sharded
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
        if ctx.padding_idx is not None:  # is not learnt by looking it up
            rows = rows.masked_fill((ids == ctx.padding_idx).unsqueeze(1), 0)
        gradient, take = ctx.gradient, _taker.get()
        weight = gradient.weight
        # Another lookup's part, or a hook, would need the whole.
        if take is not None and gradient.lookups == 1 and not weight._backward_hooks:
            take(weight, gradient.take_pieces(ids, rows))
            return None, None, None, None
        return gradient.take().index_add_(0, ids, rows), None, None, None
