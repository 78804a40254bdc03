"""Diagnostics of a run: each rule reads the statistics so far and says what to do about a fault.

A rule warns once a run. The thresholds lie outside what healthy runs of the embedded model reach
and inside what faulty ones do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, median

from ppo_cli.config.schema import RunConfig

FIRST_STEPS = 3  # later steps are compared with the mean of these
RECENT_STEPS = 20  # a rule looks back on at most so many steps
MIN_STEPS_AT_END = 2 * RECENT_STEPS  # a shorter run is not judged by its end
MIN_KL = -1.0  # nats per response
MAX_KL_PER_TOKEN = 2.0  # nats
MAX_KL_WITHOUT_GAIN = 10.0  # nats per response, of a run whose score did not rise
MOST_OFF_BUDGET = 0.15  # of KL, relative to the budget
MIN_KL_MOVED = 0.1  # nats per response; below it the policy has not moved
MIN_KL_GROWTH = 1.2  # ratio of the mean KL of the last steps to that of the steps before
MAX_APPROX_KL = 0.2  # half the mean squared log-ratio, per token
MAX_CLIP_FRACTION = 0.3  # of the tokens
SURPRISE_RANGE = (0.85, 1.2)  # mean of minus log-probability over mean entropy
MIN_SURPRISE_TOKENS = 2000  # fewer tokens do not show whether SURPRISE_RANGE is kept
MIN_SURPRISE_ENTROPY = 0.1  # nats per token, likewise
MAX_LOGPROB_GAP = 0.05  # nats per token, between the sampling engine and the policy
MIN_ENTROPY_SHARE = 0.3  # of the entropy in the first steps
MIN_LENGTH_SHARE = 0.7  # of the length in the first steps
MIN_LENGTH_SHARE_ASKED = 0.4  # likewise, of a run whose reward has a term for the length
MIN_SPREAD_SHARE = 0.01  # of the scores' standard deviation, or returns' variance, likewise
MIN_GAIN = 0.25  # in the scores' standard deviations of the first steps, over the whole run
MIN_LATE_GAIN = 0.1  # likewise, over the last steps
PURE_SAMPLING = {"top_k": 0, "top_p": 1.0}

Row = Mapping[str, float]
REQUIRED = (
    "objective/kl", "objective/entropy", "ppo/policy/approxkl", "ppo/policy/entropy",
    "ppo/policy/clipfrac", "ppo/val/var_explained", "ppo/returns/var", "ppo/std_scores",
    "tokens/responses_len_mean", "env/reward_mean", "env/reward_std",
)  # fmt: skip
"""The statistics that the rules read in every step."""


@dataclass
class History:
    """The steps that the rules look at. Steps whose record was lost are missing.

    Attributes:
        step: number of the newest step.
        count: number of steps seen.
        first: the first `FIRST_STEPS` steps.
        recent: the newest `RECENT_STEPS` steps.
        skipped_steps: number of steps in which a mini-batch was skipped.
    """

    step: int = 0
    count: int = 0
    first: list[Row] = field(default_factory=list)
    recent: deque[Row] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    skipped_steps: int = 0

    def add(self, row: Row) -> None:
        """Append the next step."""
        self.step = int(row.get("step", self.step + 1))
        self.count += 1
        if len(self.first) < FIRST_STEPS:
            self.first.append(row)
        self.recent.append(row)
        self.skipped_steps += row.get("ppo/policy/skipped", 0.0) > 0

    def at_first(self, key: str) -> float:
        """Mean of a statistic over the first steps."""
        return fmean(row[key] for row in self.first)

    def newest(self, key: str, count: int) -> list[float]:
        """A statistic in the newest `count` steps, oldest first; fewer where there are fewer."""
        return [row[key] for row in self.recent][-count:]

    def fall_below(self, key: str, share: float) -> tuple[float, float] | None:
        """Mean over the first and over the last three steps, if less than `share` is left of it."""
        start, now = self.at_first(key), fmean(self.newest(key, 3))
        return None if now >= share * start else (start, now)


class Diagnostics:
    """Follows the statistics of a run and returns each warning once.

    Args:
        config: the run's; messages name its settings in their remedies.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._history = History()
        self._reported: set[str] = set()

    def check_step(self, row: Row) -> list[str]:
        """Add a step's statistics; return the new warnings."""
        self._history.add(row)
        return [f"step {self._history.step}: {text}" for text in self._new_warnings(RULES)]

    def replay(self, rows: Iterable[Row]) -> None:
        """Start again from recorded steps, whose warnings were shown before."""
        self._history = History()
        for row in rows:
            if all(key in row for key in REQUIRED):
                self.check_step(row)

    def check_end(self) -> list[str]:
        """Return the warnings about a run that has made all of its steps."""
        return self._new_warnings(FINAL_RULES)

    def _new_warnings(self, rules: Iterable[Rule]) -> list[str]:
        warnings = []
        for rule in rules:
            if rule.name in self._reported or self._history.count < rule.min_steps:
                continue
            if (warning := rule.check(self._history, self._config)) is not None:
                self._reported.add(rule.name)
                warnings.append(warning)
        return warnings


