"""Log-probabilities from hidden states, with only a piece of the logits in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ppo_cli.kernels.matmul import by_onednn, is_large_weight, product, row_slices, wide_product
from ppo_cli.kernels.tied_embeddings import TiedGradient, add_gradient
from ppo_cli.utils.device import computes_bfloat16

PIECE_BYTES = 2**27  # of logits that one matrix product makes
BLOCK_BYTES = 2**22  # of logits that a CPU reduces at a time; they fit into its cache
TILE_BYTES = 2**25  # of embeddings in one product in low precision
ROUNDED_BYTES = 2**21  # of embeddings that are rounded at a time; they fit into the cache
MIN_PRODUCTS_TO_REORDER = 8  # with the same embeddings; fewer do not repay the reordering
KEPT_BYTES = 2**28  # of logits kept for the backward pass, which recomputes them if there are more


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits (N, V), float32, of hidden states (N, H) and output embeddings (V, H).

    Under autocast a GPU multiplies in low precision and sums in float32. torch has no such product
    for a CPU, which computes in float32. Not differentiable.
    """
    low = _low_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.device.type == "cuda" and low is not None:
            logits = torch.mm(hidden.to(low), weight.to(low).t(), out_dtype=torch.float32)
            return logits if bias is None else logits + bias.float()
        offset = None if bias is None else bias.float()
        return wide_product(hidden.float(), weight.float(), offset)


def ready_projection(
    weight: Tensor, bias: Tensor | None, *, rows: int, times: int
) -> Callable[[Tensor], Tensor]:
    """`project` by embeddings that do not change between calls.

    In low precision the embeddings are rounded once for a GPU. On a CPU with bfloat16 units, under
    bfloat16 autocast, their common part is subtracted, and the rest is rounded and reordered for
    oneDNN once, in tiles small enough for freed memory. The logits are rounded to bfloat16 then:
    the sampled distribution was 1e-4 nats per token from that of a float32 model.

    Args:
        weight: (V, H) output embeddings.
        bias: (V,) or None.
        rows: hidden states of a call, about.
        times: number of calls to come, about.

    Returns:
        A function from hidden states (N, H) to logits (N, V), float32.
    """
    low = _low_dtype(weight)
    if weight.device.type == "cuda" and low is not None:
        return partial(project, weight=weight.to(low), bias=bias)
    reorders = (
        weight.device.type == "cpu"
        and times >= MIN_PRODUCTS_TO_REORDER
        and torch.backends.mkldnn.is_available()
        and low == torch.bfloat16
        and computes_bfloat16(weight.device)
    )
    if not reorders:
        return partial(project, weight=weight, bias=bias)
    tiles = [
        (tile, torch.ops.mkldnn._reorder_linear_weight(embeddings, rows))
        for tile, embeddings in _without_common_part(weight, _common_part(weight), torch.bfloat16)
    ]

    def by_rounded(hidden: Tensor) -> Tensor:
        low = hidden.to(torch.bfloat16)
        logits = hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)
        for tile, laid_out in tiles:
            logits[:, tile] = by_onednn(low, laid_out)
        return logits if bias is None else logits.add_(bias)

    return by_rounded


def token_logprobs_and_entropies(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    tied: TiedGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,) of `targets` and entropies (N,), nats, float32, differentiable.

    Logits (N, V) of more than `KEPT_BYTES` are never in memory as a whole. With p the probabilities
    and H the entropy, the gradients are those of the softmax: `d logprob[t] / d logit[v] =
    [v = t] - p[v]` and `d H / d logit[v] = -p[v] (log p[v] + H)`.

    Args:
        hidden: (N, H) hidden states from which the targets are predicted.
        weight: (V, H) output embeddings.
        bias: (V,) or None.
        targets: (N,) token ids.
        tied: receives the gradient of `weight`, which its other use then returns; None to return
            it here.
    """
    logprobs, entropies = _TokenLogprobs.apply(hidden, weight, bias, targets, tied)
    return logprobs, entropies


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities (N,) of `tokens` (N,) under `logits` (N, V)."""
    return -torch.nn.functional.cross_entropy(logits, tokens, reduction="none")


