"""Batched sampling: queries in, responses out, one length limit for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppo_cli.data.prompts import BROKEN
from ppo_cli.errors import UsageError
from ppo_cli.kernels.patches import fast_layers
from ppo_cli.kernels.switch import is_enabled
from ppo_cli.models.capabilities import reads_packed, rope_switch
from ppo_cli.models.context import context_length, context_used
from ppo_cli.models.decode_encoded import decode_encoded
from ppo_cli.models.decode_loop import LogitsCallback, decode_cached, decode_uncached
from ppo_cli.models.encoder_decoder import is_encoder_decoder
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.models.self_check import SamplingMethod, choose_sampling_method
from ppo_cli.models.transformers_generate import GenerateSettings, generate_responses
from ppo_cli.utils.device import modes_kept


@dataclass(frozen=True)
class Rollout:
    """B queries and the responses sampled to them.

    Attributes:
        queries: B tensors of token ids, each 1-D and of its own length.
        responses: B tensors of token ids, 1-D, the end-of-text token included where it was drawn.
        texts: B strings to be scored, query and response decoded together; of a conversation, and
            of an encoder-decoder, the response alone.
        response_texts: B strings, the responses alone.
        messages: B conversations that were answered; None for a text.
        continues: whether responses to texts continue them; those of an encoder-decoder do not.
    """

    queries: list[Tensor]
    responses: list[Tensor]
    texts: list[str]
    response_texts: list[str]
    messages: list[list[dict[str, Any]] | None]
    continues: bool = True


def to_texts(
    tokenizer: Any,
    queries: Sequence[Tensor],
    responses: Sequence[Tensor],
    messages: Sequence[list[dict[str, Any]] | None] | None = None,
    *,
    continues: bool = True,
) -> Rollout:
    """B queries and responses as texts, without special tokens.

    Arguments are those of `Rollout`. A response's text is what it adds to its query's: many
    tokenizers drop a space at the beginning of what they decode, and the last character of a query
    may end in the response.
    """
    answered = [*(messages if messages is not None else [None] * len(queries))]
    if not continues:
        texts = tokenizer.batch_decode(list(responses), skip_special_tokens=True)
        return Rollout(list(queries), list(responses), texts, texts, answered, continues)
    whole = [torch.cat([q.to(r.device), r]) for q, r in zip(queries, responses, strict=True)]
    texts = tokenizer.batch_decode(whole, skip_special_tokens=True)
    starts = tokenizer.batch_decode(list(queries), skip_special_tokens=True)
    added = [
        _added(start, text)
        if text.startswith(start.rstrip(BROKEN))
        else tokenizer.decode(response, skip_special_tokens=True)
        for start, text, response in zip(starts, texts, responses, strict=True)
    ]
    return Rollout(
        queries=list(queries),
        responses=list(responses),
        # A template's text, such as the names of roles, is nobody's opinion; nor is the user's.
        texts=[
            text if conversation is None else response
            for text, response, conversation in zip(texts, added, answered, strict=True)
        ],
        response_texts=added,
        messages=answered,
    )


def _added(start: str, text: str) -> str:
    """What `text` has after `start`, a broken character at whose end it may have completed."""
    return text[len(start if text.startswith(start) else start.rstrip(BROKEN)) :]


@torch.no_grad()
def sample_responses(
    model: Any,
    queries: Sequence[Tensor],
    max_new_tokens: Sequence[int],
    settings: SamplingParams | GenerateSettings,
    *,
    batch_size: int | None = None,
    uniforms: Tensor | None = None,
) -> list[Tensor]:
    """Sample one response to each query, with dropout off.

    Queries are padded on the left and masked, with position ids counted from their first token,
    so a response does not depend on what else is in the batch (up to rounding). For the encoder of
    an encoder-decoder they are padded on the right.

    Args:
        model: has `generate`, `device`, `config` and `generation_config`, as `transformers` does.
        queries: B tensors of token ids, 1-D, none empty.
        max_new_tokens: B limits; a response ends there or after its first stop token.
        settings: how tokens are drawn. The model's own `generation_config` has no effect.
        batch_size: sequences in a forward pass; None for all at once.
        uniforms: (B, R) random numbers in [0, 1) that decide the tokens, R the largest limit; None
            draws them. transformers' `generate` draws by itself, seeded by the first of them.

    Returns:
        B tensors of token ids, 1-D, on the model's device, without a decoder's start token.

    Raises:
        UsageError: an empty query, or one that with its response exceeds the model's context.
        ModelError: no method of sampling gives the model's own distribution.
        NumericalError: a probability is not finite.
    """
    queries = [query.to(model.device) for query in queries]
    _check_lengths(model, queries, max_new_tokens)
    if not queries:
        return []
    if not _may_take_own_loop(model):
        settings = _for_generate(settings)
    method = _method(model, settings)
    responses: list[Tensor] = []
    # Our own loop leaves a row that has ended where it is; transformers reads on.
    in_step = method == "loop" or is_encoder_decoder(model)
    context = None if in_step else context_length(model)
    with modes_kept(model), fast_layers():
        model.eval()
        for batch in _batches(queries, max_new_tokens, batch_size or len(queries), context):
            limits = list(max_new_tokens[batch])
            own = None if uniforms is None else uniforms[batch]
            responses += _sample_batch(
                model, queries[batch], limits, settings, method, uniforms=own
            )
    return responses


def check_sampling(model: Any, pad_token_id: int | None) -> SamplingMethod:
    """The fastest method of sampling that is right for a model. The self-check is made once.

    Raises:
        UsageError: the model is not causal: its logits depend on later tokens.
        ModelError: no method gives the logits of a plain forward pass of each text alone.
    """
    params = SamplingParams(pad_token_id=pad_token_id)
    return _method(model, params if _may_take_own_loop(model) else _for_generate(params))


def _may_take_own_loop(model: Any) -> bool:
    """Whether `SamplingParams` may do without transformers' `generate`."""
    return isinstance(model, AutoModelForCausalLMWithValueHead)


