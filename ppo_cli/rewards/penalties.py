"""Reward shaping: what is taken from the classifier's scores before PPO sees them.

Each term is a number a response, worked out from its tokens or its text, in units of the score:

    shaped score = score - missing_eos_penalty x [ended by its limit alone]
                         - length_cost x |tokens - target_length|
                         - repetition_cost x (share of word pairs that were there before)

All are off by default. Sources: the first is `missing_eos_penalty` of TRL's later trainers; the
second is the simplest of its kind, for DAPO's ramp before a common limit ("soft overlong
punishment", https://arxiv.org/abs/2503.14476) has no meaning where each response has a limit of its
own; the third is `seq-rep-2` of Welleck et al. 2020 (https://arxiv.org/abs/1908.04319), over words.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ppo_cli.config.schema import RewardConfig
from ppo_cli.errors import UsageError
from ppo_cli.utils.ngrams import repetition


def check_terms(settings: RewardConfig, end_ids: Collection[int]) -> None:
    """Raise `UsageError` where responses shall be fined for not ending, and none can end."""
    if settings.missing_eos_penalty and not end_ids:
        raise UsageError(
            "reward.missing_eos_penalty: neither tokenizer nor model has an end-of-text token, so "
            "no response ends by itself: say with rollout.stop what does, or set the penalty to 0"
        )


def without_end(responses: Sequence[Tensor], end_ids: Collection[int]) -> Tensor:
    """(B,) 1 where a response's last token is none of `end_ids`, else 0."""
    lasts = [int(response[-1]) if len(response) else None for response in responses]
    return torch.tensor([float(last not in end_ids) for last in lasts])


def length_gap(responses: Sequence[Tensor], target: int) -> Tensor:
    """(B,) tokens between each response's length and `target`, whichever is longer."""
    return torch.tensor([float(abs(len(response) - target)) for response in responses])


def repeated_pairs(texts: Sequence[str]) -> Tensor:
    """(B,) share of each text's word pairs that it contained already; 0 for up to one word."""
    return torch.tensor([repetition([text]) for text in texts])


def penalties(
    responses: Sequence[Tensor],
    texts: Sequence[str],
    end_ids: Collection[int],
    settings: RewardConfig,
) -> dict[str, Tensor]:
    """What each term that is on takes from the scores: its name -> (B,), none below 0.

    Args:
        responses: B tensors of token ids, 1-D.
        texts: B strings, the responses decoded.
        end_ids: tokens that end a response.
        settings: says which terms are on, and their size.
    """
    taken: dict[str, Tensor] = {}
    if settings.missing_eos_penalty:
        open_ended = without_end(responses, end_ids)
        taken["missing_eos_penalty"] = settings.missing_eos_penalty * open_ended
    if settings.length_cost:
        gap = length_gap(responses, settings.target_length)
        taken["length_cost"] = settings.length_cost * gap
    if settings.repetition_cost:
        taken["repetition_cost"] = settings.repetition_cost * repeated_pairs(texts)
    return taken


def shaped(scores: Tensor, taken: Mapping[str, Tensor]) -> Tensor:
    """Scores (B,) less what the terms take."""
    return scores - sum(taken.values(), torch.zeros_like(scores))


def shaping_statistics(scores: Tensor, taken: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean of each term and of the shaped scores, for a run's metrics; nothing without a term."""
    if not taken:
        return {}
    means = {f"env/{name}": value.mean().item() for name, value in taken.items()}
    return means | {"env/shaped_reward_mean": shaped(scores, taken).mean().item()}
