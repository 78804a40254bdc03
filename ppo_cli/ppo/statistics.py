"""The statistics that `PPOTrainer.step` returns: every key, its meaning, and how to print it.

Keys and definitions are TRL 0.11.4's. "Averaged" means the unweighted mean over the mini-batches of
all epochs of the step.

To add a statistic: compute it in `step_statistics.py` (`minibatch_statistics` for one that is
averaged, `step_statistics` for another), and give its meaning here. Tables, plots and checks follow
from the key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Statistic(NamedTuple):
    """A statistic: its meaning, whether it is about the optimised objective, whether an array.

    What does not fit into a few words is its detail, in sentences.
    """

    meaning: str
    objective: bool = False
    is_array: bool = False
    detail: str = ""

    @property
    def explanation(self) -> str:
        """The meaning, and what else there is to say."""
        meaning = f"{self.meaning}; array" if self.is_array else self.meaning
        return f"{meaning}. {self.detail}" if self.detail else meaning


STATISTICS: dict[str, Statistic] = {
    "objective/kl": Statistic(
        "KL penalty per sequence, before the coefficient",
        True,
        detail="In nats: by default the policy's log-probability minus the reference's, summed "
        "over the tokens of a response, then averaged over the batch. It is taken before the "
        "update, with the policy that sampled. As an estimate from samples it may be slightly "
        "negative; ppo.kl_penalty=full makes it exact.",
    ),
    "objective/kl_dist": Statistic("the same of each sequence (B,)", True, True),
    "objective/logprobs": Statistic(
        "log-probabilities when sampled (B, T-1)",
        True,
        True,
        detail="They are those of the policy that sampled, and 0 outside the response.",
    ),
    "objective/ref_logprobs": Statistic("the reference's log-probabilities (B, T-1)", True, True),
    "objective/kl_coef": Statistic("KL coefficient that this step used", True),
    "objective/entropy": Statistic(
        "minus the log-probability of a response, mean",
        True,
        detail="In nats, over a whole response.",
    ),
    "ppo/loss/policy": Statistic("clipped policy loss, averaged", True),
    "ppo/loss/value": Statistic("clipped value loss before vf_coef, averaged", True),
    "ppo/loss/total": Statistic(
        "policy loss + vf_coef x value loss, averaged",
        True,
        detail="The entropy bonus or the KL loss is part of it where one is on.",
    ),
    "ppo/policy/entropy": Statistic(
        "entropy per token of the policy, averaged", True, detail="In nats."
    ),
    "ppo/policy/approxkl": Statistic(
        "half the squared log-ratio per token, averaged",
        True,
        detail="It says how far the step moved the policy.",
    ),
    "ppo/policy/policykl": Statistic("old minus new log-probability per token, averaged", True),
    "ppo/policy/clipfrac": Statistic("fraction of tokens with a clipped ratio, averaged", True),
    "ppo/policy/skipped": Statistic(
        "fraction of mini-batches over ratio_threshold, skipped",
        True,
        detail="Nothing is learnt from those.",
    ),
    "ppo/policy/advantages_mean": Statistic("mean whitened advantage, averaged", True),
    "ppo/policy/advantages": Statistic("advantage of each token in training order", True, True),
    "ppo/policy/ratio": Statistic("probability ratio of each token in training order", True, True),
    "ppo/mean_non_score_reward": Statistic(
        "mean reward per token without the score",
        detail="That is minus the KL coefficient times the KL penalty.",
    ),
    "ppo/mean_scores": Statistic("mean score, after scaling and clipping"),
    "ppo/std_scores": Statistic("standard deviation of the scores"),
    "ppo/returns/mean": Statistic("mean return, averaged"),
    "ppo/returns/var": Statistic("variance of the returns, averaged"),
    "ppo/val/vpred": Statistic("mean value prediction, averaged"),
    "ppo/val/error": Statistic("squared error of the value prediction, averaged"),
    "ppo/val/clipfrac": Statistic("fraction of tokens with a clipped value, averaged"),
    "ppo/val/mean": Statistic("mean value when sampled, averaged"),
    "ppo/val/var": Statistic("variance of the values when sampled, averaged"),
    "ppo/val/var_explained": Statistic(
        "share of the returns' variance that the values explain",
        detail="1 is perfect, 0 or less is useless.",
    ),
    "ppo/learning_rate": Statistic("learning rate of the first parameter group"),
    "tokens/queries_len_mean": Statistic("mean query length, tokens"),
    "tokens/queries_len_std": Statistic("its standard deviation"),
    "tokens/queries_dist": Statistic("query length of each sample (B,)", is_array=True),
    "tokens/responses_len_mean": Statistic("mean response length, tokens"),
    "tokens/responses_len_std": Statistic("its standard deviation"),
    "tokens/responses_dist": Statistic("response length of each sample (B,)", is_array=True),
    "time/ppo/forward_pass": Statistic("seconds: policy and reference before the update"),
    "time/ppo/compute_rewards": Statistic("seconds: rewards"),
    "time/ppo/compute_advantages": Statistic("seconds: advantages"),
    "time/ppo/optimize_step": Statistic("seconds: all epochs; a GPU has started them"),
    "time/ppo/calc_stats": Statistic("seconds: these statistics, and the rest of a GPU's work"),
    "time/ppo/total": Statistic("seconds: the whole step"),
}


def is_array(key: str) -> bool:
    """Whether a statistic of `PPOTrainer.step` is an array; unknown ones are not."""
    return key in STATISTICS and STATISTICS[key].is_array


# The keys that `ppo-cli train` adds in a run's metrics, except those of evaluations.
RUN_STATISTICS: dict[str, Statistic] = {
    "env/reward_mean": Statistic("mean score: of the classifier, or the sum of the terms"),
    "env/reward_std": Statistic("its standard deviation"),
    "env/probability_mean": Statistic(
        "mean probability of the wanted label", detail="There is one only with a classifier."
    ),
    "env/score_scale": Statistic(
        "what scores are divided by: their standard deviation",
        detail="Only with ppo.use_score_scaling.",
    ),
    "env/missing_eos_penalty": Statistic(
        "mean penalty for no end before the limit", detail="Only if it is on."
    ),
    "env/length_cost": Statistic("mean penalty for the length", detail="Only if it is on."),
    "env/repetition_cost": Statistic(
        "mean penalty for repeated word pairs", detail="Only if it is on."
    ),
    "env/shaped_reward_mean": Statistic(
        "mean score minus the penalties", detail="Only if a penalty is on."
    ),
    "env/rewards/NAME/mean": Statistic(
        "mean of this term, times its weight", detail="These add up to env/reward_mean."
    ),
    "env/rewards/NAME/std": Statistic("its standard deviation"),
    "env/rewards/NAME/none": Statistic("share of responses to which it does not apply"),
    "env/rewards/NAME/weight": Statistic("its weight"),
    "eval/rewards/NAME": Statistic(
        "mean of this term, times its last weight", detail="These add up to eval/score."
    ),
    "sampling/logprob_gap": Statistic(
        "mean gap of engine's and policy's log-probabilities",
        detail="Absolute differences of the tokens that the engine drew, nats per token. Only with "
        "a rollout.engine other than transformers.",
    ),
    "sampling/kl": Statistic(
        "KL of the engine from the policy per token (k3)",
        detail="In nats, and never negative. Only with a rollout.engine other than transformers.",
    ),
    "time/sampling": Statistic("seconds: sampling the responses"),
    "time/scoring": Statistic("seconds: the classifier, or all terms"),
    "time/optimising": Statistic("seconds: the PPO step itself"),
    "time/step": Statistic("seconds: the whole step"),
    "perf/tokens_per_second": Statistic("query and response tokens per second, all phases"),
    "run/rollbacks": Statistic("number of returns to a checkpoint after divergence"),
    "time/evaluating": Statistic("seconds: the evaluation, not part of the step"),
}


TERM = re.compile(r"(?<=^env/rewards/).+(?=/(?:mean|std|none|weight)$)|(?<=^eval/rewards/).+$")
"""The name of a reward's term in a key, for which `NAME` stands in `RUN_STATISTICS`."""