def _for_generate(settings: SamplingParams | GenerateSettings) -> GenerateSettings:
    return GenerateSettings.of(settings) if isinstance(settings, SamplingParams) else settings


def _method(model: Any, settings: SamplingParams | GenerateSettings) -> SamplingMethod:
    """The fastest method that is right; our own loops follow nothing but `SamplingParams`."""
    methods: list[SamplingMethod] = ["padded", "equal", "uncached"]
    if isinstance(settings, SamplingParams):
        methods = ["padded", "equal", "whole"]
        if is_enabled("decode_loop") and _has_loop(model):
            methods.insert(0, "loop")
    pad = settings.pad_token_id or 0
    pure: SamplingParams | GenerateSettings = SamplingParams(pad_token_id=pad)
    if isinstance(settings, GenerateSettings):
        pure = GenerateSettings(pad_token_id=pad)

    def sample(
        method: SamplingMethod, queries: list[Tensor], limits: list[int], callback: LogitsCallback
    ) -> list[Tensor]:
        with fast_layers():
            return _sample_batch(model, queries, limits, pure, method, callback)

    return choose_sampling_method(model, methods, sample, pad_token_id=pad)


def _has_loop(policy: Any) -> bool:
    if is_encoder_decoder(policy):
        return not policy.adds_tokens
    return bool(policy.allows(reads_packed))


def _sample_batch(
    model: Any,
    queries: Sequence[Tensor],
    limits: list[int],
    settings: SamplingParams | GenerateSettings,
    method: SamplingMethod,
    on_logits: LogitsCallback | None = None,
    uniforms: Tensor | None = None,
) -> list[Tensor]:
    """A response to each of a batch's queries.

    Rows that exceed the length at which the model changes its positions are read whole, those
    of equal length together.
    """
    switch = rope_switch(model.config)
    for_long: SamplingMethod = "whole" if isinstance(settings, SamplingParams) else "uncached"
    groups: dict[tuple[SamplingMethod, int], list[int]] = {}
    for i, (query, limit) in enumerate(zip(queries, limits, strict=True)):
        is_long = switch is not None and len(query) + limit > switch
        row_method = for_long if is_long else method
        length = len(query) if row_method in ("equal", "uncached", "whole") else 0
        groups.setdefault((row_method, length), []).append(i)
    responses: list[Tensor] = [queries[0].new_empty(0)] * len(queries)
    for (row_method, _), rows in groups.items():
        found = _sample_group(
            model,
            [queries[i] for i in rows],
            [limits[i] for i in rows],
            settings,
            row_method,
            None if on_logits is None else _of_rows(on_logits, rows),
            None if uniforms is None else uniforms[rows],
        )
        for i, response in zip(rows, found, strict=True):
            responses[i] = response
    return responses


