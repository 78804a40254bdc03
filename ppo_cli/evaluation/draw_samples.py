"""Responses to the same queries with the same random numbers, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ppo_cli.data.chat import Message
from ppo_cli.evaluation.samples import Sample
from ppo_cli.models.sampling import Rollout, sample_responses, to_texts
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.rewards.sentiment import RewardFunction, SentimentReward
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
    limits = [max_new_tokens] * len(queries)
    with RandomStream(seed, model.device).active():
        responses = sample_responses(model, queries, limits, params, batch_size=batch_size)
    return to_texts(tokenizer, queries, responses, messages)


def draw_scores(
    model: Any,
    tokenizer: Any,
    queries: Sequence[Tensor],
    params: SamplingParams,
    *,
    count: int,
    max_new_tokens: int,
    seed: int,
    reward: RewardFunction,
    messages: Sequence[list[Message] | None] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> np.ndarray:
    """Scores of `count` responses to each of P queries, (P, count).

    Only one batch of responses is in memory at a time.

    Args:
        model, tokenizer, queries, params, max_new_tokens, seed, messages: as in `draw_rollout`.
        count: responses to each query.
        reward: scores query and response together.
        progress: called after each batch with the number of responses so far.
    """
    rows = [query for query in queries for _ in range(count)]
    answered = [one for one in messages or [None] * len(queries) for _ in range(count)]
    scores = np.empty(len(rows))
    stream = RandomStream(seed, model.device)
    for start in range(0, len(rows), BATCH_SIZE):
        batch = rows[start : start + BATCH_SIZE]
        with stream.active():
            responses = sample_responses(model, batch, [max_new_tokens] * len(batch), params)
        conversations = answered[start : start + len(batch)]
        texts = to_texts(tokenizer, batch, responses, conversations).texts
        scores[start : start + len(batch)] = reward(texts).numpy()
        progress(start + len(batch))
    return scores.reshape(len(queries), count)


def score_rollout(
    rollout: Rollout, query_texts: Sequence[str], reward: SentimentReward | None
) -> list[Sample]:
    """B queries and responses with their scores; without scores where `reward` is None."""
    scores: list[float] | list[None] = [None] * len(query_texts)
    probabilities: list[float] | list[None] = [None] * len(query_texts)
    if reward is not None:
        logits, chances = reward.scores(rollout.texts)
        scores = (logits if reward.output == "logit" else chances).tolist()
        probabilities = chances.tolist()
    return [
        Sample(*row)
        for row in zip(
            query_texts,
            rollout.response_texts,
            scores,
            probabilities,
            rollout.messages,
            strict=True,
        )
    ]
