"""A step made of TRL 0.11.4's methods: the numbers of our own, and no replaced one is ignored."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DataCollatorForLanguageModeling,
    Trainer,
)

from ppo_cli import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_cli.errors import UsageError
from tests.conftest import make_batch, make_policy, make_tokenizer, weights


class Called(PPOTrainer):
    """Replaces every method by a call of itself, and notes what it was given and returned."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seen: dict[str, list[Any]] = {}
        super().__init__(*args, **kwargs)

    def _note(self, name: str, *shapes: Any) -> None:
        self.seen.setdefault(name, []).append(shapes)

    def batched_forward_pass(  # type: ignore[override]
        self,
        model: Any,
        queries: list[Tensor],
        responses: list[Tensor],
        model_inputs: dict[str, Tensor],
        return_logits: bool = False,
        response_masks: list[Tensor] | None = None,
    ) -> Any:
        found = super().batched_forward_pass(
            model, queries, responses, model_inputs, return_logits, response_masks
        )
        rows = model_inputs["input_ids"].shape
        assert model_inputs["attention_mask"].sum(1).tolist() == [
            len(q) + len(r) for q, r in zip(queries, responses, strict=True)
        ]
        self._note("forward", return_logits, rows, *(x is not None and x.shape for x in found))
        return found

    def _kl_penalty(self, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
        self._note("kl", logprob.shape, ref_logprob.shape)
        return super()._kl_penalty(logprob, ref_logprob)

    def compute_rewards(self, scores: Tensor, *grids: Tensor) -> Any:
        self._note("rewards", scores.shape, *(grid.shape for grid in grids))
        return super().compute_rewards(scores, *grids)

    def compute_advantages(self, values: Tensor, rewards: Tensor, mask: Tensor) -> Any:
        self._note("advantages", values.shape, rewards.shape, mask.shape)
        return super().compute_advantages(values, rewards, mask)

    def loss(self, *grids: Tensor) -> Any:
        self._note("loss", *(grid.shape for grid in grids))
        return super().loss(*grids)

    def train_minibatch(self, *grids: Tensor) -> Any:
        self.model.train()  # as the method of 0.11.4 begins
        return super().train_minibatch(*grids)

    def record_step_stats(self, kl_coef: float, **data: Any) -> Any:
        self._note("stats", kl_coef, sorted(data))
        return super().record_step_stats(kl_coef, **data)


def make(kind: type[PPOTrainer], *, policy: Any = None, **settings: Any) -> PPOTrainer:
    extra = {k: settings.pop(k) for k in ("training_data_collator", "tokenizer") if k in settings}
    policy = policy or make_policy(resid_pdrop=0.3)
    rest = {"batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2, **settings}
    tokenizer = extra.pop("tokenizer", None) or make_tokenizer()
    # Adam would turn the rounding of gradients that are zero into steps.
    sgd = torch.optim.SGD((p for p in policy.parameters() if p.requires_grad), lr=0.05)
    return kind(PPOConfig(**rest), policy, None, tokenizer, optimizer=sgd, **extra)


def masks_of(responses: list[Tensor]) -> list[Tensor]:
    """Gaps in all responses, one without a token that counts."""
    masks = [torch.arange(len(response)) % 3 != 1 for response in responses]
    masks[2] = torch.zeros_like(masks[2])
    return [mask.long() for mask in masks]


ACCUMULATED = {"mini_batch_size": 2, "gradient_accumulation_steps": 2}
SETTINGS: list[dict[str, Any]] = [
    {"masked": True, "lam": 0.7, "gamma": 0.9, "kl_penalty": "abs", "use_score_scaling": True},
    {"kl_penalty": "full", "whiten_rewards": True, "ent_coef": 0.1, "temperature": 1.3}
    | ACCUMULATED,
    {"advantage_norm": "mini_batch", "max_grad_norm": 0.1, "responses_per_query": 2}
    | {"early_stopping": True, "target_kl": 1e-9},
    {"ratio_threshold": 1.02, "seed": 3} | ACCUMULATED,  # the first of two is skipped, too
    {"gradient_checkpointing": True, "value_warmup_steps": 1},
]


@pytest.mark.filterwarnings("ignore:.*ratio_threshold", "ignore:KL is negative")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_methods_make_the_step_that_is_made_without_them(settings: dict[str, Any]) -> None:
    is_masked, settings = (
        settings.get("masked"),
        {k: settings[k] for k in settings if k != "masked"},
    )
    results = []
    for kind in (PPOTrainer, Called):
        trainer = make(kind, **settings)
        for seed in range(2):
            queries, responses, scores = make_batch(seed=seed)
            masks = masks_of(responses) if is_masked else None
            stats = trainer.step(queries, responses, scores, masks)
        results.append((stats, weights(trainer.model)))
    (own, own_weights), (found, found_weights) = results
    assert set(own) == set(found)
    for key in own:
        if not key.startswith("time/"):
            np.testing.assert_allclose(found[key], own[key], atol=2e-5, rtol=1e-4, err_msg=key)
    torch.testing.assert_close(found_weights, own_weights, atol=1e-5, rtol=1e-4)
    assert (own_weights - weights(make_policy())).abs().max() > 1e-3


def test_methods_get_the_arguments_and_shapes_of_0_11_4() -> None:
    queries, responses, scores = make_batch()
    trainer = make(Called, kl_penalty="full", ppo_epochs=1)
    trainer.step(queries, responses, scores)
    width = max(len(q) + len(r) for q, r in zip(queries, responses, strict=True))
    grid, small = (8, width - 1), (4, width - 1)
    vocabulary = (80,)
    assert (
        trainer.seen["forward"][:2] == [(True, (8, width), grid, grid + vocabulary, grid, grid)] * 2
    )
    assert (
        trainer.seen["forward"][2:]
        == [(True, (4, width), small, small + vocabulary, small, small)] * 2
    )
    assert trainer.seen["kl"] == [((width - 1, 80),) * 2] * 8
    assert trainer.seen["rewards"] == [((8,), grid + vocabulary, grid + vocabulary, grid)]
    assert trainer.seen["advantages"] == [(grid,) * 3]
    assert trainer.seen["loss"] == [(small, small, small + vocabulary, *[small] * 5)] * 2
    named = "kls logprobs masks non_score_reward queries ref_logprobs responses scores train_stats"
    assert trainer.seen["stats"] == [(0.2, named.split())]


def changed(name: str, trainer: PPOTrainer) -> Any:
    """A method that returns something else than the trainer's own."""
    before = getattr(trainer, name)

    def other(*args: Any, **kwargs: Any) -> Any:
        found = before(*args, **kwargs)
        if name == "prepare_model_inputs":
            return {**found, "token_type_ids": torch.zeros_like(found["input_ids"])}
        if name in ("train_minibatch", "record_step_stats"):
            return {**found, "mine": torch.tensor(3.0)}
        if name == "loss":  # statistics of the user's own making, and few
            return found[0] * 0, found[1] * 0, {"loss/total": torch.tensor(7.0)}
        if name == "batched_forward_pass":
            return found[0], found[1], found[2] + 1, found[3]
        return found * 2 if isinstance(found, Tensor) else (found[0] * 2, *found[1:])

    return other


@cache
def two_steps(replaced: str | None) -> dict[str, Any]:
    """Statistics of the second step, with a method replaced."""
    trainer = make(PPOTrainer, ppo_epochs=1)
    if replaced is not None:
        setattr(trainer, replaced, changed(replaced, trainer))
    return [trainer.step(*make_batch()) for _ in range(2)][1]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("batched_forward_pass", "ppo/val/mean"),
        ("_kl_penalty", "objective/kl"),
        ("compute_rewards", "ppo/returns/mean"),
        ("compute_advantages", "ppo/val/mean"),
        ("loss", "ppo/loss/total"),
        ("train_minibatch", "ppo/mine"),
        ("record_step_stats", "mine"),
    ],
)
@pytest.mark.filterwarnings("ignore:KL is negative")
def test_a_method_replaced_at_run_time_is_used(name: str, key: str) -> None:
    stats = two_steps(name)
    assert two_steps(None).get(key) != pytest.approx(stats[key], abs=1e-3)
    if name == "loss":
        assert stats["ppo/loss/total"] == 7
        assert stats["objective/kl"] == 0, "a loss of 0 moves nothing"