def stronger_kl_penalty(config: RunConfig) -> str:
    """The remedy for a policy that moves too far from its reference."""
    if (budget := config.run.kl_budget) is not None:
        return f"lower run.kl_budget ({budget:g}) or {config.step_size}"
    return f"raise ppo.init_kl_coef ({config.ppo.init_kl_coef:g}) or lower {config.step_size}"


def sampling_warning(config: RunConfig) -> str | None:
    """Warning, before the first step, that responses will not be samples of the policy itself."""
    changed = _impure_sampling(config)
    if not changed:
        return None
    return (
        f"with {_settings(changed)} responses are not samples of the policy itself: KL is biased "
        f"and may become negative. Train with {_pure(changed)}; `generate` samples as you like "
        "afterwards"
    )


def budget_warning(kl: float, config: RunConfig) -> str | None:
    """Warning, at the end, that a run with a budget of KL ended elsewhere.

    Args:
        kl: of the weights that are kept, exact, nats per response.
        config: the run's.
    """
    budget = config.run.kl_budget
    if budget is None or abs(kl / budget - 1) <= MOST_OFF_BUDGET:
        return None
    seen = f"KL is {kl:.2f}, not within {MOST_OFF_BUDGET:.0%} of the budget of {budget:g}"
    if kl < budget:
        return (
            f"{seen}: the run was too short to use it up, or no more score is to be had. Give more "
            f"run.steps ({config.run.steps}), or raise {config.step_size}"
        )
    return (
        f"{seen}: steps move the policy further than the KL penalty takes it back. Lower "
        f"{config.step_size}, or give more run.steps ({config.run.steps})"
    )


def _negative_kl(history: History, config: RunConfig) -> str | None:
    """Mean KL of three steps below 0. Only samples of another distribution explain it."""
    kl = fmean(history.newest("objective/kl", 3))
    if kl >= MIN_KL:
        return None
    remedy = "Sampling is pure, so precision is the likely cause: set policy.precision=fp32"
    if changed := _impure_sampling(config):
        remedy = f"{_settings(changed)} is the cause: train with {_pure(changed)}"
    return (
        f"KL is {kl:.2f} nats per response. Over samples of the policy itself it would not be "
        f"below 0, and PPO is rewarded for driving it further down. {remedy}"
    )