def _sample_group(
    model: Any,
    queries: Sequence[Tensor],
    limits: list[int],
    settings: SamplingParams | GenerateSettings,
    method: SamplingMethod,
    on_logits: LogitsCallback | None,
    uniforms: Tensor | None,
) -> list[Tensor]:
    """A response to each of the queries, which one method samples together."""
    to_encoder = is_encoder_decoder(model)
    ids, mask = _padded(queries, settings.pad_token_id or 0, on_the_left=not to_encoder)
    if isinstance(settings, SamplingParams) and method in ("loop", "whole") and to_encoder:
        return decode_encoded(
            model, ids, mask, limits, settings, on_logits, uniforms, use_cache=method == "loop"
        )
    if isinstance(settings, SamplingParams) and method == "loop":
        return decode_cached(model, ids, mask, limits, settings, on_logits, uniforms)
    if isinstance(settings, SamplingParams) and method == "whole":
        return decode_uncached(model, ids, limits, settings, on_logits, uniforms)
    with _seeded_by(uniforms):
        return generate_responses(
            model,
            ids,
            mask,
            limits,
            _for_generate(settings),
            use_cache=method != "uncached",
            on_logits=on_logits,
        )


@contextmanager
def _seeded_by(uniforms: Tensor | None) -> Iterator[None]:
    """Seed torch inside the block by the first of some random numbers, if there are any."""
    if uniforms is None:
        yield
        return
    devices = [uniforms.device] if uniforms.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(uniforms.flatten()[0].item() * 2**24))  # float32 has 24 bits
        yield


def _of_rows(on_logits: LogitsCallback, rows: list[int]) -> LogitsCallback:
    """`on_logits` for some `rows` of a batch, called with their indices in the batch."""
    indices = torch.tensor(rows)
    return lambda chosen, logits: on_logits(indices[chosen.cpu()], logits)


def _batches(
    queries: Sequence[Tensor], limits: Sequence[int], size: int, context: int | None
) -> list[slice]:
    """Rows in their order, at most `size` together, none of which exceeds the context meanwhile."""
    batches: list[slice] = []
    start = longest = most = 0
    for i, (query, limit) in enumerate(zip(queries, limits, strict=True)):
        longest, most = max(longest, len(query)), max(most, limit)
        if i > start and (i - start == size or (context and longest + most > context)):
            batches.append(slice(start, i))
            start, longest, most = i, len(query), limit
    return [*batches, slice(start, len(queries))] if queries else []


def _padded(rows: Sequence[Tensor], pad: int, *, on_the_left: bool) -> tuple[Tensor, Tensor]:
    """Ids (B, T) with the rows at one side, and their mask (B, T)."""
    width = max(row.numel() for row in rows)
    ids = rows[0].new_full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - row.numel(), width) if on_the_left else slice(row.numel())
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def _check_lengths(model: Any, queries: Sequence[Tensor], max_new_tokens: Sequence[int]) -> None:
    context = context_length(model)
    for i, (query, new) in enumerate(zip(queries, max_new_tokens, strict=True)):
        if query.numel() == 0:
            raise UsageError(f"query {i} has no tokens: begin it with the bos token, or some text")
        if context is not None and context_used(model, query.numel(), new) > context:
            raise UsageError(
                f"query {i} has {query.numel()} tokens; with {new} new ones it exceeds the "
                f"model's context of {context}: shorten it, or lower the number of new tokens"
            )
