"""Capabilities of a language model: which fast paths it allows, by forward passes of the model.

Each check reads a few tokens. Its result is kept until the model's modules, weights or hooks
change. It decides between the fast path and the one that is right for every model.
"""

from __future__ import annotations

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
from ppo_cli.kernels.kv_cache import cache_argument, has_windows, make_static, preallocated_cache
from ppo_cli.kernels.patches import PASSED_ON, fast_layers
from ppo_cli.kernels.switch import enabled, is_enabled
from ppo_cli.models.encoder_decoder import is_encoder_decoder
from ppo_cli.utils.device import modes_kept

REFUSALS = (TypeError, AttributeError, ValueError, LookupError, RuntimeError, AssertionError)
RECORDER = "transformers.utils.output_capturing"
"""Its hooks stay on a model that has returned hidden states, and change nothing."""


class _Structure:
    """A model's modules with their weights and hooks, by which a change of the model is noticed."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (module, type(module), dict(module._modules), "forward" in vars(module))
            for module in model.modules()
        ]
        self._weights = [_weights(module) for module, *_ in self._modules]
        self._hooks = [_hooks(module) for module, *_ in self._modules]

    def is_kept(self) -> bool:
        """Whether nothing was added, replaced or removed since. Every forward pass calls this."""
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


class _CheckResults:
    """Results of the checks of a model, and the structure that they are valid for."""

    def __init__(self, model: nn.Module) -> None:
        self.structure = _Structure(model)
        self.is_final = False
        self.answers: dict[frozenset[str], dict[Any, Any]] = {}


_check_results: WeakKeyDictionary[nn.Module, _CheckResults] = WeakKeyDictionary()


def check_results(model: nn.Module) -> dict[Any, Any]:
    """Results of the checks of a model as it is now, by check; empty again once it changes.

    Each choice of fast paths has results of its own.
    """
    found = _check_results.get(model)
    if found is None or not (found.is_final or found.structure.is_kept()):
        found = _check_results[model] = _CheckResults(model)
    return found.answers.setdefault(enabled(), {})


def keep_results(model: nn.Module) -> None:
    """Keep the results of the checks of a model from now on, although its weights are sharded."""
    check_results(model)
    _check_results[model].is_final = True


@contextmanager
def unsuitable_errors() -> Iterator[None]:
    """Around a forward pass that checks whether a model takes such inputs.

    Raises:
        UnsuitableModel: it does not. Lack of memory and errors of our own code are raised as they
            are.
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


def _checked_once(capability: Callable[[Any], bool]) -> Callable[[Any], bool]:
    @wraps(capability)
    def check(model: Any) -> bool:
        results = check_results(model)
        if capability not in results:
            with torch.no_grad(), modes_kept(model), no_autocast(model), fast_layers():
                model.eval()
                try:
                    results[capability] = capability(model)
                except UnsuitableModel:
                    results[capability] = False
        return bool(results[capability])

    return check


class Reading(NamedTuple):
    """How a model reads sequences in the forward pass that computes their log-probabilities.

    Attributes:
        rows: several sequences in a row; one in a row, padded on the right; or sequences of equal
            length together, without padding.
        masked: a mask separates packed sequences, so that the model need not look for their ends.
        logits: by the output layer's weights, by a call of that layer, or by the whole model.
    """

    rows: Literal["packed", "padded", "equal"]
    masked: bool
    logits: Literal["weights", "layer", "model"]


def fastest_reading(model: Any) -> Reading:
    """The fastest way that a causal model and the switch allow, by the questions below."""
    packed = is_enabled("packing") and reads_packed(model)
    through_layer = is_enabled("lm_head") and ends_in_output_layer(model)
    plain = through_layer and is_plain_layer(model.get_output_embeddings())
    return Reading(
        rows="packed" if packed else "padded",
        masked=packed and reads_block_mask(model),
        logits="weights" if plain else "layer" if through_layer else "model",
    )


PADDED_READING = Reading("padded", masked=False, logits="model")
"""Right for every model in which padding on the right changes nothing."""


def safer_readings(reading: Reading) -> list[Reading]:
    """The readings to try where `reading` is not right for a model, the fastest first."""
    ways = (PADDED_READING, PADDED_READING._replace(rows="equal"))
    return [way for way in ways if way != reading]