def _foreign_samples(history: History, config: RunConfig) -> str | None:
    """Samples of another distribution than the policy's, although sampling is pure.

    The mean of minus log-probability over samples of a policy is the policy's entropy.
    """
    approx_kl = max(history.newest("ppo/policy/approxkl", RECENT_STEPS))
    lengths = history.newest("tokens/responses_len_mean", RECENT_STEPS)
    entropies = history.newest("ppo/policy/entropy", RECENT_STEPS)
    expected = sum(length * each for length, each in zip(lengths, entropies, strict=True))
    if _impure_sampling(config) or approx_kl > MAX_APPROX_KL / 2:
        return None
    tokens = sum(lengths) * config.ppo.batch_size
    if tokens < MIN_SURPRISE_TOKENS or min(entropies) <= MIN_SURPRISE_ENTROPY:
        return None
    share = sum(history.newest("objective/entropy", RECENT_STEPS)) / expected
    if SURPRISE_RANGE[0] <= share <= SURPRISE_RANGE[1]:
        return None
    return (
        f"minus the log-probability of the responses is {share:.0%} of the policy's entropy: they "
        "are drawn from another distribution than PPO computes with, and KL is biased. "
        "Precision is the likely cause: set policy.precision=fp32"
    )


def _engine_gap(history: History, config: RunConfig) -> str | None:
    """A sampling engine whose distribution is not the policy's."""
    gap = history.recent[-1].get("sampling/logprob_gap", 0.0)
    if gap <= MAX_LOGPROB_GAP:
        return None
    return (
        f"the log-probabilities of the sampling engine are {gap:.2g} nats per token from the "
        f"policy's (sampling/logprob_gap; usual are under {MAX_LOGPROB_GAP:g}): its samples are "
        "not quite the policy's, and KL is biased. Its precision, or a feature of the model that "
        f"{config.rollout.engine} lacks, is the likely cause: set policy.precision=fp32, or "
        "rollout.engine=transformers"
    )


def _large_updates(history: History, config: RunConfig) -> str | None:
    """Clip fraction or approximate KL above their limits in two of three steps."""
    clip_fraction = median(history.newest("ppo/policy/clipfrac", 3))
    approx_kl = median(history.newest("ppo/policy/approxkl", 3))
    if clip_fraction <= MAX_CLIP_FRACTION and approx_kl <= MAX_APPROX_KL:
        return None
    return (
        f"updates are too large: {clip_fraction:.0%} of the tokens are clipped, and half the "
        f"squared log-ratio per token is {approx_kl:.2g} (ppo/policy/clipfrac and approxkl; usual "
        f"are under {MAX_CLIP_FRACTION:.0%} and {MAX_APPROX_KL:g}). PPO is valid for small steps "
        f"only: {_smaller_steps(config)}, or end a step's updates in time with "
        "ppo.max_approx_kl=0.1"
    )


def _skipped(history: History, config: RunConfig) -> str | None:
    """Mini-batches over the ratio threshold."""
    skipped = history.recent[-1].get("ppo/policy/skipped", 0.0)
    if not skipped:
        return None
    return (
        f"{skipped:.0%} of the mini-batches were skipped: their mean probability ratio is over "
        f"ppo.ratio_threshold ({config.ppo.ratio_threshold:g}), so nothing is learnt from them. "
        f"The policy moves too far in a step: {_smaller_steps(config)}"
    )


def _value_head(history: History, config: RunConfig) -> str | None:
    """A value head that explains nothing after the first steps, which an untrained one needs.

    Measured on the embedded model, at about the score that the default (vf_coef 0.5) reaches with
    KL 8.5: KL is 15 with vf_coef 0, 9.5 with 0.01, whether lambda is 1 or 0.95; but 13 with 5, at
    a lower score, as the policy gets little of the clipped gradient. One seed each.
    """
    explained = median(history.newest("ppo/val/var_explained", RECENT_STEPS))
    variance = median(history.newest("ppo/returns/var", RECENT_STEPS))
    moves = abs(fmean(history.newest("objective/kl", RECENT_STEPS))) > MIN_KL_MOVED
    has_other_baseline = config.ppo.responses_per_query > 1  # mean score of the query's others
    if explained > 0 or variance < MIN_SPREAD_SHARE * history.at_first("ppo/returns/var"):
        return None
    if has_other_baseline or not moves:  # a policy that does not move has another fault
        return None
    coefficient = config.ppo.vf_coef
    remedy = (
        f"Raise ppo.vf_coef ({coefficient:g}), to 1 at most, or" if coefficient < 1 else "Raise"
    )
    return (
        f"the value head explains nothing of the returns ({explained:.2f} of their variance over "
        f"{RECENT_STEPS} steps): advantages are noisier than they need be, and the score costs "
        f"more KL. {remedy} ppo.batch_size ({config.ppo.batch_size})"
    )


