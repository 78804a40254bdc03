"""Potentials: the classifier's scores of unfinished texts, before each response token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_cli.models.sampling import Rollout
from ppo_cli.rewards.sentiment import RewardFunction


def potentials(
    rollout: Rollout, tokenizer: Any, reward: RewardFunction, every: int
) -> list[Tensor]:
    """Scores of each query with the beginnings of its response, for `PPOTrainer.step`.

    Of an answer in a conversation, and of an encoder-decoder's response, its own beginnings are
    scored, without the query.

    Args:
        rollout: B queries and responses.
        tokenizer: the policy's.
        reward: scores texts.
        every: the text is scored before response tokens 0, `every`, 2 x `every` ...; the tokens
            between have the last of these scores.

    Returns:
        B tensors, (response_length,): the score before each response token.
    """
    prefixes, lengths = [], []
    for query, response, messages in zip(
        rollout.queries, rollout.responses, rollout.messages, strict=True
    ):
        before = query.tolist() if messages is None and rollout.continues else []
        ids, start = before + response.tolist(), len(before)
        prefixes += [ids[:end] for end in range(start, len(ids), every)]
        lengths.append(len(response))
    if not prefixes:
        return [torch.zeros(0) for _ in lengths]
    scores = reward(tokenizer.batch_decode(prefixes, skip_special_tokens=True))
    parts = scores.split([-(-length // every) for length in lengths])
    return [
        part.repeat_interleave(every)[:length] for part, length in zip(parts, lengths, strict=True)
    ]
