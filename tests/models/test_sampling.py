"""Batched sampling: responses follow the model's own distribution in any batch."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from torch import Tensor
from transformers import GenerationConfig

from ppo_cli.errors import UsageError
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.models.sampling import sample_responses, to_texts
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.models.transformers_generate import GenerateSettings, from_generation_kwargs
from tests.conftest import (
    EOS,
    SMALL,
    VOCABULARY,
    make_gpt2,
    make_policy,
    make_tokenizer,
    make_trainer,
)

QUERIES = [torch.tensor(ids) for ids in ([5], [7, 8, 9, 10, 11], [1, 2], [3, 30, 40], [60])]


def make_model(name: str) -> Any:
    if name == "GPT2":
        return make_gpt2()
    torch.manual_seed(0)
    extra = {"ffn_dim": 24, "word_embed_proj_dim": 16} if name == "OPT" else {}
    config = getattr(transformers, f"{name}Config")(**SMALL, **extra)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


ENDS_AT_0 = SamplingParams(stop_token_ids=(0,), pad_token_id=0)


def sample(
    model: Any,
    queries: list[Tensor],
    limits: list[int],
    batch_size: int | None = None,
    **kwargs: Any,
) -> list[Tensor]:
    """Responses by keywords of transformers' `generate`."""
    settings = from_generation_kwargs(**{"pad_token_id": EOS, "eos_token_id": EOS, **kwargs})
    return sample_responses(model, queries, limits, settings, batch_size=batch_size)


@torch.no_grad()
def greedy_by_hand(model: Any, query: Tensor, limit: int, eos: int | None = EOS) -> list[int]:
    """One query, no padding, no cache, the most likely token each time."""
    ids = query.tolist()
    for _ in range(limit):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(query) :]


# ---------------------------------------------------------------- lengths


@pytest.mark.usefixtures("both_ways")
def test_each_response_ends_at_its_own_limit() -> None:
    limits = [3, 9, 1, 6, 2]
    responses = sample(make_gpt2(), QUERIES, limits, eos_token_id=None)
    assert [len(response) for response in responses] == limits
    assert all(response.dim() == 1 for response in responses)
    assert all(response.dtype == torch.long for response in responses)


def test_a_shorter_limit_gives_the_start_of_the_longer_response() -> None:
    model = make_gpt2()
    longer = sample(model, QUERIES, [9] * 5, do_sample=False)
    shorter = sample(model, QUERIES, [2, 9, 4, 1, 3], do_sample=False)
    for a, b, limit in zip(longer, shorter, (2, 9, 4, 1, 3), strict=True):
        assert b.tolist() == a[:limit].tolist()


def test_stopping_criteria_of_the_users_own_work_beside_the_limits() -> None:
    def at_three_tokens(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 5 + 3)

    responses = sample(
        make_gpt2(),
        QUERIES,
        [9, 9, 2, 9, 9],
        eos_token_id=None,
        stopping_criteria=[at_three_tokens],
    )
    assert [len(response) for response in responses] == [3, 3, 2, 3, 3]


# ---------------------------------------------------------------- batching and padding


