"""The fast paths of a step against the plain ones: the same statistics and weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from ppo_cli import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_cli.errors import UsageError
from ppo_cli.kernels import tied_embeddings
from ppo_cli.kernels.tied_embeddings import TiedGradient
from ppo_cli.models import capabilities
from ppo_cli.models.capabilities import ends_in_output_layer, reads_packed
from ppo_cli.ppo import optimizer_step
from ppo_cli.ppo.forward import TokenOutputs
from ppo_cli.ppo.update import Update
from tests.conftest import (
    VOCABULARY,
    make_batch,
    make_gpt2,
    make_policy,
    make_silent_policy,
    make_tokenizer,
    make_trainer,
    weights,
)

Stats = dict[str, Any]
WIDTH = make_gpt2().config.n_embd
ROWS_AT_ONCE = 7  # of the embeddings, where Adam takes them in pieces
pytestmark = pytest.mark.usefixtures("fast_paths")


def descent(policy: torch.nn.Module) -> torch.optim.Optimizer:
    """Plain gradient descent: Adam would amplify rounding differences to whole steps."""
    trainable = [p for p in policy.parameters() if p.requires_grad]
    return torch.optim.SGD(trainable, lr=0.02)


def two_steps(trainer: PPOTrainer) -> tuple[list[Stats], Tensor]:
    """Statistics of two steps, the second with masks, one of which leaves no token."""
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


def answer(
    monkeypatch: pytest.MonkeyPatch, question: Callable[[Any], bool], answered: bool
) -> None:
    """Make one of the questions about a model's architecture have this answer."""
    monkeypatch.setattr(capabilities, question.__name__, lambda model: answered)


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
        answer(monkeypatch, reads_packed, packed)
        policy = make_policy()

        def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            read[-1].add("position_ids" in kwargs)

        read.append(set())
        policy.register_forward_pre_hook(count, with_kwargs=True)
        trainer = make_trainer(policy, optimizer=descent(policy), **SETTINGS[name])
        results.append(two_steps(trainer))
    assert read == [{True}, {False}]
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
    monkeypatch.setattr(optimizer_step, "LARGE_GRADIENTS", 0 if yes else 2**60)


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
        {"ratio_threshold": 1.0001},  # cancels some
        {"optimizer": "fused AdamW"},
        {"optimizer": "AMSGrad in groups"},
        {"optimizer": "fused SGD"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*ratio_threshold")
def test_weights_that_move_as_their_gradients_come_end_where_they_would(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tied_embeddings, "PIECE_BYTES", ROWS_AT_ONCE * 4 * WIDTH)
    optimizer = settings.pop("optimizer", "our own")
    finals, losses = [], []
    for yes in (False, True):
        in_backward(monkeypatch, yes)
        trainer = trainer_with(optimizer, **settings)
        assert of(trainer).optimizer_step.is_within_backward is yes
        losses.append([trainer.step(*make_batch(seed=s))["ppo/loss/total"] for s in range(2)])
        finals.append([weights(trainer.model), *adam_state(trainer)])
    assert losses[0] == losses[1]
    assert len(finals[0]) == len(finals[1]) > 3
    for plain, fused in zip(*finals, strict=True):
        torch.testing.assert_close(fused, plain, rtol=0, atol=1e-7)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rows of each piece of a gradient that was taken."""
    rows: list[int] = []
    take_pieces = TiedGradient.take_pieces

    def spy(self: TiedGradient, *args: Any) -> tied_embeddings.GradientPieces:
        for where, gradient in take_pieces(self, *args):
            rows.append(len(gradient))
            yield where, gradient

    monkeypatch.setattr(TiedGradient, "take_pieces", spy)
    monkeypatch.setattr(tied_embeddings, "PIECE_BYTES", ROWS_AT_ONCE * 4 * WIDTH)
    return rows


def test_adam_takes_the_embeddings_in_pieces(
    pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_backward(monkeypatch, True)
    make_trainer(ppo_epochs=2).step(*make_batch())
    once = [ROWS_AT_ONCE] * (VOCABULARY // ROWS_AT_ONCE) + [VOCABULARY % ROWS_AT_ONCE]
    assert pieces == 2 * once


def with_a_hook(policy: Any) -> None:
    """Only the first five tokens' embeddings learn."""
    rows = torch.arange(VOCABULARY).unsqueeze(1) < 5
    policy.pretrained_model.get_input_embeddings().weight.register_hook(lambda g: g * rows)


def with_two_lookups(policy: Any) -> None:
    """The embeddings are used a second time in the forward."""
    embed = policy.pretrained_model.get_input_embeddings()
    body = policy.pretrained_model.transformer
    forward = body.forward

    def twice(input_ids: Tensor, **kwargs: Any) -> Any:
        output = forward(input_ids, **kwargs)
        output.last_hidden_state = output.last_hidden_state + 0.1 * embed(input_ids)
        return output

    body.forward = twice


@pytest.mark.parametrize("change", [with_a_hook, with_two_lookups])
def test_embeddings_with_more_to_their_gradient_move_whole(
    change: Callable[[Any], None], pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    finals = []
    for yes in (False, True):
        in_backward(monkeypatch, yes)
        policy = make_policy()
        change(policy)
        trainer = make_trainer(policy, make_policy())
        trainer.step(*make_batch())
        finals.append(weights(trainer.model))
    assert not pieces
    torch.testing.assert_close(*finals, rtol=0, atol=1e-7)
    assert not torch.equal(finals[0], weights(make_policy()))


def test_an_optimizer_of_other_weights_leaves_the_embeddings_alone(
    pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_backward(monkeypatch, True)
    policy = make_policy()
    embeddings = policy.pretrained_model.get_input_embeddings().weight
    before = embeddings.detach().clone()
    others = [p for p in policy.parameters() if p is not embeddings]
    trainer = make_trainer(policy, optimizer=torch.optim.Adam(others, lr=1e-3, fused=True))
    trainer.step(*make_batch())
    assert torch.equal(before, embeddings)
    assert not torch.equal(weights(policy), weights(make_policy()))


PARTS: dict[str, Callable[[Any], Any]] = {
    "value head": lambda policy: policy.v_head,
    "last block": lambda policy: policy.pretrained_model.transformer.h[-1],
}


class WithMethods(PPOTrainer):
    """Its step is made of the methods of 0.11.4."""

    def record_step_stats(self, kl_coef: float, **data: Any) -> dict[str, Any]:
        return super().record_step_stats(kl_coef, **data)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", [PPOTrainer, WithMethods])
def test_gradients_that_the_optimizer_does_not_hold_shrink_no_step(
    part: str, kind: type[PPOTrainer]
) -> None:
    """An optimizer of a part moves it as where nothing else has a gradient."""
    finals = []
    for is_frozen in (False, True):
        policy = make_policy()
        held = list(PARTS[part](policy).parameters())
        if is_frozen:
            for parameter in set(policy.parameters()) - set(held):
                parameter.requires_grad_(False)
        config = PPOConfig(batch_size=8, mini_batch_size=2, ppo_epochs=2, max_grad_norm=0.05)
        config.gradient_accumulation_steps = 2
        optimizer = torch.optim.SGD(held, lr=0.5)
        trainer = kind(config, policy, make_policy(), make_tokenizer(), optimizer=optimizer)
        for seed in range(2):
            trainer.step(*make_batch(seed=seed))
        assert all(parameter.grad is None for parameter in policy.parameters())
        finals.append(weights(policy))
    torch.testing.assert_close(*finals, rtol=1e-5, atol=1e-6)
    assert not torch.equal(finals[0], weights(make_policy()))


def adapted(**settings: Any) -> AutoModelForCausalLMWithValueHead:
    adapter = LoraConfig(target_modules=["c_attn"], init_lora_weights=False)
    model = get_peft_model(make_gpt2(), adapter)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(settings.get(name.rsplit(".", 3)[1], False))
    return AutoModelForCausalLMWithValueHead(model)


def frozen() -> AutoModelForCausalLMWithValueHead:
    policy = make_policy()
    policy.pretrained_model.requires_grad_(False)
    return policy


@pytest.mark.parametrize(
    ("make", "steps", "message"),
    [
        (
            adapted,
            None,
            "only the value head trains: .* adapter is frozen .*is_trainable=True",
        ),
        (frozen, None, "only the value head trains: the language model's weights are frozen"),
        (make_policy, "head", "only the value head trains: .* weights are not in the optimizer"),
        (make_policy, "other", "nothing trains: .* weights are not in the optimizer"),
    ],
)
def test_it_is_said_where_the_language_model_does_not_train(
    make: Callable[[], Any], steps: str | None, message: str
) -> None:
    policy, optimizer = make(), None
    if steps is not None:
        held = (
            policy.v_head.parameters() if steps == "head" else [torch.nn.Parameter(torch.ones(1))]
        )
        optimizer = torch.optim.Adam(held)
    before = weights(policy.pretrained_model)
    with pytest.warns(UserWarning, match=message):
        trainer = make_trainer(policy, optimizer=optimizer)
    trainer.step(*make_batch())
    assert torch.equal(before, weights(policy.pretrained_model))


@pytest.mark.parametrize("settings", [{}, {"value_warmup_steps": 1}], ids=str)
def test_the_reference_does_not_set_free_what_is_frozen_in_an_adapter(
    settings: dict[str, Any],
) -> None:
    """peft lets a whole adapter train once it was off."""
    policy = adapted(lora_B=not settings, lora_A=bool(settings))
    with torch.no_grad():  # the adapter changes nothing yet, so the policy is its own reference
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    trainer = make_trainer(policy, **settings)
    assert trainer.ref_model is None
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    trainer.step(*make_batch())
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert bool([name for name in moved if "lora_B" in name]) is not bool(settings)
    assert not [name for name in moved if "lora_A" in name]


def test_a_policy_without_anything_to_train_is_refused() -> None:
    with pytest.raises(UsageError, match="no parameter of the model trains"):
        make_trainer(make_policy().requires_grad_(False))  # type: ignore[arg-type]


def test_moments_are_made_before_the_first_forward_and_move_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_backward(monkeypatch, True)
    trainer, seen = make_trainer(), []
    forward = Update.forward_before

    def look(self: Update, *args: Any) -> Any:
        seen.append((weights(trainer.model), adam_state(trainer)))
        return forward(self, *args)

    monkeypatch.setattr(Update, "forward_before", look)
    trainer.step(*make_batch())
    trainer.step(*make_batch())
    (first, moments), (_, later) = seen
    assert torch.equal(first, weights(make_policy()))
    assert len(moments) == 3 * len(list(trainer.model.parameters()))
    assert not any(moment.any() for moment in moments)
    assert all(number.any() for number in later)


@pytest.mark.parametrize("yes", [False, True])
def test_gradients_are_let_go(yes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is left after a step; where weights move in backward, there is one at a time."""
    in_backward(monkeypatch, yes)
    monkeypatch.setattr(optimizer_step, "BYTES_AT_ONCE", 1)  # none waits for others
    trainer = make_trainer(ppo_epochs=2)
    held: list[int] = []
    of_all = trainer.optimizer.optimizer
    step = torch.optim.Adam.step

    def spy(self: torch.optim.Adam, *args: Any) -> Any:
        held.append(sum(p.grad is not None for p in trainer.model.parameters()))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    trainer.step(*make_batch())
    count = len(list(trainer.model.parameters()))
    if yes:
        assert held[0] == count  # makes the moments
        # The embeddings' never is there whole.
        assert list(filter(None, held[1:])) == [1] * (2 * (count - 1))
    else:
        assert held == [count] * 2
    assert all(p.grad is None for p in trainer.model.parameters())
    assert all(not p._post_accumulate_grad_hooks for p in trainer.model.parameters())
    assert not hasattr(of_all, "found_inf")


def test_a_step_within_backward_is_one_step_for_those_who_listen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_backward(monkeypatch, True)
    trainer, steps = make_trainer(ppo_epochs=3), []
    trainer.optimizer.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    trainer.step(*make_batch())
    assert len(steps) == 3


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
    "AMSGrad in groups": lambda ps: torch.optim.AdamW(
        [{"params": ps[1::2], "lr": 2e-3}, {"params": ps[::2]}],
        lr=1e-3,
        fused=True,
        amsgrad=True,
        weight_decay=0.1,
    ),
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
    assert of(trainer).optimizer_step.is_within_backward is (
        yes and optimizer in ("our own", "fused AdamW", "fused SGD", "AMSGrad in groups")
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
    forward = Update._forward

    def broken(self: Update, *args: Any) -> TokenOutputs:
        return TokenOutputs(*(output * torch.nan for output in forward(self, *args)))

    monkeypatch.setattr(Update, "_forward", broken)
    with pytest.warns(UserWarning, match="ratio_threshold"):
        trainer.step(*make_batch())
    assert torch.equal(before, weights(trainer.model))


@pytest.mark.parametrize("settings", [{}, {"max_approx_kl": 1.0, "ratio_threshold": 1e9}], ids=str)
@pytest.mark.filterwarnings("ignore:.*ratio_threshold")
def test_one_bad_mini_batch_cancels_its_whole_accumulated_step(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_backward(monkeypatch, True)
    settings = {"mini_batch_size": 2, "gradient_accumulation_steps": 2, **settings}
    trainer = make_trainer(ppo_epochs=1, **settings)
    assert not of(trainer).optimizer_step.is_within_backward
    forward, made = Update._forward, []

    def first_is_bad(self: Update, *args: Any) -> TokenOutputs:
        outputs = forward(self, *args)
        made.append(weights(trainer.model))
        return outputs._replace(logprobs=outputs.logprobs + 5 * (len(made) == 1))

    monkeypatch.setattr(Update, "_forward", first_is_bad)
    trainer.step(*make_batch())
    after = [*made, weights(trainer.model)]
    assert torch.equal(after[0], after[2])  # the first step, of two mini-batches, was cancelled
    if "max_approx_kl" in settings:
        assert len(made) == 2  # and was the last
    else:
        assert len(made) == 4
        assert not torch.equal(made[2], after[4])  # the second was not


@pytest.mark.parametrize(
    ("settings", "large", "expected"),
    [
        ({}, 0, True),
        ({"mini_batch_size": 2}, 0, True),
        ({"max_grad_norm": 1.0}, 0, False),
        ({"mini_batch_size": 2, "gradient_accumulation_steps": 2}, 0, False),
        ({}, 4 * len(weights(make_policy())), True),
        ({}, 4 * len(weights(make_policy())) + 1, False),
        ({}, optimizer_step.LARGE_GRADIENTS, False),
    ],
    ids=str,
)
def test_weights_move_in_backward_where_no_other_gradient_has_a_say_and_there_are_many(
    settings: dict[str, Any], large: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer_step, "LARGE_GRADIENTS", large)
    assert of(make_trainer(**settings)).optimizer_step.is_within_backward is expected


def test_an_optimizer_of_the_users_own_making_steps_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Counting(torch.optim.Adam):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            return super().step(closure)

    in_backward(monkeypatch, True)
    policy = make_policy()
    optimizer = Counting(policy.parameters(), lr=1e-3, fused=True)
    trainer = make_trainer(policy, optimizer=optimizer, ppo_epochs=3)
    assert not of(trainer).optimizer_step.is_within_backward
    trainer.step(*make_batch())
    assert optimizer.steps == 3


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


# ---------------------------------------------------------------- further terms of the loss


def gradient_of(loss: Callable[[Tensor, Tensor], Tensor], **settings: Any) -> tuple[Tensor, Tensor]:
    """The change of the weights in one plain descent step, and the rate times `loss`'s gradient.

    `loss` is a function of the log-probabilities and entropies of all response tokens, computed row
    by row from whole distributions. Scores and KL are zero, so PPO's own loss has no gradient.
    """
    policy, twin = make_policy(), make_policy()
    queries, responses, scores = make_batch()
    trainer = make_trainer(
        policy,
        settings.pop("reference", None),
        optimizer=descent(policy),
        ppo_epochs=1,
        vf_coef=0.0,
        **settings,
    )
    policy.v_head.summary.weight.data.zero_()
    policy.v_head.summary.bias.data.zero_()
    before = weights(policy.pretrained_model)
    trainer.step(queries, responses, [torch.tensor(0.0)] * len(scores))
    logprobs, entropies = [], []
    for query, response in zip(queries, responses, strict=True):
        logits = twin.pretrained_model(torch.cat([query, response])[None]).logits[0]
        p = torch.distributions.Categorical(logits=logits[len(query) - 1 : -1])
        logprobs.append(p.log_prob(response))
        entropies.append(p.entropy())
    loss(torch.cat(logprobs), torch.cat(entropies)).backward()
    expected = torch.cat([-0.02 * p.grad.flatten() for p in twin.pretrained_model.parameters()])
    return weights(policy.pretrained_model) - before, expected


def test_the_entropy_bonus_raises_the_mean_entropy_of_response_tokens() -> None:
    moved, expected = gradient_of(lambda _, entropies: -0.7 * entropies.mean(), ent_coef=0.7)
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_in_the_loss_pulls_towards_the_reference_and_leaves_the_rewards_alone(
    kind: str,
) -> None:
    reference = make_policy(seed=1)
    queries, responses, _ = make_batch()
    ref_logprobs = []
    for query, response in zip(queries, responses, strict=True):
        with torch.no_grad():
            logits = reference.pretrained_model(torch.cat([query, response])[None]).logits[0]
        rows = logits[len(query) - 1 : -1].log_softmax(-1)
        ref_logprobs.append(rows.gather(1, response[:, None]).squeeze(1))
    ref = torch.cat(ref_logprobs)

    def penalty(logprobs: Tensor, _: Tensor) -> Tensor:
        x = logprobs - ref
        each = x.square() / 2 if kind == "k2" else (-x).exp() - 1 + x
        return 0.3 * each.mean()

    moved, expected = gradient_of(
        penalty, reference=reference, kl_in_loss=True, kl_penalty=kind, init_kl_coef=0.3
    )
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["kl", "k1", "abs", "full"])
def test_kl_in_the_loss_refuses_penalties_without_a_right_gradient(kind: str) -> None:
    with pytest.raises(ValueError, match=f"k2 or k3, not {kind}"):
        make_trainer(kl_in_loss=True, kl_penalty=kind)


def test_advantages_are_normalised_where_they_are_told_to_be() -> None:
    stats = {
        norm: make_trainer(mini_batch_size=4, advantage_norm=norm, ppo_epochs=1).step(*make_batch())
        for norm in ("batch", "mini_batch", "none")
    }
    advantages = {norm: s["ppo/policy/advantages"] for norm, s in stats.items()}
    counts = [len(make_batch()[1][i]) for i in np.random.RandomState(0).permutation(8)]
    first = sum(counts[:4])
    halves = advantages["mini_batch"][:first], advantages["mini_batch"][first:]
    for half in halves:
        assert half.mean() == pytest.approx(0, abs=1e-5)
        assert half.std(ddof=1) == pytest.approx(1, abs=1e-4)
    whole = advantages["batch"]
    assert whole.mean() == pytest.approx(0, abs=1e-5)
    assert abs(whole[:first].mean()) > 1e-3
    plain = advantages["none"]
    np.testing.assert_allclose((plain - plain.mean()) / plain.std(ddof=1), whole, atol=1e-4)


def test_a_step_ends_before_the_mini_batch_that_would_pass_the_kl_limit() -> None:
    def run(limit: float | None) -> tuple[Stats, int, Tensor]:
        policy = make_policy()
        trainer = make_trainer(policy, mini_batch_size=4, max_approx_kl=limit)
        moves = []
        policy.register_forward_pre_hook(lambda *_: moves.append(weights(policy)))
        return trainer.step(*make_batch()), len(moves), weights(policy)

    free, forwards, moved = run(None)
    # One forward before, two a pass; the first mini-batch has not moved at all.
    assert forwards == 1 + 2 * 4
    stats, forwards, stopped = run(1e-6)
    assert forwards == 1 + 2  # the second mini-batch finds that the first moved too far
    assert len(stats["ppo/policy/ratio"]) < len(free["ppo/policy/ratio"])
    start = weights(make_policy())
    assert 0 < (stopped - start).abs().max() < (moved - start).abs().max()
    _, forwards, loose = run(1e6)
    assert forwards == 1 + 2 * 4
    assert torch.equal(loose, moved)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("penalty", ["kl", "full"])
def test_a_temperature_is_part_of_the_policy_wherever_probabilities_are_taken(
    plain: bool, penalty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against models with untied output embeddings that are divided by the temperature."""
    answer(monkeypatch, ends_in_output_layer, plain)
    results = []
    for temperature in (0.5, 1.0):
        models = [make_policy(seed, tie_word_embeddings=False) for seed in (0, 1)]
        for model in models:
            head = model.pretrained_model.lm_head
            head.requires_grad_(False)
            head.weight.div_(0.5 / temperature)
        settings = {"temperature": temperature, "kl_penalty": penalty}
        trainer = make_trainer(*models, optimizer=descent(models[0]), **settings)
        stats = [trainer.step(*make_batch()) for _ in range(2)]
        moved = weights(models[0].pretrained_model.transformer)
        samples = trainer.generate(make_batch()[0], max_new_tokens=4, batch_size=8)
        results.append((stats, moved, torch.cat(samples)))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        for key in one:
            if not key.startswith("time/"):
                np.testing.assert_allclose(one[key], other[key], rtol=1e-3, atol=1e-5, err_msg=key)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-5)
    assert torch.equal(results[0][2], results[1][2])


# ---------------------------------------------------------------- baselines


def test_each_score_is_compared_with_the_others_of_its_query() -> None:
    queries, responses, _ = make_batch()
    scores = [torch.tensor(s) for s in (1.0, 4.0, 2.0, 2.0, -3.0, 5.0, 7.0, 7.0)]
    policy = make_silent_policy()
    settings: Stats = {"lam": 1.0, "advantage_norm": "none", "ppo_epochs": 1}
    trainer = make_trainer(policy, responses_per_query=4, **settings)
    stats = trainer.step(queries, responses, scores)
    order = np.random.RandomState(0).permutation(8)
    gains = [1 - 8 / 3, 4 - 5 / 3, 2 - 7 / 3, 2 - 7 / 3, -3 - 19 / 3, 5 - 11 / 3, 7 - 3, 7 - 3]
    expected = [gains[i] for i in order for _ in responses[i]]
    np.testing.assert_allclose(stats["ppo/policy/advantages"], expected, rtol=1e-5)
    assert stats["ppo/mean_scores"] == pytest.approx(25 / 8)


def test_what_a_query_promises_does_not_count_twice() -> None:
    """A potential that is constant in a group of texts does not change the advantages."""
    queries, responses, scores = make_batch()
    results = []
    for phi in (None, [torch.full((len(r),), 3.0 + i // 4) for i, r in enumerate(responses)]):
        policy = make_silent_policy()
        settings: Stats = {"lam": 1.0, "advantage_norm": "none", "ppo_epochs": 1}
        settings["calibrate_potentials"] = False
        trainer = make_trainer(policy, responses_per_query=4, **settings)
        stats = trainer.step(queries, responses, scores, potentials=phi)
        results.append(stats["ppo/policy/advantages"])
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)


def test_a_batch_holds_whole_groups() -> None:
    with pytest.raises(ValueError, match="multiple of responses_per_query"):
        make_trainer(responses_per_query=3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_during_the_value_warm_up_the_head_alone_learns(checkpointing: bool) -> None:
    policy = make_policy()
    trainer = make_trainer(
        policy, value_warmup_steps=2, learning_rate=1e-2, gradient_checkpointing=checkpointing
    )
    body, head = weights(policy.pretrained_model), weights(policy.v_head)
    errors = []
    for step in range(3):
        stats = trainer.step(*make_batch())
        errors.append(stats["ppo/val/error"])
        assert torch.equal(weights(policy.pretrained_model), body) == (step < 2)
        assert not torch.equal(weights(policy.v_head), head)
    assert errors[1] < errors[0]
    assert stats["objective/kl"] == pytest.approx(0, abs=1e-6)
