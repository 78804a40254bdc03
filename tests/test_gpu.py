"""What only a CUDA GPU can show: `make test-gpu`. Elsewhere all of it is skipped.

The other tests hide the GPUs from torch, so that they are the same on every machine.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import GPT2Config, GPT2LMHeadModel

from ppo_cli import AutoModelForCausalLMWithValueHead
from ppo_cli.config.policy import PolicyConfig
from ppo_cli.kernels.cuda_graph import no_gpu_sync
from ppo_cli.models import decode_loop
from ppo_cli.models.loading import load_policy
from ppo_cli.models.plain_forward import sample_logits
from ppo_cli.models.saving import write_model
from ppo_cli.ppo import optimizer_step
from ppo_cli.ppo.update import Update
from tests.conftest import (
    SMALL_RUN,
    make_batch,
    make_gpt2,
    make_policy,
    make_tokenizer,
    make_trainer,
    tried,
    weights,
)
from tests.models.test_decode_loop import LIMITS, QUERIES, SETTINGS, STILL, sample, with_uniforms
from tests.models.test_decode_loop import make_policy as make_other
from tests.models.test_self_check import assert_right, make_model
from tests.ppo.test_parity import CASES
from tests.ppo.test_parity import test_step_gives_what_trl_gave as compare_with_trl
from tests.test_cli import anew

CUDA = torch.device("cuda", 0)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")


@pytest.mark.parametrize("case", CASES)
def test_a_step_gives_what_trl_gave(case: str) -> None:
    compare_with_trl(case)


# ---------------------------------------------------------------- waiting


UPDATES: dict[str, dict[str, Any]] = {
    "one pass": {},
    "exact KL": {"kl_penalty": "full"},
    "mini-batches": {"mini_batch_size": 2},
    "accumulated": {"mini_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "KL in the loss": {"kl_in_loss": True, "kl_penalty": "k3", "ent_coef": 0.01},
    "bfloat16": {"accelerator_kwargs": {"mixed_precision": "bf16"}},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("within_backward", [False, True])
@pytest.mark.parametrize("name", UPDATES)
def test_the_optimisation_loop_never_waits_for_the_gpu(
    name: str, within_backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if within_backward:
        monkeypatch.setattr(optimizer_step, "LARGE_GRADIENTS", 0)
    run, runs = Update.run, []

    def watched(self: Update, *args: Any) -> Any:
        runs.append(1)
        with no_gpu_sync():
            return run(self, *args)

    trainer = make_trainer(**UPDATES[name])
    trainer.step(*make_batch())  # finds out what the model can do, makes Adam's moments
    monkeypatch.setattr(Update, "run", watched)
    before = weights(trainer.model)
    trainer.step(*make_batch(seed=1))
    assert runs
    assert (weights(trainer.model) != before).any()


def test_waiting_would_be_noticed() -> None:
    with no_gpu_sync(), pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(3, device="cuda").sum().item()


# ---------------------------------------------------------------- learning


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize(
    ("precision", "close"), [("no", 1e-4), ("bf16", 0.05), ("fp16", 0.02)], ids=str
)
def test_a_step_is_the_processors_but_for_rounding(
    precision: str, close: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities and values of one batch, and where the weights go in one epoch."""
    results = []
    for settings in ({"cpu": True, "mixed_precision": "no"}, {"mixed_precision": precision}):
        AcceleratorState._reset_state(reset_partial_state=True)
        policy = make_policy()
        descent = torch.optim.SGD(policy.parameters(), lr=0.1)
        trainer = make_trainer(policy, optimizer=descent, ppo_epochs=1, accelerator_kwargs=settings)
        before = weights(policy)
        stats = trainer.step(*make_batch())
        results.append((stats["objective/logprobs"], (weights(policy).cpu() - before.cpu())))
    assert trainer.accelerator.device.type == "cuda"
    (expected, went), (actual, goes) = results
    assert abs(actual - expected).max() < close * abs(expected).max()
    if precision != "fp16":  # whose first steps may be left out, until gradients are in range
        assert torch.nn.functional.cosine_similarity(goes, went, dim=0) > 1 - close


