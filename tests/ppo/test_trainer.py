"""`PPOTrainer`: its interface, and the bugs of TRL 0.11.4 that are corrected.

The numbers in comments are those of the list of differences in docs/trl.md.
"""

from __future__ import annotations

import copy
import itertools
import random
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import GenerationConfig

from ppo_cli import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from ppo_cli.ppo.statistics import STATISTICS
from ppo_cli.training.state import _scale_learning_rate
from tests.conftest import (
    EOS,
    VOCABULARY,
    make_batch,
    make_gpt2,
    make_policy,
    make_tokenizer,
    make_trainer,
    weights,
)

Policy = AutoModelForCausalLMWithValueHead


def finite(stats: dict[str, Any]) -> bool:
    return all(np.isfinite(value).all() for value in stats.values())


@pytest.mark.usefixtures("both_ways")
def test_step_returns_every_statistic_and_no_other() -> None:
    stats = make_trainer().step(*make_batch())
    assert set(stats) == set(STATISTICS)
    for key, value in stats.items():
        assert isinstance(value, np.ndarray if STATISTICS[key].is_array else float), key
    assert finite(stats)


def test_score_scaling_works_and_normalises() -> None:  # 1
    queries, responses, _ = make_batch()
    scores = [torch.tensor(100.0 + i) for i in range(8)]
    trainer = make_trainer(use_score_scaling=True, use_score_norm=True)
    stats = trainer.step(queries, responses, scores)
    assert stats["ppo/mean_scores"] == pytest.approx(0, abs=1e-5)
    assert stats["ppo/std_scores"] == pytest.approx(1, abs=1e-3)


def test_equal_scores_survive_scaling() -> None:
    queries, responses, _ = make_batch()
    trainer = make_trainer(use_score_scaling=True)
    stats = trainer.step(queries, responses, [torch.tensor(3.0)] * 8)
    assert stats["ppo/mean_scores"] == pytest.approx(3.0)


def test_whitened_rewards_do_not_depend_on_padding() -> None:  # 2
    queries, responses, scores = make_batch()

    def advantages_of_first(longest: int) -> np.ndarray:
        batch = copy.deepcopy(responses)
        mask = [torch.ones_like(r) for r in batch]
        batch[-1] = torch.cat([batch[-1], torch.zeros(longest, dtype=torch.long)])
        mask[-1] = torch.cat([mask[-1], torch.zeros(longest, dtype=torch.long)])
        trainer = make_trainer(whiten_rewards=True, ppo_epochs=1)
        order = np.random.RandomState(0).permutation(8)
        flat = trainer.step(queries, batch, scores, mask)["ppo/policy/advantages"]
        lengths = [int(mask[i].sum()) for i in order]
        start = sum(lengths[: list(order).index(0)])
        return flat[start : start + lengths[list(order).index(0)]]

    np.testing.assert_allclose(advantages_of_first(0), advantages_of_first(20), atol=1e-5)


