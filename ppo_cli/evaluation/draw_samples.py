"""Responses to the same queries with the same random numbers, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo_cli.data.chat import Message
from ppo_cli.evaluation.samples import Sample
from ppo_cli.models.decode_loop import draw_uniforms
from ppo_cli.models.encoder_decoder import is_encoder_decoder
from ppo_cli.models.sampling import Rollout, sample_responses, to_texts
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.rewards.batch import RewardBatch
from ppo_cli.rewards.reward_sum import RewardSum, Scores
from ppo_cli.utils import processes
from ppo_cli.utils.random_state import RandomStream

BATCH_SIZE = 64
"""Sequences in a forward pass."""


def draw_rollout(
    model: Any,
    tokenizer: Any,
    queries: Sequence[Tensor],
    params: SamplingParams,
    *,
    max_new_tokens: int,
    seed: int,
    batch_size: int = BATCH_SIZE,
    messages: Sequence[list[Message] | None] | None = None,
) -> Rollout:
    """Sample a response to each of N queries, with random numbers that `seed` alone decides.

    Each process samples its rows, which are the same whatever the number of processes.

    Args:
        model: the policy or a plain causal model.
        tokenizer: the model's.
        queries: N tensors of token ids, 1-D.
        params: settings of sampling.
        max_new_tokens: limit on a response.
        seed: with equal seeds two models draw from the same random numbers.
        batch_size: sequences in a forward pass.
        messages: the conversations that the queries are made of, None for texts.
    """
    own = processes.rows(len(queries))
    limits = [max_new_tokens] * len(queries)
    with RandomStream(seed, model.device).active():
        uniforms = _uniforms(limits, model.device, batch_size)
        responses = sample_responses(
            model,
            queries[own],
            limits[own],
            params,
            batch_size=batch_size,
            uniforms=None if uniforms is None else uniforms[own],
        )
    return to_texts(
        tokenizer,
        queries[own],
        responses,
        messages[own] if messages else None,
        continues=not is_encoder_decoder(model),
    )


def _uniforms(limits: list[int], device: Any, batch_size: int | None = None) -> Tensor | None:
    """Random numbers for rows of which each process samples a part; None for one process."""
    return draw_uniforms(limits, device, batch_size) if processes.count() > 1 and limits else None


def draw_scores(
    model: Any,
    tokenizer: Any,
    queries: Sequence[Tensor],
    params: SamplingParams,
    *,
    count: int,
    max_new_tokens: int,
    seed: int,
    reward: Any,
    texts: Sequence[str] | None = None,
    columns: Sequence[Mapping[str, Any]] | None = None,
    messages: Sequence[list[Message] | None] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> np.ndarray:
    """Scores of `count` responses to each of P queries, (P, count).

    Only one batch of responses is in memory at a time. Several processes take turns.

    Args:
        model, tokenizer, queries, params, max_new_tokens, seed, messages: as in `draw_rollout`.
        count: responses to each query.
        reward: as in `score_rollout`.
        texts: P texts of the queries; None to decode them.
        columns: P rows of data columns, for rewards.
        progress: called after each batch with the number of responses so far.
    """
    if texts is None:
        texts = tokenizer.batch_decode(list(queries), skip_special_tokens=True)
    owners = [i for i in range(len(queries)) for _ in range(count)]
    scores = np.zeros(len(owners))
    stream = RandomStream(seed, model.device)
    scorer, continues = RewardSum.of(reward), not is_encoder_decoder(model)
    with processes.agreed():
        for turn, start in enumerate(range(0, len(owners), BATCH_SIZE)):
            batch = owners[start : start + BATCH_SIZE]
            rows, limits = [queries[i] for i in batch], [max_new_tokens] * len(batch)
            with stream.active():
                uniforms = _uniforms(limits, model.device)
                if turn % processes.count() != processes.index():
                    continue
                responses = sample_responses(model, rows, limits, params, uniforms=uniforms)
            chats = [messages[i] for i in batch] if messages else None
            found = RewardBatch.of(
                to_texts(tokenizer, rows, responses, chats, continues=continues),
                [texts[i] for i in batch],
                [columns[i] for i in batch] if columns else None,
                params.stop_token_ids,
            )
            scores[start : start + len(batch)] = scorer.score(found).total.numpy()
            progress(start + len(batch))
    of_all: np.ndarray = np.sum(processes.gather(scores), axis=0)
    return of_all.reshape(len(queries), count)


def score_rollout(
    rollout: Rollout,
    query_texts: Sequence[str],
    reward: Any,
    columns: Sequence[Mapping[str, Any]] | None = None,
    end_ids: Collection[int] = (),
) -> list[Sample]:
    """B queries and responses with their scores, at the last weights of the reward.

    Args:
        rollout: the responses.
        query_texts: B texts.
        reward: a `RewardSum`, or a classifier; None leaves scores out.
        columns: B rows of data columns, for rewards.
        end_ids: tokens that end a response, likewise.
    """
    ended = _ended(rollout.responses, end_ids)
    if reward is None:
        rows = zip(query_texts, rollout.response_texts, rollout.messages, ended, strict=True)
        return [
            Sample(query, response, None, None, messages, continues=rollout.continues, ended=end)
            for query, response, messages, end in rows
        ]
    batch = RewardBatch.of(rollout, query_texts, columns, end_ids)
    scorer = RewardSum.of(reward)
    samples = samples_of(batch, scorer.score(batch), has_terms=scorer.is_composed)
    return [replace(sample, ended=end) for sample, end in zip(samples, ended, strict=True)]


def samples_of(batch: RewardBatch, scores: Scores, *, has_terms: bool) -> list[Sample]:
    """B responses with their scores and, with `has_terms`, what each term contributed."""
    count = len(batch.responses)
    chances = [None] * count if scores.probability is None else scores.probability.tolist()
    terms: list[dict[str, float | None]] = [{} for _ in range(count)]
    for name, part in scores.parts.items() if has_terms else ():
        there = zip(part.tolist(), scores.applies[name].tolist(), strict=True)
        for row, (value, applies) in zip(terms, there, strict=True):
            row[name] = value if applies else None
    messages = batch.messages or [None] * count
    rows = zip(
        *(batch.queries, batch.responses, scores.total.tolist(), chances, messages, terms),
        *([None] * count, [batch.continues] * count),
        strict=True,
    )
    return [Sample(*row) for row in rows]


def _ended(responses: Sequence[Tensor], end_ids: Collection[int]) -> list[bool]:
    """Whether the last token of each response is one that ends responses."""
    lengths = [len(response) for response in responses]
    if not sum(lengths):
        return [False] * len(lengths)
    ids = torch.cat(list(responses)).tolist()  # all at once: a GPU is waited for once
    ends = np.cumsum(lengths)
    pairs = zip(lengths, ends, strict=True)
    return [bool(length) and ids[end - 1] in end_ids for length, end in pairs]
