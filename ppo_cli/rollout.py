"""Batched sampling: queries in, responses out, one length limit a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ppo_cli.architecture import reads_packed
from ppo_cli.context import context_length as context_length
from ppo_cli.decoding import decode_responses, not_finite
from ppo_cli.errors import UsageError
from ppo_cli.matmul import fast_matmul
from ppo_cli.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.runtime import modes_kept

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
    """B queries and responses as texts, special tokens left out."""
    whole = [torch.cat([q.to(r.device), r]) for q, r in zip(queries, responses, strict=True)]
    return Rollout(
        queries=list(queries),
        responses=list(responses),
        texts=tokenizer.batch_decode(whole, skip_special_tokens=True),
        response_texts=tokenizer.batch_decode(responses, skip_special_tokens=True),
    )


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
    _check_lengths(queries, max_new_tokens, context_length(model.config))
    if isinstance(eos_token_id, int):
        eos_token_id = [eos_token_id]
    end_ids = set(eos_token_id or ())
    if generation_kwargs.get("num_return_sequences", 1) != 1:
        raise UsageError("num_return_sequences must be 1: repeat the queries instead")
    base = generation_config or GenerationConfig(**PURE_SAMPLING)
    pad = 0 if pad_token_id is None else pad_token_id
    stopping = generation_kwargs.pop("stopping_criteria", None) or []

    plain = None
    if generation_config is None and not stopping and _knows_positions(model):
        plain = _plain_sampling(generation_kwargs)

    responses: list[Tensor] = []
    # Our own loop lets a row that has ended stay where it is; transformers reads on.
    context = None if plain is not None else context_length(model.config)
    with modes_kept(model), fast_matmul():
        model.eval()
        for batch in _batches(queries, max_new_tokens, batch_size or len(queries), context):
            limits = list(max_new_tokens[batch])
            ids, mask = _pad_left(queries[batch], pad)
            if plain is not None:
                responses += decode_responses(model, ids, mask, limits, end_ids, **plain)
                continue
            row_limits = torch.tensor(limits, device=model.device)
            with _generation_config(model, base), _finite_probabilities():
                output = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    stopping_criteria=StoppingCriteriaList(
                        [*stopping, _RowLimits(row_limits + ids.shape[1])]
                    ),
                    max_new_tokens=max(limits),
                    pad_token_id=pad,
                    eos_token_id=eos_token_id,
                    **generation_kwargs,
                )
            for row, limit in zip(output[:, ids.shape[1] :], limits, strict=True):
                responses.append(_until_end(row[:limit], end_ids))
    return responses


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


def _knows_positions(model: Any) -> bool:
    return isinstance(model, AutoModelForCausalLMWithValueHead) and model.allows(reads_packed)


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