@pytest.mark.parametrize("name", ["GPT2", "Llama", "GPTNeoX", "OPT"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_padded_batch_gives_each_query_what_it_gets_alone(
    name: str, batch_size: int | None
) -> None:
    model = make_model(name)
    responses = sample(model, QUERIES, [6] * 5, do_sample=False, batch_size=batch_size)
    for query, response in zip(QUERIES, responses, strict=True):
        assert response.tolist() == greedy_by_hand(model, query, 6)


@pytest.mark.parametrize("pad", [0, 5, EOS, None])
def test_the_pad_token_does_not_matter(pad: int | None) -> None:
    model = make_gpt2()
    responses = sample(model, QUERIES, [6] * 5, do_sample=False, pad_token_id=pad)
    for query, response in zip(QUERIES, responses, strict=True):
        assert response.tolist() == greedy_by_hand(model, query, 6)


def chi_square_bound(cells: int) -> float:
    """Far above what the statistic of a right sampler reaches: mean + 6 standard deviations."""
    return cells - 1 + 6 * (2 * (cells - 1)) ** 0.5


@torch.no_grad()
def exact_pairs(model: Any, query: Tensor, vocabulary: int) -> dict[tuple[int, ...], float]:
    """Probability of each response of at most two tokens that ends at token 0."""
    first = model(input_ids=query.unsqueeze(0)).logits[0, -1].double().softmax(-1)
    exact: dict[tuple[int, ...], float] = {(0,): first[0].item()}
    for a, b in itertools.product(range(1, vocabulary), range(vocabulary)):
        longer = torch.cat([query, torch.tensor([a])]).unsqueeze(0)
        second = model(input_ids=longer).logits[0, -1].double().softmax(-1)
        exact[a, b] = (first[a] * second[b]).item()
    assert sum(exact.values()) == pytest.approx(1)
    return exact


def test_samples_of_a_padded_batch_are_as_frequent_as_the_model_says() -> None:
    vocabulary, repeats = 5, 3000
    model = make_gpt2(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, initializer_range=0.5)
    queries = [torch.tensor(ids) for ids in ([3], [1, 2, 4, 4, 2], [2, 0, 1])]
    torch.manual_seed(0)
    responses = sample_responses(
        model,
        [query for query in queries for _ in range(repeats)],
        [2] * (3 * repeats),
        ENDS_AT_0,
    )
    for i, query in enumerate(queries):
        drawn = [tuple(r.tolist()) for r in responses[i * repeats : (i + 1) * repeats]]
        exact = exact_pairs(model, query, vocabulary)
        assert set(drawn) <= set(exact)
        statistic = sum(
            (drawn.count(pair) - repeats * p) ** 2 / (repeats * p) for pair, p in exact.items()
        )
        assert statistic < chi_square_bound(len(exact))


def test_the_test_of_frequencies_would_notice_a_wrong_temperature() -> None:
    """The bound above is not so wide that anything passes."""
    vocabulary, repeats = 5, 3000
    model = make_gpt2(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, initializer_range=0.5)
    query = torch.tensor([3])
    warm = dataclasses.replace(ENDS_AT_0, temperature=1.3)
    responses = sample_responses(model, [query] * repeats, [2] * repeats, warm)
    drawn = [tuple(r.tolist()) for r in responses]
    exact = exact_pairs(model, query, vocabulary)
    statistic = sum((drawn.count(k) - repeats * p) ** 2 / (repeats * p) for k, p in exact.items())
    assert statistic > chi_square_bound(len(exact))


# ---------------------------------------------------------------- the end of text


def always(token: int) -> Any:
    """A GPT-2 that nearly always writes `token`, after any text."""
    model = make_gpt2(tie_word_embeddings=False)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 5
    return model


@pytest.mark.usefixtures("both_ways")
def test_the_end_of_text_token_ends_a_response_and_is_part_of_it() -> None:
    responses = sample(always(EOS), QUERIES, [6] * 5)
    assert [response.tolist() for response in responses] == [[EOS]] * 5
    responses = sample(always(4), QUERIES, [3] * 5)
    assert [response.tolist() for response in responses] == [[4, 4, 4]] * 5


@pytest.mark.usefixtures("both_ways")
def test_any_of_several_end_tokens_ends_a_response_and_without_one_none_does() -> None:
    assert sample(always(4), QUERIES[:1], [6], eos_token_id=[9, 4])[0].tolist() == [4]
    assert sample(always(EOS), QUERIES[:1], [4], eos_token_id=None)[0].tolist() == [EOS] * 4


def test_an_end_token_in_the_query_does_not_end_anything() -> None:
    model = make_gpt2()
    queries = [torch.tensor([EOS, 3, EOS]), torch.tensor([EOS]), torch.tensor([1, 2, 3, 4, EOS])]
    responses = sample(model, queries, [5] * 3, do_sample=False)
    for query, response in zip(queries, responses, strict=True):
        assert response.tolist() == greedy_by_hand(model, query, 5)


def test_rows_that_have_ended_do_not_touch_those_that_go_on() -> None:
    """Random samples end at different places; none has anything after its end."""
    model = make_gpt2(vocab_size=4, bos_token_id=0, eos_token_id=0, initializer_range=0.05)
    torch.manual_seed(0)
    responses = sample_responses(model, [torch.tensor([1])] * 200, [10] * 200, ENDS_AT_0)
    lengths = {len(response) for response in responses}
    assert len(lengths) > 5
    for response in responses:
        assert 0 not in response[:-1].tolist()
        assert response[-1] == 0 or len(response) == 10


# ---------------------------------------------------------------- settings


def skewed(model: Any) -> Any:
    """Give a model a generation_config that changes its distribution in many ways."""
    model.generation_config.update(
        do_sample=False,
        top_k=1,
        repetition_penalty=5.0,
        temperature=0.1,
        no_repeat_ngram_size=1,
        num_beams=2,
        max_length=8,
        min_length=7,
        suppress_tokens=[1, 2, 3],
        bad_words_ids=[[5]],
    )
    return model


@pytest.mark.usefixtures("both_ways")
def test_the_models_own_generation_config_changes_nothing_and_is_left_as_it_was() -> None:
    plain, model = make_gpt2(), skewed(make_gpt2())
    before = model.generation_config.to_dict()
    for arguments in ({}, {"do_sample": False}):
        torch.manual_seed(1)
        expected = sample(plain, QUERIES, [9] * 5, **arguments)
        torch.manual_seed(1)
        actual = sample(model, QUERIES, [9] * 5, **arguments)
        assert [r.tolist() for r in actual] == [r.tolist() for r in expected]
    assert model.generation_config.to_dict() == before


def test_the_same_holds_for_a_policy_with_and_without_an_adapter() -> None:
    adapter = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    for settings in ({}, {"peft_config": adapter}):
        expected = sample(make_gpt2(), QUERIES, [9] * 5, do_sample=False)
        base = skewed(make_gpt2())
        before = base.generation_config.to_dict()
        policy = AutoModelForCausalLMWithValueHead.from_pretrained(base, **settings)
        actual = sample(policy, QUERIES, [9] * 5, do_sample=False)
        assert [r.tolist() for r in actual] == [r.tolist() for r in expected]
        assert policy.generation_config.to_dict() == before
        assert base.generation_config.to_dict() == before


def test_stop_strings_end_each_response_by_itself() -> None:
    model, tokenizer = make_gpt2(), make_tokenizer()
    free = [greedy_by_hand(model, query, 8) for query in QUERIES]
    stop = tokenizer.decode(free[1][2:4])  # two tokens
    assert stop not in tokenizer.decode(free[0])
    kwargs = {"do_sample": False, "stop_strings": stop, "tokenizer": tokenizer}
    found = sample(model, QUERIES, [8] * 5, batch_size=2, **kwargs)
    assert found[1].tolist() == free[1][:4]  # the padding after it, which is its end token, is not
    assert found[0].tolist() == free[0]
    in_query = sample(model, QUERIES, [8] * 5, **kwargs | {"stop_strings": ["t8 t9"]})
    assert in_query[1].tolist() == free[1]
    widths: list[int] = []

    def record(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        widths.append(ids.shape[1])
        return torch.zeros(len(ids), dtype=torch.bool)

    sample(model, QUERIES[1:2], [8], **kwargs, stopping_criteria=[record])
    assert max(widths) == 5 + 4  # it is not sampled further
    config = GenerationConfig(do_sample=False, stop_strings=[stop])
    same = sample(model, QUERIES, [8] * 5, generation_config=config, tokenizer=tokenizer)
    assert [row.tolist() for row in same] == [row.tolist() for row in found]
    with pytest.raises(UsageError, match="stop_strings needs the tokenizer"):
        sample(model, QUERIES, [8] * 5, stop_strings=["t1"])
    with pytest.raises(UsageError, match="'' is in every text"):
        sample(model, QUERIES, [8] * 5, stop_strings=[""], tokenizer=tokenizer)


def test_a_generation_config_that_is_passed_is_used_and_keywords_change_it() -> None:
    model = make_gpt2()
    greedy = [greedy_by_hand(model, query, 6) for query in QUERIES]
    only_best = GenerationConfig(do_sample=True, top_k=1)
    torch.manual_seed(0)
    used = sample(model, QUERIES, [6] * 5, generation_config=only_best)
    assert [r.tolist() for r in used] == greedy
    changed = sample(model, QUERIES, [6] * 5, generation_config=only_best, top_k=0)
    assert [r.tolist() for r in changed] != greedy


EVERY = list(range(VOCABULARY))


@pytest.mark.parametrize(
    ("config", "keywords", "lengths"),
    [
        ({"max_new_tokens": 3}, {}, [3] * 5),
        ({"max_new_tokens": 3}, {"max_new_tokens": 5}, [5] * 5),
        ({"max_length": 9}, {}, [9 - len(query) for query in QUERIES]),
        ({"max_length": 9}, {"max_new_tokens": 2}, [2] * 5),
        ({"max_new_tokens": 3}, {"max_length": 9}, [9 - len(query) for query in QUERIES]),
        ({"max_new_tokens": 3}, {"length_sampler": lambda: 4.0}, [4] * 5),
        ({"eos_token_id": EVERY, "max_new_tokens": 3}, {}, [1] * 5),
        ({"eos_token_id": EVERY, "max_new_tokens": 3}, {"eos_token_id": -1}, [3] * 5),
        ({}, {}, [6] * 5),
    ],
)
def test_a_generation_config_sets_ends_and_lengths_and_nothing_else(
    config: dict[str, Any], keywords: dict[str, Any], lengths: list[int]
) -> None:
    policy = make_policy()
    policy.generation_config.update(max_new_tokens=6, do_sample=False, top_k=1)
    trainer, uniforms = make_trainer(policy), torch.rand(5, 9)

    def sampled(**settings: Any) -> list[list[int]]:
        rest = {"eos_token_id": -1, **settings, **keywords}
        if "generation_config" in settings and "eos_token_id" in config:
            rest = {**settings, **keywords}
        found = trainer.generate(
            QUERIES, batch_size=5, return_prompt=False, uniforms=uniforms, **rest
        )
        return [row.tolist() for row in found]

    found = sampled(generation_config=GenerationConfig(**config))
    assert [len(row) for row in found] == lengths
    longest = sampled(max_new_tokens=max(lengths))
    assert found == [row[:n] for row, n in zip(longest, lengths, strict=True)], "pure as without"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of 1 or more, got 0"),
        ({"max_new_tokens": -1}, "got -1"),
        ({"max_new_tokens": 2.5}, "got 2.5"),
        ({"max_length": 0}, "max_length must be"),
        ({"length_sampler": lambda: 0}, "what length_sampler returns must be"),
        ({"generation_config": {"max_new_tokens": 3}}, "must be a GenerationConfig, got dict"),
        ({"return_dict_in_generate": True}, "call the model's own generate"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask: queries are padded and masked"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_trainer().generate(QUERIES, **settings)


def test_an_error_while_sampling_leaves_mode_and_generation_config_as_they_were() -> None:
    model = make_gpt2(resid_pdrop=0.5).train()
    before = model.generation_config

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, QUERIES, [4] * 5, stopping_criteria=[fail])
    assert model.training
    assert model.generation_config is before


@pytest.mark.usefixtures("both_ways")
def test_dropout_is_off_while_sampling_and_every_module_is_as_before_afterwards() -> None:
    model = make_gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = [greedy_by_hand(model, query, 6) for query in QUERIES]
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    for _ in range(2):
        responses = sample(model, QUERIES, [6] * 5, do_sample=False)
        assert [response.tolist() for response in responses] == expected
        assert [module.training for module in model.modules()] == modes


def test_sampling_takes_no_gradients_and_ends_differ_with_torchs_seed() -> None:
    model = make_gpt2()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append([r.tolist() for r in sample(model, QUERIES, [9] * 5)])
    assert draws[0] == draws[1] != draws[2]
    assert not any(r.requires_grad for r in sample(model, QUERIES, [2] * 5))


def test_the_keywords_of_the_classic_tutorial_are_taken() -> None:
    torch.manual_seed(3)
    pure = sample(make_gpt2(), QUERIES, [9] * 5)
    torch.manual_seed(3)
    tutorial = sample(
        make_gpt2(), QUERIES, [9] * 5, min_length=-1, top_k=0.0, top_p=1.0, do_sample=True
    )
    assert [r.tolist() for r in tutorial] == [r.tolist() for r in pure]


@pytest.mark.usefixtures("both_ways")
def test_sampling_settings_that_are_passed_have_their_effect() -> None:
    model = make_gpt2()
    torch.manual_seed(0)
    cold = sample(model, QUERIES, [6] * 5, temperature=1e-4)
    assert [r.tolist() for r in cold] == [greedy_by_hand(model, query, 6) for query in QUERIES]
    best = sample(model, QUERIES, [6] * 5, top_k=1)
    assert [r.tolist() for r in best] == [r.tolist() for r in cold]


PARAMS = SamplingParams(temperature=0.5, top_k=7, top_p=0.9, stop_token_ids=(3, 5), pad_token_id=2)


def test_sampling_params_and_keywords_of_generate_say_the_same() -> None:
    assert from_generation_kwargs(**PARAMS.generation_kwargs()) == PARAMS
    for name in ("temperature", "top_k", "top_p"):
        changed = dataclasses.replace(PARAMS, **{name: getattr(SamplingParams(), name)})
        assert from_generation_kwargs(**changed.generation_kwargs()) == changed
        assert GenerateSettings.of(changed).kwargs[name] == getattr(SamplingParams(), name)
    for ends in (3, [3], torch.tensor(3), torch.tensor([3])):
        assert from_generation_kwargs(eos_token_id=ends, pad_token_id=None) == SamplingParams(
            stop_token_ids=(3,)
        )
    with pytest.raises(TypeError, match="num_beams"):
        SamplingParams(num_beams=2)  # type: ignore[call-arg]


# ---------------------------------------------------------------- refusals


def test_a_query_that_does_not_fit_with_its_response_is_refused_by_number() -> None:
    model = make_gpt2()  # a context of 48
    queries = [torch.tensor([1]), torch.arange(40)]
    with pytest.raises(UsageError, match=r"query 1 has 40 tokens; with 9 new .* context of 48"):
        sample(model, queries, [9, 9])
    assert len(sample(model, queries, [9, 8], eos_token_id=None)[1]) == 8


@pytest.mark.parametrize("name", ["Llama", "GPTNeoX", "OPT"])
def test_a_query_may_fill_the_context_of_other_architectures_but_not_exceed_it(name: str) -> None:
    model = make_model(name)
    assert len(sample(model, [torch.arange(46)], [2], eos_token_id=None)[0]) == 2
    with pytest.raises(UsageError, match="context of 48"):
        sample(model, [torch.arange(46)], [3])


def test_an_empty_query_is_refused_by_number() -> None:
    queries = [torch.tensor([1]), torch.tensor([], dtype=torch.long)]
    with pytest.raises(UsageError, match="query 1 has no tokens"):
        sample(make_gpt2(), queries, [4, 4])


def test_several_sequences_a_query_are_refused() -> None:
    with pytest.raises(UsageError, match="num_return_sequences"):
        sample(make_gpt2(), QUERIES, [4] * 5, num_return_sequences=2)


def test_no_queries_give_no_responses() -> None:
    assert sample(make_gpt2(), [], []) == []


# ---------------------------------------------------------------- texts


def test_a_rollout_holds_queries_responses_and_their_texts_without_special_tokens() -> None:
    tokenizer, queries = make_tokenizer(pad=0), QUERIES[:2]
    rollout = to_texts(tokenizer, queries, sample(always(EOS), queries, [3, 3]))
    assert [q.tolist() for q in rollout.queries] == [q.tolist() for q in QUERIES[:2]]
    assert [r.tolist() for r in rollout.responses] == [[EOS], [EOS]]
    assert rollout.texts == ["t5", "t7 t8 t9 t10 t11"]
    assert rollout.response_texts == ["", ""]
    rollout = to_texts(tokenizer, queries, sample(always(4), queries, [3, 1]))
    assert rollout.texts == ["t5 t4 t4 t4", "t7 t8 t9 t10 t11 t4"]
    assert rollout.response_texts == [" t4 t4 t4", " t4"]  # what they add to their queries
