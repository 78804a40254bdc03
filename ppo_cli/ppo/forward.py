"""A model with a value head over a `TokenBatch`: outputs at the response tokens that count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_cli.models.capabilities import rope_switch
from ppo_cli.models.encoder_decoder import decoder_start
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.models.self_check import refuse_noise, settle_reading
from ppo_cli.ppo.packing import TokenBatch


class TokenOutputs(NamedTuple):
    """A policy's outputs for N response tokens, float32, (N,) each, or (B, R) as grids."""

    logprobs: Tensor
    entropies: Tensor
    values: Tensor


def token_forward(model: Any, tokens: TokenBatch, temperature: float = 1.0) -> TokenOutputs:
    """Outputs (N,) of a model with a value head at the N positions that count.

    Raises:
        UsageError, ModelError: as in `check_reading`.
    """
    check_reading(model)
    return _token_forward(model, tokens, temperature)


def token_logits(model: Any, tokens: TokenBatch, temperature: float = 1.0) -> Tensor:
    """Logits (N, V), float32, of a model with a value head at the N positions that count."""
    return logits_and_values(model, tokens, temperature)[0]


def logits_and_values(
    model: Any, tokens: TokenBatch, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Logits (N, V) and values (N,), float32, at the N positions that count.

    Raises:
        UsageError, ModelError: as in `check_reading`.
    """
    check_reading(model)

    def run(part: TokenBatch) -> tuple[Tensor, ...]:
        inputs, positions = _inputs(model, part)
        logits, _, values = model(**inputs, positions=positions, temperature=temperature)
        return logits.float(), values.float()

    logits, values = _in_groups(model, tokens, run)
    return logits, values


def check_reading(model: Any) -> None:
    """Choose the layout of rows for a model with a value head by a trial, unless that is done.

    Raises:
        UsageError: the model is not causal: its outputs depend on later tokens.
        ModelError: outputs of several sequences together differ from those of each alone.
    """
    inner = _unwrapped(model)
    settle_reading(inner, _reader(inner))


def check_noise(model: Any) -> None:
    """Check that a model in its present modes has the outputs of eval mode, unless that is done.

    Raises:
        ModelError: the outputs differ.
    """
    inner = _unwrapped(model)
    refuse_noise(inner, _reader(inner))


def _reader(policy: Any) -> Callable[[Sequence[Tensor], Sequence[Tensor]], TokenOutputs]:
    """A function from queries and responses to `policy`'s outputs for the response tokens."""
    # accelerate puts autocast around the forward of the object itself.
    forward = partial(type(policy).forward, policy)

    def read(queries: Sequence[Tensor], responses: Sequence[Tensor]) -> TokenOutputs:
        start, device = decoder_start(policy), queries[0].device
        tokens = TokenBatch.from_lists(queries, responses, None, 0, device, start)
        return _token_forward(policy, tokens, 1.0, forward)

    return read


def _token_forward(
    model: Any,
    tokens: TokenBatch,
    temperature: float,
    forward: Callable[..., tuple[Tensor, ...]] | None = None,
) -> TokenOutputs:
    forward = forward or model

    def run(part: TokenBatch) -> tuple[Tensor, ...]:
        inputs, positions = _inputs(model, part)
        targets = part.flat_targets
        outputs = forward(**inputs, positions=positions, targets=targets, temperature=temperature)
        return tuple(output.float() for output in outputs)

    return TokenOutputs(*_in_groups(model, tokens, run))


def _in_groups(
    model: Any, tokens: TokenBatch, run: Callable[[TokenBatch], tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Outputs of `run` for all tokens, in as few forwards as the model allows."""
    inner = _unwrapped(model)
    switch, equal = rope_switch(inner.config), inner.reading().rows == "equal"
    if not equal and switch is None:
        return run(tokens)
    groups = tokens.length_groups(switch, equal=equal)
    if len(groups) == 1:
        return run(tokens)
    places = torch.cat([tokens.flat_places(group) for group in groups])
    parts = [torch.cat(part) for part in zip(*(run(tokens.select(g)) for g in groups), strict=True)]
    return tuple(torch.empty_like(part).index_copy(0, places, part) for part in parts)


def _inputs(model: Any, tokens: TokenBatch) -> tuple[dict[str, Tensor], Tensor]:
    """Rows in the model's layout, and the flat positions in them whose outputs are used."""
    reading = _unwrapped(model).reading()
    if reading.rows != "packed":
        return tokens.padded
    inputs, positions = tokens.packed
    if reading.masked:
        inputs = {**inputs, "attention_mask": tokens.packed_mask}
    return inputs, positions


def _unwrapped(model: Any) -> AutoModelForCausalLMWithValueHead:
    """The policy without the wrapper that accelerate may have put around it."""
    inner: AutoModelForCausalLMWithValueHead = getattr(model, "module", model)
    return inner
