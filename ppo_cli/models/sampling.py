"""Batched sampling: queries in, responses out, one length limit a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ppo_cli.data.prompts import BROKEN
from ppo_cli.errors import UsageError
from ppo_cli.kernels.patches import fast_matmul
from ppo_cli.kernels.switch import is_enabled
from ppo_cli.models.capabilities import reads_packed, rope_switch
from ppo_cli.models.context import context_length as context_length
from ppo_cli.models.decode_loop import decode_responses, decode_whole, not_finite
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.models.self_check import SamplingWay, Watch, sampling_way
from ppo_cli.utils.device import modes_kept

# Every setting that shapes the distribution, at the value that leaves it alone. Without them
# `generate` would fill what is not given from the model's own generation_config, whose top-k or
# penalties make samples that are not the policy's.
PURE_SAMPLING: dict[str, Any] = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
}


DEFAULT_NEW_TOKENS = 20  # what transformers' `generate` adds where no length is given


@dataclass(frozen=True)
class Rollout:
    """B queries and the responses sampled to them.

    Attributes:
        queries: B tensors of token ids, each 1-D and of its own length.
        responses: B tensors of token ids, 1-D, the end-of-text token included where it was drawn.
        texts: B strings, query and response decoded together.
        response_texts: B strings, the responses alone.
    """

    queries: list[Tensor]
    responses: list[Tensor]
    texts: list[str]
    response_texts: list[str]


def sample_texts(
    model: Any,
    tokenizer: Any,
    queries: Sequence[Tensor],
    max_new_tokens: Sequence[int],
    **kwargs: Any,
) -> Rollout:
    """`sample_responses`, decoded; pad and end-of-text tokens are the tokenizer's unless given."""
    tokens = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id")}
    responses = sample_responses(model, queries, max_new_tokens, **{**tokens, **kwargs})
    return decode(tokenizer, queries, responses)


def decode(tokenizer: Any, queries: Sequence[Tensor], responses: Sequence[Tensor]) -> Rollout:
    """B queries and responses as texts, special tokens left out.

    A response's text is what it adds to its query's: many tokenizers drop a space at the beginning
    of what they decode, and the last character of a query may end in the response.
    """
    whole = [torch.cat([q.to(r.device), r]) for q, r in zip(queries, responses, strict=True)]
    texts = tokenizer.batch_decode(whole, skip_special_tokens=True)
    starts = tokenizer.batch_decode(list(queries), skip_special_tokens=True)
    return Rollout(
        queries=list(queries),
        responses=list(responses),
        texts=texts,
        response_texts=[
            _added(start, text)
            if text.startswith(start.rstrip(BROKEN))
            else tokenizer.decode(response, skip_special_tokens=True)
            for start, text, response in zip(starts, texts, responses, strict=True)
        ],
    )


def _added(start: str, text: str) -> str:
    """What `text` has after `start`, a broken character at whose end it may have mended."""
    return text[len(start if text.startswith(start) else start.rstrip(BROKEN)) :]


@torch.no_grad()
def sample_responses(
    model: Any,
    queries: Sequence[Tensor],
    max_new_tokens: Sequence[int],
    *,
    pad_token_id: int | None,
    eos_token_id: int | list[int] | None,
    batch_size: int | None = None,
    generation_config: GenerationConfig | None = None,
    **generation_kwargs: Any,
) -> list[Tensor]:
    """Sample one response to each query, with dropout off.

    Queries are padded on the left and masked, with position ids counted from their first token,
    so a response does not depend on what else is in the batch (up to rounding).

    Args:
        model: has `generate`, `device`, `config` and `generation_config`, as `transformers` does.
        queries: B tensors of token ids, 1-D, none empty.
        max_new_tokens: B limits; a response ends there or after its first end-of-text token.
        pad_token_id: fills the batch up; any id will do, it is masked.
        eos_token_id: ends a response; None for responses of full length.
        batch_size: sequences a forward pass; None for all at once.
        generation_config: replaces pure sampling as the base that `generation_kwargs` change.
        generation_kwargs: settings of `generate`; pure sampling from the model's own distribution
            where they are silent.

    Returns:
        B tensors of token ids, 1-D, on the model's device.

    Raises:
        UsageError: an empty query, or one that with its response exceeds the model's context.
    """
    queries = [query.to(model.device) for query in queries]
    _check_lengths(queries, max_new_tokens, context_length(model))
    if isinstance(eos_token_id, int):
        eos_token_id = [eos_token_id]
    if generation_kwargs.get("num_return_sequences", 1) != 1:
        raise UsageError("num_return_sequences must be 1: repeat the queries instead")
    pad = 0 if pad_token_id is None else pad_token_id
    stopping = generation_kwargs.pop("stopping_criteria", None) or []
    shaping = None
    if (
        generation_config is None
        and not stopping
        and isinstance(model, AutoModelForCausalLMWithValueHead)
    ):
        shaping = _plain_sampling(generation_kwargs)
    call = _Call(
        model,
        eos_token_id,
        pad,
        generation_config or GenerationConfig(**PURE_SAMPLING),
        stopping,
        generation_kwargs,
    )
    if not queries:
        return []
    way = _way(model, pad, is_plain=shaping is not None)
    responses: list[Tensor] = []
    # Our own loop lets a row that has ended stay where it is; transformers reads on.
    context = None if way == "loop" else context_length(model)
    with modes_kept(model), fast_matmul():
        model.eval()
        for batch in _batches(queries, max_new_tokens, batch_size or len(queries), context):
            limits = list(max_new_tokens[batch])
            responses += _sample(call, way, queries[batch], limits, shaping)
    return responses


