"""From hidden states to log-probabilities, with a bounded piece of the logits at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ppo_cli.matmul import is_worthwhile, product, row_slices, wide_product
from ppo_cli.tying import TiedGradient, add_gradient

PIECE_BYTES = 2**27  # of logits that one matrix product makes
BLOCK_BYTES = 2**22  # of logits that are reduced at a time, while the cache holds them
CONVERTED_BYTES = 2**23  # of a weight that is converted to another type at a time
KEPT_BYTES = 2**28  # of logits kept for the backward pass; more are computed again there


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Logits (N, V), float32, of hidden states (N, H) and output embeddings (V, H).

    Under autocast a GPU multiplies in low precision and sums in float32. The CPU, which has no such
    product, stays in float32: a logit of -80 rounded to bfloat16 is off by up to 0.25, as much as a
    PPO step changes it. Not differentiable.
    """
    low = _compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.device.type == "cuda" and low != torch.float32:
            logits = torch.mm(hidden.to(low), weight.to(low).t(), out_dtype=torch.float32)
            return logits if bias is None else logits + bias.float()
        offset = None if bias is None else bias.float()
        return wide_product(hidden.float(), weight.float(), offset)


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
        keep = any(ctx.needs_input_grad) and 4 * len(targets) * len(weight) <= KEPT_BYTES
        kept: list[Tensor] = []
        for piece in row_slices(len(targets), len(weight), PIECE_BYTES):
            logits = project(hidden[piece], weight, bias)
            chosen[piece] = logits.gather(1, targets[piece].unsqueeze(1)).squeeze(1)
            for block in row_slices(len(logits), len(weight), BLOCK_BYTES):
                rows = slice(piece.start + block.start, piece.start + block.stop)
                normalisers[rows], entropies[rows], totals[rows] = _reduce(logits[block])
            if keep:
                kept.append(logits)
        ctx.tied, ctx.compute_dtype = tied, _compute_dtype(hidden)
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
        low = ctx.compute_dtype
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = grad_bias = None
        low_hidden = hidden.to(low)
        for piece in row_slices(len(targets), len(weight), PIECE_BYTES):
            kept = bool(ctx.kept)
            numbers = ctx.kept.pop(0) if kept else project(hidden[piece], weight, bias)
            # In low precision each row goes to the front half of its place.
            grad = numbers if numbers.dtype == low else numbers.view(low)[:, : len(weight)]
            for block in row_slices(len(numbers), len(weight), BLOCK_BYTES):
                rows = slice(piece.start + block.start, piece.start + block.stop)
                exponentials = numbers[block]
                if not kept:
                    exponentials.sub_(normalisers[rows].unsqueeze(1)).exp_()
                _to_logit_gradient(
                    exponentials,
                    totals[rows] if kept else torch.ones_like(totals[rows]),
                    targets[rows],
                    entropies[rows],
                    None if grad_logprobs is None else grad_logprobs[rows],
                    None if grad_entropies is None else grad_entropies[rows],
                )
                if grad is not numbers:
                    grad[block] = exponentials.to(low)
            if grad_hidden is not None:
                grad_hidden[piece] = _times_weight(grad, weight)
            if needs_weight and ctx.tied is not None:
                ctx.tied.leave(grad, low_hidden[piece])
            elif needs_weight:
                grad_weight = add_gradient(grad_weight, grad, low_hidden[piece], weight)
            if needs_bias:
                total = grad.sum(0, dtype=bias.dtype)
                grad_bias = total if grad_bias is None else grad_bias.add_(total)
        return grad_hidden, grad_weight, grad_bias, None, None


def _times_weight(grad: Tensor, weight: Tensor) -> Tensor:
    """Product (n, H) of (n, V) `grad` and (V, H) `weight`, in the type of `grad`.

    Where the weight has another it is converted a piece at a time, on the CPU, and the pieces'
    products are summed in its own.
    """
    if weight.dtype == grad.dtype or weight.device.type != "cpu":
        right = weight.to(grad.dtype)
        return product(grad, right.t(), worthwhile=is_worthwhile(weight))
    total = weight.new_zeros(len(grad), weight.shape[1])
    for tile in row_slices(len(weight), weight.shape[1], CONVERTED_BYTES):
        total += grad[:, tile] @ weight[tile].to(grad.dtype)
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


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    """What autocast, where it is on, would multiply `tensor` in."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype
