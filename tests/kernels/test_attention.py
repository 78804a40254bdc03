"""Attention over short rows has the outputs and gradients of torch's attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ppo_cli.kernels import attention, patches
from ppo_cli.kernels.patches import fast_layers
from tests.conftest import SMALL, make_gpt2

B, HEADS, T, D = 3, 2, 7, 16
ROUNDING = 2**-6  # a few bfloat16 roundings of numbers of about 1


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    """Shapes of the queries in calls of `short_attention`, as on a CPU with bfloat16 units."""
    shapes: list[torch.Size] = []
    plain = attention.short_attention

    def spy(query: Tensor, *rest: Any) -> Tensor:
        shapes.append(query.shape)
        return plain(query, *rest)

    monkeypatch.setattr(attention, "short_attention", spy)
    monkeypatch.setattr(patches, "computes_bfloat16", lambda device: True)
    return shapes


def inputs(dtype: torch.dtype, *shape: int) -> list[Tensor]:
    """Query, key and value as models pass them: views of (B, T, heads, D)."""
    generator = torch.Generator().manual_seed(0)
    shape = shape or (B, T, HEADS, D)
    return [
        torch.randn(shape, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]


def packed_mask() -> Tensor:
    """(B, 1, T, T): causal, the first four tokens of a row apart from the last three."""
    sequence = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    same = sequence.unsqueeze(0) == sequence.unsqueeze(1)
    return (same & torch.ones(T, T, dtype=torch.bool).tril()).expand(B, 1, T, T)


MASKS: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"is_causal": True},
    "packed": {"attn_mask": packed_mask()},
    "by head": {"attn_mask": packed_mask().expand(B, HEADS, T, T)},
    "scaled": {"attn_mask": packed_mask(), "scale": 0.7},
}


@pytest.mark.parametrize("name", MASKS)
def test_outputs_and_gradients_are_those_of_exact_attention(
    name: str, taken: list[torch.Size]
) -> None:
    low = inputs(torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in low]
    expected = nn.functional.scaled_dot_product_attention(*exact, **MASKS[name])
    with fast_layers():
        actual = nn.functional.scaled_dot_product_attention(*low, **MASKS[name])
    assert taken == [(B, HEADS, T, D)]
    assert actual.dtype == torch.bfloat16
    weights = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    torch.testing.assert_close(actual.double(), expected, atol=ROUNDING, rtol=ROUNDING)
    for mine, theirs in zip(low, exact, strict=True):
        assert mine.grad is not None and mine.grad.dtype == torch.bfloat16
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=4 * ROUNDING, rtol=0)


def test_scores_are_not_rounded_to_bfloat16() -> None:
    """Scores of 200 and 200.5 would be the same number in bfloat16."""
    query = torch.tensor([[[[200.0]], [[200.0]]]]).bfloat16().transpose(1, 2)
    key = torch.tensor([[[[1.0]], [[1.0 + 2**-7]]]]).bfloat16().transpose(1, 2)
    value = torch.tensor([[[[0.0]], [[1.0]]]]).bfloat16().transpose(1, 2)
    output = attention.short_attention(query, key, value, None, False, 1.0)
    expected = torch.sigmoid(torch.tensor(200 * 2**-7))
    torch.testing.assert_close(output.float().flatten(), expected.expand(2), atol=0.004, rtol=0)


def test_a_token_that_may_attend_to_none_disturbs_nothing() -> None:
    query, key, value = inputs(torch.bfloat16)
    mask = packed_mask().clone()
    mask[0, 0, 2] = False
    output = attention.short_attention(query, key, value, mask, False, None)
    output.float().sum().backward()
    assert output.isfinite().all()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (query, key, value))


def other_calls() -> dict[str, Callable[[], Tensor]]:
    """Calls that torch computes."""
    low = inputs(torch.bfloat16)
    few_keys = [low[0], *(t[:, :1] for t in low[1:])]
    bias = torch.zeros(B, 1, T, T, dtype=torch.bfloat16)

    def attend(*tensors: Tensor, **settings: Any) -> Tensor:
        return nn.functional.scaled_dot_product_attention(*tensors, **settings)

    return {
        "float32": lambda: attend(*inputs(torch.float32)),
        "a bias": lambda: attend(*low, attn_mask=bias),
        "one query, as in decoding": lambda: attend(low[0][:, :, :1], *low[1:]),
        "one token": lambda: attend(*(t[:, :, :1] for t in low)),
        "fewer key heads": lambda: attend(*few_keys, enable_gqa=True),
        "long rows": lambda: attend(*inputs(torch.bfloat16, 1, 300, 1, 4), is_causal=True),
    }


@pytest.mark.parametrize("name", other_calls())
def test_other_calls_are_left_to_torch(name: str, taken: list[torch.Size]) -> None:
    expected = other_calls()[name]()
    with fast_layers():
        actual = other_calls()[name]()
    assert not taken
    assert torch.equal(actual, expected)


def test_dropout_is_left_to_torch(taken: list[torch.Size]) -> None:
    with fast_layers():
        nn.functional.scaled_dot_product_attention(*inputs(torch.bfloat16), dropout_p=0.5)
    assert not taken


@pytest.mark.parametrize("make", [make_gpt2, lambda: LlamaForCausalLM(LlamaConfig(**SMALL)).eval()])
def test_a_whole_model_under_autocast_has_close_logits_and_gradients(
    make: Callable[[], Any], taken: list[torch.Size]
) -> None:
    """They are as close to those in float32 as torch's own are."""
    torch.manual_seed(0)
    model = make()
    ids = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])

    def run(autocast: bool) -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids).logits
        logits.float().log_softmax(-1)[..., 3].sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return torch.cat([t.detach().float().flatten() for t in (logits, *gradients)])

    exact, usual = run(autocast=False), run(autocast=True)
    with fast_layers():
        fast = run(autocast=True)
    assert len(taken) == model.config.num_hidden_layers
    assert (fast - exact).norm() < 1.5 * (usual - exact).norm()
