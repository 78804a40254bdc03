"""GELU by the sigmoid is the same function, and takes the place of no other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation

from ppo_cli.kernels import gelu
from ppo_cli.kernels.gelu import TanhGELU, fuse_activations, has_fused_activations
from ppo_cli.kernels.switch import using
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from tests.conftest import make_gpt2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [NewGELUActivation, FastGELUActivation, GELUTanh])
def test_a_fused_activation_is_the_same_function(kind: type[nn.Module], dtype: torch.dtype) -> None:
    model = nn.Sequential(kind())
    x = torch.linspace(-12, 12, 4001).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = model(exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    fuse_activations(model)
    actual = model(x)
    (fused_slope,) = torch.autograd.grad(actual.sum(), x)
    assert type(model[0]) is TanhGELU
    assert actual.dtype == dtype
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(fused_slope.double(), slope, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, 5, 2)])
def test_any_shape_and_layout_in_pieces(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gelu, "AT_ONCE", 4)
    x = torch.randn(shape)
    x = x.transpose(0, -1) if shape else x  # not contiguous
    expected = nn.functional.gelu(x, approximate="tanh")
    torch.testing.assert_close(TanhGELU()(x), expected)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(TanhGELU()(x).sum(), x)
    (right,) = torch.autograd.grad(nn.functional.gelu(x, approximate="tanh").sum(), x)
    torch.testing.assert_close(slope, right)


def test_at_its_ends_it_is_zero_and_its_input() -> None:
    x = torch.tensor([-1e30, -100.0, 0.0, 100.0, 1e10])
    assert TanhGELU()(x).tolist() == x.clamp(min=0).tolist()
    assert math.isnan(TanhGELU()(torch.tensor(math.nan)))


def test_a_policy_has_no_slow_activation_left_and_its_model_is_otherwise_unchanged() -> None:
    model = make_gpt2()
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    config, names = model.config.to_dict(), list(model.state_dict())
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        AutoModelForCausalLMWithValueHead(model)
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    kinds = [type(module) for module in model.modules()]
    assert NewGELUActivation not in kinds
    assert kinds.count(TanhGELU) == 2  # a layer each
    assert model.config.to_dict() == config
    assert model.config.activation_function == "gelu_new"
    assert list(model.state_dict()) == names


def test_other_activations_stay_as_they_are() -> None:
    for name in ("gelu", "relu", "silu", "quick_gelu"):
        model = make_gpt2(activation_function=name)
        before = [type(module) for module in model.modules()]
        fuse_activations(model)
        assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize(
    ("setting", "kind"),
    [("auto", TanhGELU), ("-sigmoid", nn.GELU), ("-gelu", NewGELUActivation)],
)
def test_the_switch_decides(setting: str, kind: type) -> None:
    with using(setting):
        policy = AutoModelForCausalLMWithValueHead(make_gpt2())
    assert {type(block.mlp.act) for block in policy.pretrained_model.transformer.h} == {kind}
    assert has_fused_activations(policy) == (setting != "-gelu")