def check_sampling(model: Any, pad_token_id: int | None) -> SamplingWay:
    """Try how responses are best sampled from a model, where that was not tried yet.

    Returns:
        The way that is taken.

    Raises:
        UsageError: it looks ahead, so it is not causal.
        ModelError: what is sampled is not what it says of each text alone.
    """
    is_policy = isinstance(model, AutoModelForCausalLMWithValueHead)
    return _way(model, 0 if pad_token_id is None else pad_token_id, is_plain=is_policy)


@dataclass(frozen=True)
class _Call:
    """What a call of `sample_responses` asks of each batch."""

    model: Any
    eos_token_id: list[int] | None
    pad_token_id: int
    generation_config: GenerationConfig
    stopping: Sequence[StoppingCriteria]
    generation_kwargs: dict[str, Any]


def _way(model: Any, pad: int, *, is_plain: bool) -> SamplingWay:
    """The fastest way of sampling that is right; our own loops do nothing but plain sampling."""
    ways: list[SamplingWay] = ["padded", "equal", "uncached"]
    if is_plain:
        ways = ["padded", "equal", "whole"]
        if is_enabled("decode_loop") and model.allows(reads_packed):
            ways.insert(0, "loop")
    pure = _Call(model, None, pad, GenerationConfig(**PURE_SAMPLING), (), {})

    def sample(
        way: SamplingWay, queries: list[Tensor], limits: list[int], watch: Watch
    ) -> list[Tensor]:
        with fast_matmul():
            return _sample(pure, way, queries, limits, {}, watch)

    return sampling_way(model, ways, sample, pad_token_id=pad)


def _sample(
    call: _Call,
    way: SamplingWay,
    queries: Sequence[Tensor],
    limits: list[int],
    shaping: dict[str, Any] | None,
    watch: Watch | None = None,
) -> list[Tensor]:
    """A response to each of a batch's queries, by one of the ways.

    Rows that leave the length at which the model turns positions otherwise are read whole, those
    of equal length together.
    """
    switch = rope_switch(call.model.config)
    groups: dict[tuple[SamplingWay, int], list[int]] = {}
    for i, (query, limit) in enumerate(zip(queries, limits, strict=True)):
        is_long = switch is not None and len(query) + limit > switch
        row_way = way
        if is_long:
            row_way = "uncached" if shaping is None else "whole"
        alike = len(query) if row_way in ("equal", "uncached", "whole") else 0
        groups.setdefault((row_way, alike), []).append(i)
    responses: list[Tensor] = [queries[0].new_empty(0)] * len(queries)
    for (row_way, _), rows in groups.items():
        ids, mask = _pad_left([queries[i] for i in rows], call.pad_token_id)
        row_limits = [limits[i] for i in rows]
        told = None if watch is None else _of_rows(watch, rows)
        ends, settings = set(call.eos_token_id or ()), {**(shaping or {}), "watch": told}
        if row_way == "loop":
            found = decode_responses(call.model, ids, mask, row_limits, ends, **settings)
        elif row_way == "whole":
            found = decode_whole(call.model, ids, row_limits, ends, **settings)
        else:
            found = _generate(call, ids, mask, row_limits, told, cached=row_way != "uncached")
        for i, response in zip(rows, found, strict=True):
            responses[i] = response
    return responses


def _generate(
    call: _Call,
    ids: Tensor,
    mask: Tensor,
    limits: list[int],
    watch: Watch | None,
    *,
    cached: bool,
) -> list[Tensor]:
    """Responses by transformers' own `generate`."""
    model, settings = call.model, dict(call.generation_kwargs)
    if not cached:
        settings["use_cache"] = False
    if watch is not None:
        settings["logits_processor"] = LogitsProcessorList([_Watcher(watch)])
    row_limits = torch.tensor(limits, device=model.device) + ids.shape[1]
    with _generation_config(model, call.generation_config), _finite_probabilities():
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            stopping_criteria=StoppingCriteriaList([*call.stopping, _RowLimits(row_limits)]),
            max_new_tokens=max(limits),
            pad_token_id=call.pad_token_id,
            eos_token_id=call.eos_token_id,
            **settings,
        )
    ends = set(call.eos_token_id or ())
    rows = zip(output[:, ids.shape[1] :], limits, strict=True)
    return [_until_end(row[:limit], ends) for row, limit in rows]


