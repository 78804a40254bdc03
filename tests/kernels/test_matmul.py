"""Linear layers by oneDNN have the numbers of plain torch; other calls are left to torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from ppo_cli.kernels import matmul, patches
from ppo_cli.kernels.matmul import prefers_onednn, product, wide_product
from ppo_cli.kernels.patches import fast_layers
from tests.conftest import SMALL, make_gpt2

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch without oneDNN"
)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the products by oneDNN, as on a processor where it is the faster library."""
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(matmul, "prefers_onednn", lambda: True)
    monkeypatch.setattr(matmul, "MIN_WEIGHT_SIZE", 0)

    def spy(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        shapes.append((*a.shape, b.shape[0]))
        return product(a, b, bias)

    monkeypatch.setattr(matmul, "product", spy)
    return shapes


def normal(*shape: int, seed: int = 0, **kwargs: Any) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **kwargs)


def results(function: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> list[Tensor]:
    """Output and all gradients of a loss that weights every number differently."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    output = function(x)
    (output * normal(*output.shape, seed=9).to(output.dtype)).sum().backward()
    gradients = [x.grad, *(p.grad for p in module.parameters())]
    return [output.detach(), *(g.clone() for g in gradients if g is not None)]


LAYERS = {
    "linear": lambda: nn.Linear(12, 20),
    "linear without bias": lambda: nn.Linear(12, 20, bias=False),
    "GPT-2's Conv1D": lambda: Conv1D(20, 12),
}
SHAPES = [(7, 12), (3, 5, 12), (2, 1, 4, 12), (1, 12)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_the_outputs_and_gradients_of_plain_torch(
    name: str, shape: tuple[int, ...], taken: list[tuple[int, ...]]
) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    expected = results(layer, normal(*shape), layer)
    assert not taken
    with fast_layers():
        actual = results(layer, normal(*shape), layer)
    rows = normal(*shape).numel() // 12
    assert taken == [(rows, 12, 20), (rows, 20, 12), *taken[2:]]
    assert sorted(taken[2:]) in ([(12, rows, 20)], [(20, rows, 12)])
    assert len(actual) == len(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed_input", [False, True])
def test_strided_tensors_are_multiplied_as_they_are(
    transposed_input: bool, taken: list[tuple[int, ...]]
) -> None:
    x = normal(12, 7).T if transposed_input else normal(7, 24)[:, ::2]
    weight = normal(12, 20).T
    with fast_layers():
        output = nn.functional.linear(x, weight)
    torch.testing.assert_close(output, x @ weight.T)
    assert taken == [(7, 12, 20)]


@pytest.mark.parametrize(
    "make",
    [make_gpt2, lambda: LlamaForCausalLM(LlamaConfig(**SMALL)).eval()],
    ids=["GPT-2", "Llama"],
)
def test_a_whole_model_has_the_same_logits_and_gradients(
    make: Callable[[], Any], taken: list[tuple[int, ...]]
) -> None:
    torch.manual_seed(0)
    model = make()
    ids = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])

    def run() -> list[Tensor]:
        model.zero_grad()
        logits = model(input_ids=ids).logits
        logits.log_softmax(-1)[..., 3].sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = run()
    with fast_layers():
        actual = run()
    assert len(taken) >= 3 * 2 * 4  # forward, both gradients; two layers of four products or more
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_frozen_gets_no_gradient_and_costs_no_product(taken: list[tuple[int, ...]]) -> None:
    layer = nn.Linear(12, 20).requires_grad_(False)
    x = normal(7, 12).requires_grad_()
    with fast_layers():
        layer(x).sum().backward()
        layer(x.detach())
    assert layer.weight.grad is None
    assert taken == [(7, 12, 20), (7, 20, 12), (7, 12, 20)]
    taken.clear()
    layer.requires_grad_()
    with fast_layers():
        layer(x.detach()).sum().backward()
    assert taken == [(7, 12, 20), (20, 7, 12)]


def other_calls() -> dict[str, Callable[[], Tensor]]:
    """Calls that are no float32 linear layer, or have nothing to multiply."""
    x, w, b = normal(7, 12), normal(20, 12), normal(20)
    linear = nn.functional.linear
    return {
        "float64": lambda: linear(x.double(), w.double(), b.double()),
        "bfloat16": lambda: linear(x.bfloat16(), w.bfloat16(), b.bfloat16()),
        "one dimension": lambda: linear(x[0], w, b),
        "empty input": lambda: linear(x[:0], w, b),
        "empty 3-D input": lambda: linear(x[:0].view(2, 0, 12), w, b),
        "no inputs": lambda: linear(normal(7, 0), normal(20, 0)),
        "no outputs": lambda: linear(x, w[:0]),
        "addmm with factors": lambda: torch.addmm(b, x, w.T, alpha=2, beta=3),
        "addmm of a matrix": lambda: torch.addmm(normal(7, 20), x, w.T),
        "addmm of a row": lambda: torch.addmm(b.unsqueeze(0), x, w.T),
        "addmm in float64": lambda: torch.addmm(b.double(), x.double(), w.double().T),
        "matmul": lambda: x @ w.T,
        "einsum": lambda: torch.einsum("ij,kj->ik", x, w),
        "embedding": lambda: nn.functional.embedding(torch.tensor([1, 2]), w),
    }


@pytest.mark.parametrize("name", other_calls())
def test_other_calls_pass_through_untouched(name: str, taken: list[tuple[int, ...]]) -> None:
    expected = other_calls()[name]()
    with fast_layers():
        actual = other_calls()[name]()
    assert not taken
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_under_autocast_layers_that_learn_have_its_numbers(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], taken: list[tuple[int, ...]]
) -> None:
    layer = LAYERS[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = results(layer, normal(*shape, dtype=dtype), layer)
        with fast_layers():
            actual = results(layer, normal(*shape, dtype=dtype), layer)
    assert len(taken) == 3
    assert actual[0].dtype == torch.bfloat16
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=2**-7)


def test_under_autocast_no_copy_of_a_weight_is_held(taken: list[tuple[int, ...]]) -> None:
    layer = nn.Linear(12, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16), fast_layers():
        output = layer(normal(7, 12))
    held = {t.data_ptr(): t for t in output.grad_fn.next_functions[0][0].saved_tensors}
    weights = [t for t in held.values() if t.shape == layer.weight.shape]
    assert [t.data_ptr() for t in weights] == [layer.weight.data_ptr()]
    assert taken == [(7, 12, 20)]


@pytest.mark.parametrize("name", LAYERS)
def test_under_autocast_what_does_not_learn_is_left_to_it(
    name: str, taken: list[tuple[int, ...]]
) -> None:
    """Autocast converts each weight once for all tokens of a sample."""
    layer = LAYERS[name]()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(normal(7, 12))
        with fast_layers():
            actual = layer(normal(7, 12))
    assert not taken
    assert torch.equal(actual, expected)


def test_keywords_reach_the_layer(taken: list[tuple[int, ...]]) -> None:
    x, w, b = normal(7, 12), normal(20, 12), normal(20)
    with fast_layers():
        by_name = nn.functional.linear(input=x, weight=w, bias=b)
    torch.testing.assert_close(by_name, nn.functional.linear(x, w, b))
    assert len(taken) == 1


@pytest.mark.usefixtures("taken")
def test_torchs_functions_are_back_once_the_last_is_out() -> None:
    def called() -> tuple[Callable, ...]:
        functional = torch.nn.functional
        return functional.linear, torch.addmm, functional.scaled_dot_product_attention

    before = called()
    outer, inner = fast_layers(), fast_layers()
    with outer:
        replaced = called()
        assert not set(replaced) & set(before)
        with pytest.raises(ZeroDivisionError), inner:
            1 / 0  # noqa: B018
        assert called() == replaced
    assert called() == before


@pytest.mark.parametrize("enabled", [True, False])
def test_cudnn_has_no_part_in_attention_inside_and_the_part_it_had_afterwards(
    enabled: bool,
) -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    try:
        with pytest.raises(ZeroDivisionError), fast_layers(), fast_layers():
            1 / torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled() is enabled
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_blocks_that_overlap_leave_all_as_it_was_once_the_last_is_over() -> None:
    """The first block to begin is the first to end, as with two threads."""
    enabled, linear = torch.backends.cuda.cudnn_sdp_enabled(), torch.nn.functional.linear
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        first, second = ExitStack(), ExitStack()
        for block in (first, second):
            block.enter_context(fast_layers())
        inside = torch.nn.functional.linear
        first.close()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.nn.functional.linear is inside
        second.close()
        assert torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.nn.functional.linear is linear
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


def test_what_others_put_in_their_place_is_called_and_put_back(
    taken: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = MagicMock(side_effect=torch.nn.functional.linear)
    monkeypatch.setattr(torch.nn.functional, "linear", theirs)
    layer = nn.Linear(12, 20)
    with fast_layers():
        layer(normal(7, 12))
        assert taken == [(7, 12, 20)]
        assert not theirs.called
        layer.double()(normal(7, 12).double())  # is not taken over
    assert len(taken) == theirs.call_count == 1
    assert torch.nn.functional.linear is theirs


@pytest.mark.parametrize("native", [True, False])
def test_where_torchs_own_choice_is_right_nothing_is_taken_over(
    native: bool, taken: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "prefers_onednn", lambda: False)
    monkeypatch.setattr(patches, "computes_bfloat16", lambda device: native)
    layer = nn.Linear(12, 20)
    expected = layer(normal(7, 12))
    with fast_layers():
        assert torch.equal(layer(normal(7, 12)), expected)
    assert not taken
    assert torch.equal(product(normal(7, 12), layer.weight, layer.bias), expected)


@pytest.mark.parametrize(
    ("cpuinfo", "capability", "mkl", "onednn", "expected"),
    [
        ("vendor_id : AuthenticAMD", "AVX512", True, True, True),
        ("vendor_id : AuthenticAMD", "AVX2", True, True, False),
        ("vendor_id : GenuineIntel", "AVX512", True, True, False),
        ("vendor_id : AuthenticAMD", "AVX512", False, True, False),
        ("vendor_id : AuthenticAMD", "AVX512", True, False, False),
        ("CPU implementer : 0x41", "SVE256", False, True, False),
        (None, "AVX512", True, True, False),  # no such file: not Linux
    ],
)
def test_onednn_is_preferred_where_mkl_leaves_the_processors_widest_registers_unused(
    cpuinfo: str | None,
    capability: str,
    mkl: bool,
    onednn: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read_text(self: Path, **kwargs: Any) -> str:
        if cpuinfo is None:
            raise FileNotFoundError(self)
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(matmul.platform, "processor", lambda: "arm")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    assert prefers_onednn.__wrapped__() is expected


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 7, 20, 64])
def test_a_wide_product_in_tiles_is_the_whole_one(
    rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "prefers_onednn", lambda: False)
    monkeypatch.setattr(matmul, "TILE_BYTES", 4 * 12 * rows)
    monkeypatch.setattr(matmul, "FEW_ROWS", 4)
    a, b, shift = normal(5, 12), normal(61, 12, seed=1), normal(61, seed=2)
    tiles: list[int] = []
    whole = torch.mm

    def spy(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        tiles.append(b.shape[1])
        return whole(a, b, out=out)

    monkeypatch.setattr(torch, "mm", spy)
    found = wide_product(a, b, shift if bias else None)
    expected = torch.nn.functional.linear(a.double(), b.double(), shift.double() if bias else None)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert tiles == {1: [1] * 61, 7: [7] * 8 + [5], 20: [20, 20, 20, 1]}.get(rows, [])
    tiles.clear()
    few = wide_product(a[:4], b, shift if bias else None)
    torch.testing.assert_close(few.double(), expected[:4], atol=1e-5, rtol=1e-5)
    assert not tiles