def _entropy(history: History, config: RunConfig) -> str | None:
    """Entropy at a fraction of its value in the first steps."""
    fall = history.fall_below("ppo/policy/entropy", MIN_ENTROPY_SHARE)
    if fall is None:
        return None
    start, now = fall
    return (
        f"entropy fell from {start:.2f} to {now:.2f} nats per token: responses become alike, and "
        f"the policy no longer explores. Remedy: {stronger_kl_penalty(config)}; an entropy bonus "
        f"(ppo.ent_coef, {config.ppo.ent_coef:g}) works against it, too"
    )


def _far_from_reference(history: History, config: RunConfig) -> str | None:
    """More KL per token than text that is still language costs."""
    kl = fmean(history.newest("objective/kl", 3))
    per_token = kl / max(fmean(history.newest("tokens/responses_len_mean", 3)), 1)
    if per_token <= MAX_KL_PER_TOKEN:
        return None
    return (
        f"KL is {kl:.0f} nats per response, {per_token:.1f} per token: the responses are very "
        "unlikely under the reference, so the text may be broken whatever its score. Read "
        f"samples.jsonl. Remedy: {stronger_kl_penalty(config)}"
    )


def _equal_scores(history: History, config: RunConfig) -> str | None:
    """Scores that do not differ, from the start or any more."""
    start = history.at_first("ppo/std_scores")
    largest = max(history.newest("ppo/std_scores", 5))
    if config.ppo.batch_size == 1 or largest > max(MIN_SPREAD_SHARE * start, 1e-6):
        return None
    if largest >= start:
        remedy = "choose another reward.model, or check reward.sentiment and ppo.score_clip"
        if config.reward.terms is not None:
            remedy = "check what the terms of the reward give in samples.jsonl, and ppo.score_clip"
        return f"every response gets the same score, so there is nothing to learn from: {remedy}"
    return (
        f"scores hardly differ any more (standard deviation {largest:.2g}, {start:.2g} at first): "
        "there is nothing left to learn, and noise moves the policy from here on. Stop here, or "
        "train with fewer run.steps"
    )


def _short_responses(history: History, config: RunConfig) -> str | None:
    """Responses at a fraction of their length in the first steps."""
    reward = config.reward
    asked = reward.length_cost or reward.missing_eos_penalty
    asked = asked or any(term.cost in ("length", "missing_eos") for term in reward.terms or ())
    share = MIN_LENGTH_SHARE_ASKED if asked else MIN_LENGTH_SHARE
    fall = history.fall_below("tokens/responses_len_mean", share)
    if fall is None:
        return None
    start, now = fall
    return (
        f"responses shrank from {start:.1f} to {now:.1f} tokens: ending early is rewarded. "
        f"Remedy: reward.length_cost with reward.target_length={round(start)}, or "
        f"{stronger_kl_penalty(config)}"
    )


def _no_end_of_text(history: History, config: RunConfig) -> str | None:
    """The penalty for a missing end of text falls on every response."""
    penalty = config.reward.missing_eos_penalty
    if not penalty or min(history.newest("env/missing_eos_penalty", 5)) < 0.99 * penalty:
        return None
    return (
        "every response ends only at its length limit, so reward.missing_eos_penalty is the same "
        "for all and teaches nothing: raise rollout.output_max_length, or set in rollout.stop what "
        "ends a response"
    )


def _count_of_skips(history: History, config: RunConfig) -> str | None:
    """Number of steps in which mini-batches were skipped."""
    if not history.skipped_steps:
        return None
    return f"in {history.skipped_steps} of {history.count} steps mini-batches were skipped"


