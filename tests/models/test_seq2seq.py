"""Policies of encoder-decoders: loading, sampling, sharing, adapters, saving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from ppo_cli import AutoModelForCausalLMWithValueHead, create_reference_model
from ppo_cli import AutoModelForSeq2SeqLMWithValueHead as Policy
from ppo_cli.config.policy import AdapterConfig
from ppo_cli.errors import ModelError, UsageError
from ppo_cli.kernels.switch import using
from ppo_cli.models.adapter import new_adapter
from ppo_cli.models.decode_encoded import decode_encoded
from ppo_cli.models.encoder_decoder import decoder_start
from ppo_cli.models.frozen_layers import freeze_layers
from ppo_cli.models.sampling import check_sampling, sample_responses, to_texts
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.models.saving import write_model
from ppo_cli.models.transformers_generate import GenerateSettings
from ppo_cli.rewards.batch import RewardBatch
from ppo_cli.rewards.partial_scores import potentials
from tests.conftest import (
    make_gpt2,
    make_seq2seq,
    make_seq2seq_policy,
    make_seq2seq_tokenizer,
    save_seq2seq,
)

KINDS = ("T5", "Bart")
QUERIES = [torch.tensor(ids) for ids in ([5, 6, 7, 8, 1], [9, 1], [10, 11, 12, 1], [4, 1])]
LIMITS = [7, 2, 5, 7]
EOS = 1


@torch.no_grad()
def logits_alone(model: Any, query: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """Logits (R, V) of the response's tokens by transformers' own forward."""
    start = torch.tensor([decoder_start(model)])
    decoder = torch.cat([start, response])[None, :-1]
    return model(input_ids=query[None], decoder_input_ids=decoder).logits[0]


# ---------------------------------------------------------------- loading and saving


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_policy_is_loaded_with_its_value_head(kind: str, tmp_path: Path) -> None:
    policy = make_seq2seq_policy(kind)
    policy.save_pretrained(tmp_path)
    again = Policy.from_pretrained(tmp_path).eval()
    ids = {"input_ids": QUERIES[0][None], "decoder_input_ids": QUERIES[2][None]}
    for found, expected in zip(again(**ids)[::2], policy(**ids)[::2], strict=True):
        torch.testing.assert_close(found, expected)
    assert again(**ids)[2].shape == (1, 4)  # a value of each token that the decoder reads
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(plain(**ids).logits, policy(**ids)[0])


def test_a_folder_of_trl_is_read(tmp_path: Path) -> None:
    policy = make_seq2seq_policy()
    policy.save_pretrained(tmp_path)
    head = tmp_path / "value_head.safetensors"
    weights = tmp_path / "model.safetensors"
    save_file(load_file(weights) | load_file(head), weights, {"format": "pt"})
    head.unlink()
    again = Policy.from_pretrained(tmp_path)
    assert torch.equal(again.v_head.summary.weight, policy.v_head.summary.weight)


def test_each_class_refuses_the_other_kind_and_names_the_right_one(tmp_path: Path) -> None:
    make_gpt2().save_pretrained(tmp_path / "gpt2")
    for model in (make_gpt2(), tmp_path / "gpt2"):
        with pytest.raises(UsageError, match=r"GPT2LMHeadModel is not .*ForCausalLMWithValueHead"):
            Policy.from_pretrained(model)
    make_seq2seq().save_pretrained(tmp_path / "t5")
    for model in (make_seq2seq(), tmp_path / "t5"):
        with pytest.raises(UsageError, match=r"T5For.* is not .*ForSeq2SeqLMWithValueHead"):
            AutoModelForCausalLMWithValueHead.from_pretrained(model)
    with pytest.raises(UsageError, match="BartModel is not"):  # without an output layer
        Policy(make_seq2seq("Bart").model)


def test_a_decoder_without_a_start_token_is_refused() -> None:
    model = make_seq2seq(decoder_start_token_id=None)
    model.generation_config.decoder_start_token_id = None
    with pytest.raises(ModelError, match="names no decoder_start_token_id"):
        check_sampling(Policy(model), 0)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("kind", KINDS)
def test_responses_are_drawn_from_the_models_distribution(kind: str) -> None:
    """By the given random numbers, row by row, whatever else is in the batch."""
    policy = make_seq2seq_policy(kind).eval()
    assert check_sampling(policy, 0) == "loop"
    uniforms = torch.rand(len(QUERIES), 7, generator=torch.Generator().manual_seed(1))
    ends = (EOS, *range(20, 35))
    params = SamplingParams(temperature=0.7, top_k=20, stop_token_ids=ends, pad_token_id=0)
    responses = sample_responses(policy, QUERIES, LIMITS, params, uniforms=uniforms)
    for i, response in enumerate(responses):
        ended = int(response[-1]) in ends
        assert len(response) == LIMITS[i] or ended
        logits = logits_alone(policy.pretrained_model, QUERIES[i], response) / 0.7
        kept = logits >= logits.topk(20).values[:, -1:]
        sums = logits.where(kept, -torch.inf).softmax(-1).double().cumsum(-1)
        expected = torch.searchsorted(sums, uniforms[i, : len(response), None].double())
        assert response.tolist() == expected.squeeze(1).tolist()
    assert [len(response) for response in responses] != LIMITS  # some ended by a token


def test_rows_that_have_ended_are_left_out_and_a_cache_changes_nothing() -> None:
    policy = make_seq2seq_policy("Bart").eval()
    ids = torch.nn.utils.rnn.pad_sequence(QUERIES, batch_first=True)
    mask, params = (ids != 0).long(), SamplingParams(pad_token_id=0)
    uniforms = torch.rand(len(QUERIES), 7, generator=torch.Generator().manual_seed(2))
    seen: dict[bool, list[int]] = {True: [], False: []}
    drawn = [
        decode_encoded(
            policy, ids, mask, [7, 1, 2, 2], params,
            lambda rows, _, own=seen[use_cache]: own.append(len(rows)), uniforms,
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    ]  # fmt: skip
    assert [r.tolist() for r in drawn[0]] == [r.tolist() for r in drawn[1]]
    assert seen[True] == seen[False] == [4, 3, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_generate_is_used_where_it_is_asked_for(kind: str) -> None:
    policy = make_seq2seq_policy(kind).eval()
    beams = GenerateSettings((EOS,), 0, kwargs={"num_beams": 2, "do_sample": False})
    responses = sample_responses(policy, QUERIES, LIMITS, beams)
    assert all(1 <= len(r) <= limit for r, limit in zip(responses, LIMITS, strict=True))
    (expected,) = policy.pretrained_model.generate(
        QUERIES[0][None], num_beams=2, do_sample=False, max_new_tokens=7, eos_token_id=EOS
    )
    assert responses[0].tolist() == expected[1:].tolist()[: len(responses[0])]
    with using("-decode_loop"):
        assert check_sampling(policy, 0) == "padded"
        greedy = SamplingParams(top_k=1, pad_token_id=0, stop_token_ids=(EOS,))
        (response,) = sample_responses(policy, QUERIES[:1], [4], greedy)
    logits = logits_alone(policy.pretrained_model, QUERIES[0], response)
    assert response.tolist() == logits.argmax(-1).tolist()


def test_a_response_is_a_text_of_its_own() -> None:
    tokenizer = make_seq2seq_tokenizer()
    rollout = to_texts(tokenizer, QUERIES[:1], [torch.tensor([5, 6, 1])], continues=False)
    assert rollout.texts == rollout.response_texts == ["t5 t6"]
    batch = RewardBatch.of(rollout, ["t5"])
    assert batch.take([0], ["t5 t6"]).responses == ["t5 t6"]  # although it begins as the query does
    seen: list[str] = []

    def lengths(texts: Sequence[str]) -> torch.Tensor:
        seen.extend(texts)
        return torch.tensor([float(len(text)) for text in texts])

    potentials(rollout, tokenizer, lengths, every=1)
    assert seen == ["", "t5", "t5 t6"]


# ---------------------------------------------------------------- what trains


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_shares_the_encoder_and_the_decoders_lower_layers(kind: str) -> None:
    policy = make_seq2seq_policy(kind)
    reference = create_reference_model(policy, num_shared_layers=1)
    own, others = dict(policy.named_parameters()), dict(reference.named_parameters())
    trained = {name for name, parameter in own.items() if parameter.requires_grad}
    assert {name for name in own if own[name] is not others[name]} == trained
    stack = "decoder.block" if kind == "T5" else "decoder.layers"
    assert any(f"{stack}.1." in name for name in trained)
    for shared in ("shared.", "embed_", ".encoder.", f"{stack}.0."):
        assert not any(shared in name for name in trained)


def test_numbers_of_frozen_layers_are_the_decoders() -> None:
    model = make_seq2seq()
    freeze_layers(model, [1])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if "decoder.block.1" in name}


@pytest.mark.parametrize("targets", [None, ["all-linear"], ["q"]])
def test_an_adapter_is_made_and_saved(targets: list[str] | None, tmp_path: Path) -> None:
    base = save_seq2seq(tmp_path / "base")
    settings = AdapterConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapter = new_adapter(settings, base)
    policy = Policy.from_pretrained(base, peft_config=adapter)
    assert policy.pretrained_model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    adapted = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert any(".encoder." in name for name in adapted)
    assert any("EncDecAttention" in name for name in adapted)
    assert any("wi_0" in name for name in adapted) == (targets == ["all-linear"])
    if targets != ["q"]:
        return
    folder = tmp_path / "saved"
    folder.mkdir()
    write_model(policy.eval(), make_seq2seq_tokenizer(), folder)
    again = Policy.from_pretrained(folder / "adapter").eval()
    whole = Policy.from_pretrained(folder).eval()
    ids = {"input_ids": QUERIES[0][None], "decoder_input_ids": QUERIES[2][None]}
    for model in (again, whole):
        torch.testing.assert_close(model(**ids)[0], policy(**ids)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match=r"SEQ_2_SEQ_LM.*not of a causal"):
        AutoModelForCausalLMWithValueHead.from_pretrained(folder / "adapter")


def test_an_adapter_of_virtual_tokens_is_sampled_by_generate() -> None:
    from peft import PromptTuningConfig

    config = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    policy = Policy.from_pretrained(make_seq2seq(), peft_config=config).eval()
    assert check_sampling(policy, 0) == "padded"


def test_lora_of_a_users_own_is_taken() -> None:
    config = LoraConfig(r=2, target_modules=["q"], task_type="SEQ_2_SEQ_LM")
    policy = Policy.from_pretrained(make_seq2seq(), peft_config=config)
    assert {n.split(".")[0] for n, p in policy.named_parameters() if p.requires_grad} == {
        "pretrained_model",
        "v_head",
    }
