"""What the probes say of each architecture; packed rows are right wherever they say yes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from ppo_cli.models.capabilities import (
    ends_in_output_layer,
    reads_block_mask,
    reads_packed,
    reads_static_cache,
)
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.ppo.forward import token_forward
from ppo_cli.ppo.packing import TokenBatch
from tests.conftest import SMALL, VOCABULARY, make_gpt2

pytestmark = pytest.mark.usefixtures("fast_paths")

GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
ALIBI = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
EAGER = {"attn_implementation": "eager"}
WINDOW = {"num_key_value_heads": 1, "sliding_window": 4}  # shorter than the sequences below
# Architecture, settings, reads_packed, ends_in_output_layer.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], bool, bool]] = {
    "gpt2": ("GPT2", {}, True, True),
    "gpt2, eager": ("GPT2", EAGER, True, True),
    "llama": ("Llama", SMALL, True, True),
    "llama, eager": ("Llama", {**SMALL, **EAGER}, True, True),
    "gpt_neox": ("GPTNeoX", SMALL, True, True),
    "mistral, window": ("Mistral", {**SMALL, **WINDOW}, True, True),
    "mistral, window, eager": ("Mistral", {**SMALL, **WINDOW, **EAGER}, True, True),
    "gemma2, window, capped": (
        "Gemma2",
        {**GROUPED, "sliding_window": 4, "final_logit_softcapping": 2.0},
        True,
        False,
    ),
    "granite, scaled": ("Granite", {**SMALL, "logits_scaling": 4.0}, True, False),
    "opt, learned positions": (
        "OPT",
        {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16},
        False,
        True,
    ),
    "bloom, alibi": ("Bloom", {**ALIBI, "hidden_size": 16}, False, True),
    "mamba, recurrent": (
        "Mamba",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 4,
            "initializer_range": 0.3,
        },
        False,
        True,
    ),
}
# No windows, and an attention that takes any mask.
MASKED = {"gpt2", "llama", "gpt_neox", "granite, scaled"}
PACKABLE = [name for name, (_, _, packed, _) in ARCHITECTURES.items() if packed]


@functools.cache
def make_model(name: str) -> Any:
    prefix, settings, _, _ = ARCHITECTURES[name]
    if prefix == "GPT2":
        return make_gpt2(**settings)
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**settings)
    return getattr(transformers, f"{prefix}ForCausalLM")(config).eval()


def ragged(count: int = 12, longest: int = 12) -> tuple[list[Tensor], list[Tensor]]:
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest + 1, (2, count), generator=g).tolist()
    return tuple(  # type: ignore[return-value]
        [torch.randint(0, VOCABULARY, (n,), generator=g) for n in row] for row in lengths
    )


@torch.no_grad()
def one_by_one(model: Any, queries: list[Tensor], responses: list[Tensor]) -> Tensor:
    """Log-probabilities of all response tokens, each sequence alone, by the whole model."""
    logprobs = []
    for query, response in zip(queries, responses, strict=True):
        ids = torch.cat([query, response]).unsqueeze(0)
        log_p = model(input_ids=ids, use_cache=False).logits[0, len(query) - 1 : -1].log_softmax(-1)
        logprobs.append(log_p.gather(1, response.unsqueeze(1)).squeeze(1))
    return torch.cat(logprobs)


def tokens_read(model: Any) -> TokenBatch:
    """The batch of `ragged`, with what was laid out to read it."""
    tokens = TokenBatch.from_lists(*ragged(), None, 0, torch.device("cpu"))
    with torch.no_grad():
        token_forward(AutoModelForCausalLMWithValueHead(model).eval(), tokens)
    return tokens


def in_a_batch(model: Any, queries: list[Tensor], responses: list[Tensor]) -> Tensor:
    tokens = TokenBatch.from_lists(queries, responses, None, 0, torch.device("cpu"))
    policy = AutoModelForCausalLMWithValueHead(model).eval()
    with torch.no_grad():
        return token_forward(policy, tokens).logprobs


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_probes_tell_architectures_apart(name: str) -> None:
    _, _, packed, plain = ARCHITECTURES[name]
    model = make_model(name)
    assert reads_packed(model) is packed
    assert ends_in_output_layer(model) is plain
    policy = AutoModelForCausalLMWithValueHead(model)
    assert tuple(map(policy.allows, (reads_packed, ends_in_output_layer))) == (packed, plain)
    assert policy.allows(reads_block_mask) is (name in MASKED)
    assert policy.allows(reads_static_cache) is (name in MASKED | {"opt, learned positions"})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_batch_gives_each_sequence_the_log_probabilities_it_has_alone(name: str) -> None:
    model = make_model(name)
    queries, responses = ragged()
    expected = one_by_one(model, queries, responses)
    actual = in_a_batch(model, queries, responses)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_rows_were_really_packed(name: str) -> None:
    """Guards the test above: its batch goes through packed rows, in which a leak would show."""
    model = make_model(name)
    tokens = TokenBatch.from_lists(*ragged(), None, 0, torch.device("cpu"))
    inputs, positions = tokens.packed
    assert len(inputs["input_ids"]) < len(tokens)
    assert ("packed_mask" in vars(tokens_read(model))) is (name in MASKED)
    leaking = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    policy = AutoModelForCausalLMWithValueHead(model).eval()
    with torch.no_grad():
        wrong = policy(**leaking, positions=positions, targets=tokens.flat_targets)[0]
    assert (wrong - one_by_one(model, *ragged())).abs().max() > 0.1


def test_sequences_longer_than_a_sliding_window_are_read_as_alone() -> None:
    model = make_model("mistral, window")
    queries, responses = ragged(count=6, longest=23)
    assert min(len(q) + len(r) for q, r in zip(queries, responses, strict=True)) > 4
    expected = one_by_one(model, queries, responses)
    actual = in_a_batch(model, queries, responses)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    model.config.sliding_window, window = 40, model.config.sliding_window
    try:
        assert (one_by_one(model, queries, responses) - expected).abs().max() > 0.1
    finally:
        model.config.sliding_window = window


class Leak:
    """The last hidden states of a model, with a little of the tokens before mixed in."""

    def __init__(self, share: float, back: int, only_packed: bool = True) -> None:
        self.share, self.back, self.only_packed = share, back, only_packed

    def __call__(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if self.only_packed and kwargs.get("position_ids") is None:
            return output
        hidden = output.last_hidden_state
        earlier = torch.nn.functional.pad(hidden, (0, 0, self.back, 0))[:, : hidden.shape[1]]
        output.last_hidden_state = hidden + self.share * earlier
        return output


@pytest.mark.parametrize("back", [1, 3])
@pytest.mark.parametrize("share", [1e-2, 1e-5])
def test_a_model_that_leaks_from_one_sequence_into_the_next_is_found_out(
    share: float, back: int
) -> None:
    assert reads_packed(make_gpt2())
    model = make_gpt2()
    model.base_model.register_forward_hook(Leak(share, back), with_kwargs=True)
    assert not reads_packed(model)


def test_packed_rows_that_are_not_read_as_alone_are_noticed() -> None:
    """Nothing leaks, but the output is not that of each sequence alone."""
    model = make_gpt2()
    model.base_model.register_forward_hook(Leak(0.01, 0), with_kwargs=True)
    assert not reads_packed(model)


def test_a_model_that_ignores_its_positions_is_found_out() -> None:
    model = make_gpt2()

    def drop(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "position_ids": None}

    model.base_model.register_forward_pre_hook(drop, with_kwargs=True)
    assert not reads_packed(model)


def test_a_model_that_takes_no_positions_reads_no_packed_rows() -> None:
    model = make_gpt2()

    def refuse(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if "position_ids" in kwargs:
            raise TypeError("unexpected keyword argument 'position_ids'")

    model.base_model.register_forward_pre_hook(refuse, with_kwargs=True)
    assert not reads_packed(model)


def test_logits_changed_after_the_output_embeddings_are_not_projected_plainly() -> None:
    model = make_gpt2()

    def double(module: Any, args: Any, output: Any) -> Any:
        output.logits = 2 * output.logits
        return output

    model.register_forward_hook(double)
    assert not ends_in_output_layer(model)
    queries, responses = ragged()
    torch.testing.assert_close(
        in_a_batch(model, queries, responses),
        one_by_one(model, queries, responses),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_capability_is_checked_once_without_gradients_or_a_change_of_mode() -> None:
    model = make_gpt2(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5).train()
    model.transformer.drop.eval()
    modes = [module.training for module in model.modules()]
    calls: list[bool] = []
    model.base_model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert reads_packed(model) and ends_in_output_layer(model)
        asked = len(calls)
        assert reads_packed(model) and ends_in_output_layer(model)
    assert len(calls) == asked
    assert not any(calls)
    assert [module.training for module in model.modules()] == modes
    assert reads_packed(make_gpt2().bfloat16())