def _climbing_kl(history: History, config: RunConfig) -> str | None:
    """KL that still rises over the last steps, with the score or without."""
    half = RECENT_STEPS // 2
    kl = history.newest("objective/kl", RECENT_STEPS)
    scores = history.newest("env/reward_mean", RECENT_STEPS)
    before, after = fmean(kl[:half]), fmean(kl[half:])
    if after < max(MIN_KL_GROWTH * before, before + 1):
        return None
    gain = fmean(scores[half:]) - fmean(scores[:half])
    growth = f"{before:.1f} to {after:.1f} over {RECENT_STEPS} steps"
    if gain > MIN_LATE_GAIN * history.at_first("env/reward_std"):
        return (
            f"KL was still rising at the end ({growth}), and so was the score: more run.steps will "
            "gain more (--resume --steps)"
        )
    return (
        f"KL was still rising at the end ({growth}), the score was not: the policy moves away from "
        f"its reference for nothing. Remedy: {stronger_kl_penalty(config)}"
    )


def _no_gain(history: History, config: RunConfig) -> str | None:
    """A score that did not rise, near the reference or far from it."""
    kl = fmean(history.newest("objective/kl", RECENT_STEPS))
    score = fmean(history.newest("env/reward_mean", RECENT_STEPS))
    gain = score - history.at_first("env/reward_mean")
    if gain > MIN_GAIN * history.at_first("env/reward_std"):
        return None
    if abs(kl) <= MIN_KL_MOVED:
        return (
            f"the policy hardly moved: KL is {kl:.2g} nats per response after {history.step} "
            f"steps. Raise {config.step_size}, or give more run.steps"
        )
    if kl > MAX_KL_WITHOUT_GAIN:
        return (
            f"the score did not rise ({gain:+.2f}), yet the policy is {kl:.0f} nats per response "
            f"from its reference. Train anew: {_smaller_steps(config)}, or raise "
            f"ppo.init_kl_coef ({config.ppo.init_kl_coef:g})"
        )
    return None


def _impure_sampling(config: RunConfig) -> dict[str, float]:
    """The settings of sampling that change the distribution."""
    values = {name: getattr(config.rollout, name) for name in PURE_SAMPLING}
    return {name: value for name, value in values.items() if value != PURE_SAMPLING[name]}


def _settings(values: Mapping[str, float]) -> str:
    return ", ".join(f"rollout.{name}={value:g}" for name, value in values.items())


def _pure(names: Iterable[str]) -> str:
    return ", ".join(f"{name}={PURE_SAMPLING[name]:g}" for name in names)


def _smaller_steps(config: RunConfig) -> str:
    epochs = f" or ppo.ppo_epochs ({config.ppo.ppo_epochs})" if config.ppo.ppo_epochs > 1 else ""
    return f"lower {config.step_size}{epochs}"


@dataclass(frozen=True)
class Rule:
    """One fault to look for.

    Attributes:
        name: identifies the rule.
        min_steps: number of steps that the rule needs.
        check: history and configuration -> the warning; None where there is no fault.
    """

    name: str
    min_steps: int
    check: Callable[[History, RunConfig], str | None]


RULES = (
    Rule("negative KL", 3, _negative_kl),
    Rule("foreign samples", RECENT_STEPS, _foreign_samples),
    Rule("engine gap", 1, _engine_gap),
    Rule("skips", 1, _skipped),
    Rule("large updates", 3, _large_updates),
    Rule("far away", 3, _far_from_reference),
    Rule("value head", 2 * RECENT_STEPS, _value_head),
    Rule("entropy", 2 * FIRST_STEPS, _entropy),
    Rule("equal scores", 5, _equal_scores),
    Rule("short", 2 * FIRST_STEPS, _short_responses),
    Rule("no end", 5, _no_end_of_text),
)
FINAL_RULES = (
    Rule("count of skips", 2, _count_of_skips),
    Rule("climbing", MIN_STEPS_AT_END, _climbing_kl),
    Rule("no gain", MIN_STEPS_AT_END, _no_gain),
)
