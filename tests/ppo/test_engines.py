"""Sampling engines: settings are followed, samples are those of the policy's present weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from ppo_cli import AutoModelForCausalLMWithValueHead, PPOTrainer
from ppo_cli.config.schema import RolloutConfig
from ppo_cli.errors import MissingPackageError, ModelError, NumericalError, UsageError
from ppo_cli.models.engine import EngineSamples, SamplingEngine
from ppo_cli.models.paged_engine import LOGGER
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.ppo.engines import check_engine, logprob_gap, make_engine, try_engine
from tests import vllm_standin
from tests.conftest import EOS, make_batch, make_gpt2, make_trainer, weights

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], init_lora_weights=False)
QUERIES = [torch.tensor(ids) for ids in [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2, 3]] * 3]
LIMITS = [7, 3, 9, 5] * 3
PARAMS = SamplingParams(temperature=0.7, stop_token_ids=(EOS, *range(3, 13)))


@pytest.fixture
def vllm() -> Iterator[list[vllm_standin.LLM]]:
    """A stand-in of vLLM, and its engines so far."""
    with vllm_standin.installed() as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on the disk, where vLLM reads it."""
    found = tmp_path_factory.mktemp("model")
    make_gpt2().save_pretrained(found)
    return found


def trainer_of(folder: Path, adapter: Any = None, **settings: Any) -> PPOTrainer:
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(model, peft_config=adapter)
    return make_trainer(policy, **settings)


def engine_of(kind: Any, trainer: PPOTrainer, **settings: Any) -> SamplingEngine:
    config = RolloutConfig(engine=kind, **settings)
    return make_engine(config, trainer, QUERIES)


@torch.no_grad()
def of_policy(trainer: PPOTrainer, drawn: EngineSamples, temperature: float) -> list[Tensor]:
    """The policy's own log-probabilities of samples to `QUERIES`, by a plain forward of each."""
    model = trainer.model.pretrained_model.eval()
    found = []
    for query, response in zip(QUERIES, drawn.responses, strict=True):
        logits = model(torch.cat([query, response]).unsqueeze(0)).logits[0, len(query) - 1 : -1]
        logprobs = (logits / temperature).log_softmax(-1)
        found.append(logprobs.gather(1, response.unsqueeze(1)).squeeze(1))
    return found


def gap(trainer: PPOTrainer, drawn: EngineSamples, temperature: float = 0.7) -> float:
    assert drawn.logprobs is not None
    expected = torch.cat(of_policy(trainer, drawn, temperature))
    return logprob_gap(torch.cat(drawn.logprobs), expected)["sampling/logprob_gap"]


@pytest.mark.parametrize("kind", ["paged", "vllm"])
def test_an_engine_follows_limits_end_tokens_and_temperature(
    kind: str, folder: Path, vllm: list[vllm_standin.LLM]
) -> None:
    trainer = trainer_of(folder)
    engine = engine_of(kind, trainer)
    engine.refresh()
    ends = {*PARAMS.stop_token_ids}
    drawn = engine.sample(QUERIES, LIMITS, PARAMS)
    assert gap(trainer, drawn) < 1e-5 and gap(trainer, drawn, 1.0) > 0.05
    ended = 0
    for response, limit in zip(drawn.responses, LIMITS, strict=True):
        assert 0 < len(response) <= limit and response.dtype == torch.int64
        assert not ends & {*response[:-1].tolist()}
        is_ended = response[-1].item() in ends
        assert is_ended or len(response) == limit
        ended += is_ended
    assert 0 < ended < len(LIMITS)
    whole = engine.sample(QUERIES, LIMITS, SamplingParams(temperature=9.0))  # end of text, too
    assert [len(response) for response in whole.responses] == LIMITS


@pytest.mark.parametrize("adapter", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["paged", "vllm"])
def test_samples_follow_the_weights_and_the_adapter_after_every_step(
    kind: str, adapter: Any, folder: Path, vllm: list[vllm_standin.LLM]
) -> None:
    trainer = trainer_of(folder, adapter, learning_rate=0.02)
    engine = engine_of(kind, trainer)
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    for seed in range(2):
        engine.refresh()
        drawn = engine.sample(QUERIES, LIMITS, PARAMS)
        assert gap(trainer, drawn) < 1e-5
        before = weights(trainer.model)
        trainer.step(*make_batch(seed=seed))
        assert not torch.equal(weights(trainer.model), before)
        assert gap(trainer, drawn) > 0.01  # so the check above would have seen old weights
    if kind == "vllm":
        stale = engine.sample(QUERIES, LIMITS, PARAMS)
        assert gap(trainer, stale) > 0.01  # vLLM has its own copy
    engine.refresh()
    assert gap(trainer, engine.sample(QUERIES, LIMITS, PARAMS)) < 1e-5
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