@pytest.mark.usefixtures("both_ways")
def test_gradient_checkpointing_recomputes_and_changes_no_number() -> None:  # 4
    calls = {False: 0, True: 0}
    finals = []
    for checkpointing in (False, True):
        policy = make_policy(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
        trainer = make_trainer(policy, gradient_checkpointing=checkpointing, ppo_epochs=1)

        def count(*_: Any, key: bool = checkpointing) -> None:
            calls[key] += torch.is_grad_enabled()  # the probes of the architecture are without

        policy.pretrained_model.transformer.h[0].mlp.register_forward_pre_hook(count)
        trainer.step(*make_batch())
        finals.append(weights(policy))
    assert calls[True] > calls[False]
    torch.testing.assert_close(finals[0], finals[1])


def test_checkpointing_that_was_switched_on_at_the_model_recomputes_as_well() -> None:
    calls, finals = [], []
    for is_on in (False, True):
        policy = make_policy(resid_pdrop=0.5)
        trainer = make_trainer(policy, ppo_epochs=1)
        trainer.step(*make_batch())  # its self-check
        if is_on:
            trainer.model.gradient_checkpointing_enable()
        seen: list[int] = []
        policy.pretrained_model.transformer.h[0].ln_1.register_forward_pre_hook(
            lambda *_, seen=seen: seen.append(1)
        )
        trainer.model.train()
        trainer.step(*make_batch())
        calls.append(len(seen))
        finals.append(weights(policy))
    assert calls[1] > calls[0]
    torch.testing.assert_close(finals[0], finals[1])


@pytest.mark.usefixtures("both_ways")
def test_a_pad_token_that_the_model_does_not_know_is_not_read() -> None:
    finals = []
    for pad in (EOS, VOCABULARY):  # a new token, without resize_token_embeddings
        tokenizer = make_tokenizer(VOCABULARY + 1, pad=pad)
        trainer = make_trainer(tokenizer=tokenizer)
        queries, responses, scores = make_batch()
        found = trainer.generate(queries, max_new_tokens=2, do_sample=False, batch_size=8)
        trainer.step(queries, responses, scores)
        finals.append((weights(trainer.model), found))
    torch.testing.assert_close(*finals)


def test_responses_of_one_token_may_have_no_dimension() -> None:
    stats = []
    for shape in ((1,), ()):
        queries = [torch.tensor(3).reshape(shape) for _ in range(8)]
        responses = [torch.tensor(i).reshape(shape) for i in range(8)]
        masks = [torch.tensor(int(i > 0)).reshape(shape) for i in range(8)]
        found = make_trainer().step(queries, responses, make_batch()[2], masks)
        stats.append({k: v for k, v in found.items() if not k.startswith("time/")})
    np.testing.assert_equal(*stats)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (
            torch.tensor([1, VOCABULARY]),
            "0: the token id 80 is not in the model's vocabulary of 80",
        ),
        (torch.tensor([1, -100]), "0: the token id -100 is not in the model's vocabulary"),
        (torch.tensor([1.0]), "responses must be token ids, integers - got torch.float32"),
        (torch.tensor([True]), "responses must be token ids, integers - got torch.bool"),
    ],
    ids=str,
)
def test_what_is_no_token_id_is_refused_by_name(response: torch.Tensor, message: str) -> None:
    queries, responses, scores = make_batch()
    trainer = make_trainer()
    with pytest.raises(ValueError, match=message):
        trainer.step(queries, [response, *responses[1:]], scores)
    if not response.is_floating_point() and response.dtype != torch.bool:
        with pytest.raises(ValueError, match=f"query {message}"):
            trainer.generate([response])


