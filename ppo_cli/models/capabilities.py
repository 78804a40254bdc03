"""What a language model's architecture allows, found out by asking the model itself.

Each answer is found with a few tokens, and found anew once the model's modules, weights or hooks
are others. It decides between the fast way and the one that suits every model.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ppo_cli.errors import UnsuitableModel, is_out_of_memory
from ppo_cli.kernels.attention import block_mask
from ppo_cli.kernels.feed_forward import last_feed_forward_at
from ppo_cli.kernels.kv_cache import cache_argument, has_windows, hold_still, roomy_cache
from ppo_cli.kernels.patches import PASSED_ON, fast_matmul
from ppo_cli.kernels.switch import enabled, is_enabled
from ppo_cli.utils.device import modes_kept

REFUSALS = (TypeError, AttributeError, ValueError, LookupError, RuntimeError, AssertionError)
RECORDER = "transformers.utils.output_capturing"
"""Whose hooks stay once hidden states were asked for, and change nothing."""


class _Structure:
    """A model's modules with their weights and hooks, to tell whether they are still the same."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (module, type(module), dict(module._modules), "forward" in vars(module))
            for module in model.modules()
        ]
        self._weights = [_weights(module) for module, *_ in self._modules]
        self._hooks = [_hooks(module) for module, *_ in self._modules]

    def is_kept(self) -> bool:
        """Whether nothing was added, replaced or taken away since. It is asked in each forward."""
        for i, (module, kind, children, has_own_forward) in enumerate(self._modules):
            if (
                type(module) is not kind
                or module._modules != children
                or ("forward" in module.__dict__) is not has_own_forward  # accelerate's, say
                or _weights(module) != self._weights[i]
                or _hooks(module) != self._hooks[i]
            ):
                return False
        return True


def _weights(module: nn.Module) -> list[tuple[int, torch.dtype]]:
    return [(id(p), p.dtype) for p in module._parameters.values() if p is not None]


def _hooks(module: nn.Module) -> list[Any]:
    if not (module._forward_hooks or module._forward_pre_hooks):
        return []
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return [hook for hook in hooks if getattr(hook, "__module__", None) != RECORDER]


class _Findings:
    """What was found out about a model, and the structure that it holds for."""

    def __init__(self, model: nn.Module) -> None:
        self.structure = _Structure(model)
        self.answers: dict[frozenset[str], dict[Any, Any]] = {}


_findings: WeakKeyDictionary[nn.Module, _Findings] = WeakKeyDictionary()


def findings(model: nn.Module) -> dict[Any, Any]:
    """What was found out about a model as it is now, by question; empty again once it changes.

    Other fast paths have findings of their own.
    """
    found = _findings.get(model)
    if found is None or not found.structure.is_kept():
        found = _findings[model] = _Findings(model)
    return found.answers.setdefault(enabled(), {})


@contextmanager
def asking() -> Iterator[None]:
    """Around a model's forward pass that asks whether it takes such inputs.

    Raises:
        UnsuitableModel: it does not. Memory that runs out, and what our own code raises, pass.
    """
    try:
        yield
    except UnsuitableModel:
        raise
    except REFUSALS as error:
        if is_out_of_memory(error) or _is_ours(error):
            raise
        raise UnsuitableModel(str(error)) from error