def test_weights_that_move_within_the_backward_pass_end_where_others_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends = []
    for size in (2**27, 0):
        monkeypatch.setattr(optimizer_step, "LARGE_GRADIENTS", size)
        monkeypatch.setattr(optimizer_step, "BYTES_AT_ONCE_ON_GPU", 2000)
        policy = make_policy().cuda()
        # Gradients that are rounding noise (the keys' biases') move nothing.
        adam = torch.optim.Adam(policy.parameters(), lr=1e-3, eps=1e-4, fused=True)
        trainer = make_trainer(policy, optimizer=adam)
        for seed in range(2):
            trainer.step(*make_batch(seed=seed))
        ends.append(weights(trainer.model))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- sampling


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A 1 for each replay of a recorded step."""
    replayed: list[int] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(self: torch.cuda.CUDAGraph) -> None:
        replayed.append(1)
        replay(self)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return replayed


def on_gpu(monkeypatch: pytest.MonkeyPatch, queries: list[Any]) -> list[Any]:
    """The queries there, and a table of random numbers for them."""
    with_uniforms(monkeypatch, list(range(len(queries))))
    table = decode_loop.torch.rand
    monkeypatch.setattr(decode_loop.torch, "rand", lambda *shape, **_: table(*shape).cuda())
    return [query.cuda() for query in queries]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", STILL)
def test_replayed_steps_draw_what_steps_one_by_one_draw(
    name: str, settings: dict[str, Any], replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tried(copy.deepcopy(make_other(name)).cuda())
    queries = on_gpu(monkeypatch, QUERIES)
    replayed = sample(policy, queries, LIMITS, **settings)
    assert len(replays) >= 6
    replays.clear()
    monkeypatch.setattr(decode_loop, "_is_worth_recording", lambda *_: False)
    assert sample(policy, queries, LIMITS, **settings) == replayed
    assert not replays


def test_recordings_share_their_memory(replays: list[int]) -> None:
    policy = AutoModelForCausalLMWithValueHead(make_gpt2(vocab_size=50_000)).eval().cuda()
    reserved = []
    for _ in range(6):
        sample(policy, [query.cuda() for query in QUERIES] * 20, [30] * 120)
        reserved.append(torch.cuda.memory_reserved())
    assert replays
    assert reserved[-1] == reserved[1]


def test_a_model_that_waits_for_the_gpu_is_sampled_from_all_the_same(
    replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tried(AutoModelForCausalLMWithValueHead(make_gpt2()).eval().cuda())
    waiting = copy.deepcopy(policy)
    waiting.pretrained_model.transformer.h[1].register_forward_hook(
        lambda module, args, output: args[0].sum().item() and None
    )
    tried(waiting)
    queries = on_gpu(monkeypatch, QUERIES)
    expected = sample(policy, queries, LIMITS)
    assert replays
    replays.clear()
    for _ in range(2):
        assert sample(waiting, queries, LIMITS) == expected
    assert not replays
    assert waiting in decode_loop._not_capturable
    torch.ones(10**7, device="cuda").sum().item()  # nothing is left in a recording's hands


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_what_is_sampled_is_what_a_step_reads(precision: str, replays: list[int]) -> None:
    """The mean log-probability of samples is minus the entropy, also once the weights moved."""
    trainer = make_trainer(
        batch_size=64,
        mini_batch_size=64,
        learning_rate=3e-3,
        accelerator_kwargs={"mixed_precision": precision},
    )
    queries, _, scores = make_batch(64)
    for _ in range(3):
        replays.clear()
        drawn = trainer.generate(queries, batch_size=64, return_prompt=False, max_new_tokens=30)
        assert len(replays) > 20
        stats = trainer.step(queries, drawn, scores)
        logprobs = stats["objective/logprobs"]
        logprobs = torch.from_numpy(logprobs[logprobs != 0])
        assert len(logprobs) == sum(map(len, drawn))
        entropy = stats["ppo/policy/entropy"]  # of the epochs, which move it a little
        spread = logprobs.std() / len(logprobs) ** 0.5
        assert abs(logprobs.mean() + entropy) < 5 * spread + 0.1


def test_one_seed_gives_one_set_of_samples(replays: list[int]) -> None:
    queries, _, _ = make_batch()
    results = []
    for _ in range(2):
        torch.rand(3, device="cuda")  # the caller's own random numbers have no part in it
        trainer = make_trainer()
        drawn = trainer.generate(queries, batch_size=8, return_prompt=False, max_new_tokens=30)
        results.append([row.tolist() for row in drawn])
    assert results[0] == results[1]
    assert replays


# ---------------------------------------------------------------- the command


def ppo_cli(*arguments: str, cwd: Path) -> str:
    """What the command prints, in a process that has found the GPU by itself."""
    done = anew(*arguments, cwd=cwd)
    assert done.code == 0, done.err
    return done.out


@pytest.mark.parametrize("precision", ["auto", "fp16"])
def test_a_run_trains_goes_on_and_is_compared(precision: str, tmp_path: Path) -> None:
    train = ("train", "--config", SMALL_RUN, "--set", f"policy.precision={precision}")
    ppo_cli(*train, "--set", "run.checkpoint_every=1", cwd=tmp_path)
    ppo_cli(*train, "--resume", "--steps", "3", cwd=tmp_path)
    text = ppo_cli("generate", "ppo-good", "--prompt", "This movie", cwd=tmp_path)
    assert text.strip()
    text = ppo_cli("compare", "ppo-good", "--samples", "8", cwd=tmp_path)
    assert "ppo-good" in text


def test_a_dry_run_foresees_the_memory_of_the_gpu(tmp_path: Path) -> None:
    train = ("train", "--config", SMALL_RUN, "--set", "ppo.mini_batch_size=8", "--json")
    found = json.loads(ppo_cli(*train, "--dry-run", cwd=tmp_path))
    space = found["spaces"][0]
    assert space["kind"] == "GPU memory" and space["fits"]
    code = (
        "import sys, torch; from ppo_cli.cli import app; sys.argv = ['ppo-cli', *sys.argv[1:]]\n"
        "try: app.main()\n"
        "finally: print(torch.cuda.max_memory_allocated(), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *train], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stderr.split()[-1])
    print(f"estimated {space['needed']}, used {peak}")
    assert 0.75 < space["needed"] / peak < 1.25


# ---------------------------------------------------------------- the trial


@pytest.mark.parametrize("name", ["llama", "bloom", "mamba", "bart", "rembert"])
def test_families_are_sampled_and_read_as_each_sequence_is_alone(name: str) -> None:
    assert_right(tried(AutoModelForCausalLMWithValueHead(make_model(name).cuda())))


def test_a_trial_finds_the_fast_way_of_gpt2_small() -> None:
    model = GPT2LMHeadModel(GPT2Config()).cuda()
    tried(AutoModelForCausalLMWithValueHead(make_gpt2().cuda()))  # the first use of the device
    policy = AutoModelForCausalLMWithValueHead(model)
    torch.cuda.synchronize()
    start = time.perf_counter()
    tried(policy)
    torch.cuda.synchronize()
    print(f"the trial took {time.perf_counter() - start:.2f} s")
    assert policy.reading().rows == "packed"


# ---------------------------------------------------------------- quantised bases


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
@pytest.mark.parametrize("width", ["load_in_4bit", "load_in_8bit"])
def test_an_adapter_learns_on_a_quantised_base(width: str, tmp_path: Path) -> None:
    """And reads back; of 4 bits the merged model is the policy, but for rounding."""
    make_gpt2(n_embd=64).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    settings = {"model": str(tmp_path / "base"), "quantization": {width: True}}
    policy = load_policy(
        PolicyConfig.model_validate({**settings, "adapter": {"r": 2}}), device=CUDA
    )
    assert policy.device.type == "cuda"
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    trainer = make_trainer(policy, learning_rate=1e-2)
    assert trainer.ref_model is None
    for seed in range(2):
        trainer.step(*make_batch(seed=seed))
    for name, parameter in policy.named_parameters():
        is_trained = "lora_" in name or "v_head" in name
        assert torch.equal(parameter, before[name]) is not is_trained, name
    expected = sample_logits(policy.eval())
    (tmp_path / "adapter").mkdir()
    write_model(policy, make_tokenizer(), tmp_path / "adapter")
    again = load_policy(
        PolicyConfig.model_validate({**settings, "model": str(tmp_path / "adapter")}), device=CUDA
    )
    torch.testing.assert_close(sample_logits(again.eval()), expected, rtol=0.02, atol=0.02)
    if width == "load_in_4bit":
        (tmp_path / "whole").mkdir()
        write_model(policy, make_tokenizer(), tmp_path / "whole", "merged")
        whole = GPT2LMHeadModel.from_pretrained(tmp_path / "whole")
        scale = expected.abs().max()
        assert (sample_logits(whole.eval()) - expected).abs().max() < 8 * 2**-7 * scale


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
def test_a_run_on_a_4_bit_base_is_sampled_compared_and_exported(tmp_path: Path) -> None:
    asked = ("policy.quantization.load_in_4bit=true", "policy.adapter.r=4")
    sets = [word for setting in asked for word in ("--set", setting)]
    ppo_cli("train", "--config", SMALL_RUN, *sets, cwd=tmp_path)
    assert (tmp_path / "ppo-good" / "adapter_config.json").is_file()
    assert "ppo-good" in ppo_cli("compare", "ppo-good", "--samples", "8", cwd=tmp_path)
    ppo_cli("export", "ppo-good", "whole", "--dtype", "bfloat16", cwd=tmp_path)
    text = ppo_cli("generate", "whole", "--prompt", "This movie", "--no-score", cwd=tmp_path)
    assert text.strip()
