"""The decode loop: greedy tokens as in transformers, others as frequent as the model says."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig

from ppo_cli.errors import NumericalError
from ppo_cli.kernels import kv_cache
from ppo_cli.kernels.cuda_graph import NotCapturable
from ppo_cli.models import decode_loop, sampling
from ppo_cli.models.capabilities import reads_packed, reads_static_cache
from ppo_cli.models.decode_loop import decode_cached, draw
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.models.sampling import sample_responses
from ppo_cli.models.transformers_generate import GenerateSettings, from_generation_kwargs
from tests.conftest import EOS, SMALL, VOCABULARY, make_gpt2, tried

pytestmark = pytest.mark.usefixtures("fast_paths")

WINDOW = {"num_key_value_heads": 1, "sliding_window": 4}
GEMMA = {**SMALL, **WINDOW, "head_dim": 8, "final_logit_softcapping": 2.0}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {}),
    "llama": ("Llama", SMALL),
    "gpt_neox": ("GPTNeoX", SMALL),
    "mistral, window": ("Mistral", {**SMALL, **WINDOW}),
    "gemma2, window, capped": ("Gemma2", GEMMA),
}
QUERIES = [
    torch.tensor(ids)
    for ids in ([5], [7, 8, 9, 10, 11, 12], [1, 2], [3, 30, 40], [60], [EOS, 4, 4, 9])
]
LIMITS = [7, 12, 1, 9, 15, 4]
END_IDS = set(range(0, VOCABULARY, 5))  # so that some rows end of themselves


@functools.cache
def make_policy(name: str = "gpt2") -> AutoModelForCausalLMWithValueHead:
    prefix, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    model: Any
    if prefix == "GPT2":
        model = make_gpt2(**settings)
    else:
        config = getattr(transformers, f"{prefix}Config")(**settings)
        model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    policy = AutoModelForCausalLMWithValueHead(model).eval()
    assert policy.allows(reads_packed)
    return tried(policy)


def sample(
    policy: Any,
    queries: list[Tensor],
    limits: list[int],
    batch_size: int | None = None,
    **kwargs: Any,
) -> list[list[int]]:
    """Responses by keywords of transformers' `generate`."""
    keywords = {"pad_token_id": 0, "eos_token_id": sorted(END_IDS), **kwargs}
    settings = from_generation_kwargs(**keywords)
    responses = sample_responses(policy, queries, limits, settings, batch_size=batch_size)
    return [response.tolist() for response in responses]


