"""Signs that a run goes wrong: each looks at the steps so far and says what was seen, or None.

The limits lie well apart from what healthy runs of the embedded model reach and well within what
spoilt ones do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean, median

from ppo_cli.config.schema import RunConfig

BEGINNING = 3
"""Steps that later ones are measured by."""
MEMORY = 20
"""Newest steps that are remembered."""
FEWEST_AT_END = 2 * MEMORY
"""A shorter run is not judged by how it ended."""
PURE = {"top_k": 0, "top_p": 1.0}
NEGATIVE_KL = -1.0  # nats per response
CLIPPED = 0.3
LEAP = 0.2  # half the squared log-ratio, per token
KL_PER_TOKEN = 2.0  # nats
ENTROPY_LEFT = 0.3  # of the beginning's
LENGTH_LEFT = 0.4  # of the beginning's
NO_SPREAD = 0.01  # of the beginning's
UNLIKELY = (0.85, 1.2)  # surprise per token, as a share of the entropy
ENOUGH_TOKENS = 2000
CLIMB, STANDSTILL = 1.2, 0.1
GAIN = 0.25  # of the scores' standard deviation at the beginning
FAR = 10.0  # nats per response

Row = Mapping[str, float]
READ = (
    "objective/kl", "objective/entropy", "ppo/policy/approxkl", "ppo/policy/entropy",
    "ppo/policy/clipfrac", "ppo/val/var_explained", "ppo/returns/var", "ppo/std_scores",
    "tokens/responses_len_mean", "env/reward_mean", "env/reward_std",
)  # fmt: skip
"""What is read of every step."""


@dataclass
class History:
    """The steps seen so far, the first and the newest: not all, where a record of them was lost.

    Attributes:
        step: number of the newest.
        count: how many were seen.
        first: the first `BEGINNING` steps.
        recent: the newest `MEMORY` steps.
        skipping: steps in which a mini-batch was skipped.
    """

    step: int = 0
    count: int = 0
    first: list[Row] = field(default_factory=list)
    recent: deque[Row] = field(default_factory=lambda: deque(maxlen=MEMORY))
    skipping: int = 0

    def add(self, row: Row) -> None:
        """Take in the next step."""
        self.step = int(row.get("step", self.step + 1))
        self.count += 1
        if len(self.first) < BEGINNING:
            self.first.append(row)
        self.recent.append(row)
        self.skipping += row.get("ppo/policy/skipped", 0.0) > 0

    def beginning(self, key: str) -> float:
        """Mean of a statistic over the first steps."""
        return fmean(row[key] for row in self.first)

    def newest(self, key: str, count: int) -> list[float]:
        """A statistic in the newest `count` steps, oldest first; fewer where there are none."""
        return [row[key] for row in self.recent][-count:]


def sampling_advice(config: RunConfig) -> str | None:
    """Said before the first step where responses will not be samples of the policy itself."""
    changed = _impure(config)
    if not changed:
        return None
    pure = ", ".join(f"{name}={PURE[name]:g}" for name in changed)
    return (
        f"with {_settings(changed)} responses are not samples of the policy itself: KL is biased "
        f"and may become negative. Train with {pure}; `generate` samples as you like afterwards"
    )


def _impure(config: RunConfig) -> dict[str, float]:
    """Those settings of sampling that change the distribution."""
    values = {name: getattr(config.rollout, name) for name in PURE}
    return {name: value for name, value in values.items() if value != PURE[name]}


def _settings(values: Mapping[str, float]) -> str:
    return ", ".join(f"rollout.{name}={value:g}" for name, value in values.items())


def negative_kl(history: History, config: RunConfig) -> str | None:
    """KL below 0 over three steps, which only samples of another distribution explain."""
    kl = fmean(history.newest("objective/kl", 3))
    if kl >= NEGATIVE_KL:
        return None
    remedy = "Sampling is pure, so precision is the likely cause: set policy.precision=fp32"
    if changed := _impure(config):
        pure = ", ".join(f"{name}={PURE[name]:g}" for name in changed)
        remedy = f"{_settings(changed)} is the cause: train with {pure}"
    return (
        f"KL is {kl:.2f} nats per response. Over samples of the policy itself it would not be "
        f"below 0, and PPO is rewarded for driving it further down. {remedy}"
    )


def foreign_samples(history: History, config: RunConfig) -> str | None:
    """Only where sampling is pure by its settings; for the others there is a warning at the start.

    Of samples of the policy the mean of minus log-probability is the entropy.
    """
    leap = max(history.newest("ppo/policy/approxkl", MEMORY))
    lengths = history.newest("tokens/responses_len_mean", MEMORY)
    entropies = history.newest("ppo/policy/entropy", MEMORY)
    expected = sum(length * each for length, each in zip(lengths, entropies, strict=True))
    is_known = sum(lengths) * config.ppo.batch_size >= ENOUGH_TOKENS and min(entropies) > 0.1
    if _impure(config) or leap > LEAP / 2 or not is_known:
        return None
    share = sum(history.newest("objective/entropy", MEMORY)) / expected
    if UNLIKELY[0] <= share <= UNLIKELY[1]:
        return None
    return (
        f"responses hold {share:.0%} of the surprise that samples of the policy would: "
        "they are drawn from another distribution than PPO computes with, and KL is biased. "
        "Precision is the likely cause: set policy.precision=fp32"
    )


def large_updates(history: History, config: RunConfig) -> str | None:
    """Clip fraction or approximate KL over their limits in two of three steps."""
    clipped = median(history.newest("ppo/policy/clipfrac", 3))
    leap = median(history.newest("ppo/policy/approxkl", 3))
    if clipped <= CLIPPED and leap <= LEAP:
        return None
    return (
        f"updates are too large: {clipped:.0%} of the tokens are clipped, and half the squared "
        f"log-ratio per token is {leap:.2g} (ppo/policy/clipfrac and approxkl; usual are under "
        f"{CLIPPED:.0%} and {LEAP:g}). PPO trusts small steps alone: {_smaller_steps(config)}, or "
        "end a step's updates in time with ppo.max_approx_kl=0.1"
    )


def skips(history: History, config: RunConfig) -> str | None:
    """Mini-batches over the ratio threshold."""
    skipped = history.recent[-1].get("ppo/policy/skipped", 0.0)
    if not skipped:
        return None
    return (
        f"{skipped:.0%} of the mini-batches were skipped: their mean probability ratio is over "
        f"ppo.ratio_threshold ({config.ppo.ratio_threshold:g}), so what they hold is not learnt. "
        f"The policy moves too far in a step: {_smaller_steps(config)}"
    )


def value_head(history: History, config: RunConfig) -> str | None:
    """After the first `MEMORY` steps, which an untrained head needs.

    On the embedded model, at about the score that the default (vf_coef 0.5) reaches with KL 8.5: 15
    with vf_coef 0, 9.5 with 0.01, whether lambda is 1 or 0.95; but 13 with 5, at a lower score: the
    policy gets little of the clipped gradient. One seed each.
    """
    explained = median(history.newest("ppo/val/var_explained", MEMORY))
    variance = median(history.newest("ppo/returns/var", MEMORY))
    moves = abs(fmean(history.newest("objective/kl", MEMORY))) > STANDSTILL
    has_other = config.ppo.responses_per_query > 1  # the mean of a query's other scores
    if explained > 0 or variance < NO_SPREAD * history.beginning("ppo/returns/var"):
        return None
    if has_other or not moves:  # a policy that stands still has another fault
        return None
    coefficient = config.ppo.vf_coef
    remedy = (
        f"Raise ppo.vf_coef ({coefficient:g}), to 1 at most, or" if coefficient < 1 else "Raise"
    )
    return (
        f"the value head explains nothing of the returns ({explained:.2f} of their variance over "
        f"{MEMORY} steps): advantages are noisier than they need be, and the score costs more KL. "
        f"{remedy} ppo.batch_size ({config.ppo.batch_size})"
    )


def entropy(history: History, config: RunConfig) -> str | None:
    """Entropy at a fraction of what it was."""
    start = history.beginning("ppo/policy/entropy")
    now = fmean(history.newest("ppo/policy/entropy", 3))
    if now >= ENTROPY_LEFT * start:
        return None
    return (
        f"entropy fell from {start:.2f} to {now:.2f} nats per token: the policy writes less and "
        f"less that differs, and finds nothing new. {_hold_back(config)}; an entropy bonus "
        f"(ppo.ent_coef, {config.ppo.ent_coef:g}) works against it, too"
    )


def far_away(history: History, config: RunConfig) -> str | None:
    """More KL per token than a text that is still language costs."""
    kl = fmean(history.newest("objective/kl", 3))
    each = kl / max(fmean(history.newest("tokens/responses_len_mean", 3)), 1)
    if each <= KL_PER_TOKEN:
        return None
    return (
        f"KL is {kl:.0f} nats per response, {each:.1f} per token: the policy writes what the "
        f"reference would hardly ever, so the text may be broken whatever its score. Read "
        f"samples.jsonl. {_hold_back(config)}"
    )


def equal_scores(history: History, config: RunConfig) -> str | None:
    """Scores that do not differ, from the start or by now."""
    start = history.beginning("ppo/std_scores")
    largest = max(history.newest("ppo/std_scores", 5))
    if config.ppo.batch_size == 1 or largest > max(NO_SPREAD * start, 1e-6):
        return None
    if largest >= start:
        return (
            "every response gets the same score, so there is nothing to learn from: choose "
            "another reward.model, or check what reward.sentiment and score_clip make of it"
        )
    return (
        f"scores hardly differ any more (standard deviation {largest:.2g}, {start:.2g} at first): "
        "there is nothing left to learn, and what still moves the policy is noise. Stop here, or "
        "fewer run.steps"
    )


def short(history: History, config: RunConfig) -> str | None:
    """Responses at a fraction of the length they had."""
    start = history.beginning("tokens/responses_len_mean")
    now = fmean(history.newest("tokens/responses_len_mean", 3))
    if now >= LENGTH_LEFT * start:
        return None
    return (
        f"responses shrank from {start:.1f} to {now:.1f} tokens: ending early pays. "
        f"reward.length_cost with reward.target_length={round(start)} takes the gain out of it. "
        f"{_hold_back(config)}"
    )


def no_end(history: History, config: RunConfig) -> str | None:
    """The penalty for not ending falls on every response."""
    full = config.reward.missing_eos_penalty
    if not full or min(history.newest("env/missing_eos_penalty", 5)) < 0.99 * full:
        return None
    return (
        "all responses end at their limit alone, so reward.missing_eos_penalty is the same for "
        "each and teaches nothing: raise rollout.output_max_length, or say with rollout.stop what "
        "ends a response"
    )


def count_skips(history: History, config: RunConfig) -> str | None:
    """In how many steps mini-batches were skipped."""
    if not history.skipping:
        return None
    return f"in {history.skipping} of {history.count} steps mini-batches were skipped"


def climbing(history: History, config: RunConfig) -> str | None:
    """KL rising over the last steps, with the score or without."""
    half = MEMORY // 2
    kl = history.newest("objective/kl", MEMORY)
    scores = history.newest("env/reward_mean", MEMORY)
    before, after = fmean(kl[:half]), fmean(kl[half:])
    if after < max(CLIMB * before, before + 1):
        return None
    gain = fmean(scores[half:]) - fmean(scores[:half])
    spread = history.beginning("env/reward_std")
    seen = f"KL was still climbing at the end ({before:.1f} to {after:.1f} over {MEMORY} steps)"
    if gain > STANDSTILL * spread:
        return f"{seen}, and so was the score: more run.steps will gain more (--resume --steps)"
    return f"{seen}, the score was not: distance that buys nothing. {_hold_back(config)}"


def no_gain(history: History, config: RunConfig) -> str | None:
    """A score that did not rise, near the reference or far from it."""
    kl = fmean(history.newest("objective/kl", MEMORY))
    gain = fmean(history.newest("env/reward_mean", MEMORY)) - history.beginning("env/reward_mean")
    if gain > GAIN * history.beginning("env/reward_std"):
        return None
    if abs(kl) <= STANDSTILL:
        return (
            f"the policy hardly moved: KL is {kl:.2g} nats per response after {history.step} "
            f"steps. Raise {config.step_size}, or give more run.steps"
        )
    if kl > FAR:
        return (
            f"the score did not rise ({gain:+.2f}), yet the policy is {kl:.0f} nats per response "
            f"from its reference: it got lost. Train anew: {_smaller_steps(config)}, or raise "
            f"ppo.init_kl_coef ({config.ppo.init_kl_coef:g})"
        )
    return None


def _smaller_steps(config: RunConfig) -> str:
    epochs = f" or ppo.ppo_epochs ({config.ppo.ppo_epochs})" if config.ppo.ppo_epochs > 1 else ""
    return f"lower {config.step_size}{epochs}"


def _hold_back(config: RunConfig) -> str:
    return f"Raise ppo.init_kl_coef ({config.ppo.init_kl_coef:g}) or lower {config.step_size}"