def scalars(stats: Mapping[str, Any]) -> dict[str, float]:
    """The statistics that are single numbers."""
    return {k: v for k, v in stats.items() if isinstance(v, (int, float))}


GROUPS: dict[bool, dict[str, tuple[str, ...]]] = {
    True: {
        "Objective Statistics": ("objective/",),
        "PPO Losses (Related to Minimizing Objective Function)": ("ppo/loss/",),
        "PPO Policy Statistics": ("ppo/policy/",),
    },
    False: {
        "Reward and Value Function Estimation": (
            "env/",
            "ppo/mean_",
            "ppo/std_",
            "ppo/returns/",
            "ppo/val/",
        ),
        "Evaluation on Held-out Prompts": ("eval/",),
        "Optimizer": ("ppo/learning_rate",),
        "Token Lengths": ("tokens/",),
        "Sampling Engine": ("sampling/",),
        "Time Statistics": ("time/", "perf/"),
        "Run": ("run/",),
    },
}


def grouped(
    stats: Mapping[str, Any],
    related_to_objective: bool,
    evaluation: Mapping[str, Statistic] | None = None,
) -> dict[str, list[tuple[str, float, str]]]:
    """Scalar statistics under their headings: (key, value, meaning) of each.

    Args:
        stats: the statistics; arrays are left out.
        related_to_objective: which half of them.
        evaluation: explains the keys of evaluations, in their order.
    """
    numbers = scalars(stats)
    known = STATISTICS | RUN_STATISTICS | dict(evaluation or {})
    order = list(known)

    def place(key: str) -> tuple[int, str]:
        key = TERM.sub("NAME", key)
        return (order.index(key) if key in known else len(order), key)

    def meaning(key: str) -> str:
        found = known.get(TERM.sub("NAME", key))
        return found.meaning if found else ""

    groups: dict[str, list[tuple[str, float, str]]] = {}
    for title, prefixes in GROUPS[related_to_objective].items():
        rows = [
            (key, numbers[key], meaning(key))
            for key in sorted(numbers, key=place)
            if key.startswith(prefixes)
        ]
        if rows:
            groups[title] = rows
    return groups


def print_ppo_stats(
    stats: Mapping[str, Any],
    related_to_objective: bool = False,
    write: Callable[[str], Any] = print,
) -> None:
    """Print the statistics of `step()` under headings, one per line.

    Args:
        stats: the statistics; arrays are left out.
        related_to_objective: True for those of the optimised losses, False for the others: rewards,
            values, lengths, times.
        write: called with each line.
    """
    write("PPO Training Statistics")
    for title, rows in grouped(stats, related_to_objective).items():
        write("")
        write(f"{title}:")
        for key, value, meaning in rows:
            label = meaning.partition(",")[0] or key
            shown = f"{value:.6g}" if math.isfinite(value) else str(value)
            write(f"  {label[:1].upper()}{label[1:]} ({key}): {shown}")
