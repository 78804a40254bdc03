"""One gradient for embeddings that look tokens up and, tied, project on the vocabulary.

Left to itself, autograd makes two dense (V, H) tensors, one for each use: the projection's, which
waits for the whole backward pass, and the lookup's, nearly all zeros, which is then added to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ppo_cli.matmul import is_worthwhile, product


def add_gradient(
    total: Tensor | None, grad_logits: Tensor, hidden: Tensor, weight: Tensor
) -> Tensor:
    """Gradient (V, H) of a projection by `weight`, added in place to `total`.

    It is the product of (N, V) `grad_logits` and (N, H) `hidden`.
    """
    part = product(grad_logits.t(), hidden.t(), worthwhile=is_worthwhile(weight)).to(weight.dtype)
    return part if total is None else total.add_(part)


class TiedGradient:
    """What the projection's backward pass, which comes first, leaves to the lookup's.

    Args:
        weight: (V, H) embeddings.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._dense: Tensor | None = None
        self._factors: list[tuple[Tensor, Tensor]] = []

    def leave(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Hand on a part of the projection's: (N, V) `grad_logits` and (N, H) `hidden`.

        While they take less memory than their product it is left to `take`.
        """
        self._factors.append((grad_logits, hidden))
        weight = self._weight
        held = sum(grad.nbytes for grad, _ in self._factors)
        if held >= weight.nbytes:
            self._multiply()

    def take(self) -> Tensor:
        """The projection's gradient, (V, H), zeros if it had none; it is the caller's."""
        self._multiply()
        dense, self._dense = self._dense, None
        return torch.zeros_like(self._weight) if dense is None else dense

    def _multiply(self) -> None:
        while self._factors:
            self._dense = add_gradient(self._dense, *self._factors.pop(), self._weight)


@contextmanager
def tied_gradient(model: Any) -> Iterator[TiedGradient | None]:
    """Inside, the lookups of a causal language model return what is left in the gradient given.

    None where there is nothing to gain: embeddings that are not tied or do not train, or are on a
    GPU, where the two tensors take a fraction of a millisecond.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not (torch.is_grad_enabled() and _suits(embedding) and embedding.weight is head.weight):
        yield None
        return
    gradient = TiedGradient(embedding.weight)

    def look_up(module: nn.Embedding, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        looked_up: Tensor = _Lookup.apply(module.weight, *args, module.padding_idx, gradient)
        return looked_up

    with embedding.register_forward_hook(look_up):
        yield gradient


def _suits(embedding: Any) -> bool:
    """Whether `_Lookup` does what a module does."""
    return (
        type(embedding) is nn.Embedding
        and embedding.weight.requires_grad
        and embedding.weight.is_leaf
        and embedding.weight.dtype == torch.float32
        and embedding.weight.device.type == "cpu"
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
            counts = ids != ctx.padding_idx
            ids, rows = ids[counts], rows[counts]
        return ctx.gradient.take().index_add_(0, ids, rows), None, None, None
