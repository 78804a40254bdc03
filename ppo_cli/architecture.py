"""What a language model's architecture allows, found out by asking the model itself.

Each answer is found once a model, with a few tokens, and decides between the fast way and the one
that suits every model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ppo_cli.attention import block_mask
from ppo_cli.cache import has_windows, hold_still, roomy_cache
from ppo_cli.feed_forward import last_feed_forward_at
from ppo_cli.runtime import modes_kept


def _once_a_model(question: Callable[[Any], bool]) -> Callable[[Any], bool]:
    answers: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    @wraps(question)
    def ask(model: Any) -> bool:
        if model not in answers:
            with torch.no_grad(), modes_kept(model), _no_autocast(model):
                model.eval()
                try:
                    answers[model] = question(model)
                except (TypeError, AttributeError, ValueError, IndexError, RuntimeError):
                    answers[model] = False  # it does not take such inputs
        return answers[model]

    return ask


@_once_a_model
def projects_plainly(model: Any) -> bool:
    """Whether a causal model's logits are its output embeddings times its last hidden state.

    Some architectures scale or cap them; for these the whole model has to run.
    """
    ids = _tokens(model, [[0, 1]])
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    plain = model.get_output_embeddings()(hidden)
    whole = model(input_ids=ids, use_cache=False).logits
    return torch.equal(plain, whole.to(plain.dtype))


@_once_a_model
def reads_packed(model: Any) -> bool:
    """Whether a causal model keeps apart several sequences in a row, told by their positions.

    That means position ids that begin anew, without an attention mask: what one sequence holds must
    not change a bit of the next, and each must come out as it does alone. Models without position
    ids or with a recurrent state do not.
    """
    ids, positions = _packed_rows(model)
    changed = _tokens(model, [[7, 8, 9, 3, 4, 5, 6], [8, 9, 4, 3, 2, 1, 0]])

    def read(tokens: Tensor, **inputs: Tensor) -> Tensor:
        output = model.base_model(input_ids=tokens, use_cache=False, **inputs)
        hidden: Tensor = output.last_hidden_state
        return hidden

    packed = read(ids, position_ids=positions)
    other = read(changed, position_ids=positions)
    leaks = not (
        torch.equal(packed[0, 3:], other[0, 3:]) and torch.equal(packed[1, 2:], other[1, 2:])
    )
    alone = torch.cat([read(ids[0:1, 3:])[0], read(ids[1:2, 2:6])[0]])
    together = torch.cat([packed[0, 3:], packed[1, 2:6]])
    return not leaks and _same(together, alone)


@_once_a_model
def ends_in_feed_forward(model: Any) -> bool:
    """Whether a causal model's last feed-forward network may run on some positions alone.

    No other position may matter to them: in the trial these are not numbers.
    """
    ids, _ = _packed_rows(model)
    read = torch.tensor([2, 5, 9, 13], device=ids.device)

    def hidden() -> Tensor:
        output = model.base_model(input_ids=ids, use_cache=False)
        at_all: Tensor = output.last_hidden_state
        return at_all.flatten(0, 1)[read]

    expected = hidden()
    with last_feed_forward_at(model, read, unread=math.nan):
        return _same(hidden(), expected)


@_once_a_model
def reads_block_mask(model: Any) -> bool:
    """Whether a causal model takes a mask (B, 1, T, T) in place of finding sequences in a row.

    To find them it would wait for the GPU. Models with windows have other masks in some layers.
    """
    if has_windows(model.config):
        return False
    ids, positions = _packed_rows(model)
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    found = model.base_model(**inputs).last_hidden_state
    given = model.base_model(**inputs, attention_mask=block_mask(positions)).last_hidden_state
    return _same(given, found)


@_once_a_model
def reads_still_cache(model: Any) -> bool:
    """Whether a causal model reads a cache of fixed size, told by a mask what of it is there.

    The next token's hidden state must be the one that a growing cache gives. Models with windows
    do not, nor those whose attention does not take a mask (B, 1, T, room) of what may be seen.
    """
    ids, mask = _tokens(model, [[0, 1, 2], [3, 4, 5]]), _tokens(model, [[0, 1, 1], [1, 1, 1]])
    next_ids, positions = _tokens(model, [[6], [7]]), _tokens(model, [[0, 0, 1], [0, 1, 2]])

    def read(tokens: Tensor, seen: Tensor, at: Tensor, cache: Any) -> Tensor:
        inputs = {"attention_mask": seen, "position_ids": at, "past_key_values": cache}
        output = model.base_model(input_ids=tokens, use_cache=True, **inputs)
        hidden: Tensor = output.last_hidden_state
        return hidden[:, -1]

    growing, still = (roomy_cache(model.config, ids.shape[1] + 2) for _ in range(2))
    for cache in (growing, still):
        read(ids, mask, positions, cache)
    at, seen = positions[:, -1:] + 1, torch.cat([mask, mask[:, -1:]], 1)
    expected = read(next_ids, seen, at, growing)
    room = hold_still(still, at.new_tensor([ids.shape[1]]))
    seen = torch.nn.functional.pad(seen, (0, room - seen.shape[1]))[:, None, None].bool()
    return _same(read(next_ids, seen, at, still), expected)


def _same(actual: Tensor, expected: Tensor) -> bool:
    """Whether the two differ in rounding alone."""
    tolerance = 10 * torch.finfo(expected.dtype).eps ** 0.75 * expected.abs().max()
    return bool((actual - expected).abs().max() <= tolerance)


def _packed_rows(model: Any) -> tuple[Tensor, Tensor]:
    """Ids and position ids (2, 7): two sequences a row, the second row ends in padding."""
    positions = [[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 0]]
    ids = [[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]]
    return _tokens(model, ids), _tokens(model, positions, wrap=False)


def _tokens(model: Any, rows: list[list[int]], wrap: bool = True) -> Tensor:
    ids = torch.tensor(rows, device=model.device)
    return ids % model.get_input_embeddings().weight.shape[0] if wrap else ids


def _no_autocast(model: Any) -> torch.autocast:
    return torch.autocast(model.device.type, enabled=False)
