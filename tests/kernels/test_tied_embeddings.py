"""One gradient for both uses of tied embeddings equals that of plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ppo_cli import AutoModelForCausalLMWithValueHead
from ppo_cli.kernels import lm_head, tied_embeddings
from ppo_cli.kernels.tied_embeddings import TiedGradient
from tests.conftest import SMALL, VOCABULARY, make_gpt2

PAD = 3


def make_llama(tied: bool = True) -> LlamaForCausalLM:
    """A model whose lookup has no gradient for the padding token."""
    torch.manual_seed(0)
    changes = {"pad_token_id": PAD, "tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes}))


MODELS: dict[str, Callable[[], Any]] = {"gpt2": make_gpt2, "llama": make_llama}


def gradients(
    policy: AutoModelForCausalLMWithValueHead, parts: str, *, by_autograd: bool = False
) -> dict[str, Tensor]:
    """Gradients of a loss over 24 positions with many equal tokens, added to those there."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 8, (4, 9), generator=g)
    positions = torch.arange(36)[torch.arange(36) % 3 > 0]
    targets = torch.randint(0, VOCABULARY, (24,), generator=g)
    weights = torch.linspace(-1, 2, 24)
    if by_autograd:
        logits, _, values = policy(input_ids=ids)
        log_p = logits.flatten(0, 1)[positions].log_softmax(-1)
        entropies = -(log_p.exp() * log_p).sum(-1)
        logprobs = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
        values = values.flatten()[positions]
    else:
        logprobs, entropies, values = policy(input_ids=ids, positions=positions, targets=targets)
    loss = (values * weights).sum()
    if "logits" in parts:
        loss = loss + (logprobs * weights).sum() + (entropies * weights.flip(0)).sum()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in policy.named_parameters()
        if parameter.grad is not None
    }


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rows of each part that was kept for a lookup."""
    rows: list[int] = []
    leave = TiedGradient.add

    def spy(self: TiedGradient, grad_logits: Tensor, hidden: Tensor) -> None:
        rows.append(len(hidden))
        leave(self, grad_logits, hidden)

    monkeypatch.setattr(TiedGradient, "add", spy)
    return rows


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("parts", ["logits and values", "values"])
@pytest.mark.parametrize("piece", [2**27, 4 * VOCABULARY * 5], ids=["whole", "in pieces"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_plain_autograd(
    name: str, piece: int, parts: str, left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head, "PIECE_BYTES", piece)
    policy = AutoModelForCausalLMWithValueHead(MODELS[name]()).eval()
    expected = gradients(policy, parts, by_autograd=True)
    policy.zero_grad()
    assert_same(gradients(policy, parts), expected)
    assert sum(left) == (24 if "logits" in parts else 0)
    assert parts == "values" or (len(left) > 1) == (piece < 2**27)


def test_a_second_backward_pass_adds_to_the_first_and_begins_with_nothing_left() -> None:
    policy = AutoModelForCausalLMWithValueHead(make_gpt2()).eval()
    once = gradients(policy, "logits and values")
    twice = gradients(policy, "logits and values")
    assert_same(twice, {name: 2 * gradient for name, gradient in once.items()})


def test_factors_are_multiplied_once_they_hold_more_than_their_product() -> None:
    weight = torch.zeros(50, 8)
    gradient = TiedGradient(weight)
    g = torch.Generator().manual_seed(0)
    parts = [(torch.randn(n, 50, generator=g), torch.randn(n, 8, generator=g)) for n in (3, 4, 6)]
    held = []
    for part in parts:
        gradient.add(*part)
        held.append(len(gradient._factors))
    assert held == [1, 2, 0]  # 3 and 7 rows are less than 8, 13 are not
    expected = sum((grad.t() @ hidden for grad, hidden in parts), torch.zeros(()))
    torch.testing.assert_close(gradient.take(), expected)
    torch.testing.assert_close(gradient.take(), weight)  # it was taken


@pytest.mark.parametrize("rows", [0, 3, 30], ids=["lookups alone", "factors", "multiplied"])
@pytest.mark.parametrize("at_once", [1, 7, 50, 1000])
def test_pieces_make_up_the_whole(at_once: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tied_embeddings, "PIECE_BYTES", 4 * 8 * at_once)
    g = torch.Generator().manual_seed(0)
    grad_logits, hidden = torch.randn(rows, 50, generator=g), torch.randn(rows, 8, generator=g)
    ids, of_lookups = torch.tensor([49, 3, 0, 3, 49]), torch.randn(5, 8, generator=g)
    gradient = TiedGradient(torch.zeros(50, 8))
    if rows:
        gradient.add(grad_logits, hidden)
    whole, at = torch.full((50, 8), torch.nan), []
    for where, piece in gradient.take_pieces(ids, of_lookups):
        whole[where] = piece
        at.append(where.start)
    assert at == list(range(0, 50, at_once))
    torch.testing.assert_close(whole, grad_logits.t() @ hidden + _one_hot(ids).t() @ of_lookups)
    assert not gradient.take().any()  # all was taken


def _one_hot(ids: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(ids, 50).float()


def untied() -> Any:
    return make_llama(tied=False)


def frozen() -> Any:
    model = make_gpt2()
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def scaled() -> Any:
    model = make_gpt2()
    model.get_input_embeddings().scale_grad_by_freq = True
    return model


@pytest.mark.parametrize("make", [untied, frozen, scaled])
def test_other_embeddings_are_left_to_autograd(make: Callable[[], Any], left: list[int]) -> None:
    policy = AutoModelForCausalLMWithValueHead(make()).eval()
    expected = gradients(policy, "logits and values", by_autograd=True)
    policy.zero_grad()
    assert_same(gradients(policy, "logits and values"), expected)
    assert not left


def test_outside_and_without_gradients_lookups_are_the_modules_own() -> None:
    model = make_gpt2()
    embedding = model.get_input_embeddings()
    ids = torch.arange(4)
    with torch.no_grad(), tied_embeddings.tied_gradient(model) as gradient:
        assert gradient is None
        assert not embedding._forward_hooks
    with tied_embeddings.tied_gradient(model) as gradient:
        assert gradient is not None
        assert embedding(ids).grad_fn.name() == "_LookupBackward"
        torch.testing.assert_close(embedding(ids), embedding.weight[:4])
        assert gradient.lookups == 2
        with torch.no_grad():  # asks for no part of the gradient
            torch.testing.assert_close(embedding(ids), embedding.weight[:4])
        assert gradient.lookups == 2
    assert embedding(ids).grad_fn.name() == "EmbeddingBackward0"