def test_paged_draws_from_the_trainers_random_numbers_alone(folder: Path) -> None:
    drawn = []
    for seed in (0, 0, 1):
        trainer = trainer_of(folder, seed=seed)
        engine = engine_of("paged", trainer, batch_size=3)
        state = torch.get_rng_state()
        trainer.model.train()
        drawn.append([engine.sample(QUERIES, LIMITS, PARAMS) for _ in range(2)])
        assert torch.equal(torch.get_rng_state(), state) and trainer.model.pretrained_model.training
    texts = [[[r.tolist() for r in one.responses] for one in two] for two in drawn]
    assert texts[0] == texts[1] and texts[0] != texts[2] and texts[0][0] != texts[0][1]


def test_sizes_and_settings_reach_the_engine(
    folder: Path, vllm: list[vllm_standin.LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(folder)
    engine_of("vllm", trainer, batch_size=3, output_max_length=11)
    engine_of("vllm", trainer, engine_kwargs={"gpu_memory_utilization": 0.6})
    settings = [made.settings for made in vllm]
    assert [one["gpu_memory_utilization"] for one in settings] == [0.3, 0.6]
    assert settings[0]["max_num_seqs"] == 3 and settings[0]["max_model_len"] == 5 + 10
    assert settings[0]["trust_remote_code"] is False

    seen: dict[str, Any] = {}
    model = trainer.model.pretrained_model
    make = model.init_continuous_batching

    def spy(**kwargs: Any) -> Any:
        seen.update(vars(kwargs["continuous_batching_config"]))
        return make(**kwargs)

    monkeypatch.setattr(model, "init_continuous_batching", spy)
    options = {"page_size": 4, "max_batch_tokens": 7}
    engine_of("paged", trainer, batch_size=2, engine_kwargs=options).sample(QUERIES, LIMITS, PARAMS)
    assert seen["max_batch_tokens"] == 7
    assert seen["max_requests_per_batch"] == 2 and seen["page_size"] == 4
    assert seen["num_blocks"] == 4 + 4  # two rows of 14 tokens, in pages of 4


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("paged", {"page_sise": 8}, "Did you mean 'page_size'"),
        ("paged", {"page_size": 2}, r"page_size \(2\).*4 at least"),
        ("paged", {"seed": 3}, "seed is no setting of ContinuousBatchingConfig"),
        ("vllm", {"temperature": 2}, "temperature is no setting of VLLMGeneration"),
        ("vllm", {"gpu_memory_utilization": 2}, "vLLM does not start: gpu_memory"),
    ],
)
def test_settings_that_an_engine_does_not_take_are_refused(
    kind: str, options: Any, said: str, folder: Path, vllm: list[vllm_standin.LLM]
) -> None:
    with pytest.raises((UsageError, ModelError), match=said):
        engine_of(kind, trainer_of(folder), engine_kwargs=options)


def test_what_an_engine_cannot_do_is_one_message(
    folder: Path,
    vllm: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = trainer_of(folder)
    engines = [engine_of(kind, trainer) for kind in ("paged", "vllm")]
    monkeypatch.setattr("ppo_cli.models.vllm_engine.is_quantized", lambda _: True)
    with pytest.raises(UsageError, match="needs whole weights"):
        engine_of("vllm", trainer)
    trainer.model.pretrained_model.transformer.ln_f.weight.data.fill_(torch.nan)
    monkeypatch.setattr(logging.getLogger(LOGGER), "handlers", [caplog.handler])
    caplog.clear()
    for engine in engines:
        engine.refresh()
        with pytest.raises(NumericalError, match="not finite"):
            engine.sample(QUERIES, LIMITS, PARAMS)
    assert caplog.records == []  # of its thread


class Foreign:
    """An engine whose samples are another model's."""

    def refresh(self) -> None: ...

    def sample(self, queries: Any, limits: Any, params: SamplingParams) -> EngineSamples:
        drawn = [torch.arange(limit) for limit in limits]
        return EngineSamples(drawn, [torch.full((limit,), -1.0) for limit in limits])


def test_an_engine_that_samples_from_something_else_is_refused_before_the_run(
    folder: Path,
) -> None:
    trainer = trainer_of(folder)
    try_engine(engine_of("paged", trainer), trainer, QUERIES, PARAMS, 8)
    with pytest.raises(ModelError, match="nats per token from the policy's"):
        try_engine(Foreign(), trainer, QUERIES, PARAMS, 8)
    trainer.model.config._attn_implementation = "flex_attention"
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel.*set rollout.engine=transformers"):
        engine_of("paged", trainer).sample(QUERIES, LIMITS, PARAMS)


def test_without_its_package_vllm_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingPackageError, match=r"pip install 'ppo-cli\[vllm\]'") as caught:
        check_engine(RolloutConfig(engine="vllm"))
    assert caught.value.exit_code == 2


def test_gap_and_kl_by_hand() -> None:
    engine, policy = torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.5]).log()
    found = logprob_gap(engine, policy)
    log2 = torch.tensor(2.0).log().item()
    # k3: (1/2 - 1 + log 2 + 2 - 1 - log 2) / 2
    assert found == pytest.approx({"sampling/logprob_gap": log2, "sampling/kl": 0.25})
    assert json.dumps(logprob_gap(engine, engine)) == json.dumps(dict.fromkeys(found, 0.0))
