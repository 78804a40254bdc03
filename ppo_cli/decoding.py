"""The decode loop behind sampling: a cache allocated once, ended rows dropped, one draw a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from ppo_cli.errors import NumericalError
from ppo_cli.policy import AutoModelForCausalLMWithValueHead

DROP_SHARE = 0.25  # of the rows have ended: worth copying the cache without them


@torch.no_grad()
def decode_responses(
    policy: AutoModelForCausalLMWithValueHead,
    input_ids: Tensor,
    attention_mask: Tensor,
    limits: Sequence[int],
    end_ids: set[int],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[Tensor]:
    """Sample a response to each query. The policy must `reads_packed`: know position ids.

    Each row has random numbers of its own, drawn before the first token, so that a response does
    not depend on when others end.

    Args:
        policy: in eval mode.
        input_ids: (B, T) queries, padded on the left.
        attention_mask: (B, T).
        limits: B numbers of new tokens at most.
        end_ids: tokens that end a response.
        temperature: divides the logits.
        top_k: draw among so many most probable tokens; 0 for all.
        top_p: draw among the most probable tokens that together have this probability.

    Returns:
        B tensors of token ids, 1-D, each with its end token if one was drawn.

    Raises:
        NumericalError: a probability is not finite.
    """
    device, longest = input_ids.device, max(limits)
    warp = _warpers(temperature, top_k, top_p)
    chances = torch.rand(len(limits), longest, device=device)
    remaining = torch.tensor(limits, device=device)
    ends = torch.tensor(sorted(end_ids), device=device)
    responses = input_ids.new_zeros(len(limits), longest)
    lengths = torch.zeros_like(remaining)

    cache = _cache(policy.config, input_ids.shape[1] + longest)
    mask = torch.nn.functional.pad(attention_mask, (0, longest), value=1)
    rows = torch.arange(len(limits), device=device)  # which sequence each row of the cache is
    going = torch.ones_like(rows, dtype=torch.bool)
    ids, positions = input_ids, (attention_mask.cumsum(1) - 1).clamp(min=0)
    projection = policy.ready_projection(rows=len(limits), times=longest)
    for step in range(longest):
        seen = mask[:, : input_ids.shape[1] + step]
        logits = policy.next_logits(ids, seen, positions, projection, past_key_values=cache)
        tokens = draw(warp(ids, logits), chances[rows, step])
        responses[rows, step] = tokens
        lengths[rows] += going
        going = going & (lengths[rows] < remaining[rows]) & ~torch.isin(tokens, ends)
        left = int(going.sum())
        if not left:
            break
        ids, positions = tokens.unsqueeze(1), positions[:, -1:] + 1
        if left <= (1 - DROP_SHARE) * len(rows):
            kept = going.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            rows, going, ids, positions, mask = (
                tensor[kept] for tensor in (rows, going, ids, positions, mask)
            )
    return [row[:length] for row, length in zip(responses, lengths.tolist(), strict=True)]


def draw(logits: Tensor, chances: Tensor) -> Tensor:
    """One token (B,) a row of logits (B, V), by inverting the distribution at `chances` (B,).

    Source: Devroye 1986, "Non-Uniform Random Variate Generation", III.2, sequential search.
    The sums are float64, where there is such a type: 50,000 float32 terms would lose rare tokens.

    Raises:
        NumericalError: a probability is not finite.
    """
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    sums = logits.float().softmax(-1).cumsum(-1, dtype=exact)
    total = sums[:, -1:]
    if not total.isfinite().all():
        raise NumericalError(
            "the policy's probabilities are not finite any more: its last update went too far. "
            "Lower ppo.learning_rate or set ppo.max_grad_norm"
        )
    places = torch.searchsorted(sums, chances.unsqueeze(1).to(exact) * total, right=True)
    return places.squeeze(1).clamp(max=logits.shape[1] - 1)


def _warpers(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(int(top_k)))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(float(top_p)))
    return warpers


def _cache(config: Any, capacity: int) -> DynamicCache:
    """transformers' own cache, its plain layers with room for `capacity` tokens from the start."""
    cache = DynamicCache(config=config)
    cache.layers = [
        _RoomyLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


class _RoomyLayer(DynamicLayer):
    """Keys and values in a buffer allocated once, instead of a longer copy each token."""

    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._end = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
            rows = len(key_states)
            self._buffers = (self._room(key_states, rows), self._room(value_states, rows))
        start, self._end = self._end, self._end + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self._end] = states
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        if self._buffers is None:
            return
        kept = []
        for buffer in self._buffers:
            kept.append(self._room(buffer, len(indices)))
            kept[-1][:, :, : self._end] = buffer[indices, :, : self._end]
        self._buffers = (kept[0], kept[1])
        self._show()

    def _show(self) -> None:
        assert self._buffers is not None
        self.keys, self.values = (buffer[:, :, : self._end] for buffer in self._buffers)

    def _room(self, like: Tensor, rows: int) -> Tensor:
        return like.new_empty(rows, like.shape[1], self._capacity, like.shape[3])