def _is_ours(error: BaseException) -> bool:
    """Whether code of this package raised `error`, which makes it a bug."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    is_here = frame.f_globals.get("__name__", "").startswith("ppo_cli.")
    return is_here and frame.f_code not in PASSED_ON


def _once_a_model(question: Callable[[Any], bool]) -> Callable[[Any], bool]:
    @wraps(question)
    def ask(model: Any) -> bool:
        answers = findings(model)
        if question not in answers:
            with torch.no_grad(), modes_kept(model), no_autocast(model), fast_matmul():
                model.eval()
                try:
                    answers[question] = question(model)
                except UnsuitableModel:
                    answers[question] = False
        return bool(answers[question])

    return ask


class Reading(NamedTuple):
    """How a model is to read sequences, to say what it thinks of some of their tokens.

    Attributes:
        rows: several sequences a row; one a row, padded on the right; or sequences of equal length
            together, without padding.
        masked: packed rows are told apart by a mask, which need not be looked for.
        logits: multiplied from the output layer's weights, asked of that layer, or of the model.
        narrow: the last feed-forward network runs on the positions that are read alone.
    """

    rows: Literal["packed", "padded", "equal"]
    masked: bool
    logits: Literal["weights", "layer", "model"]
    narrow: bool


def fastest_reading(model: Any) -> Reading:
    """The fastest way that a causal model and the switch allow, by the questions below."""
    packed = is_enabled("packing") and reads_packed(model)
    through_layer = is_enabled("lm_head") and ends_in_output_layer(model)
    plain = through_layer and is_plain_layer(model.get_output_embeddings())
    return Reading(
        rows="packed" if packed else "padded",
        masked=packed and reads_block_mask(model),
        logits="weights" if plain else "layer" if through_layer else "model",
        narrow=through_layer and is_enabled("feed_forward") and ends_in_feed_forward(model),
    )


PADDED_READING = Reading("padded", masked=False, logits="model", narrow=False)
"""Suits all models whose padding on the right changes nothing."""


def safer_readings(reading: Reading) -> list[Reading]:
    """What is left to try where `reading` is not what the model says, fastest first."""
    ways = (PADDED_READING, PADDED_READING._replace(rows="equal"))
    return [way for way in ways if way != reading]


def is_plain_layer(layer: Any) -> bool:
    """Whether a layer does no more than multiply by its weight, in float32 or below.

    Not so with an adapter, hooks, a parametrization, quantised or offloaded weights.
    """
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and type(layer.weight.data) is Tensor
        and layer.weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and layer.weight.device.type != "meta"
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
        and not layer._backward_pre_hooks
        and "forward" not in vars(layer)
    )


@_once_a_model
def ends_in_output_layer(model: Any) -> bool:
    """Whether a causal model's logits are what its output layer makes of its last hidden state.

    Some architectures scale or cap them; for these the whole model has to run.
    """
    ids = _tokens(model, [[0, 1]])
    with asking():
        hidden = _hidden(model.base_model(input_ids=ids, use_cache=False))
        plain = model.get_output_embeddings()(hidden)
        whole = model(input_ids=ids, use_cache=False).logits
    return plain.shape == whole.shape and torch.equal(plain, whole.to(plain.dtype))


@_once_a_model
def looks_ahead(model: Any) -> bool:
    """Whether what a model says at a position depends on the tokens that come later."""
    rows = _tokens(model, [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 9, 10, 11]])
    with asking():
        first, other = model(input_ids=rows, use_cache=False).logits[:, -8:-3]
    return bool(first.isfinite().all()) and not same(other, first, precision(model))


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
        with asking():
            return _hidden(model.base_model(input_ids=tokens, use_cache=False, **inputs))

    both = read(torch.cat([ids, changed]), position_ids=torch.cat([positions, positions]))
    packed, other = both.chunk(2)
    leaks = not (
        torch.equal(packed[0, 3:], other[0, 3:]) and torch.equal(packed[1, 2:], other[1, 2:])
    )
    alone = read(torch.stack([ids[0, 3:], ids[1, 2:6]]))
    together = torch.stack([packed[0, 3:], packed[1, 2:6]])
    return not leaks and same(together, alone, precision(model))


@_once_a_model
def ends_in_feed_forward(model: Any) -> bool:
    """Whether a causal model's last feed-forward network may run on some positions alone.

    No other position may matter to them: in the trial these are not numbers.
    """
    ids, _ = _packed_rows(model)
    read = torch.tensor([2, 5, 9, 13], device=ids.device)

    def hidden() -> Tensor:
        with asking():
            at_all = _hidden(model.base_model(input_ids=ids, use_cache=False))
        return at_all.flatten(0, 1)[read]

    expected = hidden()
    with last_feed_forward_at(model, read, unread=math.nan):
        return same(hidden(), expected, precision(model))


@_once_a_model
def reads_block_mask(model: Any) -> bool:
    """Whether a causal model takes a mask (B, 1, T, T) in place of finding sequences in a row.

    To find them it would wait for the GPU. Models with windows have other masks in some layers.
    """
    with asking():
        if has_windows(model.config):
            return False
    ids, positions = _packed_rows(model)
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    with asking():
        found = _hidden(model.base_model(**inputs))
        given = _hidden(model.base_model(**inputs, attention_mask=block_mask(positions)))
    return same(given, found, precision(model))


@_once_a_model
def reads_still_cache(model: Any) -> bool:
    """Whether a causal model reads a cache of fixed size, told by a mask what of it is there.

    The next token's hidden state must be the one that a growing cache gives. Models with windows
    do not, nor those whose attention does not take a mask (B, 1, T, room) of what may be seen.
    """
    ids, mask = _tokens(model, [[0, 1, 2], [3, 4, 5]]), _tokens(model, [[0, 1, 1], [1, 1, 1]])
    next_ids, positions = _tokens(model, [[6], [7]]), _tokens(model, [[0, 0, 1], [0, 1, 2]])

    def read(tokens: Tensor, seen: Tensor, at: Tensor, cache: Any) -> Tensor:
        inputs = {"attention_mask": seen, "position_ids": at, **cache_argument(model, cache)}
        with asking():
            return _hidden(model.base_model(input_ids=tokens, use_cache=True, **inputs))[:, -1]

    with asking():
        growing, still = (roomy_cache(model.config, ids.shape[1] + 2) for _ in range(2))
    for cache in (growing, still):
        read(ids, mask, positions, cache)
    at, seen = positions[:, -1:] + 1, torch.cat([mask, mask[:, -1:]], 1)
    expected = read(next_ids, seen, at, growing)
    room = hold_still(still, at.new_tensor([ids.shape[1]]))
    seen = torch.nn.functional.pad(seen, (0, room - seen.shape[1]))[:, None, None].bool()
    return same(read(next_ids, seen, at, still), expected, precision(model))


def rope_switch(config: Any) -> int | None:
    """Tokens beyond which a model turns the positions of a whole forward pass otherwise.

    So does "longrope" (Phi 3): there a row beside a longer one is not read as it is alone. None for
    a model that has no such length.
    """
    text = config.get_text_config()
    settings = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    groups = [settings, *(group for group in settings.values() if isinstance(group, dict))]
    lengths = [
        group.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        for group in groups
        if group.get("rope_type", group.get("type")) == "longrope"
    ]
    return min((int(length) for length in lengths if length), default=None)


def precision(model: nn.Module) -> torch.dtype:
    """What a model rounds its numbers to, at the lowest; bfloat16 where weights are quantised.

    A quantised model's numbers may differ by as much with what is read beside them: what is rounded
    how is decided by all of an input.
    """
    kinds = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    parts = (*model.modules(), *(p.data for p in model.parameters()))
    if any(
        "quant" in type(part).__module__ or "bitsandbytes" in type(part).__module__
        for part in parts
    ):
        kinds.add(torch.bfloat16)
    return max(kinds or {torch.float32}, key=lambda dtype: torch.finfo(dtype).eps)


def same(
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype = torch.float32,
    scale: Tensor | None = None,
) -> bool:
    """Whether the two differ in rounding alone.

    Args:
        actual: what is compared, of the shape of `expected`.
        expected: what it should be.
        dtype: what both were computed in.
        scale: size of the numbers that were rounded; None for the largest of `expected`.
    """
    if expected.numel() == 0:
        return True
    difference = (actual - expected).abs()
    if scale is None:
        scale = expected.abs().max()
    eps, single = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    if eps <= single:
        return bool(difference.max() <= 10 * single**0.75 * scale)
    # So few digits leave room for a wrong model, too, unless the mean is looked at.
    return bool(difference.max() <= 8 * eps * scale and difference.mean() <= 2 * eps * scale)


def _hidden(output: Any) -> Tensor:
    """The last hidden states (B, T, H) of a model below its output layer."""
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        raise UnsuitableModel("the model below the output layer gives no hidden states (B, T, H)")
    return hidden


def _packed_rows(model: Any) -> tuple[Tensor, Tensor]:
    """Ids and position ids (2, 7): two sequences a row, the second row ends in padding."""
    positions = [[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 0]]
    ids = [[0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0]]
    return _tokens(model, ids), _tokens(model, positions, wrap=False)


def _tokens(model: Any, rows: list[list[int]], wrap: bool = True) -> Tensor:
    ids = torch.tensor(rows, device=model.device)
    return ids % model.get_input_embeddings().weight.shape[0] if wrap else ids


def no_autocast(model: Any) -> torch.autocast:
    """In a `with` block `model` computes in its own precision."""
    return torch.autocast(model.device.type, enabled=False)
