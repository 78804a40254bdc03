"""GELU in one kernel is the same function, and replaces no other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import FastGELUActivation, NewGELUActivation

from ppo_cli.kernels.gelu import fuse_activations, has_fused_activations
from ppo_cli.kernels.switch import using
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from tests.conftest import make_gpt2


@pytest.mark.parametrize("kind", [NewGELUActivation, FastGELUActivation])
def test_a_fused_activation_is_the_same_function(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind())
    x = torch.linspace(-12, 12, 4001).requires_grad_()
    exact = x.detach().double().requires_grad_()
    expected = model(exact)
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    fuse_activations(model)
    actual = model(x)
    (fused_slope,) = torch.autograd.grad(actual.sum(), x)
    assert type(model[0]) is nn.GELU
    torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(fused_slope.double(), slope, rtol=2e-6, atol=2e-6)


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
    assert kinds.count(nn.GELU) == 2  # one per layer
    assert model.config.to_dict() == config
    assert model.config.activation_function == "gelu_new"
    assert list(model.state_dict()) == names


def test_other_activations_stay_as_they_are() -> None:
    for name in ("gelu", "relu", "silu", "quick_gelu"):
        model = make_gpt2(activation_function=name)
        before = [type(module) for module in model.modules()]
        fuse_activations(model)
        assert [type(module) for module in model.modules()] == before


@pytest.mark.parametrize(("setting", "kind"), [("auto", nn.GELU), ("-gelu", NewGELUActivation)])
def test_the_switch_decides(setting: str, kind: type) -> None:
    with using(setting):
        policy = AutoModelForCausalLMWithValueHead(make_gpt2())
    assert {type(block.mlp.act) for block in policy.pretrained_model.transformer.h} == {kind}
    assert has_fused_activations(policy) == (setting == "auto")
