"""Penalties: subtracted from the classifier's scores before PPO sees them.

Each term is one number per response, computed from its tokens or its text, in units of the score:

    penalised score = score - missing_eos_penalty x [no end token before the length limit]
                            - length_cost x |tokens - target_length|
                            - repetition_cost x (share of repeated word pairs)

All are off by default. Sources: the first is `missing_eos_penalty` of TRL's later trainers; the
second is the simplest length penalty, because DAPO's ramp before a common limit ("soft overlong
punishment", https://arxiv.org/abs/2503.14476) needs one limit for all responses; the third is
`seq-rep-2` of Welleck et al. 2020 (https://arxiv.org/abs/1908.04319), over words.

To add a term: its weight is a field of `RewardConfig`, `score_penalties` computes it under the same
name, and `RUN_STATISTICS` in `ppo/statistics.py` says what `env/NAME` means.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ppo_cli.config.reward import RewardConfig
from ppo_cli.errors import UsageError
from ppo_cli.rewards.batch import RewardBatch
from ppo_cli.utils.ngrams import repetition


def check_penalties(settings: RewardConfig, end_ids: Collection[int]) -> None:
    """Raise `UsageError` where a missing end is penalised, and no token can end a response."""
    is_term = any(term.cost == "missing_eos" for term in settings.terms or ())
    if (settings.missing_eos_penalty or is_term) and not end_ids:
        raise UsageError(
            "reward.missing_eos_penalty: neither tokenizer nor model has an end-of-text token, so "
            "no response ends by itself: name end texts with rollout.stop, or set the penalty to 0"
        )


def without_end(responses: Sequence[Tensor], end_ids: Collection[int]) -> Tensor:
    """(B,) 1 where a response's last token is not in `end_ids`, else 0."""
    lasts = [int(response[-1]) if len(response) else None for response in responses]
    return torch.tensor([float(last not in end_ids) for last in lasts])


def length_gap(responses: Sequence[Tensor], target: int) -> Tensor:
    """(B,) absolute difference of each response's length and `target`, tokens."""
    return torch.tensor([float(abs(len(response) - target)) for response in responses])


def repeated_pairs(texts: Sequence[str]) -> Tensor:
    """(B,) share of each text's word pairs that occur earlier in it; 0 for fewer than two words."""
    return torch.tensor([repetition([text]) for text in texts])


class CostReward:
    """One of these costs as a term of a sum: 0 or less.

    Args:
        cost: `length`, `repetition` or `missing_eos`.
        target: length (tokens) without a cost.
    """

    def __init__(self, cost: str, target: int = 0) -> None:
        self._cost = cost
        self._target = target

    def __call__(self, batch: RewardBatch) -> Tensor:
        """Minus the cost of each response (B,)."""
        if self._cost == "length":
            return -length_gap(batch.token_ids, self._target)
        if self._cost == "repetition":
            return -repeated_pairs(batch.responses)
        return -without_end(batch.token_ids, batch.end_ids)


def score_penalties(
    responses: Sequence[Tensor],
    texts: Sequence[str],
    end_ids: Collection[int],
    settings: RewardConfig,
) -> dict[str, Tensor]:
    """The terms that are on: name -> (B,), none below 0.

    Args:
        responses: B tensors of token ids, 1-D.
        texts: B strings, the responses decoded.
        end_ids: tokens that end a response.
        settings: the weights of the terms; 0 for off.
    """
    terms: dict[str, Tensor] = {}
    if settings.missing_eos_penalty:
        open_ended = without_end(responses, end_ids)
        terms["missing_eos_penalty"] = settings.missing_eos_penalty * open_ended
    if settings.length_cost:
        gap = length_gap(responses, settings.target_length)
        terms["length_cost"] = settings.length_cost * gap
    if settings.repetition_cost:
        terms["repetition_cost"] = settings.repetition_cost * repeated_pairs(texts)
    return terms


def penalised(scores: Tensor, penalties: Mapping[str, Tensor]) -> Tensor:
    """Scores (B,) minus all penalties."""
    return scores - sum(penalties.values(), torch.zeros_like(scores))


def penalty_statistics(scores: Tensor, penalties: Mapping[str, Tensor]) -> dict[str, float]:
    """Means of the terms and of the penalised scores, for a run's metrics; empty without terms."""
    if not penalties:
        return {}
    means = {f"env/{name}": value.mean().item() for name, value in penalties.items()}
    return means | {"env/shaped_reward_mean": penalised(scores, penalties).mean().item()}