def test_dropout_is_off_while_sampling_and_modes_are_kept() -> None:  # 3, 5
    policy = make_policy(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    trainer = make_trainer(policy)
    policy.train()
    trainer.step(*make_batch())
    assert policy.training
    query = torch.tensor([1, 2, 3])
    greedy = [
        trainer.generate(query, do_sample=False, max_new_tokens=20).tolist() for _ in range(3)
    ]
    assert greedy[0] == greedy[1] == greedy[2]
    assert policy.training


@pytest.mark.usefixtures("both_ways")
def test_first_epoch_has_ratio_one_with_dropout_in_the_model() -> None:  # 3
    policy = make_policy(resid_pdrop=0.5, attn_pdrop=0.5)
    policy.train()
    stats = make_trainer(policy, ppo_epochs=1).step(*make_batch())
    np.testing.assert_allclose(stats["ppo/policy/ratio"], 1.0, atol=1e-5)


@pytest.mark.parametrize("is_adapted", [False, True], ids=["whole", "adapter"])
def test_accelerates_own_state_keeps_a_policy(is_adapted: bool, tmp_path: Path) -> None:
    def make() -> PPOTrainer:
        adapter = LoraConfig(target_modules=["c_attn"]) if is_adapted else None
        policy = AutoModelForCausalLMWithValueHead.from_pretrained(
            make_gpt2(), peft_config=adapter, summary_dropout_prob=0.0
        )
        return make_trainer(policy)

    trainer, other = make(), make()
    trainer.step(*make_batch())
    trainer.accelerator.save_state(tmp_path)
    other.accelerator.load_state(tmp_path)
    torch.testing.assert_close(weights(other.model), weights(trainer.model))
    assert not torch.equal(weights(make().model), weights(trainer.model))


def test_gradients_are_clipped_on_every_step() -> None:  # 6
    policy = make_policy()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    trainer = make_trainer(policy, optimizer=optimizer, max_grad_norm=1e-3, ppo_epochs=3)
    moved = []
    before = weights(policy)
    step = trainer.optimizer.step

    def record(*args: Any, **kwargs: Any) -> Any:
        nonlocal before
        result = step(*args, **kwargs)
        moved.append((weights(policy) - before).norm().item())
        before = weights(policy)
        return result

    trainer.optimizer.step = record
    for seed in range(2):
        trainer.step(*make_batch(seed=seed))
    assert len(moved) == 6
    assert max(moved) <= 1e-3 * 1.01


def test_ratio_over_the_threshold_leaves_the_weights_alone() -> None:  # 7
    policy = make_policy()
    trainer = make_trainer(policy, ppo_epochs=4, ratio_threshold=1e9)
    trainer.step(*make_batch())  # gives Adam its momentum
    before = weights(policy)
    trainer.config.ratio_threshold = 1e-6
    with pytest.warns(UserWarning, match="ratio_threshold"):
        stats = trainer.step(*make_batch(seed=1))
    assert torch.equal(before, weights(policy))
    assert stats["ppo/loss/total"] == 0


def test_accumulation_does_not_depend_on_the_dataloader() -> None:  # 9
    rows = Dataset.from_dict({"input_ids": [[1, 2]] * 8})
    finals = []
    for from_loader in (False, True):
        policy = make_policy()
        trainer = make_trainer(
            policy,
            dataset=rows,
            data_collator=lambda r: r,
            mini_batch_size=2,
            gradient_accumulation_steps=4,
            ppo_epochs=1,
        )
        if from_loader:
            for _ in trainer.dataloader:
                trainer.step(*make_batch())
        else:
            trainer.step(*make_batch())
        finals.append(weights(policy))
    torch.testing.assert_close(finals[0], finals[1])


@pytest.mark.usefixtures("both_ways")
def test_masked_and_empty_responses_take_part_in_nothing() -> None:  # 10
    queries, responses, scores = make_batch()
    masks = [torch.ones_like(r) for r in responses]
    masks[2] = torch.zeros_like(masks[2])
    responses[5] = responses[5][:0]
    masks[5] = masks[5][:0]
    trainer = make_trainer(mini_batch_size=1, gradient_accumulation_steps=8)
    stats = trainer.step(queries, responses, scores, masks)
    assert finite(stats)
    assert stats["objective/kl_dist"][[2, 5]].tolist() == [0, 0]
    assert torch.isfinite(weights(trainer.model)).all()


def test_masked_tokens_are_skipped_not_counted_as_zero() -> None:  # 10
    """Tokens that do not count have no place in the grids."""
    from ppo_cli.ppo.packing import TokenBatch

    hole = torch.tensor([1, 0, 0, 1, 1])
    batch = TokenBatch.from_lists(
        [torch.tensor([4])], [torch.arange(5)], [hole], 0, torch.device("cpu")
    )
    assert batch.targets.tolist() == [[0, 3, 4]]
    assert batch.sources.tolist() == [[0, 3, 4]]
    assert batch.mask.tolist() == [[True] * 3]


def test_one_token_in_the_whole_batch_gives_no_nan() -> None:  # 10
    queries, responses, scores = make_batch()
    masks = [torch.zeros_like(r) for r in responses]
    masks[0][0] = 1
    trainer = make_trainer()
    assert finite(trainer.step(queries, responses, scores, masks))
    assert torch.isfinite(weights(trainer.model)).all()


def test_a_batch_without_a_token_that_counts_is_refused() -> None:  # 10
    queries, responses, scores = make_batch()
    masks = [torch.zeros_like(r) for r in responses]
    with pytest.raises(ValueError, match="no response token counts"):
        make_trainer().step(queries, responses, scores, masks)


def test_the_padding_side_of_the_tokenizer_changes_nothing() -> None:  # 11
    results = []
    for side in ("left", "right"):
        trainer = make_trainer(tokenizer=make_tokenizer(padding_side=side))
        results.append(trainer.step(*make_batch())["objective/logprobs"])
    np.testing.assert_array_equal(results[0], results[1])


def test_reference_response_of_a_peft_policy_is_sampled_without_the_adapter() -> None:  # 12, 13
    from peft import LoraConfig

    base = make_gpt2()
    expected = base.generate(
        torch.tensor([[1, 2, 3]]), do_sample=False, max_new_tokens=12, pad_token_id=EOS
    )
    policy = Policy.from_pretrained(
        base, peft_config=LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    trainer = make_trainer(policy)
    assert trainer.ref_model is None
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2.0)
    tuned, reference = trainer.generate(
        torch.tensor([1, 2, 3]), generate_ref_response=True, do_sample=False, max_new_tokens=12
    )
    assert reference.tolist() == expected.tolist()
    assert tuned.tolist() != expected.tolist()


@pytest.mark.usefixtures("both_ways")
def test_peft_step_measures_kl_from_the_base_model() -> None:  # 12
    from peft import LoraConfig

    base = make_gpt2()
    policy = Policy.from_pretrained(
        copy.deepcopy(base), peft_config=LoraConfig(r=4, target_modules=["c_attn"])
    )
    batch, trainer = make_batch(), make_trainer(policy)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    with_adapter = trainer.step(*batch)
    explicit = make_trainer(make_policy(), base).step(*batch)
    np.testing.assert_allclose(
        with_adapter["objective/ref_logprobs"], explicit["objective/ref_logprobs"], atol=1e-5
    )
    assert abs(with_adapter["objective/kl"]) > 1e-3


def test_eos_in_the_prompt_cuts_nothing() -> None:  # 14
    trainer = make_trainer()
    queries = [torch.tensor([EOS, 1, 2]), torch.tensor([3, EOS, 4, 5])]
    for query, output in zip(
        queries, trainer.generate(queries, max_new_tokens=3, eos_token_id=-1), strict=True
    ):
        assert output[: len(query)].tolist() == query.tolist()
        assert len(output) == len(query) + 3


@pytest.mark.parametrize(
    ("given", "ends"),
    [
        ({}, {0, 1, EOS}),  # what tokenizer, configuration and generation_config name together
        ({"eos_token_id": [5, 6]}, {5, 6}),
        ({"eos_token_id": torch.tensor([5, 6])}, {5, 6}),
        ({"eos_token_id": torch.tensor(5)}, {5}),
        ({"eos_token_id": -1}, set()),
        ({"eos_token_id": None}, set()),
        ({"generation_config": GenerationConfig(eos_token_id=[5, 6], do_sample=True)}, {5, 6}),
        ({"generation_config": GenerationConfig(do_sample=True)}, {0, 1, EOS}),
        (
            {"generation_config": GenerationConfig(eos_token_id=0, top_k=0), "eos_token_id": 5},
            {5},
        ),
    ],
)
def test_responses_end_by_all_that_model_and_tokenizer_name_or_by_what_the_caller_gives(
    given: dict[str, Any], ends: set[int]
) -> None:
    policy = make_policy(vocab_size=12, initializer_range=0.02, eos_token_id=1, bos_token_id=1)
    policy.generation_config.eos_token_id = [0, 50256]
    tokenizer = make_tokenizer(vocabulary=12, eos=11, pad=11)
    ends = {11 if end == EOS else end for end in ends}
    trainer = make_trainer(policy, tokenizer=tokenizer)
    queries = [torch.tensor([EOS % 12, 2, 3])] * 32
    settings = {"top_k": 0, "do_sample": True, "max_new_tokens": 12, "return_prompt": False}
    rows = [row.tolist() for row in trainer.generate(queries, **settings, **given)]
    assert all(ends.isdisjoint(row[:-1]) for row in rows)
    assert all(len(row) == 12 or row[-1] in ends for row in rows)
    assert {row[-1] for row in rows if len(row) < 12} == ends


@pytest.mark.usefixtures("both_ways")
def test_single_query_gives_a_row_and_return_prompt_false_the_response_alone() -> None:
    trainer = make_trainer()
    query = torch.tensor([EOS, 1, 2])
    whole = trainer.generate(query, max_new_tokens=4, eos_token_id=-1)
    assert whole.shape == (1, 7)
    assert whole[0, :3].tolist() == query.tolist()
    alone = trainer.generate(query, max_new_tokens=4, eos_token_id=-1, return_prompt=False)
    assert alone.shape == (1, 4)


def test_length_sampler_is_asked_once_a_query() -> None:
    lengths = iter(range(1, 9))
    queries, _, _ = make_batch()
    responses = make_trainer().generate(
        queries,
        length_sampler=lambda: next(lengths),
        batch_size=3,
        return_prompt=False,
        eos_token_id=-1,
    )
    assert [len(r) for r in responses] == list(range(1, 9))


def test_shared_layers_are_the_same_memory_and_do_not_move() -> None:  # 15
    policy = make_policy(n_layer=3)
    trainer = make_trainer(policy, num_shared_layers=2)
    mine = dict(policy.named_parameters())
    theirs = dict(trainer.ref_model.named_parameters())
    shared = {name for name in mine if mine[name].data_ptr() == theirs[name].data_ptr()}
    assert {n for n in mine if ".h.0." in n or ".h.1." in n or "wte" in n or "wpe" in n} == shared
    before = {name: value.detach().clone() for name, value in mine.items()}
    trainer.step(*make_batch())
    for name, value in mine.items():
        assert torch.equal(value, before[name]) == (name in shared), name


def test_constructor_leaves_the_global_random_states_alone() -> None:  # 17
    policy = make_policy()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    trainer = make_trainer(policy, seed=3)
    trainer.generate(torch.tensor([1, 2]), max_new_tokens=4)
    trainer.step(*make_batch())
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.usefixtures("both_ways")
def test_the_seed_decides_samples_and_weights() -> None:
    def run(seed: int) -> tuple[list[int], torch.Tensor]:
        trainer = make_trainer(make_policy(), seed=seed, mini_batch_size=2)
        sample = trainer.generate(torch.tensor([1, 2]), max_new_tokens=20, eos_token_id=-1)
        trainer.step(*make_batch())
        return sample[0].tolist(), weights(trainer.model)

    first, again, other = run(1), run(1), run(2)
    assert first[0] == again[0]
    assert torch.equal(first[1], again[1])
    assert first[0] != other[0]
    assert not torch.equal(first[1], other[1])


def test_backward_batch_size_follows_its_parts() -> None:  # 18
    config = PPOConfig(batch_size=8, mini_batch_size=4)
    config.mini_batch_size = 2
    assert config.backward_batch_size == 2


def test_a_config_made_impossible_later_is_refused() -> None:
    config = PPOConfig(batch_size=8, mini_batch_size=4)
    config.mini_batch_size = 3
    with pytest.raises(ValueError, match=r"8.*3 x 1 = 3"):
        PPOTrainer(config, make_policy(), None, make_tokenizer())


def test_ratio_and_advantages_hold_only_tokens_that_count() -> None:  # 19
    queries, responses, scores = make_batch()
    stats = make_trainer(ppo_epochs=3, mini_batch_size=2).step(queries, responses, scores)
    tokens = sum(len(r) for r in responses)
    assert stats["ppo/policy/ratio"].shape == (3 * tokens,)
    assert stats["ppo/policy/advantages"].shape == (3 * tokens,)
    assert stats["ppo/policy/advantages"].mean() == pytest.approx(0, abs=1e-5)


def test_early_stopping_ends_the_epochs_once_kl_exceeds_its_target_by_half() -> None:  # 8
    queries, _, scores = make_batch()
    policy = make_policy()
    likeliest = [
        policy.generate(q[None], do_sample=False, max_new_tokens=6, eos_token_id=None)[0, len(q) :]
        for q in queries
    ]  # every movement of the policy makes these less likely

    def step(**settings: Any) -> dict[str, Any]:
        trainer = make_trainer(make_policy(), learning_rate=0.01, **settings)
        return trainer.step(queries, likeliest, scores)

    kl = 2 * step(ppo_epochs=2)["ppo/policy/policykl"]  # of the second epoch; the first has 0
    early = step(early_stopping=True, target_kl=0.99 * kl / 1.5)
    assert early["ppo/policy/ratio"].size == 2 * 8 * 6
    later = step(early_stopping=True, target_kl=1.01 * kl / 1.5)
    assert later["ppo/policy/ratio"].size > 2 * 8 * 6


def test_negative_kl_warns() -> None:  # 21
    policy, reference = make_policy(0), make_policy(1)
    queries, _, scores = make_batch()
    responses = [reference.generate(q[None], max_new_tokens=12, do_sample=False)[0, len(q) :]
                 for q in queries]  # fmt: skip
    with pytest.warns(UserWarning, match="KL is negative"):
        make_trainer(policy, reference).step(queries, responses, scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, r, s: (tuple(q), r, s), "queries must be a list"),
        (lambda q, r, s: (q[:3], r, s), r"Batch size \(8\).*3 for: queries"),
        (lambda q, r, s: (q, r, [1.0] * 8), "Elements in scores must be tensors"),
        (lambda q, r, s: (q, r, [*s[:7], torch.tensor(float("nan"))]), r"scores\[7\].*nan"),
        (lambda q, r, s: (q, r, [*s[:7], torch.ones(2)]), r"scores\[7\]"),
        (lambda q, r, s: ([*q[:7], q[7][:0]], r, s), "query 7 has no tokens"),
        (lambda q, r, s: ([*q[:7], q[7][None]], r, s), "queries must be 1-dimensional"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: Any, message: str) -> None:
    trainer = make_trainer()
    before = weights(trainer.model)
    with pytest.raises(ValueError, match=message):
        trainer.step(*change(*make_batch()))
    assert torch.equal(before, weights(trainer.model))


@pytest.mark.parametrize(
    ("name", "value"), [("config", {}), ("model", make_gpt2()), ("tokenizer", "gpt2")]
)
def test_wrong_arguments_are_named(name: str, value: Any) -> None:
    arguments = {
        "config": PPOConfig(),
        "model": make_policy(),
        "tokenizer": make_tokenizer(),
        name: value,
    }
    with pytest.raises(ValueError, match=f"{name} must be a"):
        PPOTrainer(**arguments)


def test_dataloader_drops_the_short_batch_and_unused_columns() -> None:
    rows = Dataset.from_dict(
        {"input_ids": [[i] for i in range(20)], "query": ["q"] * 20, "stars": [1] * 20}
    )
    trainer = make_trainer(dataset=rows, data_collator=lambda data: data)
    batches = list(trainer.dataloader)
    assert [len(batch) for batch in batches] == [8, 8]
    assert set(batches[0][0]) == {"input_ids", "query"}
    assert [row["input_ids"] for row in batches[0]] != [[i] for i in range(8)]


def test_own_optimizer_and_scheduler_are_used() -> None:
    policy = make_policy()
    optimizer = torch.optim.SGD(policy.v_head.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    trainer = make_trainer(policy, optimizer=optimizer, lr_scheduler=scheduler)
    before = policy.pretrained_model.transformer.wte.weight.detach().clone()
    head = policy.v_head.summary.weight.detach().clone()
    rates = [trainer.step(*make_batch())["ppo/learning_rate"] for _ in range(3)]
    assert rates == pytest.approx([0.5, 0.05, 0.005])
    assert torch.equal(before, policy.pretrained_model.transformer.wte.weight)
    assert not torch.equal(head, policy.v_head.summary.weight)


def test_a_plain_model_can_be_the_reference() -> None:
    batch = make_batch()
    plain = make_trainer(make_policy(0), make_gpt2(1)).step(*batch)
    wrapped = make_trainer(make_policy(0), make_policy(1)).step(*batch)
    np.testing.assert_allclose(plain["objective/kl_dist"], wrapped["objective/kl_dist"], atol=1e-5)


def test_without_a_reference_kl_starts_at_zero_and_the_copy_stays() -> None:
    trainer = make_trainer()
    reference = weights(trainer.ref_model)
    stats = trainer.step(*make_batch())
    assert stats["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert torch.equal(reference, weights(trainer.ref_model))
    assert not torch.equal(reference, weights(trainer.model))


def test_state_continues_bit_for_bit() -> None:
    settings: dict[str, Any] = {
        "mini_batch_size": 2,
        "use_score_scaling": True,
        "horizon": 50.0,
    }
    straight = make_trainer(**settings)
    for seed in range(2):
        straight.step(*make_batch(seed=seed))
    resumed = make_trainer(**settings)
    resumed.model.load_state_dict(straight.model.state_dict())
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    results = []
    for trainer in (straight, resumed):
        sample = trainer.generate(torch.tensor([1, 2]), max_new_tokens=20, eos_token_id=-1)
        stats = trainer.step(*make_batch(seed=2))
        results.append((sample.tolist(), stats["ppo/loss/total"], weights(trainer.model)))
    assert results[0][:2] == results[1][:2]
    assert torch.equal(results[0][2], results[1][2])


def test_log_stats_without_a_tracker_is_silent() -> None:
    trainer = make_trainer()
    stats = trainer.step(*make_batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.log_stats(
            stats, {"query": ["a"] * 8, "response": ["b"] * 8}, [torch.tensor(1.0)] * 8
        )


def test_saving_writes_policy_tokenizer_and_card(tmp_path: Any) -> None:
    trainer = make_trainer()
    trainer.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"model.safetensors", "value_head.safetensors", "tokenizer.json", "README.md"} <= names
    loaded = Policy.from_pretrained(str(tmp_path / "saved"))
    assert torch.equal(weights(loaded), weights(trainer.model))


def test_best_model_is_pushed_on_new_heights(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(push_to_hub_if_best_kwargs={"repo_id": "me/best"})
    pushed: list[str] = []
    monkeypatch.setattr(trainer, "push_to_hub", lambda repo_id: pushed.append(repo_id))
    queries, responses, _ = make_batch()
    for score in (1.0, 0.5, 2.0):
        trainer.step(queries, responses, [torch.tensor(score)] * 8)
    assert pushed == ["me/best", "me/best"]


def test_ppo_learns_a_toy() -> None:
    """One token is rewarded: its frequency must rise far above chance."""
    trainer = make_trainer(
        make_policy(initializer_range=0.05),
        batch_size=32,
        mini_batch_size=32,
        learning_rate=3e-3,
        init_kl_coef=0.02,
        adap_kl_ctrl=False,
    )
    queries = [torch.tensor([i]) for i in range(32)]
    share = 0.0
    for _ in range(25):
        responses = trainer.generate(
            queries, max_new_tokens=6, batch_size=32, return_prompt=False, eos_token_id=-1
        )
        scores = [(response == 7).float().mean() * 5 for response in responses]
        share = float(torch.stack(responses).eq(7).float().mean())
        trainer.step(queries, responses, scores)
    assert share > 0.5


class FakeTracker:
    """Keeps what it is sent, with the keywords of accelerate's trackers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: list[tuple[dict[str, Any], int | None]] = []

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.rows.append((values, step))


def test_every_tracker_gets_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb drops a row whose number is not above those of all rows so far, the user's too."""
    wandb = SimpleNamespace(
        Histogram=lambda array: array.tolist(),
        Table=lambda columns, data: {"columns": columns, "data": data},
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trainer = make_trainer()
    trackers = [FakeTracker("wandb"), FakeTracker("aim")]
    monkeypatch.setattr(trainer.accelerator, "trackers", trackers)
    stats = trainer.step(*make_batch())
    texts = {"query": ["a"] * 8, "response": ["\x1b[1m"] * 8}
    scores = [torch.tensor(float(i)) for i in range(8)]
    for _ in range(2):
        trainer.log_stats(stats, texts, scores)
    (first, number), second = trackers[0].rows
    assert number is None and second == (first, None) and first["step"] == 1
    assert first["game_log"]["columns"] == ["query", "response", "reward"]
    assert first["game_log"]["data"][3] == ["a", "\\x1b[1m", 3.0]
    assert first["env/reward_dist"] == list(range(8))
    numbers, number = trackers[1].rows[1]
    assert number == 1 and numbers["env/reward_mean"] == pytest.approx(3.5)
    assert numbers["ppo/loss/total"] == stats["ppo/loss/total"]
    assert all(isinstance(value, (int, float)) for value in numbers.values())
    with pytest.raises(ValueError, match=r"columns \['mood'\] to log"):
        trainer.log_stats(stats, texts, scores, columns_to_log=["mood"])


def test_a_reference_given_beside_an_adapter_is_the_one_that_counts() -> None:
    from peft import LoraConfig

    policy = Policy.from_pretrained(
        make_gpt2(), peft_config=LoraConfig(r=4, target_modules=["c_attn"])
    )
    batch = make_batch()
    given = make_trainer(policy, make_gpt2(1)).step(*batch)
    explicit = make_trainer(make_policy(0), make_gpt2(1)).step(*batch)
    np.testing.assert_allclose(
        given["objective/ref_logprobs"], explicit["objective/ref_logprobs"], atol=1e-5
    )


def test_accumulated_mini_batches_make_the_step_of_the_whole_batch() -> None:
    """Plain gradient descent, so that the size of the gradient matters; equal lengths."""
    queries = [torch.tensor([i + 1, i + 2]) for i in range(8)]
    responses = [torch.tensor([i, 2 * i, 3 * i]) for i in range(8)]
    scores = make_batch()[2]
    finals = []
    for mini_batch_size, accumulation in ((8, 1), (2, 4)):
        policy = make_policy()
        trainer = make_trainer(
            policy,
            optimizer=torch.optim.SGD(policy.parameters(), lr=0.1),
            mini_batch_size=mini_batch_size,
            gradient_accumulation_steps=accumulation,
            ppo_epochs=1,
        )
        trainer.step(queries, responses, scores)
        finals.append(weights(policy))
    torch.testing.assert_close(finals[0], finals[1])


def rates(steps: int, **settings: Any) -> list[float]:
    """Learning rates in a run of `steps` steps, and in two more steps."""
    settings = {"steps": 8 * steps, "max_grad_norm": 1e-9, "ppo_epochs": 2, **settings}
    trainer = make_trainer(learning_rate=1.0, **settings)
    batch = make_batch()
    return [trainer.step(*batch)["ppo/learning_rate"] for _ in range(steps + 2)]


def test_learning_rate_schedules_end_with_the_run() -> None:
    assert rates(2) == [1.0] * 4
    assert rates(4, lr_scheduler_type="linear") == pytest.approx([1, 0.75, 0.5, 0.25, 0, 0])
    assert rates(2, lr_scheduler_type="linear", min_lr_ratio=0.2) == pytest.approx(
        [1, 0.6, 0.2, 0.2]
    )
    assert rates(2, lr_scheduler_type="cosine") == pytest.approx([1, 0.5, 0, 0], abs=1e-9)
    assert rates(4, lr_scheduler_type="cosine")[1] == pytest.approx(0.5 + 0.5**0.5 / 2)
    assert rates(3, warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates(4, warmup_steps=1, lr_scheduler_type="linear") == pytest.approx(
        [0.5, 1, 2 / 3, 1 / 3, 0, 0]
    )


def test_a_schedule_goes_on_where_a_checkpoint_left_it() -> None:
    settings: dict[str, Any] = {"steps": 32, "lr_scheduler_type": "linear"}
    trainer = make_trainer(learning_rate=1e-3, **settings)
    trainer.step(*make_batch())
    other = make_trainer(learning_rate=1e-3, **settings)
    other.load_state_dict(trainer.state_dict())
    again = [t.step(*make_batch())["ppo/learning_rate"] for t in (trainer, other)]
    assert again == pytest.approx([0.75e-3, 0.75e-3])


def test_an_adaptive_learning_rate_finds_the_size_of_its_steps() -> None:
    """From a rate far too low and one far too high, KL per step becomes about the same."""
    moved = []
    for rate in (1e-6, 1e-1):
        trainer = make_trainer(
            learning_rate=rate,
            lr_scheduler_type="adaptive",
            desired_kl=0.01,
            min_lr_ratio=1.0,
            ratio_threshold=1e9,
        )
        stats = [trainer.step(*make_batch(seed=i)) for i in range(30)]
        rates = [s["ppo/learning_rate"] for s in stats]
        assert rates[0] == rate
        assert all(
            min(abs(b / a - f) for f in (1, 1.5, 1 / 1.5)) < 1e-6
            for a, b in itertools.pairwise(rates)
        )
        moved.append(np.median([s["ppo/policy/approxkl"] for s in stats[-8:]]))
    assert all(0.003 < m < 0.03 for m in moved), moved


def test_a_rollback_slows_an_adaptive_learning_rate_down_for_good() -> None:
    """The adaptation would undo half the rate alone within two steps."""
    settings: dict[str, Any] = {
        "learning_rate": 1e-3, "lr_scheduler_type": "adaptive", "desired_kl": 0.01,
        "min_lr_ratio": 1.0,
    }  # fmt: skip
    start = make_trainer(**settings)
    for i in range(20):
        start.step(*make_batch(seed=i))
    later = {}
    for factor in (1.0, 0.5):
        trainer = make_trainer(copy.deepcopy(start.model), start.ref_model, **settings)
        state = copy.deepcopy(start.state_dict())
        _scale_learning_rate(state, factor)
        trainer.load_state_dict(state)
        stats = [trainer.step(*make_batch(seed=i)) for i in range(20, 40)]
        later[factor] = [s["ppo/learning_rate"] for s in stats]
    assert later[0.5][0] == pytest.approx(0.5 * later[1.0][0])
    assert np.mean(later[0.5][-10:]) < 0.7 * np.mean(later[1.0][-10:])


def test_an_adaptive_learning_rate_falls_and_steps_with_it() -> None:
    """The adaptation may raise it, but it ends near zero, and so does KL per step."""
    trainer = make_trainer(
        learning_rate=1e-3, lr_scheduler_type="adaptive", desired_kl=0.01, steps=40 * 8
    )
    stats = [trainer.step(*make_batch(seed=i)) for i in range(40)]
    rates = [s["ppo/learning_rate"] for s in stats]
    moved = [s["ppo/policy/approxkl"] for s in stats]
    assert max(rates[-4:]) < 0.2 * max(rates)
    assert np.median(moved[-8:]) < 0.1 * np.median(moved[8:16])
    # Without a correction between them, two rates differ by the fall alone: (40 - n) / 40.
    steady = [b / a * (40 - n) / (39 - n) for n, (a, b) in enumerate(itertools.pairwise(rates))]
    assert all(min(abs(f - g) for g in (1, 1.5, 1 / 1.5)) < 1e-6 for f in steady)