# ---------------------------------------------------------------- called by hand, as TRL's tests do


def test_kl_penalties_of_log_probabilities() -> None:
    logprobs = torch.tensor([[0.5, 0.2, 0.1], [0.6, 0.2, 0.1]])
    reference = torch.tensor([[0.4, 0.3, 0.0], [0.7, 0.1, 0.3]])
    differences = torch.tensor([[0.1, -0.1, 0.1], [-0.1, 0.1, -0.2]])
    expected = {"kl": differences, "abs": differences.abs(), "mse": differences.square() / 2}
    for kind, penalties in expected.items():
        trainer = make(PPOTrainer, kl_penalty=kind)
        torch.testing.assert_close(trainer._kl_penalty(logprobs, reference), penalties)
    trainer = make(PPOTrainer, kl_penalty="full")
    distributions = torch.tensor([[[0.98, 0.01, 0.01], [0.01, 0.98, 0.01]]]).log()
    others = torch.tensor([[[0.01, 0.01, 0.98], [0.01, 0.01, 0.98]]]).log()
    found = trainer._kl_penalty(distributions, others)
    torch.testing.assert_close(found, torch.tensor([[4.4474, 4.4474]]), atol=1e-4, rtol=1e-4)
    assert trainer._kl_penalty(others, others).abs().max() == 0


