"""The fast ways through a step against the plain ones: the same statistics, the same weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_batch, make_gpt2, make_policy, make_trainer, weights
from torch import Tensor

from ppo_cli import AutoModelForCausalLMWithValueHead, PPOTrainer
from ppo_cli.ppo import update as update_module
from ppo_cli.ppo.update import Update

Stats = dict[str, Any]


def descent(policy: torch.nn.Module) -> torch.optim.Optimizer:
    """Plain gradient descent: Adam would blow differences in rounding up to whole steps."""
    trainable = [p for p in policy.parameters() if p.requires_grad]
    return torch.optim.SGD(trainable, lr=0.02)


def two_steps(trainer: PPOTrainer) -> tuple[list[Stats], Tensor]:
    """Statistics of two steps, the second with masks and a response that takes part in nothing."""
    queries, responses, scores = make_batch(seed=1)
    masks = [torch.arange(len(r)) % 3 != 1 for r in responses]
    masks[3] = torch.zeros_like(masks[3])
    stats = [trainer.step(*make_batch()), trainer.step(queries, responses, scores, masks)]
    return stats, weights(trainer.model)


def assert_same(a: tuple[list[Stats], Tensor], b: tuple[list[Stats], Tensor], atol: float) -> None:
    for mine, theirs in zip(a[0], b[0], strict=True):
        assert mine.keys() == theirs.keys()
        for key in mine:
            if not key.startswith("time/"):
                np.testing.assert_allclose(
                    mine[key], theirs[key], rtol=1e-4, atol=atol, err_msg=key
                )
    torch.testing.assert_close(a[1], b[1], rtol=0, atol=atol)
    assert (weights(make_policy()) - a[1]).abs().max() > 100 * max(atol, 1e-7)


def of(trainer: PPOTrainer) -> Update:
    return Update(
        trainer.model, trainer.optimizer, trainer.accelerator, trainer._shuffle, trainer.config
    )


# ---------------------------------------------------------------- layout, shared forward


SETTINGS: dict[str, dict[str, Any]] = {
    "one pass": {},
    "full KL": {"kl_penalty": "full"},
    "mini-batches": {"mini_batch_size": 2},
    "accumulated": {"mini_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_padded_rows_give_the_statistics_and_weights_of_packed_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, read = [], []
    for packed in (True, False):
        monkeypatch.setattr(AutoModelForCausalLMWithValueHead, "reads_packed", packed)
        policy = make_policy()

        def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            read[-1].add("attention_mask" in kwargs)

        read.append(set())
        policy.register_forward_pre_hook(count, with_kwargs=True)
        trainer = make_trainer(policy, optimizer=descent(policy), **SETTINGS[name])
        results.append(two_steps(trainer))
    assert read == [{False}, {True}]
    assert_same(*results, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "saved"), [("one pass", 1), ("full KL", 0), ("checkpointed", 1)], ids=str
)
def test_the_first_epochs_forward_gives_the_old_probabilities_that_a_separate_one_would(
    name: str, saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, calls = [], []
    for shared in (True, False):
        monkeypatch.setattr(Update, "is_one_pass", shared)
        policy = make_policy()
        trainer = make_trainer(policy, optimizer=descent(policy), **SETTINGS[name])
        calls.append(0)

        def count(*_: Any) -> None:
            calls[-1] += 1

        policy.register_forward_pre_hook(count)
        results.append(two_steps(trainer))
    epochs = trainer.config.ppo_epochs
    assert calls == [2 * (epochs + 1 - saved), 2 * (epochs + 1)]
    assert_same(*results, atol=1e-5)


@pytest.mark.parametrize(("mini_batch_size", "shared"), [(8, True), (4, False), (2, False)])
def test_the_forward_is_shared_where_one_covers_the_batch(
    mini_batch_size: int, shared: bool
) -> None:
    assert of(make_trainer(mini_batch_size=mini_batch_size)).is_one_pass is shared


# ---------------------------------------------------------------- weights that move in backward


def in_backward(monkeypatch: pytest.MonkeyPatch, yes: bool) -> None:
    monkeypatch.setattr(update_module, "LARGE_GRADIENTS", 0 if yes else 2**60)


def adam_state(trainer: PPOTrainer) -> list[Tensor]:
    state = trainer.optimizer.state_dict()["state"]
    numbers = [value for index in sorted(state) for value in state[index].values()]
    return [torch.as_tensor(value).clone() for value in numbers if value is not None]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mini_batch_size": 2, "ppo_epochs": 2},
        {"gradient_checkpointing": True},
        {"num_shared_layers": 1},
    ],
    ids=str,
)
def test_weights_that_move_as_their_gradients_come_end_where_they_would(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    finals, losses = [], []
    for yes in (False, True):
        in_backward(monkeypatch, yes)
        trainer = make_trainer(**settings)
        assert of(trainer).moves_in_backward is yes
        losses.append([trainer.step(*make_batch(seed=s))["ppo/loss/total"] for s in range(2)])
        finals.append([weights(trainer.model), *adam_state(trainer)])
    assert losses[0] == losses[1]
    assert len(finals[0]) == len(finals[1]) > 3
    for plain, fused in zip(*finals, strict=True):
        torch.testing.assert_close(fused, plain, rtol=0, atol=1e-7)


@pytest.mark.parametrize("yes", [False, True])
def test_gradients_are_let_go(yes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are gone after a step; where weights move in backward there is one at a time."""
    in_backward(monkeypatch, yes)
    trainer = make_trainer(ppo_epochs=2)
    held: list[int] = []
    step = trainer.optimizer.step

    def spy(*args: Any, **kwargs: Any) -> Any:
        held.append(sum(p.grad is not None for p in trainer.model.parameters()))
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer.optimizer, "step", spy)
    trainer.step(*make_batch())
    count = len(list(trainer.model.parameters()))
    assert held == ([1] * (2 * count) if yes else [count] * 2)
    assert all(p.grad is None for p in trainer.model.parameters())
    assert all(not p._post_accumulate_grad_hooks for p in trainer.model.parameters())
    assert not hasattr(trainer.optimizer.optimizer, "found_inf")


