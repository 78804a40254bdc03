"""The last feed-forward network on the positions that are read: the same numbers for less."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ppo_cli.kernels.feed_forward import last_feed_forward_at
from ppo_cli.kernels.switch import using
from ppo_cli.models.capabilities import ends_in_feed_forward, ends_in_output_layer
from tests.conftest import VOCABULARY, make_batch, make_gpt2, make_policy, make_trainer, tried
from tests.models.test_capabilities import PACKABLE, make_model

BATCH, LENGTH = 3, 8
READ = torch.tensor([2, 3, 9, 12, 20, 23])


def token_ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def hidden_at(model: Any) -> Tensor:
    """(N, H) last hidden states where they are read."""
    hidden: Tensor = model.base_model(input_ids=token_ids(), use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[READ]


def gradients(model: Any, hidden: Tensor) -> dict[str, Tensor]:
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def rows_seen(module: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of what a module is asked from now on, as a hook registered here sees them."""
    shapes: list[tuple[int, ...]] = []
    module.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    return shapes


@pytest.mark.parametrize("name", PACKABLE)
def test_hidden_states_and_gradients_are_those_of_the_whole(name: str) -> None:
    model = make_model(name)
    whole = hidden_at(model)
    expected = gradients(model, whole)
    with last_feed_forward_at(model, READ):
        narrowed = hidden_at(model)
    torch.testing.assert_close(narrowed, whole)
    actual = gradients(model, narrowed)
    assert actual.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(actual[key], gradient, rtol=1e-4, atol=1e-5)


def test_the_last_network_alone_reads_less_and_only_inside() -> None:
    model = make_gpt2()
    first, last = (rows_seen(block.mlp.c_fc) for block in model.transformer.h)
    with last_feed_forward_at(model, READ):
        hidden_at(model)
        hidden_at(model)
    hidden_at(model)
    assert first == [(BATCH, LENGTH, 16)] * 3
    assert last == [(1, len(READ), 16)] * 2 + [(BATCH, LENGTH, 16)]


def test_other_threads_read_all_positions() -> None:
    model = make_gpt2()
    expected = hidden_at(model)
    last = rows_seen(model.transformer.h[-1].mlp.c_fc)
    with last_feed_forward_at(model, READ[:2]), ThreadPoolExecutor(1) as pool:
        torch.testing.assert_close(pool.submit(hidden_at, model).result(), expected)
        torch.testing.assert_close(hidden_at(model)[:2], expected[:2])
    assert last == [(BATCH, LENGTH, 16), (1, 2, 16)]


def test_hooks_of_others_see_all_positions() -> None:
    model = make_gpt2()
    network = model.transformer.h[-1].mlp
    asked, answered = rows_seen(network), []
    network.register_forward_hook(lambda *args: answered.append(tuple(args[2].shape)))
    with last_feed_forward_at(model, READ):
        hidden_at(model)
    assert asked == answered == [(BATCH, LENGTH, 16)]


@pytest.mark.parametrize(
    ("positions", "training", "rows"),
    [
        (range(2, 8), False, (1, 6, 16)),
        (range(16), False, (2, 8, 16)),  # all: nothing to spare
        (range(2, 8), True, (2, 8, 16)),  # checkpointing would do it again outside
    ],
)
def test_a_policy_narrows_where_it_saves_time(
    positions: range, training: bool, rows: tuple[int, ...]
) -> None:
    policy = make_policy().train(training)
    for question in (
        ends_in_output_layer,
        ends_in_feed_forward,
    ):  # asked once, in forwards of its own
        assert policy.allows(question)
    ids = token_ids()[:2]
    logits, _, values = policy(ids)
    seen = rows_seen(policy.pretrained_model.transformer.h[-1].mlp.c_fc)
    tried(policy)  # as a hook makes it another model
    seen.clear()
    at = torch.tensor(positions)
    few_logits, _, few_values = policy(ids, positions=at)
    assert seen == [rows]
    torch.testing.assert_close(few_logits, logits.flatten(0, 1)[at])
    torch.testing.assert_close(few_values, values.flatten()[at])


def test_a_ppo_step_narrows_in_all_its_epochs_and_in_the_reference() -> None:
    policy, reference = make_policy(), make_policy(1)
    trainer = make_trainer(policy, reference, ppo_epochs=3)
    queries, responses, scores = make_batch()
    seen = rows_seen(policy.pretrained_model.transformer.h[-1].mlp.c_fc)
    seen_by_reference = rows_seen(reference.pretrained_model.transformer.h[-1].mlp.c_fc)
    trainer.step(queries, responses, scores)  # tries what the models allow
    seen.clear()
    seen_by_reference.clear()
    trainer.step(queries, responses, scores)
    counted = sum(map(len, responses))
    assert seen == [(1, counted, 16)] * 3
    assert seen_by_reference == [(1, counted, 16)]


class Reversed(nn.ModuleList):
    """Layers that run from the last to the first."""

    def __iter__(self) -> Iterator[nn.Module]:
        return reversed(list(super().__iter__()))


def test_a_network_that_attention_follows_is_told_apart() -> None:
    model = make_gpt2()
    for block in model.transformer.h:  # its effect is small, and none on a tolerance
        for parameter in block.mlp.parameters():
            parameter.data.mul_(1e-6)
    assert ends_in_feed_forward(model)
    turned = make_gpt2()
    turned.load_state_dict(model.state_dict())
    turned.transformer.h = Reversed(list(turned.transformer.h))
    assert not ends_in_feed_forward(turned)


class Answers(nn.Module):
    """A model whose network answers with more than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.LSTM(4, 4)

    def forward(self, hidden: Tensor) -> Any:
        return self.mlp(hidden)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4)), "Sequential has no feed-forward network"),
        (Answers(), "LSTM returns more than one"),
    ],
)
def test_other_networks_are_refused(model: nn.Module, message: str) -> None:
    with (
        pytest.raises(TypeError, match=message),
        last_feed_forward_at(model, torch.tensor([0, 2])),
    ):
        model(torch.zeros(1, 4, 4))


def test_the_switch_decides() -> None:
    policy = make_policy()
    assert policy.reading().narrow
    with using("-feed_forward"):
        assert not policy.reading().narrow
