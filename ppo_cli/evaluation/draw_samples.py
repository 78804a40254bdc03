"""Scored samples: the same prompts and random numbers through a model, each response judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ppo_cli.evaluation.samples import Sample
from ppo_cli.models.sampling import Rollout, sample_texts
from ppo_cli.rewards.sentiment import RewardFunction, SentimentReward
from ppo_cli.utils.random_state import RandomStream


def draw_samples(
    model: Any,
    tokenizer: Any,
    queries: Sequence[Any],
    query_texts: Sequence[str],
    *,
    reward: SentimentReward | None,
    **settings: Any,
) -> list[Sample]:
    """Sample a response to each of N queries and judge it.

    Args:
        model: has `generate`; the policy or a plain causal model.
        tokenizer: the model's.
        queries: N tensors of token ids.
        query_texts: N strings, the same queries.
        reward: judges query and response together; None leaves scores out.
        settings: of `draw_rollout`.
    """
    return judge(draw_rollout(model, tokenizer, queries, **settings), query_texts, reward)


def draw_rollout(
    model: Any,
    tokenizer: Any,
    queries: Sequence[Any],
    *,
    max_new_tokens: int,
    seed: int,
    batch_size: int = 64,
    **sampling: Any,
) -> Rollout:
    """Sample a response to each of N queries, with random numbers that `seed` alone decides.

    Args:
        model: has `generate`; the policy or a plain causal model.
        tokenizer: the model's.
        queries: N tensors of token ids.
        max_new_tokens: limit on a response.
        seed: two models asked with one seed draw from the same random numbers.
        batch_size: sequences a forward pass.
        sampling: temperature, top_k, top_p, eos_token_id; pure sampling, to the tokenizer's own
            end-of-text token, without.
    """
    stream = RandomStream(seed, model.device)
    with stream.active():
        return sample_texts(
            model,
            tokenizer,
            queries,
            [max_new_tokens] * len(queries),
            batch_size=batch_size,
            **sampling,
        )


def draw_scores(
    model: Any,
    tokenizer: Any,
    queries: Sequence[Any],
    *,
    count: int,
    max_new_tokens: int,
    seed: int,
    reward: RewardFunction,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda _: None,
    **sampling: Any,
) -> np.ndarray:
    """Scores of `count` responses to each of P queries, (P, count).

    A batch of responses is there at once, however many are asked for.

    Args:
        model, tokenizer, queries, max_new_tokens, seed, batch_size, sampling: as `draw_rollout`.
        count: responses to each query.
        reward: judges query and response together.
        progress: told after each batch how many responses there are.
    """
    rows = [query for query in queries for _ in range(count)]
    scores = np.empty(len(rows))
    stream = RandomStream(seed, model.device)
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        with stream.active():
            limits = [max_new_tokens] * len(batch)
            rollout = sample_texts(model, tokenizer, batch, limits, **sampling)
        scores[start : start + len(batch)] = reward(rollout.texts).numpy()
        progress(start + len(batch))
    return scores.reshape(len(queries), count)


def judge(
    rollout: Rollout, query_texts: Sequence[str], reward: SentimentReward | None
) -> list[Sample]:
    """B queries and responses with their scores; None leaves scores out."""
    scores: list[float] | list[None] = [None] * len(query_texts)
    probabilities: list[float] | list[None] = [None] * len(query_texts)
    if reward is not None:
        logits, chances = reward.scores(rollout.texts)
        scores = (logits if reward.output == "logit" else chances).tolist()
        probabilities = chances.tolist()
    return [
        Sample(*row)
        for row in zip(query_texts, rollout.response_texts, scores, probabilities, strict=True)
    ]