def is_plain_layer(layer: Any) -> bool:
    """Whether a layer only multiplies by its weight, in float32 or a lower precision.

    That is not so with an adapter, hooks, a parametrization, quantised or offloaded weights.
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


@_checked_once
def ends_in_output_layer(model: Any) -> bool:
    """Whether a causal model's logits are its output layer's output for the last hidden state.

    Some architectures scale or cap the logits; then the whole model has to run.
    """
    ids = _tokens(model, [[0, 1]])
    with unsuitable_errors():
        hidden = _hidden(model.base_model(input_ids=ids, use_cache=False))
        plain = model.get_output_embeddings()(hidden)
        whole = model(input_ids=ids, use_cache=False).logits
    return plain.shape == whole.shape and torch.equal(plain, whole.to(plain.dtype))


@_checked_once
def looks_ahead(model: Any) -> bool:
    """Whether a model's output at a position depends on later tokens, of an encoder-decoder's
    decoder."""
    rows = _tokens(model, [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 9, 10, 11]])
    inputs = {"input_ids": rows}
    if is_encoder_decoder(model):
        inputs = {"input_ids": rows[:1].expand_as(rows), "decoder_input_ids": rows}
    with unsuitable_errors():
        first, other = model(**inputs, use_cache=False).logits[:, -8:-3]
    return bool(first.isfinite().all()) and not same(other, first, precision(model))


@_checked_once
def reads_packed(model: Any) -> bool:
    """Whether a causal model separates several sequences in a row by their position ids.

    The position ids of each sequence begin at 0, and there is no attention mask. The tokens of one
    sequence must not change a bit of the next one's output, and each output must be that of the
    sequence alone. Models without position ids or with a recurrent state cannot do that.
    """
    ids, positions = _packed_rows(model)
    changed = _tokens(model, [[7, 8, 9, 3, 4, 5, 6], [8, 9, 4, 3, 2, 1, 0]])

    def read(tokens: Tensor, **inputs: Tensor) -> Tensor:
        with unsuitable_errors():
            return _hidden(model.base_model(input_ids=tokens, use_cache=False, **inputs))

    both = read(torch.cat([ids, changed]), position_ids=torch.cat([positions, positions]))
    packed, other = both.chunk(2)
    leaks = not (
        torch.equal(packed[0, 3:], other[0, 3:]) and torch.equal(packed[1, 2:], other[1, 2:])
    )
    alone = read(torch.stack([ids[0, 3:], ids[1, 2:6]]))
    together = torch.stack([packed[0, 3:], packed[1, 2:6]])
    return not leaks and same(together, alone, precision(model))


@_checked_once
def reads_block_mask(model: Any) -> bool:
    """Whether a causal model takes a mask (B, 1, T, T) that separates the sequences in a row.

    Without the mask it looks for the sequences, which waits for the GPU. Models with windows have
    other masks in some layers.
    """
    with unsuitable_errors():
        if has_windows(model.config):
            return False
    ids, positions = _packed_rows(model)
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    with unsuitable_errors():
        found = _hidden(model.base_model(**inputs))
        given = _hidden(model.base_model(**inputs, attention_mask=block_mask(positions)))
    return same(given, found, precision(model))


@_checked_once
def reads_static_cache(model: Any) -> bool:
    """Whether a causal model reads a cache of fixed size, of which a mask says what is written.

    The next token's hidden state must be the one that a growing cache gives. Models with windows
    do not read it, nor those whose attention does not take a mask (B, 1, T, room).
    """
    ids, mask = _tokens(model, [[0, 1, 2], [3, 4, 5]]), _tokens(model, [[0, 1, 1], [1, 1, 1]])
    next_ids, positions = _tokens(model, [[6], [7]]), _tokens(model, [[0, 0, 1], [0, 1, 2]])

    def read(tokens: Tensor, seen: Tensor, at: Tensor, cache: Any) -> Tensor:
        inputs = {"attention_mask": seen, "position_ids": at, **cache_argument(model, cache)}
        with unsuitable_errors():
            return _hidden(model.base_model(input_ids=tokens, use_cache=True, **inputs))[:, -1]

    with unsuitable_errors():
        growing, still = (preallocated_cache(model.config, ids.shape[1] + 2) for _ in range(2))
    for cache in (growing, still):
        read(ids, mask, positions, cache)
    at, seen = positions[:, -1:] + 1, torch.cat([mask, mask[:, -1:]], 1)
    expected = read(next_ids, seen, at, growing)
    room = make_static(still, at.new_tensor([ids.shape[1]]))
    seen = torch.nn.functional.pad(seen, (0, room - seen.shape[1]))[:, None, None].bool()
    return same(read(next_ids, seen, at, still), expected, precision(model))


def rope_switch(config: Any) -> int | None:
    """Tokens beyond which a model changes the position embeddings of a whole forward pass.

    "longrope" (Phi 3) does so: a row beside a longer one is not read as it is alone. None for a
    model without such a length.
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
    """The lowest precision of a model's weights; bfloat16 where they are quantised.

    The outputs of a quantised model for one row may differ by as much with the other rows, where
    rounding depends on the whole input.
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
    """Whether two tensors are equal up to rounding.

    Args:
        actual: of the shape of `expected`.
        expected: the right values.
        dtype: precision in which both were computed.
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
    # With so few digits a wrong model may pass by the maximum alone, but not by the mean.
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
    """A context in which `model` computes in its own precision."""
    return torch.autocast(model.device.type, enabled=False)