def entropy(logits: Tensor) -> Tensor:
    """Entropies (N,), nats, of the distributions with `logits` (N, V)."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        tied: TiedGradient | None,
    ) -> tuple[Tensor, Tensor]:
        normalisers = torch.empty(len(targets), device=hidden.device)
        chosen, entropies = torch.empty_like(normalisers), torch.empty_like(normalisers)
        totals = torch.empty_like(normalisers)
        low = _low_dtype(hidden)
        size = (low or torch.float32).itemsize
        keep = any(ctx.needs_input_grad) and size * len(targets) * len(weight) <= KEPT_BYTES
        kept: list[Tensor] = []
        for piece in row_slices(len(targets), len(weight), PIECE_BYTES):
            numbers = _piece_of_logits(hidden[piece], weight, bias, targets[piece], low)
            for block in _blocks(numbers):
                rows = slice(piece.start + block.start, piece.start + block.stop)
                logits = _widened(numbers[block], bias)
                chosen[rows] = logits.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
                normalisers[rows], entropies[rows], totals[rows] = _reduce(logits)
                if keep and low is not None:
                    numbers[block] = logits
            if keep:
                kept.append(numbers)
        ctx.tied, ctx.low = tied, low
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers, entropies, totals)
        ctx.kept = kept  # by now exponentials; the backward pass overwrites them
        ctx.set_materialize_grads(False)
        return chosen - normalisers, entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logprobs: Tensor | None, grad_entropies: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalisers, entropies, totals = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        low = ctx.low
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = grad_bias = None
        factor = hidden if low is None else hidden.to(low)
        for piece in row_slices(len(targets), len(weight), PIECE_BYTES):
            kept = bool(ctx.kept)
            grad = (
                ctx.kept.pop(0)
                if kept
                else _piece_of_logits(hidden[piece], weight, bias, targets[piece], low)
            )
            for block in _blocks(grad):
                rows = slice(piece.start + block.start, piece.start + block.stop)
                if kept:
                    exponentials, sums = grad[block].float(), totals[rows]
                else:
                    exponentials = _widened(grad[block], bias)
                    exponentials.sub_(normalisers[rows].unsqueeze(1)).exp_()
                    sums = torch.ones_like(totals[rows])
                _to_logit_gradient(
                    exponentials,
                    sums,
                    targets[rows],
                    entropies[rows],
                    None if grad_logprobs is None else grad_logprobs[rows],
                    None if grad_entropies is None else grad_entropies[rows],
                )
                if low is not None:
                    grad[block] = exponentials
            if grad_hidden is not None:
                grad_hidden[piece] = _times_weight(grad, weight)
            if needs_weight and ctx.tied is not None:
                ctx.tied.add(grad, factor[piece])
            elif needs_weight:
                grad_weight = add_gradient(grad_weight, grad, factor[piece], weight)
            if needs_bias:
                total = grad.sum(0, dtype=bias.dtype)
                grad_bias = total if grad_bias is None else grad_bias.add_(total)
        return grad_hidden, grad_weight, grad_bias, None, None


def _blocks(logits: Tensor) -> list[slice]:
    """Rows to reduce at a time: as many as fit into a CPU's cache, on a GPU all."""
    limit = BLOCK_BYTES if logits.device.type == "cpu" else PIECE_BYTES
    return row_slices(len(logits), logits.shape[1], limit)


def _piece_of_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    low: torch.dtype | None,
) -> Tensor:
    """Logits (n, V) up to a constant per row: float32 with the bias, or in `low` without.

    In low precision a logit of -80 would be wrong by up to 0.25, as much as a PPO step changes it.
    Therefore the difference from the target's logit is rounded, which is small for every token of
    noticeable probability. The embeddings' common part, which makes logits large, adds the same to
    all logits of a row; it is subtracted before the embeddings are rounded.
    """
    if low is None:
        return project(hidden, weight, bias)
    common = _common_part(weight)
    with torch.autocast(hidden.device.type, enabled=False):
        of_targets = torch.linalg.vecdot(hidden.float(), weight[targets].float() - common)
        start = -of_targets.to(low).unsqueeze(1)
        logits = torch.empty(len(hidden), len(weight), dtype=low, device=hidden.device)
        factor = hidden.to(low)
        for tile, embeddings in _without_common_part(weight, common, low):
            columns = start.expand(-1, len(embeddings))
            torch.addmm(columns, factor, embeddings.t(), out=logits[:, tile])
    return logits


