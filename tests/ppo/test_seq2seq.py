"""`PPOTrainer` with an encoder-decoder: what `generate` returns, and what `step` learns from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import GenerationConfig

from ppo_cli import (
    AutoModelForSeq2SeqLMWithValueHead,
    BestOfNSampler,
    PPOTrainer,
    TextEnvironment,
)
from ppo_cli.config.schema import RolloutConfig
from ppo_cli.errors import UsageError
from ppo_cli.evaluation.likelihoods import likelihoods
from ppo_cli.models.encoder_decoder import decoder_start
from ppo_cli.ppo.engines import make_engine
from ppo_cli.ppo.forward import token_forward
from ppo_cli.ppo.packing import TokenBatch
from tests.conftest import (
    make_gpt2,
    make_seq2seq,
    make_seq2seq_policy,
    make_seq2seq_tokenizer,
    make_trainer,
    save_seq2seq,
    weights,
)
from tests.models.test_seq2seq import logits_alone

KINDS = ("T5", "Bart")
QUERIES = [torch.tensor([*range(3, 4 + i), 1]) for i in range(8)]
SCORES = [torch.tensor(float(i % 3)) for i in range(8)]


def trainer_of(policy: Any = None, reference: Any = None, **settings: Any) -> PPOTrainer:
    policy = policy or make_seq2seq_policy()
    return make_trainer(policy, reference, tokenizer=make_seq2seq_tokenizer(), **settings)


def responses_of(start: int = 0) -> list[torch.Tensor]:
    """Responses as `generate` returns them, of 1 to 8 tokens behind the start token."""
    return [torch.tensor([start, *range(20 + i, 20, -1), 30]) for i in range(8)]


@pytest.mark.parametrize("kind", KINDS)
def test_step_reads_what_generate_sampled(kind: str) -> None:
    policy = make_seq2seq_policy(kind)
    start = decoder_start(policy)
    trainer = trainer_of(policy)
    limits = iter(range(1, 9))
    responses = trainer.generate(QUERIES, length_sampler=lambda: next(limits), return_prompt=False)
    assert all(response[0] == start for response in responses)
    expected = [
        logits_alone(policy.pretrained_model, query, response[1:]).log_softmax(-1)
        for query, response in zip(QUERIES, responses, strict=True)
    ]
    stats = trainer.step(QUERIES, responses, SCORES)
    assert policy.reading().rows == "padded"  # padding is masked, so rows of all lengths together
    assert stats["tokens/responses_dist"].tolist() == [len(r) - 1 for r in responses]
    assert stats["tokens/queries_dist"].tolist() == [len(query) for query in QUERIES]
    for row, log_p, response in zip(stats["objective/logprobs"], expected, responses, strict=True):
        tokens = response[1:]
        of_tokens = log_p.gather(1, tokens[:, None]).squeeze(1)
        np.testing.assert_allclose(row[: len(tokens)], of_tokens, rtol=1e-4, atol=1e-4)
        assert not row[len(tokens) :].any()


def test_one_query_and_the_models_own_words_for_lengths() -> None:
    trainer = trainer_of()
    one = trainer.generate(QUERIES[3], max_new_tokens=4, eos_token_id=None)
    assert one.shape == (1, 5)
    assert trainer.generate(QUERIES[3], max_length=3, eos_token_id=None).shape == (1, 3)
    config = GenerationConfig(do_sample=False, max_new_tokens=2, num_beams=2)
    assert trainer.generate(QUERIES[3], generation_config=config).shape[1] in (2, 3)
    for wrong in ({"decoder_start_token_id": 5}, {"decoder_input_ids": torch.tensor([[0, 5]])}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            trainer.generate(QUERIES[3], **wrong)
    assert trainer.generate(QUERIES, max_new_tokens=1, decoder_start_token_id=0)[0].tolist()[0] == 0


def test_a_response_without_its_start_token_is_refused() -> None:
    trainer, responses = trainer_of(), responses_of()
    responses[2] = responses[2][1:]
    with pytest.raises(ValueError, match=r"responses\[2\] must begin with .* start token \(0\)"):
        trainer.step(QUERIES, responses, SCORES)


def test_masks_and_potentials_stand_beside_the_responses_as_they_are_given() -> None:
    policy, reference = make_seq2seq_policy(), make_seq2seq_policy()
    start = {key: value.clone() for key, value in policy.state_dict().items()}

    def learnt(**changes: Any) -> torch.Tensor:
        policy.load_state_dict(start)
        trainer = trainer_of(policy, reference, ppo_epochs=1)
        trainer.step(QUERIES, responses_of(), SCORES, **changes)
        return weights(policy)

    ones = [torch.ones(len(response)) for response in responses_of()]

    def but(place: int, value: float) -> list[torch.Tensor]:
        rows = [row.clone() for row in ones]
        for row in rows:
            row[place] = value
        return rows

    whole, with_potentials = learnt(), learnt(potentials=ones)
    assert torch.equal(learnt(response_masks=ones), whole)
    assert torch.equal(learnt(response_masks=but(0, 0)), whole)  # the start token never counts
    assert not torch.equal(learnt(response_masks=but(1, 0)), whole)
    assert torch.equal(learnt(potentials=but(0, 5.0)), with_potentials)
    assert not torch.equal(learnt(potentials=but(1, 5.0)), with_potentials)
    with pytest.raises(ValueError, match="response mask 0"):
        learnt(response_masks=[row[1:] for row in ones])


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_and_mini_batches_change_no_gradient(kind: str) -> None:
    def learnt(**settings: Any) -> torch.Tensor:
        policy = make_seq2seq_policy(kind)
        sgd = torch.optim.SGD(policy.parameters(), lr=0.05)
        trainer = trainer_of(policy, optimizer=sgd, ppo_epochs=1, **settings)
        trainer.step(QUERIES, responses_of(decoder_start(policy) or 0), SCORES)
        return weights(policy)

    expected = learnt()
    assert (expected - weights(make_seq2seq_policy(kind))).norm() > 1e-3
    torch.testing.assert_close(learnt(gradient_checkpointing=True), expected, rtol=1e-4, atol=1e-6)


def test_an_adapter_learns_and_its_reference_is_the_policy_without_it() -> None:
    lora = LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    policy = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(
        make_seq2seq(), peft_config=lora, summary_dropout_prob=0.0
    )
    trainer = trainer_of(policy, learning_rate=0.02)
    assert trainer.ref_model is None
    base = policy.pretrained_model.base_model.model.shared.weight.clone()
    first, second = (trainer.step(QUERIES, responses_of(), SCORES) for _ in range(2))
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert abs(second["objective/kl"]) > 1e-3
    assert torch.equal(policy.pretrained_model.base_model.model.shared.weight, base)


def test_a_reference_of_another_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="both be encoder-decoders, or neither"):
        trainer_of(reference=make_gpt2())
    assert trainer_of(reference=make_seq2seq()).ref_model.is_encoder_decoder


@pytest.mark.parametrize("engine", ["paged", "vllm"])
def test_engines_of_causal_models_are_refused_by_name(engine: Any) -> None:
    with pytest.raises(UsageError, match=f"engine={engine} does not sample from an encoder"):
        make_engine(RolloutConfig(engine=engine), trainer_of(), QUERIES)


def test_likelihoods_are_those_of_whole_distributions() -> None:
    policy, reference = make_seq2seq_policy().eval(), make_seq2seq_policy(seed=1).eval()
    responses = [response[1:] for response in responses_of()]
    found = likelihoods(policy, reference, QUERIES, responses)
    for i, pair in enumerate(zip(QUERIES, responses, strict=True)):
        log_p, log_q = (
            logits_alone(model.pretrained_model, *pair).log_softmax(-1).double()
            for model in (policy, reference)
        )
        p = log_p.exp()
        assert found.kl[i] == pytest.approx(float((p * (log_p - log_q)).sum()), rel=1e-4)
        assert found.entropy[i] == pytest.approx(float(-(p * log_p).sum()), rel=1e-4)
        of_tokens = log_q.gather(1, pair[1][:, None])
        assert found.reference_nll[i] == pytest.approx(float(-of_tokens.sum()), rel=1e-4)


def test_sequences_of_equal_lengths_are_read_together() -> None:
    policy = make_seq2seq_policy().eval()
    responses = [responses_of()[i % 2][1:] for i in range(8)]
    queries = [QUERIES[i % 3] for i in range(8)]
    tokens = TokenBatch.from_lists(queries, responses, None, 0, torch.device("cpu"), 0)
    expected = token_forward(policy, tokens)
    policy.read_as(policy.reading()._replace(rows="equal"))
    groups = tokens.length_groups(None, equal=True)
    assert len(groups) == 6
    for group in groups:
        part = tokens.select(group)
        assert part.encoder is not None and part.encoder.mask.all()
        assert part.padded[0]["decoder_attention_mask"].all()
    for found, value in zip(token_forward(policy, tokens), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


def test_parts_of_the_api_that_continue_a_text_refuse_an_encoder_decoder(tmp_path: Path) -> None:
    policy, tokenizer = make_seq2seq_policy(), make_seq2seq_tokenizer()
    with pytest.raises(ValueError, match="an encoder-decoder does not continue a text"):
        TextEnvironment(policy, tokenizer, {}, lambda *_, **__: [0.0], "")
    with pytest.raises(UsageError, match="reward_adapter is for causal models"):
        AutoModelForSeq2SeqLMWithValueHead.from_pretrained(
            save_seq2seq(tmp_path), reward_adapter="a"
        )
    sampler = BestOfNSampler(policy, tokenizer, lambda texts: [1.0] * len(texts), lambda: 3)
    (texts,) = sampler.generate([torch.tensor([5, 6, 1])])
    assert len(texts[0].split()) <= 3  # the response alone
