"""Log-probabilities and entropies in pieces equal those of autograd over the whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ppo_cli.kernels import lm_head, matmul, tied_embeddings
from ppo_cli.kernels.lm_head import project, ready_projection, token_logprobs_and_entropies
from ppo_cli.kernels.matmul import product

N, V, H = 37, 50, 8
ROW = 4 * V  # bytes of a row of logits
# PIECE_BYTES, BLOCK_BYTES, KEPT_BYTES: one piece; pieces and blocks that do not divide N evenly;
# the same computed again in the backward pass; less than a row.
LIMITS = {
    "one piece": (2**27, 2**22, 2**28),
    "pieces": (10 * ROW, 3 * ROW, 2**28),
    "recomputed": (10 * ROW, 3 * ROW, 0),
    "rows": (1, 1, 0),
}


def inputs(bias: bool = True, count: int = N) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, H, generator=g) * 2
    weight, shift = torch.randn(V, H, generator=g), torch.randn(V, generator=g) * 3
    targets = torch.randint(0, V, (count,), generator=g)
    return hidden, weight, shift if bias else None, targets


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def by_autograd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor]:
    log_p = torch.nn.functional.linear(hidden, weight, bias).log_softmax(-1)
    return log_p.gather(1, targets.unsqueeze(1)).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def loss(logprobs: Tensor, entropies: Tensor, kind: str) -> Tensor:
    """A loss that weights each token differently; `kind` says which outputs it includes."""
    weights = torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)
    parts = {"logprobs": logprobs * weights, "entropies": entropies * weights.flip(0)}
    return sum((part for name, part in parts.items() if name in kind), torch.zeros(())).sum()


@pytest.mark.parametrize("kind", ["logprobs", "entropies", "logprobs and entropies"])
@pytest.mark.parametrize("limits", LIMITS)
def test_numbers_and_gradients_are_those_of_autograd_in_float64(
    limits: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []  # rows of logits in each matrix product

    def spy(hidden: Tensor, *args: Any) -> Tensor:
        made.append(len(hidden))
        return project(hidden, *args)

    monkeypatch.setattr(lm_head, "project", spy)
    for name, value in zip(
        ("PIECE_BYTES", "BLOCK_BYTES", "KEPT_BYTES"), LIMITS[limits], strict=True
    ):
        monkeypatch.setattr(lm_head, name, value)
    hidden, weight, bias, targets = inputs()
    assert bias is not None
    ours = leaves(hidden, weight, bias)
    exact = leaves(hidden.double(), weight.double(), bias.double())
    results = token_logprobs_and_entropies(*ours, targets)  # type: ignore[arg-type]
    expected = by_autograd(*exact, targets)  # type: ignore[arg-type]
    for result, truth in zip(results, expected, strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-5)
    loss(*results, kind).backward()
    loss(*expected, kind).backward()
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine is not None and mine.grad is not None
        assert theirs is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)
    pieces = {"one piece": [37], "rows": [1] * 37}.get(limits, [10, 10, 10, 7])
    assert made == pieces * (1 if LIMITS[limits][2] else 2)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_frozen_tensors_get_no_gradient_and_cost_no_product(
    frozen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    products: list[int] = []

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        products.append(len(args[0]))
        return product(*args, **kwargs)

    for place in (matmul, lm_head, tied_embeddings):
        monkeypatch.setattr(place, "product", spy)
    ours, theirs = leaves(*inputs()[:3]), leaves(*inputs()[:3])
    for tensors in (ours, theirs):
        for index in frozen:
            tensors[index].requires_grad_(False)  # type: ignore[union-attr]
    for function, tensors in ((token_logprobs_and_entropies, ours), (by_autograd, theirs)):
        loss(*function(*tensors, inputs()[3]), "logprobs").backward()  # type: ignore[arg-type]
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a is not None and b is not None
        assert (a.grad is None) == (index in frozen)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    assert len(products) == 1 + (0 not in frozen) + (1 not in frozen)


def test_without_a_bias_and_without_gradients() -> None:
    hidden, weight, _, targets = inputs(bias=False)
    for result, truth in zip(
        token_logprobs_and_entropies(hidden, weight, None, targets),
        by_autograd(hidden, weight, None, targets),
        strict=True,
    ):
        assert not result.requires_grad
        torch.testing.assert_close(result, truth)


def test_huge_logits_overflow_nowhere() -> None:
    hidden, weight, bias, targets = inputs()
    (hidden,) = leaves(hidden * 1e4)
    logprobs, entropies = token_logprobs_and_entropies(hidden, weight, bias, targets)  # type: ignore[arg-type]
    (logprobs.sum() + entropies.sum()).backward()
    assert hidden is not None and hidden.grad is not None
    for numbers in (logprobs, entropies, hidden.grad):
        assert numbers.isfinite().all()
    assert (logprobs <= 0).all()
    assert (entropies.abs() < 1e-3).all()


def test_no_targets_give_no_numbers_and_no_gradient() -> None:
    hidden, weight, bias, targets = inputs(count=0)
    tensors = leaves(hidden, weight, bias)
    logprobs, entropies = token_logprobs_and_entropies(*tensors, targets)  # type: ignore[arg-type]
    assert logprobs.shape == entropies.shape == (0,)
    (logprobs.sum() + entropies.sum()).backward()
    for tensor in tensors:
        assert tensor is not None
        assert tensor.grad is None or not tensor.grad.any()


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_bfloat16_autocast_numbers_and_gradients_come_close_however_large_the_logits(
    dtype: torch.dtype, bias: bool, limits: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What all embeddings have in common moves all logits, here to -100, and no probability."""
    for name, value in zip(
        ("PIECE_BYTES", "BLOCK_BYTES", "KEPT_BYTES"), LIMITS[limits], strict=True
    ):
        monkeypatch.setattr(lm_head, name, value)
    monkeypatch.setattr(lm_head, "TILE_BYTES", 4 * H * 20)  # so the embeddings are in pieces
    monkeypatch.setattr(lm_head, "ROUNDED_BYTES", 4 * H * 3)
    hidden, weight, shift, targets = inputs(bias)
    hidden[:, 0] = 4
    weight[:, 0] -= 25
    hidden = hidden.to(dtype)
    low = leaves(hidden, weight, shift)
    exact = leaves(hidden.double(), weight.double(), None if shift is None else shift.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = token_logprobs_and_entropies(*low, targets)  # type: ignore[arg-type]
        rounded = by_autograd(hidden, weight, shift, targets)
    loss(*results, "logprobs and entropies").backward()
    expected = by_autograd(*exact, targets)  # type: ignore[arg-type]
    loss(*expected, "logprobs and entropies").backward()
    for result, truth, plain in zip(results, expected, rounded, strict=True):
        assert result.dtype == torch.float32
        error = (result - truth).norm() / len(result) ** 0.5
        assert 1e-5 < error < 0.05
        assert (plain - truth).norm() / len(result) ** 0.5 > 3 * error
    for mine, theirs in zip(low, exact, strict=True):
        if mine is None or theirs is None:
            continue
        assert mine.grad is not None
        assert theirs.grad is not None
        assert mine.grad.dtype == mine.dtype
        error = (mine.grad.float() - theirs.grad).norm() / theirs.grad.norm()
        assert 1e-5 < error < 0.02


def test_under_bfloat16_autocast_likely_tokens_are_told_apart_though_their_logits_are_large() -> (
    None
):
    """Two tokens of logits about 60, where bfloat16 is spaced by 0.25 to 0.5."""
    _, weight, _, targets = inputs()
    weight = torch.nn.functional.normalize(weight)
    weight[V // 2 :] = weight[: V // 2] * 0.99
    hidden = 60 * weight[targets]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = token_logprobs_and_entropies(hidden, weight, None, targets)
        rounded = by_autograd(hidden, weight, None, targets)
    expected = by_autograd(hidden.double(), weight.double(), None, targets)
    assert expected[0].mean() > -2
    for result, truth, plain in zip(results, expected, rounded, strict=True):
        assert (result - truth).norm() < (plain - truth).norm() / 2


@pytest.mark.parametrize("onednn", [True, False])
def test_logits_for_a_few_tokens_stay_float32_under_bfloat16_autocast(
    onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    onednn = onednn and torch.backends.mkldnn.is_available()
    monkeypatch.setattr(matmul, "prefers_onednn", lambda: onednn)
    monkeypatch.setattr(matmul, "MIN_WEIGHT_SIZE", 0)
    hidden, weight, bias, _ = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = project(hidden, weight, bias)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden @ weight.T + bias)  # type: ignore[operator]


@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="no bfloat16 by oneDNN",
)
@pytest.mark.parametrize("rows", [1, N])
@pytest.mark.parametrize("bias", [True, False])
def test_embeddings_laid_out_for_sampling_give_near_enough_probabilities_however_large_the_logits(
    bias: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What all embeddings have in common moves all logits, here to -100, and no probability."""
    monkeypatch.setattr(lm_head, "computes_bfloat16", lambda device: True)
    monkeypatch.setattr(lm_head, "TILE_BYTES", 4 * H * 20)
    monkeypatch.setattr(lm_head, "ROUNDED_BYTES", 4 * H * 3)
    hidden, weight, shift, _ = inputs(bias)
    hidden[:, 0] = 4
    weight[:, 0] -= 25
    with torch.autocast("cpu", dtype=torch.bfloat16):
        laid_out = ready_projection(weight, shift, rows=rows, times=lm_head.MIN_PRODUCTS_TO_REORDER)
        logits = [laid_out(hidden), laid_out(hidden[:3])]
        rounded = torch.nn.functional.linear(hidden, weight, shift).float().log_softmax(-1)
    expected = torch.nn.functional.linear(
        hidden.double(), weight.double(), None if shift is None else shift.double()
    ).log_softmax(-1)
    assert logits[0].dtype == torch.float32
    torch.testing.assert_close(logits[1], logits[0][:3])
    likely = expected > -4
    error = (logits[0].log_softmax(-1) - expected)[likely].square().mean().sqrt()
    assert 1e-5 < error < 0.05
    assert (rounded - expected)[likely].square().mean().sqrt() > 3 * error


@pytest.mark.parametrize("case", ["float32", "few calls", "not native", "float16"])
def test_where_laying_out_does_not_pay_logits_to_sample_from_are_plain(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head, "computes_bfloat16", lambda device: case != "not native")
    hidden, weight, bias, _ = inputs()
    times = lm_head.MIN_PRODUCTS_TO_REORDER - (case == "few calls")
    dtype = torch.float16 if case == "float16" else torch.bfloat16
    with torch.autocast("cpu", dtype=dtype, enabled=case != "float32"):
        ready = ready_projection(weight, bias, rows=N, times=times)
        assert torch.equal(ready(hidden), project(hidden, weight, bias))


def test_gradients_of_many_pieces_add_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 times the same row: a sum in bfloat16 would stop growing after 256."""
    monkeypatch.setattr(lm_head, "PIECE_BYTES", ROW)
    hidden, weight, bias, targets = inputs()
    gradients = []
    for count in (1, 600):
        tensors = leaves(weight, bias)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logprobs, _ = token_logprobs_and_entropies(
                hidden[:1].expand(count, H),
                *tensors,  # type: ignore[arg-type]
                targets[:1].expand(count),
            )
        (logprobs.sum() / count).backward()
        gradients.append([tensor.grad for tensor in tensors if tensor is not None])
    for one, many in zip(*gradients, strict=True):
        torch.testing.assert_close(many, one, rtol=0.02, atol=1e-3)