class _Watcher(LogitsProcessor):
    """Tells of all rows' logits, and leaves them as they are."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.watch(torch.arange(len(scores)), scores)
        return scores


def _of_rows(watch: Watch, rows: list[int]) -> Watch:
    """`watch`, told of the batch's rows where some of them, `rows`, were sampled together."""
    places = torch.tensor(rows)
    return lambda chosen, logits: watch(places[chosen.cpu()], logits)


def new_token_limits(
    queries: Sequence[Tensor],
    length_sampler: Callable[[], int] | None,
    generation_kwargs: dict[str, Any],
) -> list[int]:
    """New tokens of each query; takes what says so out of `generation_kwargs`."""
    new = generation_kwargs.pop("max_new_tokens", None)
    total = generation_kwargs.pop("max_length", None)
    asked = generation_kwargs.get("generation_config")
    if length_sampler is not None:
        return [int(length_sampler()) for _ in queries]
    if new is None and total is None:
        new = getattr(asked, "max_new_tokens", None)
    if new is None and total is not None:
        return [max(total - query.numel(), 1) for query in queries]
    return [int(new if new is not None else DEFAULT_NEW_TOKENS)] * len(queries)


def _plain_sampling(generation_kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The settings of our own decode loop, None where more is asked than it does."""
    settings = PURE_SAMPLING | generation_kwargs
    shaping = {name: settings[name] for name in ("temperature", "top_k", "top_p")}
    settings |= {name: PURE_SAMPLING[name] for name in shaping}
    if (settings["min_length"] or 0) <= 0:
        settings["min_length"] = PURE_SAMPLING["min_length"]
    return shaping if settings == PURE_SAMPLING and None not in shaping.values() else None


class _RowLimits(StoppingCriteria):
    """Ends each row at its own length, (B,) tokens, padding and query included."""

    def __init__(self, limits: Tensor) -> None:
        self.limits = limits

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        beams = len(input_ids) // len(self.limits)
        return input_ids.shape[1] >= self.limits.repeat_interleave(beams)


def _until_end(row: Tensor, end_ids: set[int]) -> Tensor:
    """`row` up to its first end-of-text token, that included."""
    for position, token in enumerate(row.tolist()):
        if token in end_ids:
            return row[: position + 1]
    return row


def _batches(
    queries: Sequence[Tensor], limits: Sequence[int], size: int, context: int | None
) -> list[slice]:
    """Rows in their order, `size` at most together, none of which leaves the context meanwhile."""
    batches: list[slice] = []
    start = longest = most = 0
    for i, (query, limit) in enumerate(zip(queries, limits, strict=True)):
        longest, most = max(longest, len(query)), max(most, limit)
        if i > start and (i - start == size or (context and longest + most > context)):
            batches.append(slice(start, i))
            start, longest, most = i, len(query), limit
    return [*batches, slice(start, len(queries))] if queries else []


def _pad_left(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Ids (B, T) with the rows at the right, and their mask (B, T)."""
    width = max(row.numel() for row in rows)
    ids = rows[0].new_full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - row.numel() :] = row
        mask[i, width - row.numel() :] = 1
    return ids, mask


def _check_lengths(
    queries: Sequence[Tensor], max_new_tokens: Sequence[int], context: int | None
) -> None:
    for i, (query, new) in enumerate(zip(queries, max_new_tokens, strict=True)):
        if query.numel() == 0:
            raise UsageError(f"query {i} has no tokens: begin it with the bos token, or some text")
        if context is not None and query.numel() + new > context:
            raise UsageError(
                f"query {i} has {query.numel()} tokens; with {new} new ones it exceeds the "
                f"model's context of {context}: shorten it, or lower the number of new tokens"
            )


@contextmanager
def _finite_probabilities() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise not_finite() from error


@contextmanager
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Put `config` in the place of the model's own, which `generate` would mix in."""
    owner = getattr(model, "pretrained_model", model)
    # peft's generate hands its own on to the model below it.
    inner = owner.get_base_model() if hasattr(owner, "get_base_model") else owner
    before, inner_before = owner.generation_config, inner.generation_config
    owner.generation_config = config
    try:
        yield
    finally:
        owner.generation_config = before
        inner.generation_config = inner_before