def left_padded(queries: list[Tensor]) -> tuple[Tensor, Tensor]:
    width = max(map(len, queries))
    rows = [torch.nn.functional.pad(query, (width - len(query), 0)) for query in queries]
    mask = [torch.arange(width) >= width - len(query) for query in queries]
    return torch.stack(rows), torch.stack(mask).long()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Batch sizes that went through the decode loop."""
    sizes: list[int] = []

    def spy(policy: Any, ids: Tensor, *args: Any) -> list[Tensor]:
        if args[3] is None:  # no callback: not in a model's self-check
            sizes.append(len(ids))
        return decode_cached(policy, ids, *args)

    monkeypatch.setattr(sampling, "decode_cached", spy)
    return sizes


# ---------------------------------------------------------------- the most probable tokens


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "settings", [{"top_k": 1}, {"temperature": 1e-4}, {"top_p": 1e-6}], ids=str
)
def test_with_one_choice_a_token_the_responses_are_those_of_transformers(
    name: str, settings: dict[str, Any], taken: list[int]
) -> None:
    policy = make_policy(name)
    ids, mask = left_padded(QUERIES)
    output = policy.pretrained_model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max(LIMITS),
        pad_token_id=0,
        eos_token_id=sorted(END_IDS),
    )
    expected = []
    for row, limit in zip(output[:, ids.shape[1] :].tolist(), LIMITS, strict=True):
        ends = [i + 1 for i, token in enumerate(row) if token in END_IDS]
        expected.append(row[: min([limit, *ends])])
    assert sample(policy, QUERIES, LIMITS, **settings) == expected
    assert taken == [len(QUERIES)]
    lengths = [len(response) for response in expected]
    assert any(a == b for a, b in zip(lengths, LIMITS, strict=True))
    assert any(a < b for a, b in zip(lengths, LIMITS, strict=True))


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_responses_of_many_lengths_are_those_of_each_query_alone(name: str) -> None:
    policy = make_policy(name)
    together = sample(policy, QUERIES, LIMITS, top_k=1)
    alone = [
        sample(policy, [query], [limit], top_k=1)[0]
        for query, limit in zip(QUERIES, LIMITS, strict=True)
    ]
    assert together == alone


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_the_next_tokens_logits_are_those_of_the_whole_model(name: str) -> None:
    """Capped ones included, which leave the most probable token the same."""
    policy = make_policy(name)
    ids, mask = left_padded(QUERIES)
    logits = policy.next_logits(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))
    for query, row in zip(QUERIES, logits, strict=True):
        alone = policy.pretrained_model(input_ids=query.unsqueeze(0)).logits[0, -1]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- chances


def chi_square(drawn: list[int], probabilities: Tensor) -> tuple[float, float]:
    """The statistic, and far above what a right sampler reaches: mean + 6 standard deviations."""
    expected = probabilities.double() * len(drawn)
    counts = torch.bincount(torch.tensor(drawn), minlength=len(expected)).double()
    assert (counts[expected == 0] == 0).all()
    there = expected > 0
    cells = int(there.sum())
    statistic = ((counts - expected)[there] ** 2 / expected[there]).sum().item()
    return statistic, cells - 1 + 6 * (2 * (cells - 1)) ** 0.5


def restricted(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """What the settings mean, token by token, most probable first."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(descending=True).tolist()
    if top_k:
        order = order[:top_k]
        p = torch.zeros_like(p).index_copy(0, torch.tensor(order), p[order]) / p[order].sum()
    kept, total = [], 0.0
    for token in order:
        if total >= top_p:
            break
        kept.append(token)
        total += p[token].item()
    return torch.zeros_like(p).index_copy(0, torch.tensor(kept), p[kept]) / p[kept].sum()


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 3},
    {"top_p": 0.6},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.8},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_tokens_are_as_frequent_as_the_settings_say(
    settings: dict[str, Any], taken: list[int]
) -> None:
    """First tokens, and second tokens after the most frequent first one."""
    policy = tried(
        AutoModelForCausalLMWithValueHead(make_gpt2(vocab_size=9, initializer_range=0.5))
    )
    query, repeats = torch.tensor([3, 1]), 4000
    torch.manual_seed(0)
    responses = sample(policy, [query] * repeats, [2] * repeats, eos_token_id=None, **settings)
    assert taken == [repeats]
    first = [response[0] for response in responses]
    common = max(set(first), key=first.count)
    second = [response[1] for response in responses if response[0] == common]
    for drawn, ids in ((first, query), (second, torch.cat([query, torch.tensor([common])]))):
        logits = policy(input_ids=ids.unsqueeze(0))[0][0, -1].detach()
        statistic, bound = chi_square(drawn, restricted(logits, **settings))
        assert statistic < bound
        if settings:
            other = restricted(logits, temperature=1.2)
            assert (other - restricted(logits, **settings)).abs().max() > 0.02


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_each_token_gets_its_share_of_evenly_spread_chances(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without chance, and so a hundred times sharper."""
    policy = tried(
        AutoModelForCausalLMWithValueHead(make_gpt2(vocab_size=9, initializer_range=0.5))
    )
    query, repeats = torch.tensor([3, 1]), 4000
    even = ((torch.arange(repeats) + 0.5) / repeats).unsqueeze(1)
    monkeypatch.setattr(decode_loop.torch, "rand", lambda *shape, **kwargs: even)
    responses = sample(policy, [query] * repeats, [1] * repeats, **settings)
    logits = policy(input_ids=query.unsqueeze(0))[0][0, -1].detach()
    counts = torch.bincount(torch.tensor(responses).flatten(), minlength=9)
    assert (counts - repeats * restricted(logits, **settings)).abs().max() < 1.5


def test_the_test_of_frequencies_would_notice_a_wrong_temperature() -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    drawn = draw(logits.expand(4000, 9) / 1.2, torch.rand(4000))[0].tolist()
    statistic, bound = chi_square(drawn, logits.softmax(-1))
    assert statistic > bound


def test_draw_inverts_the_distribution_at_each_uniform_number() -> None:
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(6, 3)
    chances = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 0.99])
    tokens, finite = draw(logits, chances)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    assert finite


JUST_UNDER_1 = 1 - 2**-24


@pytest.mark.parametrize("chance", [0.0, 2**-24, 0.5, JUST_UNDER_1])
@pytest.mark.parametrize("likely", [[0], [79], [3, 40], [0, 79], [0, 1, 78]])
def test_no_token_of_probability_zero_is_ever_drawn(chance: float, likely: list[int]) -> None:
    for low in (-torch.inf, -200.0):  # the second becomes zero by rounding
        logits = torch.full((1, VOCABULARY), low)
        logits[0, likely] = torch.linspace(1, 2, len(likely))
        token = draw(logits, torch.tensor([chance]))[0].item()
        assert token in likely
        if chance in (0.0, JUST_UNDER_1):
            assert token == (min(likely) if chance == 0 else max(likely))


def test_rare_tokens_of_a_large_vocabulary_keep_their_own_places() -> None:
    """After a common token, where sums in float32 would grow in jumps of thirty rare ones."""
    logits = torch.full((1, 50_001), -20.0, dtype=torch.float64)
    logits[0, 0] = 0.0
    common, rare = logits.softmax(-1)[0, :2]
    chances = common + rare * torch.arange(1000, 1100)
    tokens, _ = draw(logits.float().expand(100, -1), chances)
    assert (tokens.diff() == 1).all()
    assert (tokens - torch.arange(1001, 1101)).abs().max() < 50


@pytest.mark.parametrize("value", [torch.nan, torch.inf, None], ids=["nan", "inf", "all -inf"])
def test_probabilities_that_are_not_finite_are_reported(value: float | None) -> None:
    logits = torch.zeros(3, 8)
    logits[1] = -torch.inf
    if value is not None:
        logits[1, 4] = value
    tokens, finite = draw(logits, torch.rand(3))
    assert not finite
    assert all(0 <= token < 8 for token in tokens)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_policy_gone_wrong_is_an_error_not_a_sample(value: float, taken: list[int]) -> None:
    policy = tried(AutoModelForCausalLMWithValueHead(make_gpt2()).eval())
    assert policy.allows(reads_packed)
    with torch.no_grad():
        policy.pretrained_model.transformer.ln_f.bias[0] = value
    with pytest.raises(NumericalError, match=r"not finite any more.*ppo\.learning_rate"):
        sample(policy, QUERIES, LIMITS)
    assert taken == [len(QUERIES)]


# ---------------------------------------------------------------- rows that end


def with_uniforms(monkeypatch: pytest.MonkeyPatch, rows: list[int]) -> None:
    """Give the loop the numbers of these rows of one table, however many it draws."""
    table = torch.rand(len(QUERIES), 64, generator=torch.Generator().manual_seed(3))

    def rand(count: int, length: int, **kwargs: Any) -> Tensor:
        assert count == len(rows)
        return table[rows, :length]

    monkeypatch.setattr(decode_loop.torch, "rand", rand)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("rows", [[0], [3, 1], [5, 4, 2], [2, 2, 0, 1]], ids=str)
def test_a_response_does_not_depend_on_what_else_is_in_the_batch(
    name: str, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(name)
    with_uniforms(monkeypatch, list(range(len(QUERIES))))
    whole = sample(policy, QUERIES, LIMITS)
    with_uniforms(monkeypatch, rows)
    some = sample(policy, [QUERIES[i] for i in rows], [LIMITS[i] for i in rows])
    assert some == [whole[i] for i in rows]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dropping_ended_rows_changes_nothing_and_saves_their_work(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(name)
    sizes: list[int] = []
    next_logits = policy.next_logits

    def spy(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(len(ids))
        return next_logits(ids, *args, **kwargs)

    monkeypatch.setattr(policy, "next_logits", spy)
    with_uniforms(monkeypatch, list(range(len(QUERIES))))
    results, work = [], []
    for share in (2.0, 0.25, 0.0):  # never, as usual, at each step
        monkeypatch.setattr(decode_loop, "DROP_SHARE", share)
        sizes.clear()
        results.append(sample(policy, QUERIES, LIMITS))
        work.append(list(sizes))
    assert results[0] == results[1] == results[2]
    steps = max(map(len, results[0]))
    assert work[0] == [len(QUERIES)] * steps
    going = [sum(len(r) > step for r in results[0]) for step in range(steps)]
    assert work[2] == going
    assert len(set(going)) > 1
    assert all(a >= b > 0.75 * a for a, b in zip(work[1], going, strict=True))


def test_responses_come_back_in_order_each_up_to_its_limit_or_its_end() -> None:
    torch.manual_seed(1)
    limits = [1 + 7 * i % 11 for i in range(60)]
    responses = sample(make_policy(), [QUERIES[i % 6] for i in range(60)], limits)
    for response, limit in zip(responses, limits, strict=True):
        assert 1 <= len(response) <= limit
        assert not END_IDS & set(response[:-1])
        assert len(response) == limit or response[-1] in END_IDS
    endless = sample(make_policy(), [QUERIES[i % 6] for i in range(60)], limits, eos_token_id=None)
    assert [len(response) for response in endless] == limits
    assert any(END_IDS & set(response[:-1]) for response in endless)


def test_a_row_that_ended_does_not_leave_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """While too few have ended to be dropped, they are read along with the others."""
    policy = make_policy()
    context = policy.config.n_positions
    queries = [torch.arange(context - 4), *[torch.tensor([1, 2])] * 9]
    limits = [4, *[20] * 9]
    responses = sample(policy, queries, limits, eos_token_id=None)
    assert [len(response) for response in responses] == limits
    # transformers reads such rows on: they come in batches of their own.
    responses = sample(policy, queries, limits, eos_token_id=None, min_length=1)
    assert [len(response) for response in responses] == limits
    monkeypatch.setattr(decode_loop, "_is_worth_recording", lambda *_: True)
    monkeypatch.setattr(decode_loop, "GraphedStep", Repeated)
    responses = sample(policy, queries, limits, eos_token_id=None)
    assert [len(response) for response in responses] == limits


@pytest.mark.parametrize("min_length", [0, 1], ids=["our loop", "transformers"])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_batches_have_the_size_that_was_asked_for(
    size: int, min_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, padded = make_policy(), sampling._padded
    sampling._method(policy, GenerateSettings())  # both self-checks come first
    sizes: list[int] = []

    def spy(rows: list[Tensor], pad: int, **options: Any) -> Any:
        sizes.append(len(rows))
        return padded(rows, pad, **options)

    monkeypatch.setattr(sampling, "_padded", spy)
    sample(policy, QUERIES, LIMITS, batch_size=size, min_length=min_length)
    assert sizes == {1: [1] * 6, 4: [4, 2], 100: [6]}[size]


# ---------------------------------------------------------------- steps that are replayed


STILL = [name for name in ARCHITECTURES if "window" not in name]


class Repeated:
    """Takes the step of `GraphedStep` itself each time: without a GPU nothing can be recorded."""

    def __init__(self, step: Any, device: torch.device, *, proven: bool) -> None:
        self.step = step
        self.places: set[tuple[int, ...]] = set()

    def __call__(self) -> None:
        still = self.step
        tensors = [still._ids, still._positions, still._mask, still._slot, *vars_of(still)]
        self.places.add(tuple(tensor.data_ptr() for tensor in tensors))
        assert len(self.places) == 1  # a recorded step would not see tensors that are new
        self.step()


def vars_of(still: Any) -> list[Tensor]:
    """What else a step works on: what was drawn, and the cache."""
    drawn = [value for value in vars(still._begun.drawn).values() if isinstance(value, Tensor)]
    return drawn + [b for layer in still._begun.cache.layers for b in layer._buffers]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", STILL)
def test_steps_of_one_shape_draw_what_growing_ones_draw(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(name)
    assert policy.allows(reads_static_cache)
    with_uniforms(monkeypatch, list(range(len(QUERIES))))
    expected = sample(policy, QUERIES, LIMITS, **settings)
    monkeypatch.setattr(decode_loop, "_is_worth_recording", lambda *_: True)
    monkeypatch.setattr(decode_loop, "GraphedStep", Repeated)
    assert sample(policy, QUERIES, LIMITS, **settings) == expected


def test_what_lies_in_the_unwritten_part_of_the_cache_does_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, allocate = make_policy(), kv_cache._PreallocatedLayer._allocate
    with_uniforms(monkeypatch, list(range(len(QUERIES))))
    expected = sample(policy, QUERIES, LIMITS)

    def dirty(self: Any, like: Tensor, rows: int) -> Tensor:
        return allocate(self, like, rows).fill_(torch.nan)

    monkeypatch.setattr(kv_cache._PreallocatedLayer, "_allocate", dirty)
    monkeypatch.setattr(decode_loop, "_is_worth_recording", lambda *_: True)
    monkeypatch.setattr(decode_loop, "GraphedStep", Repeated)
    assert sample(policy, QUERIES, LIMITS) == expected


@pytest.mark.parametrize("at_once", [1, 3, 8, 50])
def test_replays_stop_once_all_rows_have_ended(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, taken = make_policy(), []

    class Counted(Repeated):
        def __call__(self) -> None:
            taken.append(1)
            super().__call__()

    with_uniforms(monkeypatch, list(range(len(QUERIES))))
    limits = [7, 50 - 9, 30, 12, 12, 12]
    expected = sample(policy, QUERIES, limits)
    needed = max(map(len, expected)) - 1  # after the first step
    assert needed < max(limits) - 1
    monkeypatch.setattr(decode_loop, "_is_worth_recording", lambda *_: True)
    monkeypatch.setattr(decode_loop, "GraphedStep", Counted)
    monkeypatch.setattr(decode_loop, "REPLAYS_AT_ONCE", at_once)
    assert sample(policy, QUERIES, limits) == expected
    assert needed <= len(taken) <= min(needed + at_once, max(limits) - 1)


def test_a_step_that_cannot_be_replayed_is_taken_anew_and_the_model_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempts = []

    class Refused:
        def __init__(self, step: Any, device: torch.device, *, proven: bool) -> None:
            assert not proven
            self.step = step

        def __call__(self) -> None:
            attempts.append(1)
            self.step()
            raise NotCapturable("it waits")

    policy = tried(AutoModelForCausalLMWithValueHead(make_gpt2()).eval())
    with_uniforms(monkeypatch, list(range(len(QUERIES))))
    expected = sample(policy, QUERIES, LIMITS)
    worth = decode_loop._is_worth_recording
    monkeypatch.setattr(
        decode_loop,
        "_is_worth_recording",
        lambda policy, longest: policy not in decode_loop._not_capturable,
    )
    monkeypatch.setattr(decode_loop, "GraphedStep", Refused)
    assert [sample(policy, QUERIES, LIMITS) for _ in range(2)] == [expected] * 2
    assert len(attempts) == 1
    assert not worth(policy, 100)
    assert policy in decode_loop._not_capturable


def test_a_model_is_watched_the_first_time_and_when_it_has_other_hooks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    class Known(Repeated):
        def __init__(self, step: Any, device: torch.device, *, proven: bool) -> None:
            seen.append(proven)
            super().__init__(step, device, proven=proven)

    policy = tried(AutoModelForCausalLMWithValueHead(make_gpt2()).eval())
    monkeypatch.setattr(decode_loop, "_is_worth_recording", lambda *_: True)
    monkeypatch.setattr(decode_loop, "GraphedStep", Known)
    for _ in range(3):
        sample(policy, QUERIES, LIMITS)
    policy.pretrained_model.transformer.h[1].register_forward_hook(lambda *_: None)
    for _ in range(2):
        sample(policy, QUERIES, LIMITS)
    assert seen == [False, True, True, False, True]


def test_nothing_is_recorded_on_a_cpu() -> None:
    assert not decode_loop._is_worth_recording(make_policy(), 100)


def test_a_row_takes_its_own_random_numbers_in_its_own_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Uniform probabilities: each token is its chance times the vocabulary."""
    policy = tried(AutoModelForCausalLMWithValueHead(make_gpt2()).eval())
    with torch.no_grad():
        policy.pretrained_model.transformer.ln_f.weight.zero_()
    with_uniforms(monkeypatch, list(range(6)))
    table = decode_loop.torch.rand(6, 15)
    responses = sample(policy, QUERIES, LIMITS, eos_token_id=None)
    expected = (table * VOCABULARY).long().tolist()
    assert responses == [row[:limit] for row, limit in zip(expected, LIMITS, strict=True)]


# ---------------------------------------------------------------- who decodes


@pytest.mark.parametrize(
    ("settings", "ours"),
    [
        ({}, True),
        ({"temperature": 0.7, "top_k": 5, "top_p": 0.9}, True),
        ({"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True}, True),
        ({"min_length": 0, "repetition_penalty": 1.0, "num_beams": 1, "use_cache": True}, True),
        ({"min_length": 3}, False),
        ({"min_new_tokens": 2}, False),
        ({"repetition_penalty": 1.3}, False),
        ({"num_beams": 2}, False),
        ({"do_sample": False}, False),
        ({"use_cache": False}, False),
        ({"top_k": None}, False),
        ({"min_p": 0.1}, False),
        ({"bad_words_ids": [[5]]}, False),
        ({"generation_config": GenerationConfig(do_sample=True)}, False),
        ({"stopping_criteria": [lambda ids, scores: torch.zeros(len(ids)).bool()]}, False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_what_the_loop_does_not_do_goes_through_transformers(
    settings: dict[str, Any], ours: bool, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy()
    sampling._method(policy, GenerateSettings())  # its self-check calls transformers, too
    asked: list[dict[str, Any]] = []
    generate = policy.generate

    def spy(**kwargs: Any) -> Any:
        asked.append(kwargs)
        return generate(**kwargs)

    monkeypatch.setattr(policy, "generate", spy)
    responses = sample(policy, QUERIES, LIMITS, **settings)
    assert [len(r) <= limit for r, limit in zip(responses, LIMITS, strict=True)] == [True] * 6
    assert (len(taken), len(asked)) == ((1, 0) if ours else (0, 1))
    if asked:
        passed = settings.keys() - {"generation_config", "stopping_criteria"}
        assert {key: asked[0][key] for key in passed} == {key: settings[key] for key in passed}


def test_models_without_a_value_head_or_without_positions_go_through_transformers(
    taken: list[int],
) -> None:
    config = transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2, initializer_range=0.3
    )
    bloom = AutoModelForCausalLMWithValueHead(transformers.BloomForCausalLM(config)).eval()
    for model in (make_gpt2(), bloom):
        assert all(sample(model, QUERIES, LIMITS))
    assert not taken