def bloom() -> Any:
    config = BloomConfig(vocab_size=80, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3)
    torch.manual_seed(0)
    return AutoModelForCausalLMWithValueHead(BloomForCausalLM(config))


QUERIES = [torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 4, 5, 6, 7])]
RESPONSES = [torch.tensor([5, 6, 7, 8, 9]), torch.tensor([8, 9, 10, 11, 12, 13])]


@pytest.mark.parametrize("make_model", [make_policy, bloom])
@torch.no_grad()
def test_a_forward_by_hand_is_the_same_in_batches_of_any_size(make_model: Any) -> None:
    policy = make_model()
    trainer = make(PPOTrainer, policy=policy)
    rows = []
    for size in (1, 2):
        trainer.config.mini_batch_size = size
        inputs = trainer.prepare_model_inputs(QUERIES, RESPONSES)
        rows.append(trainer.batched_forward_pass(policy, QUERIES, RESPONSES, inputs))
    inputs = trainer.prepare_model_inputs(QUERIES[:1], RESPONSES[:1])
    alone = trainer.batched_forward_pass(policy, QUERIES[:1], RESPONSES[:1], inputs)
    assert alone[0].shape == (1, 8) and rows[0][0].shape == (2, 12) and alone[1] is None
    trainer.data_collator = DataCollatorForLanguageModeling(
        make_tokenizer(padding_side="left"), mlm=False
    )
    inputs = trainer.prepare_model_inputs(QUERIES, RESPONSES)
    left = trainer.batched_forward_pass(policy, QUERIES, RESPONSES, inputs)
    for i in (0, 2, 3):
        torch.testing.assert_close(left[i][0, 4:], rows[1][i][0, :8])
        torch.testing.assert_close(rows[0][i], rows[1][i], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone[i], rows[1][i][:1, :8], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_loss_by_hand_depends_on_what_counts_alone() -> None:
    trainer = make(PPOTrainer)
    inputs = trainer.prepare_model_inputs(QUERIES, RESPONSES)
    logprobs, _, values, mask = trainer.batched_forward_pass(
        trainer.model, QUERIES, RESPONSES, inputs
    )
    rewards, _, _ = trainer.compute_rewards(torch.tensor([1.0, 2.0]), logprobs, logprobs + 1, mask)
    values, advantages, returns = trainer.compute_advantages(values, rewards, mask)
    logits = torch.randn(*logprobs.shape, 80)
    grids = (logprobs, values, logits, values + 0.1, logprobs + 1, mask, advantages, returns)
    for i in range(2):
        whole = trainer.loss(*(grid[i : i + 1] for grid in grids))
        counted = trainer.loss(*(grid[i : i + 1, mask[i].bool()] for grid in grids))
        assert whole[0].item() != 0 and whole[1].item() != 0
        for a, b in zip(whole[:2], counted[:2], strict=True):
            torch.testing.assert_close(a, b)


class LikeLlamaFactory(PPOTrainer, Trainer):
    """Beside transformers' own trainer, with a forward pass and a training of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        PPOTrainer.__init__(self, *args, **kwargs)

    def batched_forward_pass(  # type: ignore[override]
        self, model, queries, responses, model_inputs, return_logits=False, response_masks=None
    ):
        parts = []
        size = self.config.mini_batch_size
        for start in range(0, len(queries), size):
            inputs = {key: value[start : start + size] for key, value in model_inputs.items()}
            logits, _, values = model(**inputs)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            counts = torch.zeros_like(mask)
            counts[:, :-1] = mask[:, 1:]
            for j in range(len(ids)):
                first = len(queries[start + j]) - 1
                if mask[j, 0] == 0:
                    first += mask[j, :].nonzero()[0].item()
                counts[j, :first] = 0
                counts[j, first + len(responses[start + j]) :] = 0
            parts.append((logprobs, logits[:, :-1], values[:, :-1], counts[:, :-1]))
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def train_minibatch(self, *grids):  # as in 0.11.4
        self.model.train()
        old_logprobs, values, logprobs, logits, vpreds, mask, advantages, returns = grids
        loss_p, loss_v, train_stats = self.loss(
            old_logprobs, values, logits, vpreds, logprobs, mask, advantages, returns
        )
        self.accelerator.backward(loss_p + loss_v)
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.model_params, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return train_stats


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.filterwarnings("ignore:KL is negative")
def test_a_forward_and_an_update_of_ones_own_in_rows_of_ones_own(side: str) -> None:
    """Values outside of responses are not zero here, the rows may be padded on the left."""
    settings = {"mini_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    tokenizer = make_tokenizer(padding_side=side)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False) if side == "left" else None
    policy = make_policy(n_positions=60)
    if side == "left":  # the forward above gives no positions, so they must not matter
        policy.pretrained_model.transformer.wpe.weight.data.zero_()
        policy.pretrained_model.transformer.wpe.requires_grad_(False)
    start = {key: value.clone() for key, value in policy.state_dict().items()}
    trainer = make(LikeLlamaFactory, policy=policy, training_data_collator=collator, **settings)
    found = [trainer.step(*make_batch(seed=seed)) for seed in range(2)]
    end = weights(policy)
    policy.load_state_dict(start)
    own = make(PPOTrainer, policy=policy, **settings)
    expected = [own.step(*make_batch(seed=seed)) for seed in range(2)]
    for key in ("objective/kl", "ppo/loss/total", "ppo/val/var_explained", "ppo/policy/entropy"):
        assert found[1][key] == pytest.approx(expected[1][key], abs=1e-4, rel=1e-3), key
    torch.testing.assert_close(end, weights(policy), atol=1e-4, rtol=1e-3)


def test_what_replaced_methods_cannot_do_is_refused_by_name() -> None:
    queries, responses, scores = make_batch()
    with pytest.raises(UsageError, match=r"Called replaces .*loss.*does not do kl_in_loss"):
        make(Called, kl_in_loss=True, kl_penalty="k3").step(queries, responses, scores)
    with pytest.raises(UsageError, match="does not do potentials"):
        make(Called).step(queries, responses, scores, None, responses)
    trainer = make(Called)
    trainer.record_step_stats = lambda **_: {}  # type: ignore[assignment]
    with pytest.raises(UsageError, match="returned no 'objective/kl'"):
        trainer.step(queries, responses, scores)


def test_a_class_with_a_method_that_nothing_calls_is_refused() -> None:
    class Mixin:
        def _early_stop(self, policykl: float) -> bool:
            return True

    with pytest.raises(
        UsageError, match=r"Mixin\._early_stop: nothing calls .* set early_stopping"
    ):

        class _Mine(Mixin, PPOTrainer):
            pass

    with pytest.raises(UsageError, match=r"_generate_batched: .*; replace generate"):
        type("Mine", (PPOTrainer,), {"_generate_batched": lambda self: None})


def test_a_training_collator_without_effect_is_refused() -> None:
    with pytest.raises(UsageError, match="training_data_collator makes rows for a batched_forward"):
        make(PPOTrainer, training_data_collator=lambda rows: {})


def test_a_dataloader_of_ones_own_takes_the_arguments_of_0_11_4() -> None:
    class Mine(PPOTrainer):
        def prepare_dataloader(self, dataset: Any, data_collator: Any = None) -> Any:  # type: ignore[override]
            return torch.utils.data.DataLoader(dataset, batch_size=1)

    trainer = Mine(
        PPOConfig(batch_size=8, mini_batch_size=8), make_policy(), None, make_tokenizer(), [1, 2, 3]
    )
    assert len(trainer.dataloader) == 3
    assert trainer.current_device.type == "cpu"
    assert sum(p.numel() for p in trainer.model_params) == len(weights(trainer.model))