def test_an_error_in_backward_leaves_no_hook_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    in_backward(monkeypatch, True)
    trainer = make_trainer()

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.accelerator, "backward", fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.step(*make_batch())
    assert all(not p._post_accumulate_grad_hooks for p in trainer.model.parameters())


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer] | None] = {
    "our own": None,
    "fused AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-3, fused=True),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=1e-3, fused=False),
    "foreach Adam": lambda ps: torch.optim.Adam(ps, lr=1e-3, foreach=True),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9),
    "fused SGD": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, fused=True),
}


def trainer_with(optimizer: str, **settings: Any) -> PPOTrainer:
    policy, make = make_policy(), OPTIMIZERS[optimizer]
    if make is not None:
        settings["optimizer"] = make(list(policy.parameters()))
    return make_trainer(policy, **settings)


@pytest.mark.parametrize("yes", [False, True], ids=["after backward", "in backward"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_over_the_ratio_threshold_nothing_moves_momentum_included(
    optimizer: str, yes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_backward(monkeypatch, yes)
    trainer = trainer_with(optimizer)
    assert of(trainer).moves_in_backward is (
        yes and optimizer in ("our own", "fused AdamW", "fused SGD")
    )
    trainer.step(*make_batch())  # gives the optimizer its momentum
    assert not torch.equal(weights(trainer.model), weights(make_policy()))
    before, state = weights(trainer.model), adam_state(trainer)
    trainer.config.ratio_threshold = 1e-6
    with pytest.warns(UserWarning, match="ratio_threshold"):
        trainer.step(*make_batch(seed=1))
    assert torch.equal(before, weights(trainer.model))
    assert len(state) == len(adam_state(trainer)) > 0
    for old, new in zip(state, adam_state(trainer), strict=True):
        assert torch.equal(old, new)
    trainer.config.ratio_threshold = 10.0
    trainer.step(*make_batch(seed=2))
    assert not torch.equal(before, weights(trainer.model))


@pytest.mark.parametrize("yes", [False, True], ids=["after backward", "in backward"])
def test_a_mini_batch_that_is_not_finite_moves_nothing(
    yes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_backward(monkeypatch, yes)
    trainer = make_trainer(ppo_epochs=1)
    before = weights(trainer.model)
    minibatch = Update._minibatch

    def broken(self: Update, *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, stats = minibatch(self, *args)
        return loss * torch.nan, {**stats, "mean_ratio": stats["mean_ratio"] * torch.nan}

    monkeypatch.setattr(Update, "_minibatch", broken)
    with pytest.warns(UserWarning, match="ratio_threshold"):
        trainer.step(*make_batch())
    assert torch.equal(before, weights(trainer.model))


def test_one_bad_mini_batch_cancels_its_whole_accumulated_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_backward(monkeypatch, True)
    trainer = make_trainer(mini_batch_size=2, gradient_accumulation_steps=2, ppo_epochs=1)
    assert not of(trainer).moves_in_backward
    minibatch, made = Update._minibatch, []

    def second_is_bad(self: Update, *args: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, stats = minibatch(self, *args)
        made.append(weights(trainer.model))
        if len(made) == 1:
            stats["mean_ratio"] = stats["mean_ratio"] * 100
        return loss, stats

    monkeypatch.setattr(Update, "_minibatch", second_is_bad)
    with pytest.warns(UserWarning, match="ratio_threshold"):
        trainer.step(*make_batch())
    assert torch.equal(made[0], made[2])  # the first step, of two mini-batches, was cancelled
    assert not torch.equal(made[2], weights(trainer.model))  # the second was not


@pytest.mark.parametrize(
    ("settings", "large", "expected"),
    [
        ({}, 0, True),
        ({"mini_batch_size": 2}, 0, True),
        ({"max_grad_norm": 1.0}, 0, False),
        ({"mini_batch_size": 2, "gradient_accumulation_steps": 2}, 0, False),
        ({}, 4 * len(weights(make_policy())), True),
        ({}, 4 * len(weights(make_policy())) + 1, False),
        ({}, update_module.LARGE_GRADIENTS, False),
    ],
    ids=str,
)
def test_weights_move_in_backward_where_no_other_gradient_has_a_say_and_there_are_many(
    settings: dict[str, Any], large: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_module, "LARGE_GRADIENTS", large)
    assert of(make_trainer(**settings)).moves_in_backward is expected


# ---------------------------------------------------------------- optimizers, references


def test_an_adam_that_is_not_fused_takes_the_steps_of_our_own() -> None:
    finals = []
    for optimizer in ("our own", "Adam", "foreach Adam"):
        trainer = trainer_with(optimizer, ppo_epochs=2)
        assert isinstance(trainer.optimizer.optimizer, torch.optim.Adam)
        trainer.step(*make_batch())
        finals.append(weights(trainer.model))
    moved = (finals[0] - weights(make_policy())).abs().max()
    for other in finals[1:]:
        difference = (other - finals[0]).abs()
        assert (difference < 1e-6).float().mean() > 0.98  # but for gradients of rounding alone
        assert difference.max() < 2.1 * moved


def test_a_plain_reference_is_one_with_a_value_head_and_is_left_as_it_was() -> None:
    results = []
    for wrap in (lambda model: model, lambda model: AutoModelForCausalLMWithValueHead(model)):
        model = make_gpt2(1).train()
        before = copy.deepcopy(model.state_dict())
        policy = make_policy()
        trainer = make_trainer(policy, wrap(model), optimizer=descent(policy))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "KL is negative")
            results.append(two_steps(trainer))
        torch.manual_seed(0)
        pair = trainer.generate(
            torch.tensor([1, 2]), generate_ref_response=True, top_k=1, max_new_tokens=5
        )
        expected = model.generate(
            torch.tensor([[1, 2]]), do_sample=False, max_new_tokens=5, pad_token_id=0
        )
        assert pair[1].tolist() == expected.tolist()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
    assert_same(*results, atol=1e-7)
    assert any(abs(stats["objective/kl"]) > 0.1 for stats in results[0][0])
