"""Scored samples: the same prompts and random numbers through a model, each response judged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppo_cli.evaluation import Sample
from ppo_cli.reward import SentimentReward
from ppo_cli.rollout import Rollout, sample_texts
from ppo_cli.runtime import RandomStream


def draw_samples(
    model: Any,
    tokenizer: Any,
    queries: Sequence[Any],
    query_texts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int,
    reward: SentimentReward | None,
    batch_size: int = 64,
    **sampling: Any,
) -> list[Sample]:
    """Sample a response to each of N queries, with random numbers that `seed` alone decides.

    Args:
        model: has `generate`; the policy or a plain causal model.
        tokenizer: the model's.
        queries: N tensors of token ids.
        query_texts: N strings, the same queries.
        max_new_tokens: limit on a response.
        seed: two models asked with one seed draw from the same random numbers.
        reward: judges query and response together; None leaves scores out.
        batch_size: sequences a forward pass.
        sampling: temperature, top_k, top_p, eos_token_id; pure sampling, to the tokenizer's own
            end-of-text token, without.
    """
    stream = RandomStream(seed, model.device)
    with stream.active():
        rollout = sample_texts(
            model,
            tokenizer,
            queries,
            [max_new_tokens] * len(queries),
            batch_size=batch_size,
            **sampling,
        )
    return judge(rollout, query_texts, reward)


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