def _widened(logits: Tensor, bias: Tensor | None) -> Tensor:
    """The result of `_piece_of_logits` in float32 and with the bias."""
    if logits.dtype == torch.float32:
        return logits
    wide = logits.float()
    return wide if bias is None else wide.add_(bias)


def _common_part(weight: Tensor) -> Tensor:
    """The mean of some of the embeddings (V, H): (H,), float32.

    No probability depends on it, so any vector is correct.
    """
    return weight[::16].mean(0, dtype=torch.float32)


def _without_common_part(
    weight: Tensor, common: Tensor, low: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows and values of `weight - common`, rounded to `low`, a tile at a time.

    The next tile overwrites the values of the last one. On a GPU there is one tile.

    Args:
        weight: (V, H) embeddings.
        common: (H,), float32.
        low: type of the result.
    """
    width, is_cpu = weight.shape[1], weight.device.type == "cpu"
    tiles = row_slices(len(weight), width, TILE_BYTES if is_cpu else 4 * weight.numel())
    blocks = row_slices(tiles[0].stop, width, ROUNDED_BYTES if is_cpu else 4 * weight.numel())
    rounded = weight.new_empty(tiles[0].stop, width, dtype=low)
    difference = weight.new_empty(blocks[0].stop, width, dtype=torch.float32)
    for tile in tiles:
        embeddings = weight[tile]
        for block in blocks:
            part = embeddings[block]
            rounded[block][: len(part)] = torch.sub(part, common, out=difference[: len(part)])
        yield tile, rounded[: len(embeddings)]


def _times_weight(grad: Tensor, weight: Tensor) -> Tensor:
    """Product (n, H), float32, of the logits' gradient (n, V) and `weight` (V, H).

    In low precision the embeddings' common part is left out: each row of the gradient sums to zero
    up to rounding.
    """
    if grad.dtype == torch.float32:
        return product(grad, weight.float().t(), worthwhile=is_large_weight(weight))
    total = grad.new_zeros(len(grad), weight.shape[1], dtype=torch.float32)
    for tile, embeddings in _without_common_part(weight, _common_part(weight), grad.dtype):
        total += grad[:, tile] @ embeddings
    return total


def _reduce(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp (n,), entropy (n,) and sum of exponentials (n,) of logits (n, V).

    The maximum of each row is subtracted first. The logits are overwritten by their exponentials.
    """
    largest = logits.amax(1)
    shifted = logits - largest.unsqueeze(1)
    exponentials = torch.exp(shifted, out=logits)
    total = exponentials.sum(1)
    log_total = total.log()
    with torch.autocast(logits.device.type, enabled=False):  # which would round the summands
        mean_shifted = torch.linalg.vecdot(exponentials, shifted) / total
    return largest + log_total, log_total - mean_shifted, total


def _to_logit_gradient(
    exponentials: Tensor,
    totals: Tensor,
    targets: Tensor,
    entropies: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropies: Tensor | None,
) -> None:
    """Overwrite exponentials (n, V), with sums `totals` (n,), by the gradient of the logits.

    The docstring of `token_logprobs_and_entropies` has the formulas.
    """
    slope = torch.zeros_like(totals) if grad_logprobs is None else grad_logprobs
    if grad_entropies is None:
        exponentials.mul_(-(slope / totals).unsqueeze(1))
    else:
        p = exponentials.div_(totals.unsqueeze(1))
        by_surprise = torch.special.entr(p).mul_(grad_entropies.unsqueeze(1))
        p.mul_(-(entropies * grad_entropies + slope).unsqueeze(1)).add_(by_surprise)
    exponentials.scatter_add_(1, targets.unsqueeze(1), slope.unsqueeze(1))


def _low_dtype(tensor: Tensor) -> torch.dtype | None:
    """The type in which `tensor` is multiplied if that is below float32, by autocast or its own."""
    kind = tensor.device.type
    autocasts = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocasts else tensor.dtype
    return dtype if dtype.itemsize < torch.float32.itemsize else None
