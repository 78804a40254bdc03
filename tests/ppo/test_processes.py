"""Two processes with half a batch each learn what one process learns from the whole batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from ppo_cli import AutoModelForCausalLMWithValueHead
from ppo_cli.ppo import trainer as trainer_module
from ppo_cli.utils import launcher, processes
from tests.conftest import (
    EOS,
    make_batch,
    make_gpt2,
    make_policy,
    make_seq2seq_policy,
    make_seq2seq_tokenizer,
    make_trainer,
    weights,
)
from tests.world import in_world

STEPS = 2
Batch = tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]

# Name -> settings of the whole batch, and `skewed`, `masks`, `potentials`, `adapter`.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "even": {"even": True},
    "skewed": {"skewed": True},
    "skewed to the other side": {"skewed": True, "reversed": True},
    "one process has no token that counts": {"masks": True},
    "several mini-batches": {"mini_batch_size": 4},
    "mini-batches of two": {"mini_batch_size": 2, "skewed": True},
    "accumulation": {"mini_batch_size": 2, "gradient_accumulation_steps": 2, "skewed": True},
    "accumulation of all": {"mini_batch_size": 2, "gradient_accumulation_steps": 4},
    "no whitening": {"advantage_norm": "none", "skewed": True},
    "whitening by mini-batch": {"advantage_norm": "mini_batch", "mini_batch_size": 4},
    "whitened rewards": {"whiten_rewards": True, "skewed": True},
    "score scaling": {"use_score_scaling": True, "use_score_norm": True},
    "first scores scale": {"use_score_scaling": True, "score_scaling_samples": 8},
    "score clip": {"score_clip": 0.5},
    "entropy bonus": {"ent_coef": 0.3, "skewed": True},
    "KL in the loss": {"kl_in_loss": True, "kl_penalty": "k3", "init_kl_coef": 0.5, "skewed": True},
    "full KL": {"kl_penalty": "full", "skewed": True},
    "absolute KL": {"kl_penalty": "abs"},
    "clipping": {"max_grad_norm": 0.05, "skewed": True},
    "checkpointing": {"gradient_checkpointing": True, "skewed": True},
    "value warm-up": {"value_warmup_steps": 1, "skewed": True},
    "value warm-up by mini-batches": {"value_warmup_steps": 1, "mini_batch_size": 4},
    "value warm-up, accumulated": {
        "value_warmup_steps": 1, "mini_batch_size": 2, "gradient_accumulation_steps": 2,
    },
    "schedule": {"lr_scheduler_type": "linear", "warmup_steps": 1, "steps": 24},
    "adaptive rate": {"lr_scheduler_type": "adaptive", "steps": 24},
    "KL budget": {"kl_budget": 0.01, "init_kl_coef": 0.2},
    "early stopping": {"early_stopping": True, "target_kl": 1e-9, "mini_batch_size": 4},
    "limit of approximate KL": {"max_approx_kl": 1e-6, "mini_batch_size": 4},
    "skipped mini-batches": {"ratio_threshold": 1.0001, "mini_batch_size": 4, "skewed": True},
    "groups of responses": {"responses_per_query": 2},
    "potentials": {"potentials": True, "lam": 0.8, "skewed": True},
    "shared layers": {"num_shared_layers": 1},
    "adapter": {"adapter": True, "skewed": True},
    "methods of 0.11.4": {"classic": True, "skewed": True, "mini_batch_size": 4},
    "methods of 0.11.4, accumulated": {
        "classic": True, "masks": True, "mini_batch_size": 2, "gradient_accumulation_steps": 2,
        "kl_penalty": "full", "advantage_norm": "mini_batch", "early_stopping": True,
    },
    "adapter in its warm-up": {"adapter": True, "value_warmup_steps": 1, "mini_batch_size": 4},
    "encoder-decoder": {"encoder_decoder": True, "skewed": True, "mini_batch_size": 4},
}  # fmt: skip
SIZE = 8


def batch_of(case: dict[str, Any], step: int) -> tuple[Batch, dict[str, list[torch.Tensor]]]:
    """The whole batch of a step, and further arguments of `step`."""
    queries, responses, scores = make_batch(SIZE, seed=step, longest_query=6, longest_response=10)
    if case.get("even"):
        queries = [torch.arange(1, 4) + i for i in range(SIZE)]
        responses = [torch.arange(5, 11) + i for i in range(SIZE)]
    if case.get("skewed"):  # the first half is far longer than the second
        responses[: SIZE // 2] = [torch.arange(1, 13) + i for i in range(SIZE // 2)]
        responses[SIZE // 2 :] = [torch.tensor([i, EOS]) for i in range(SIZE // 2)]
    if case.get("reversed"):
        queries, responses, scores = queries[::-1], responses[::-1], scores[::-1]
    if case.get("encoder_decoder"):  # of another vocabulary; responses begin with its start token
        queries = [query % 60 for query in queries]
        responses = [torch.cat([torch.tensor([0]), r % 60]) for r in responses]
    extra = {}
    if case.get("masks"):
        masks = [torch.ones(len(response), dtype=torch.long) for response in responses]
        for mask in masks[SIZE // 2 :]:
            mask.zero_()
        extra["response_masks"] = masks
    if case.get("potentials"):
        generator = torch.Generator().manual_seed(step)
        extra["potentials"] = [torch.randn(len(r), generator=generator) for r in responses]
    return (queries, responses, scores), extra


def start_of(policy: AutoModelForCausalLMWithValueHead) -> torch.nn.Module:
    """A policy as `policy` was before it learnt."""
    return make_seq2seq_policy() if policy.is_encoder_decoder else make_policy()


def learnt(name: str, **accelerator: Any) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """The weights after two steps of a case, and the statistics; this process's share of them.

    Of a sharded policy, which the keywords of the accelerator may ask for, the main process has the
    weights.
    """
    case = dict(CASES[name])
    kinds = ("even", "skewed", "reversed", "masks", "potentials", "encoder_decoder", "classic")
    given = {kind: case.pop(kind, False) for kind in kinds}
    policy = make_seq2seq_policy() if given["encoder_decoder"] else make_policy()
    if case.pop("adapter", False):
        torch.manual_seed(1)
        adapter = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
        model = get_peft_model(make_gpt2(), adapter)
        torch.manual_seed(0)
        policy = AutoModelForCausalLMWithValueHead(model, summary_dropout_prob=0.0)
    count = launcher.count()
    settings = {"mini_batch_size": SIZE, "batch_size": SIZE, "ppo_epochs": 2, **case}
    for key in ("batch_size", "mini_batch_size", "steps"):
        if key in settings:
            settings[key] //= count
    # Adam would turn the rounding of gradients that are zero into steps.
    sgd = torch.optim.SGD((p for p in policy.parameters() if p.requires_grad), lr=0.05)
    start = torch.zeros(1) if policy.is_peft_model else weights(start_of(policy))
    tokenizer = make_seq2seq_tokenizer() if policy.is_encoder_decoder else None
    settings |= {"tokenizer": tokenizer, "accelerator_kwargs": accelerator}
    trainer = make_trainer(policy, optimizer=sgd, **settings)
    if given["classic"] and count > 1:  # one replaced method makes the step call them all
        trainer.record_step_stats = partial(trainer.record_step_stats)  # type: ignore[method-assign]
    stats = []
    for step in range(STEPS):
        whole, extra = batch_of(given, step)
        own = processes.rows(SIZE)
        stats.append(
            trainer.step(*(part[own] for part in whole), **{k: v[own] for k, v in extra.items()})
        )
    whole = trainer.whole_policy()
    return (start if whole is None else weights(whole) - start), stats


def learnt_in_all() -> dict[str, Any]:
    return {name: learnt(name) for name in CASES}


def test_two_halves_of_a_batch_make_the_update_of_the_whole() -> None:
    """One test, because workers of a suite would each start processes of their own."""
    two_processes = in_world(learnt_in_all)
    for name in CASES:
        check(name, [process[name] for process in two_processes])


def check(name: str, processes: list[tuple[torch.Tensor, list[dict[str, Any]]]]) -> None:
    whole, stats = learnt(name)
    assert whole.norm() > 1e-4, name
    for update, its_stats in processes:
        assert (update - whole).norm() <= 1e-5 * whole.norm(), name
        for expected, found in zip(stats, its_stats, strict=True):
            assert expected.keys() == found.keys(), name
            for key, value in expected.items():
                if not key.startswith("time/") and not (
                    CASES[name].get("classic") and "/var" in key
                ):
                    same = np.sort(np.ravel(found[key])), np.sort(np.ravel(value))
                    note = f"{name}: {key}"
                    np.testing.assert_allclose(*same, rtol=2e-4, atol=2e-5, err_msg=note)


def logged(folder: str) -> tuple[int, list[str], list[float]]:
    """What `log_stats` sends in this process: number of trackers, queries, scores."""
    settings = {"log_with": "tensorboard", "project_kwargs": {"logging_dir": folder}}
    half = SIZE // launcher.count()
    trainer = make_trainer(make_policy(), batch_size=half, mini_batch_size=half, **settings)
    sent: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "send_statistics", lambda *given: sent.append(given))
        own = list(range(SIZE))[processes.rows(SIZE)]
        rewards = [torch.tensor(float(i)) for i in own]
        trainer.log_stats({}, {"query": [f"q{i}" for i in own], "response": own}, rewards)
    [(trackers, _, _, batch, scores, _)] = sent
    return len(trackers), batch["query"], scores.tolist()


def test_trackers_get_the_rows_of_all_processes_once(tmp_path: Path) -> None:
    main, other = in_world(logged, str(tmp_path))
    everything = [f"q{i}" for i in range(SIZE)], [float(i) for i in range(SIZE)]
    assert main == (1, *everything)
    assert other[0] == 0
    writers = {path.name.split(".")[-2] for path in tmp_path.rglob("events.out*")}
    assert len(writers) == 1  # the number of a process
