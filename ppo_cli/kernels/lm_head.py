"""From hidden states to log-probabilities, with a bounded piece of the logits at a time."""

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
BLOCK_BYTES = 2**22  # of logits that a CPU reduces at a time, while its cache holds them
TILE_BYTES = 2**25  # of embeddings that low precision multiplies by at a time
ROUNDED_BYTES = 2**21  # of them that are rounded at a time, while the cache holds them
TIMES_TO_LAY_OUT = 8  # that embeddings are multiplied by, so that laying them out for it pays
KEPT_BYTES = 2**28  # of logits kept for the backward pass; more are computed again there


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits (N, V), float32, of hidden states (N, H) and output embeddings (V, H).

    Under autocast a GPU multiplies in low precision and sums in float32. The CPU, for which torch
    has no such product, stays in float32. Not differentiable.
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
    """`project` by (V, H) embeddings that stay as they are, for `times` calls of about `rows` rows.

    In low precision a GPU gets them rounded once. In bfloat16, on a CPU that computes in it,
    embeddings less their common part are rounded and laid out for the multiplication once, in tiles
    for which freed memory has room. Logits are rounded too there: what is sampled was 1e-4 nats a
    token from a float32 model's distribution.
    """
    low = _low_dtype(weight)
    if weight.device.type == "cuda" and low is not None:
        return partial(project, weight=weight.to(low), bias=bias)
    pays = (
        weight.device.type == "cpu"
        and times >= TIMES_TO_LAY_OUT
        and torch.backends.mkldnn.is_available()
        and low == torch.bfloat16
        and computes_bfloat16(weight.device)
    )
    if not pays:
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
    """Log-probabilities (N,) of `targets` (N,) and entropies (N,) in nats, float32, differentiable.

    Args:
        hidden: (N, H) states that predict the targets.
        weight: (V, H) output embeddings.
        bias: (V,) or None.
        targets: (N,) token ids.
        tied: takes the weight's gradient where another use of the weight returns it.

    Logits (N, V) are never held whole where they exceed `KEPT_BYTES`. Gradients, with p the
    probabilities and H the entropy: `d logprob[t] / d logit[v] = [v = t] - p[v]`,
    `d H / d logit[v] = -p[v] (log p[v] + H)`.
    """
    logprobs, entropies = _TokenLogprobs.apply(hidden, weight, bias, targets, tied)
    return logprobs, entropies


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities (N,) of `tokens` (N,) under `logits` (N, V)."""
    return -torch.nn.functional.cross_entropy(logits, tokens, reduction="none")


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats, (N,), of the distributions that `logits` (N, V) stand for."""
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
        ctx.kept = kept  # exponentials now; the backward pass writes over them
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
                ctx.tied.leave(grad, factor[piece])
            elif needs_weight:
                grad_weight = add_gradient(grad_weight, grad, factor[piece], weight)
            if needs_bias:
                total = grad.sum(0, dtype=bias.dtype)
                grad_bias = total if grad_bias is None else grad_bias.add_(total)
        return grad_hidden, grad_weight, grad_bias, None, None


def _blocks(logits: Tensor) -> list[slice]:
    """Rows to reduce at a time: what a CPU's cache holds, on a GPU all of them."""
    limit = BLOCK_BYTES if logits.device.type == "cpu" else PIECE_BYTES
    return row_slices(len(logits), logits.shape[1], limit)


def _piece_of_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    low: torch.dtype | None,
) -> Tensor:
    """Logits (n, V) to take differences of: float32 with the bias, or `low` without.

    In low precision a logit of -80 would be off by up to 0.25, as much as a PPO step changes it.
    What is rounded is therefore its difference from the target's logit: small for every token that
    has a probability to speak of. The embeddings' common part, which adds the same to all logits of
    a row and is where theirs are so large, is left out before they are rounded.
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
    """What `_piece_of_logits` made, in float32 and with the bias."""
    if logits.dtype == torch.float32:
        return logits
    wide = logits.float()
    return wide if bias is None else wide.add_(bias)


def _common_part(weight: Tensor) -> Tensor:
    """What the embeddings (V, H) have in common, (H,) float32: the mean of some of them.

    Any vector would do, as no probability depends on it.
    """
    return weight[::16].mean(0, dtype=torch.float32)


def _without_common_part(
    weight: Tensor, common: Tensor, low: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Embeddings (V, H) less (H,) `common`, rounded to `low`, a tile of them at a time.

    A tile is there until the next is asked for. On a GPU it is all of them.
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

    In low precision the embeddings' common part is left out: the gradient's rows sum to zero, but
    for its rounding.
    """
    if grad.dtype == torch.float32:
        return product(grad, weight.float().t(), worthwhile=is_large_weight(weight))
    total = grad.new_zeros(len(grad), weight.shape[1], dtype=torch.float32)
    for tile, embeddings in _without_common_part(weight, _common_part(weight), grad.dtype):
        total += grad[:, tile] @ embeddings
    return total


def _reduce(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log of the summed exponentials (n,), entropy (n,) and the sum (n,) of logits (n, V).

    They become their exponentials, which are taken after the largest was subtracted.
    """
    largest = logits.amax(1)
    shifted = logits - largest.unsqueeze(1)
    exponentials = torch.exp(shifted, out=logits)
    total = exponentials.sum(1)
    log_total = total.log()
    with torch.autocast(logits.device.type, enabled=False):  # it would round what is summed
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
    """Turn exponentials (n, V), which sum to `totals` (n,), into the gradient of the logits.

    The formulas stand in `token_logprobs_and_entropies`.
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
    """What autocast would multiply `tensor` in, or its own type, where that is below float32."""
    kind = tensor.device.type
    autocasts = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocasts else tensor.dtype
    return dtype if dtype.itemsize < torch.float32.itemsize else None
