"""Every statistic of a run: key, meaning, unit, formula, what is healthy, what to do if it is not.

`PPOTrainer.step` returns those of `STATISTICS`; keys and definitions are TRL 0.11.4's. "Averaged"
means the unweighted mean over the mini-batches of all epochs of the step. `ppo-cli stats --explain`
shows these texts. The measures of evaluations have theirs in `evaluation/quality.py`.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Statistic(NamedTuple):
    """What is known of a statistic.

    Attributes:
        meaning: what it is, in a few words.
        objective: whether it is about the optimised objective.
        is_array: whether it is an array, a number for each sequence or token.
        detail: what does not fit into a few words, in sentences.
        unit: of its value.
        formula: how it is computed, or where it comes from; empty where the meaning says it.
        healthy: what it does in a run that is well; empty where that depends on the run alone.
        remedy: what to do where it does not.
    """

    meaning: str
    objective: bool = False
    is_array: bool = False
    detail: str = ""
    unit: str = ""
    formula: str = ""
    healthy: str = ""
    remedy: str = ""


STATISTICS: dict[str, Statistic] = {
    "objective/kl": Statistic(
        "KL penalty per sequence, before the coefficient",
        objective=True,
        unit="nats per response",
        detail=(
            "It is taken before the update, with the policy that sampled. As an estimate from "
            "samples it may be slightly negative; ppo.kl_penalty=full makes it exact."
        ),
        formula=(
            "log p(policy) - log p(reference) of each token drawn, summed over the response, "
            "mean over the batch (ppo.kl_penalty changes the form)"
        ),
        healthy=(
            "rises from 0 and levels off: at a few nats for short responses, below 2 a token, "
            "near the KL you ask for with --kl; slightly below 0 only at the start"
        ),
        remedy=(
            "too high, or still rising at the end without the score: raise ppo.init_kl_coef, or "
            "set a limit with --kl or run.kl_ceiling; near 0 at the end: lower ppo.init_kl_coef, "
            "or make more steps; far below 0: sample with top_k 0 and top_p 1"
        ),
    ),
    "objective/kl_dist": Statistic(
        "the same of each sequence (B,)",
        objective=True,
        is_array=True,
        unit="nats per response",
    ),
    "objective/logprobs": Statistic(
        "log-probabilities when sampled (B, T-1)",
        objective=True,
        is_array=True,
        unit="nats",
        detail="They are those of the policy that sampled, and 0 outside the response.",
        formula="log p(token) under the policy that sampled it",
    ),
    "objective/ref_logprobs": Statistic(
        "the reference's log-probabilities (B, T-1)",
        objective=True,
        is_array=True,
        unit="nats",
        formula="log p(token) under the reference",
    ),
    "objective/kl_coef": Statistic(
        "KL coefficient that this step used",
        objective=True,
        unit="score per nat",
        formula="ppo.init_kl_coef, moved by ppo.adap_kl_ctrl, --kl or run.kl_ceiling",
        healthy="constant, or settling as KL nears its target",
        remedy="it runs away: the target cannot be reached; choose a KL nearer to that of the run",
    ),
    "objective/entropy": Statistic(
        "minus the log-probability of a response, mean",
        objective=True,
        unit="nats per response",
        detail="Of a whole response.",
        formula="-log p(response) when it was sampled, mean over the batch",
        healthy=(
            "falls slowly, as the policy prefers some responses; it grows with the length of "
            "responses"
        ),
        remedy="falls to a fraction of its start: raise ppo.init_kl_coef, or set ppo.ent_coef",
    ),
    "ppo/loss/policy": Statistic(
        "clipped policy loss, averaged",
        objective=True,
        unit="no unit",
        formula=(
            "mean(max(-A r, -A clip(r, 1 - c, 1 + c))); A advantage, r probability ratio, c "
            "ppo.cliprange (Schulman et al. 2017, equation 7)"
        ),
        healthy=(
            "near 0, below it more often than above: its size says nothing of how good the "
            "policy is"
        ),
        remedy="look at ppo/policy/clipfrac and approxkl instead",
    ),
    "ppo/loss/value": Statistic(
        "clipped value loss before vf_coef, averaged",
        objective=True,
        unit="score squared",
        formula="half the mean of the larger of (v - R)^2 and (clipped v - R)^2; v value, R return",
        healthy="falls in the first steps, then follows the variance of the returns",
        remedy="see ppo/val/var_explained",
    ),
    "ppo/loss/total": Statistic(
        "policy loss + vf_coef x value loss, averaged",
        objective=True,
        unit="no unit",
        formula=(
            "policy loss + ppo.vf_coef x value loss, minus the entropy bonus, plus the KL loss, "
            "where these are on"
        ),
        healthy=(
            "falls at first, with the value loss, then stays small and noisy: scores show "
            "learning, this does not"
        ),
    ),
    "ppo/policy/entropy": Statistic(
        "entropy per token of the policy, averaged",
        objective=True,
        unit="nats per token",
        formula="-sum over the vocabulary of p log p, mean over response tokens",
        healthy="falls slowly; not below 30 % of its start",
        remedy="collapsing: raise ppo.init_kl_coef, set ppo.ent_coef, or take smaller steps",
    ),
    "ppo/policy/approxkl": Statistic(
        "half the squared log-ratio per token, averaged",
        objective=True,
        unit="nats per token",
        detail="It says how far the step moved the policy.",
        formula="half the mean of (log-ratio of new and old policy)^2",
        healthy=(
            "small and steady, about ppo.desired_kl with the adaptive learning rate; over 0.2 "
            "updates are too large"
        ),
        remedy=(
            "lower ppo.learning_rate (or ppo.desired_kl) or ppo.ppo_epochs, or end updates in "
            "time with ppo.max_approx_kl"
        ),
    ),
    "ppo/policy/policykl": Statistic(
        "old minus new log-probability per token, averaged",
        objective=True,
        unit="nats per token",
        formula="mean of old minus new log-probability",
        healthy="near 0; the same limits as approxkl",
        remedy="as for ppo/policy/approxkl",
    ),
    "ppo/policy/clipfrac": Statistic(
        "fraction of tokens with a clipped ratio, averaged",
        objective=True,
        unit="a share, 0 to 1",
        formula="share of tokens where the clipped term of the loss is the larger",
        healthy="well under 30 %, over which updates are too large; 0 is normal for small steps",
        remedy="too high: lower ppo.learning_rate (or ppo.desired_kl) or ppo.ppo_epochs",
    ),
    "ppo/policy/skipped": Statistic(
        "fraction of mini-batches over ratio_threshold, skipped",
        objective=True,
        unit="a share, 0 to 1",
        detail="Nothing is learnt from those.",
        formula="share of mini-batches whose mean ratio exceeds ppo.ratio_threshold",
        healthy="0",
        remedy="lower ppo.learning_rate or ppo.ppo_epochs",
    ),
    "ppo/policy/advantages_mean": Statistic(
        "mean whitened advantage, averaged",
        objective=True,
        unit="standard deviations",
        formula="mean of the advantages after whitening",
        healthy="near 0, by construction",
    ),
    "ppo/policy/advantages": Statistic(
        "advantage of each token in training order",
        objective=True,
        is_array=True,
        unit="standard deviations",
        formula="generalised advantage estimate, whitened (ppo.gamma, ppo.lam)",
    ),
    "ppo/policy/ratio": Statistic(
        "probability ratio of each token in training order",
        objective=True,
        is_array=True,
        unit="no unit",
        formula="p(token) now / p(token) when it was sampled",
        healthy="near 1",
    ),
    "ppo/mean_non_score_reward": Statistic(
        "mean reward per token without the score",
        unit="score per token",
        formula="-KL coefficient x KL penalty, mean over response tokens",
        healthy="slightly below 0; small beside the score",
        remedy="as for objective/kl",
    ),
    "ppo/mean_scores": Statistic(
        "mean score, after scaling and clipping",
        unit="score, scaled",
        formula="mean over the batch of what PPO learns from",
        healthy="rises, then levels off",
        remedy="as for env/reward_mean",
    ),
    "ppo/std_scores": Statistic(
        "standard deviation of the scores",
        unit="score, scaled",
        formula="standard deviation over the batch",
        healthy="well above 0: equal scores teach nothing",
        remedy=(
            "near 0: the reward does not tell responses apart, or the text has collapsed; look "
            "at samples.jsonl"
        ),
    ),
    "ppo/returns/mean": Statistic(
        "mean return, averaged",
        unit="score",
        formula="advantage + value of each token, mean",
        healthy="follows the mean score",
    ),
    "ppo/returns/var": Statistic(
        "variance of the returns, averaged",
        unit="score squared",
        formula="variance over response tokens",
        healthy="above 0",
    ),
    "ppo/val/vpred": Statistic(
        "mean value prediction, averaged",
        unit="score",
        formula="mean output of the value head now",
        healthy="near ppo/returns/mean",
        remedy="see ppo/val/var_explained",
    ),
    "ppo/val/error": Statistic(
        "squared error of the value prediction, averaged",
        unit="score squared",
        formula="mean of (value - return)^2",
        healthy="below ppo/returns/var",
        remedy="see ppo/val/var_explained",
    ),
    "ppo/val/clipfrac": Statistic(
        "fraction of tokens with a clipped value, averaged",
        unit="a share, 0 to 1",
        formula="share of tokens where the clipped value has the larger error",
        healthy="small",
        remedy=(
            "high: raise ppo.cliprange_value, which suits scores of about 1, or scale scores "
            "with ppo.use_score_scaling"
        ),
    ),
    "ppo/val/mean": Statistic(
        "mean value when sampled, averaged",
        unit="score",
        formula="mean output of the value head when the batch was sampled",
        healthy="near ppo/returns/mean",
    ),
    "ppo/val/var": Statistic(
        "variance of the values when sampled, averaged",
        unit="score squared",
        formula="variance of the values",
        healthy="below ppo/returns/var",
    ),
    "ppo/val/var_explained": Statistic(
        "share of the returns' variance that the values explain",
        unit="a share, 1 at best",
        formula="1 - value error / variance of the returns",
        healthy="above 0, once the value head has learnt for some 40 steps; 1 would be perfect",
        remedy="0 or less for long: raise ppo.vf_coef (to 1 at most) or ppo.batch_size",
    ),
    "ppo/learning_rate": Statistic(
        "learning rate of the first parameter group",
        unit="no unit",
        formula="by ppo.lr_scheduler_type",
        healthy="as you set it; adaptive: moves by small factors",
    ),
    "tokens/queries_len_mean": Statistic(
        "mean query length, tokens",
        unit="tokens",
    ),
    "tokens/queries_len_std": Statistic(
        "its standard deviation",
        unit="tokens",
    ),
    "tokens/queries_dist": Statistic(
        "query length of each sample (B,)",
        is_array=True,
        unit="tokens",
    ),
    "tokens/responses_len_mean": Statistic(
        "mean response length, tokens",
        unit="tokens",
        healthy="steady, unless the reward is about length",
        remedy=(
            "shrinks below 70 % of its start: set reward.length_cost with reward.target_length, "
            "or raise ppo.init_kl_coef"
        ),
    ),
    "tokens/responses_len_std": Statistic(
        "its standard deviation",
        unit="tokens",
    ),
    "tokens/responses_dist": Statistic(
        "response length of each sample (B,)",
        is_array=True,
        unit="tokens",
    ),
    "time/ppo/forward_pass": Statistic(
        "seconds: policy and reference before the update",
        unit="seconds",
    ),
    "time/ppo/compute_rewards": Statistic(
        "seconds: rewards",
        unit="seconds",
    ),
    "time/ppo/compute_advantages": Statistic(
        "seconds: advantages",
        unit="seconds",
    ),
    "time/ppo/optimize_step": Statistic(
        "seconds: all epochs; a GPU has started them",
        unit="seconds",
    ),
    "time/ppo/calc_stats": Statistic(
        "seconds: these statistics, and the rest of a GPU's work",
        unit="seconds",
    ),
    "time/ppo/total": Statistic(
        "seconds: the whole step",
        unit="seconds",
    ),
}

# The keys that `ppo-cli train` adds in a run's metrics, except those of evaluations.
RUN_STATISTICS: dict[str, Statistic] = {
    "env/reward_mean": Statistic(
        "mean score: of the classifier, or the sum of the terms",
        unit="score",
        formula="mean over the batch, before scaling, clipping and penalties",
        healthy="rises above its noise, then levels off",
        remedy=(
            "flat: more steps, a higher learning rate (or ppo.desired_kl) or a lower "
            "ppo.init_kl_coef; up while the text gets worse: the reward is being gamed, read "
            "samples.jsonl"
        ),
    ),
    "env/reward_std": Statistic(
        "its standard deviation",
        unit="score",
        formula="standard deviation over the batch",
        healthy="well above 0",
        remedy="as for ppo/std_scores",
    ),
    "env/probability_mean": Statistic(
        "mean probability of the wanted label",
        unit="a share, 0 to 1",
        detail="There is one only with a classifier.",
        formula="mean of the classifier's P(label)",
        healthy="rises towards 1",
        remedy="as for env/reward_mean",
    ),
    "env/score_scale": Statistic(
        "what scores are divided by: their standard deviation",
        unit="score",
        detail="Only with ppo.use_score_scaling.",
        formula=(
            "standard deviation of the scores so far, or of the first ppo.score_scaling_samples"
        ),
        healthy="steady",
        remedy="still moving: set ppo.score_scaling_samples=256",
    ),
    "env/missing_eos_penalty": Statistic(
        "mean penalty for no end before the limit",
        unit="score",
        detail="Only if it is on.",
        formula="reward.missing_eos_penalty where no end token was drawn",
        healthy="falls towards 0",
        remedy="never falls: raise rollout.output_max_length, or set rollout.stop",
    ),
    "env/length_cost": Statistic(
        "mean penalty for the length",
        unit="score",
        detail="Only if it is on.",
        formula=(
            "reward.length_cost for each token by which the length differs from "
            "reward.target_length"
        ),
        healthy="small beside the score",
        remedy="lower reward.length_cost",
    ),
    "env/repetition_cost": Statistic(
        "mean penalty for repeated word pairs",
        unit="score",
        detail="Only if it is on.",
        formula="reward.repetition_cost times the share of repeated word pairs",
        healthy="falls towards 0",
    ),
    "env/shaped_reward_mean": Statistic(
        "mean score minus the penalties",
        unit="score",
        detail="Only if a penalty is on.",
        formula="env/reward_mean minus the penalties",
        healthy="rises with env/reward_mean",
    ),
    "env/rewards/NAME/mean": Statistic(
        "mean of this term, times its weight",
        unit="score",
        detail="These add up to env/reward_mean.",
        formula="weight x score of the term, mean over the batch",
        healthy="no term makes up all of env/reward_mean",
        remedy="change the weights of the terms",
    ),
    "env/rewards/NAME/std": Statistic(
        "its standard deviation",
        unit="score",
        healthy="above 0: a constant term teaches nothing",
    ),
    "env/rewards/NAME/none": Statistic(
        "share of responses to which it does not apply",
        unit="a share, 0 to 1",
        healthy="as often as you expect; 1: the term never applies",
    ),
    "env/rewards/NAME/weight": Statistic(
        "its weight",
        unit="no unit",
    ),
    "eval/rewards/NAME": Statistic(
        "mean of this term, times its last weight",
        unit="score",
        detail="These add up to eval/score.",
    ),
    "sampling/logprob_gap": Statistic(
        "mean gap of engine's and policy's log-probabilities",
        unit="nats per token",
        detail=(
            "Of the tokens that the engine drew. Only with a rollout.engine other than "
            "transformers."
        ),
        formula="mean of |log p(engine) - log p(policy)|",
        healthy="below 0.05",
        remedy="set policy.precision=fp32, or rollout.engine=transformers",
    ),
    "sampling/kl": Statistic(
        "KL of the engine from the policy per token (k3)",
        unit="nats per token",
        detail="Never negative. Only with a rollout.engine other than transformers.",
        formula="mean of exp(-x) - 1 + x, x the gap (k3)",
        healthy="near 0",
        remedy="as for sampling/logprob_gap",
    ),
    "time/sampling": Statistic(
        "seconds: sampling the responses",
        unit="seconds",
    ),
    "time/scoring": Statistic(
        "seconds: the classifier, or all terms",
        unit="seconds",
        healthy="small beside sampling",
        remedy="a larger reward.batch_size, or a faster server",
    ),
    "time/optimising": Statistic(
        "seconds: the PPO step itself",
        unit="seconds",
    ),
    "time/step": Statistic(
        "seconds: the whole step",
        unit="seconds",
    ),
    "perf/tokens_per_second": Statistic(
        "query and response tokens per second, all phases",
        unit="tokens per second",
        formula="query and response tokens / time/step",
        healthy="steady",
        remedy="falls: responses are longer, or the machine is shared",
    ),
    "run/rollbacks": Statistic(
        "number of returns to a checkpoint after divergence",
        unit="a number",
        healthy="0",
        remedy="lower ppo.learning_rate (or ppo.desired_kl)",
    ),
    "time/evaluating": Statistic(
        "seconds: the evaluation, not part of the step",
        unit="seconds",
    ),
}

TERM = re.compile(r"(?<=^env/rewards/).+(?=/(?:mean|std|none|weight)$)|(?<=^eval/rewards/).+$")
"""The name of a reward's term in a key, for which `NAME` stands in `RUN_STATISTICS`."""
