"""Diagnostics: on synthetic statistics, each with one fault, and on real steps."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ppo_cli.config.loading import load_config
from ppo_cli.config.schema import RunConfig
from ppo_cli.errors import DivergenceError
from ppo_cli.ppo.statistics import RUN_STATISTICS, STATISTICS
from ppo_cli.training.build import build_training
from ppo_cli.training.diagnostics import (
    FINAL_RULES,
    RECENT_STEPS,
    REQUIRED,
    RULES,
    Diagnostics,
    budget_warning,
    sampling_warning,
)
from ppo_cli.training.divergence import check_numbers, check_texts, check_weights
from tests.conftest import SMALL_RUN, make_batch, make_policy, make_trainer

STEPS = 60
Row = dict[str, float]
Change = Callable[[int], Row]


def healthy(step: int) -> Row:
    """Statistics roughly as the embedded default has them, with an alternating term."""
    done, wave = min(step / 30, 1.0), (-1) ** step
    length, entropy = 17 - 2 * done, 1 - 0.4 * done
    return {
        "objective/kl": 8.5 * done + 0.3 * wave,
        "objective/entropy": length * entropy * (1 + 0.05 * wave),
        "ppo/policy/entropy": entropy,
        "ppo/policy/approxkl": 0.02 + 0.01 * wave,
        "ppo/policy/clipfrac": 0.03,
        "ppo/policy/skipped": 0.0,
        "ppo/std_scores": 1.7 - 1.2 * done,
        "ppo/returns/var": 3.0 - 2.6 * done,
        "ppo/val/var_explained": 0.25 * done - 0.05,
        "tokens/responses_len_mean": length,
        "env/reward_mean": 0.2 + 1.8 * done + 0.1 * wave,
        "env/reward_std": 1.7 - 1.2 * done,
        "env/missing_eos_penalty": 0.3,
    }


def advice(config: RunConfig, change: Change, steps: int = STEPS) -> tuple[list[str], list[str]]:
    """Warnings during and after a healthy run whose steps are changed by `change`."""
    diagnostics = Diagnostics(config)
    rows = [{**healthy(step), **change(step)} for step in range(1, steps + 1)]
    said = [text for row in rows for text in diagnostics.check_step(row)]
    return said, diagnostics.check_end()


def configuration(*assignments: str) -> RunConfig:
    return load_config(SMALL_RUN, assignments=assignments)


def only_in(key: str, steps: range, value: float) -> Change:
    return lambda step: {key: value} if step in steps else {}


def shrunk(length: float) -> Row:
    """Statistics of shorter responses, with the same KL per token."""
    return {
        "tokens/responses_len_mean": length,
        "objective/entropy": 0.6 * length,
        "objective/kl": 0.5 * length,
    }


ALWAYS = range(STEPS + 1)
AFTER = range(31, STEPS + 1)
# Name: settings, a fault, a change that is no fault, parts of the message.
FAULTS: dict[str, tuple[list[str], Change, Change, list[str]]] = {
    "negative KL by sampling": (
        ["rollout.top_p=0.9", "rollout.top_k=5"],
        only_in("objective/kl", range(7, 12), -1.5),
        only_in("objective/kl", ALWAYS, -0.9),
        ["step 9:", "KL is -1.50", "rollout.top_k=5, rollout.top_p=0.9", "top_k=0, top_p=1"],
    ),
    "negative KL with pure sampling": (
        [],
        only_in("objective/kl", range(7, 12), -1.5),
        only_in("objective/kl", range(7, 8), -1.5),
        ["step 9:", "KL is -1.50", "policy.precision=fp32"],
    ),
    "foreign samples": (
        [],
        lambda step: {"objective/entropy": 0.75 * healthy(step)["objective/entropy"]},
        lambda step: {"objective/entropy": 0.93 * healthy(step)["objective/entropy"]},
        ["step 20:", "is 75% of the policy's entropy", "policy.precision=fp32"],
    ),
    "engine gap": (
        ["rollout.engine=paged"],
        only_in("sampling/logprob_gap", range(9, 30), 0.08),
        only_in("sampling/logprob_gap", ALWAYS, 0.05),
        ["step 9:", "are 0.08 nats per token", "that paged lacks", "rollout.engine=transformers"],
    ),
    "skips": (
        ["ppo.ratio_threshold=7"],
        only_in("ppo/policy/skipped", range(9, 30), 0.25),
        lambda step: {},
        ["step 9:", "25% of the mini-batches", "ratio_threshold (7)", "ppo.learning_rate (0.001)"],
    ),
    "clipped": (
        ["ppo.ppo_epochs=8"],
        only_in("ppo/policy/clipfrac", range(9, 30), 0.4),
        only_in("ppo/policy/clipfrac", range(9, 10), 0.4),
        ["step 10:", "40% of the tokens", "ppo.ppo_epochs (8)"],
    ),
    "leaps": (
        ["ppo.ppo_epochs=1"],
        only_in("ppo/policy/approxkl", ALWAYS, 0.5),
        only_in("ppo/policy/approxkl", ALWAYS, 0.15),
        ["step 3:", "log-ratio per token is 0.5", "lower ppo.learning_rate (0.001)"],
    ),
    "far away": (
        [],
        only_in("objective/kl", AFTER, 60.0),
        only_in("objective/kl", AFTER, 9.5),
        ["step 32:", "nats per response", "samples.jsonl", "ppo.init_kl_coef (0.07)"],
    ),
    "value head": (
        [],
        only_in("ppo/val/var_explained", ALWAYS, -0.3),
        only_in("ppo/val/var_explained", range(30), -5.0),
        ["step 40:", "-0.30", "ppo.vf_coef (0.5)"],
    ),
    "entropy": (
        [],
        lambda step: {"ppo/policy/entropy": 0.2, "objective/entropy": 3} if step in AFTER else {},
        lambda step: {"ppo/policy/entropy": 0.5, "objective/entropy": 7.5} if step > 30 else {},
        ["step 33:", "entropy fell from 0.97 to 0.20", "ppo.init_kl_coef (0.07)"],
    ),
    "saturated scores": (
        [],
        only_in("ppo/std_scores", AFTER, 0.001),
        only_in("ppo/std_scores", AFTER, 0.1),
        ["step 35:", "hardly differ", "0.001", "Stop here"],
    ),
    "equal scores": (
        [],
        only_in("ppo/std_scores", ALWAYS, 0.0),
        only_in("ppo/std_scores", range(1, 5), 0.0),
        ["step 5:", "every response gets the same score", "reward.model"],
    ),
    "short": (
        [],
        lambda step: shrunk(11.0) if step > 40 else {},
        lambda step: shrunk(12.5) if step > 40 else {},
        ["step 43:", "from 16.9 to 11.0 tokens", "reward.target_length=17"],
    ),
    "no end": (
        ["reward.missing_eos_penalty=1.5"],
        only_in("env/missing_eos_penalty", ALWAYS, 1.5),
        only_in("env/missing_eos_penalty", ALWAYS, 1.3),
        ["step 5:", "only at its length limit", "rollout.stop"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_reported_once(name: str) -> None:
    settings, fault, no_fault, wanted = FAULTS[name]
    said, _ = advice(configuration(*settings), fault)
    assert len(said) == 1, said
    for part in wanted:
        assert part in said[0]
    assert advice(configuration(*settings), no_fault)[0] == []


@pytest.mark.parametrize("asked", ["missing_eos_penalty", "length_cost"])
def test_a_reward_for_short_responses_may_shorten_them(asked: str) -> None:
    config = configuration(f"reward.{asked}=0.5")
    assert advice(config, lambda step: shrunk(9.0) if step > 40 else {})[0] == []
    said, _ = advice(config, lambda step: shrunk(6.0) if step > 40 else {})
    assert len(said) == 1 and "16.9 to 6.0 tokens" in said[0]


def end(kl: Callable[[int], float], score: Callable[[int], float]) -> Change:
    """Changes of KL and score in each step."""
    return lambda step: {"objective/kl": kl(step), "env/reward_mean": score(step)}


BOTH = end(lambda step: 0.15 * step, lambda step: 0.04 * step)
ALONE = end(lambda step: 0.15 * step, lambda step: 1.5)
STILL = end(lambda step: 0.01, lambda step: 0.2)
LOST = end(lambda step: 20.0, lambda step: 0.2)


def test_the_end_is_judged_in_runs_of_some_length() -> None:
    config = configuration()
    assert advice(config, lambda step: {}) == ([], [])
    assert [t[:28] for t in advice(config, BOTH)[1]] == ["KL was still rising at the e"]
    assert "and so was the score: more run.steps" in advice(config, BOTH)[1][0]
    assert "for nothing. Remedy: raise ppo.init_kl_coef (0.07)" in advice(config, ALONE)[1][0]
    assert "hardly moved" in advice(config, STILL)[1][0]
    assert "ppo.learning_rate (0.001)" in advice(config, STILL)[1][0]
    assert "20 nats" in advice(config, LOST)[1][0]
    for change in (BOTH, ALONE, STILL, LOST):
        assert len(advice(config, change)[1]) == 1
        assert advice(config, change, steps=30)[1] == []


def test_with_a_budget_of_kl_the_remedy_is_another_one_and_its_end_is_judged() -> None:
    config = configuration("run.kl_budget=4")
    assert "Remedy: lower run.kl_budget (4) or ppo.learning_rate" in advice(config, ALONE)[1][0]
    assert budget_warning(4.5, config) is None and budget_warning(99.0, configuration()) is None
    assert "KL is 3.30" in str(budget_warning(3.3, config))
    assert "more run.steps (" in str(budget_warning(3.3, config))
    assert "Lower ppo.learning_rate (0.001)" in str(budget_warning(4.7, config))


ADAPTIVE = ("ppo.lr_scheduler_type=adaptive", "ppo.desired_kl=0.05")
# Settings of the schedule, the setting that the remedy names, one that it does not name.
STEP_SIZES = [
    ((), "ppo.learning_rate (0.001)", "desired_kl"),
    (ADAPTIVE, "ppo.desired_kl (0.05)", "learning_rate"),
]


@pytest.mark.parametrize(("schedule", "remedy", "other"), STEP_SIZES)
def test_the_remedy_is_what_decides_the_size_of_the_steps(
    schedule: tuple[str, ...], remedy: str, other: str
) -> None:
    for name in ("skips", "clipped", "leaps", "far away", "entropy", "short"):
        settings, fault, *_ = FAULTS[name]
        said, _ = advice(configuration(*settings, *schedule), fault)
        assert len(said) == 1
        assert remedy in said[0] and other not in said[0], said
    for change in (ALONE, STILL, LOST):
        _, closing = advice(configuration(*schedule), change)
        assert remedy in closing[0] and other not in closing[0], closing


@pytest.mark.parametrize(("schedule", "remedy", "other"), STEP_SIZES)
def test_the_remedy_for_a_failed_step_is_the_same_setting(
    schedule: tuple[str, ...], remedy: str, other: str
) -> None:
    config = configuration(*schedule, "run.kl_limit=9")
    with pytest.raises(DivergenceError) as collapsed:
        check_texts(["the same"] * 8, config)
    with pytest.raises(DivergenceError) as far:
        check_numbers({"objective/kl": 9.5}, config)
    for error in (collapsed, far):
        assert f"lower {remedy}" in str(error.value)
        assert other not in str(error.value)
    with pytest.raises(DivergenceError) as infinite:
        check_numbers({"objective/kl": 1.0, "ppo/loss/total": float("nan")}, config)
    weights = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(weights.bias, float("inf"))
    with pytest.raises(DivergenceError) as broken:
        check_weights(weights, config)
    for error in (infinite, broken):  # an adaptive rate may also start too high
        assert "ppo.learning_rate (0.001)" in str(error.value)
        assert remedy in str(error.value)
        assert "ppo.max_grad_norm" in str(error.value)


def test_skips_are_counted_at_the_end() -> None:
    _, closing = advice(configuration(), only_in("ppo/policy/skipped", range(9, 12), 0.5))
    assert closing == ["in 3 of 60 steps mini-batches were skipped"]


def test_what_was_said_before_a_resume_is_not_said_again_and_the_rest_is_as_without_it() -> None:
    config = configuration()

    def change(step: int) -> Row:
        few = {"ppo/policy/skipped": float(step in (3, 50))}
        return {**few, "ppo/val/var_explained": -0.3} | (
            {"objective/kl": 60.0} if step > 35 else {}
        )

    rows = [{**healthy(step), **change(step)} for step in range(1, STEPS + 1)]
    whole = Diagnostics(config)
    said = [whole.check_step(row) for row in rows]
    assert sum(map(len, said)) == 3
    for stop in (10, 37, 55):
        resumed = Diagnostics(config)
        resumed.replay([*rows[:stop], {"step": stop, "eval/score": 1.0}])
        assert [resumed.check_step(row) for row in rows[stop:]] == said[stop:]
        assert resumed.check_end() == Diagnostics.check_end(_after(config, rows))


def test_after_steps_that_were_lost_advice_names_the_step_that_it_is() -> None:
    rows: list[Row] = [{**healthy(step), "step": step} for step in range(1, 60)]
    skipped = {**rows[-1], "ppo/policy/skipped": 0.5}
    for left in ([], rows[:5], rows[40:58], [*rows[:5], {"step": 6}, *rows[50:58]]):
        diagnostics = Diagnostics(configuration())
        diagnostics.replay(left)
        (text,) = diagnostics.check_step(skipped)
        assert text.startswith("step 59: ")
        closing = [text for text in diagnostics.check_end() if "skipped" in text]
        whole = [row for row in left if len(row) > 1]
        assert closing == (
            [f"in 1 of {len(whole) + 1} steps mini-batches were skipped"] * bool(whole)
        )


@pytest.mark.parametrize("key", REQUIRED)
def test_steps_that_lack_what_rules_read_are_not_recalled(key: str) -> None:
    rows: list[Row] = [{**healthy(step), "step": step} for step in range(1, STEPS + 1)]
    assert key in rows[0]
    diagnostics = Diagnostics(configuration())
    diagnostics.replay([{k: v for k, v in row.items() if k != key} for row in rows])
    assert diagnostics.check_end() == []  # like a run without steps


def test_rules_read_nothing_else_of_every_step() -> None:
    rows: list[Row] = [
        {key: healthy(step)[key] for key in REQUIRED} for step in range(1, STEPS + 1)
    ]
    _after(configuration(), rows).check_end()


def _after(config: RunConfig, rows: list[Row]) -> Diagnostics:
    diagnostics = Diagnostics(config)
    diagnostics.replay(rows)
    return diagnostics


def test_going_back_takes_the_dropped_steps_out_of_the_series() -> None:
    diagnostics = Diagnostics(configuration())
    rows = [healthy(step) for step in range(1, 40)]
    bad = [{**row, "ppo/policy/clipfrac": 0.4} for row in rows[:2]]
    for row in [*rows[:10], *bad[:1]]:
        assert diagnostics.check_step(row) == []
    diagnostics.replay(rows[:4])
    assert diagnostics.check_step(bad[0]) == []
    assert [text[:7] for text in diagnostics.check_step(bad[1])] == ["step 6:"]


def test_a_value_head_that_is_not_the_fault_is_not_blamed() -> None:
    nothing = only_in("ppo/val/var_explained", ALWAYS, -0.3)
    others = configuration("ppo.responses_per_query=2")
    assert advice(others, nothing)[0] == []
    still = {"objective/kl": 0.01, "env/reward_mean": 0.2}
    said, closing = advice(configuration(), lambda step: nothing(step) | still)
    assert said == []
    assert ["hardly moved" in text for text in closing] == [True]


def test_batches_of_one_sample_have_no_spread() -> None:
    config = configuration("ppo.batch_size=1", "ppo.mini_batch_size=1")
    assert advice(config, only_in("ppo/std_scores", ALWAYS, 0.0))[0] == []


def test_every_rule_is_tested_and_watches_statistics_that_exist() -> None:
    assert set(healthy(1)) <= {**STATISTICS, **RUN_STATISTICS}.keys()
    names = {name.partition(" by")[0].partition(" with")[0] for name in FAULTS}
    same = {"clipped": "large updates", "leaps": "large updates", "saturated scores": None}
    found = {same.get(name, name) for name in names} - {None}
    assert {rule.name for rule in RULES} == found
    assert max(rule.min_steps for rule in (*RULES, *FINAL_RULES)) <= 2 * RECENT_STEPS


def test_sampling_that_is_not_pure_is_named_before_the_first_step() -> None:
    assert sampling_warning(configuration()) is None
    said = sampling_warning(configuration("rollout.top_p=0.9"))
    assert said is not None
    assert "rollout.top_p=0.9" in said
    assert "top_p=1" in said


def test_the_trainer_warns_once_unless_its_warnings_are_off() -> None:
    reference = make_policy(1)
    queries, _, scores = make_batch()
    responses = [reference.generate(q[None], max_new_tokens=12, do_sample=False)[0, len(q) :]
                 for q in queries]  # fmt: skip
    for advises, expected in ((True, ["KL is negative", "ratio_threshold"]), (False, [])):
        trainer = make_trainer(make_policy(0), reference, learning_rate=0.1, ratio_threshold=0.9)
        trainer.advises = advises
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                stats = trainer.step(queries, responses, scores)
        said = [str(w.message) for w in caught if w.category is UserWarning]
        assert len(said) == len(expected)
        assert all(part in text for part, text in zip(expected, said, strict=True))
        assert all(w.filename == __file__ for w in caught if w.category is UserWarning)
    assert 0 < stats["ppo/policy/skipped"] <= 1


def test_the_trainer_names_what_decides_the_size_of_its_steps() -> None:
    for settings, key in (({}, "learning_rate"), ({"lr_scheduler_type": "adaptive"}, "desired_kl")):
        trainer = make_trainer(learning_rate=0.1, ratio_threshold=0.9, **settings)
        with pytest.warns(UserWarning, match=f"skipped. A lower {key} or fewer ppo_epochs"):
            trainer.step(*make_batch())


SMALL = ["run.device=cpu", "run.checkpoint_every=0", "ppo.batch_size=32"]


def run(*assignments: str, resume: bool = False) -> list[str]:
    """Warnings of a small run of the embedded model."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training = build_training(
            load_config(SMALL_RUN, assignments=[*SMALL, *assignments]), resume=resume
        )
        for _ in training.steps():
            pass
        training.finish()
        training.directory.unlock()
    return [str(w.message) for w in caught if w.category is UserWarning]


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_learning_rate_far_too_high_is_explained_and_not_again_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = ["ppo.learning_rate=0.01", "run.collapse_limit=null", "run.kl_limit=null"]
    said = run(*bad, "run.steps=5")
    assert any("updates are too large" in text and "(0.01)" in text for text in said)
    assert any("nats per response" in text and "per token" in text for text in said)
    later = run(*bad, "run.steps=7", resume=True)
    assert not {_about(text) for text in said} & {_about(text) for text in later}


def _about(text: str) -> str:
    """A message without its step and numbers."""
    return "".join(c for c in text.partition(": ")[2] if not c.isdigit())[:12]


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_healthy_run_of_the_embedded_model_has_no_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    assert run("run.steps=4") == []


def every_warning() -> list[str]:
    """Each warning of a run, and each message about a step that fails, in every form."""
    found = [text for settings, fault, *_ in FAULTS.values()
             for text in advice(configuration(*settings), fault)[0]]  # fmt: skip
    skipped = only_in("ppo/policy/skipped", range(9, 12), 0.5)
    for change in (BOTH, ALONE, STILL, LOST, skipped):
        found += advice(configuration(), change)[1]
    budget = configuration("run.kl_budget=4", "run.kl_limit=9")
    found += [str(budget_warning(kl, budget)) for kl in (3.3, 4.7)]
    found.append(str(sampling_warning(configuration("rollout.top_p=0.9"))))
    weights = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(weights.bias, float("inf"))
    for fail in (
        lambda: check_texts(["the same"] * 8, budget),
        lambda: check_numbers({"objective/kl": 9.5}, budget),
        lambda: check_numbers({"ppo/loss/total": float("nan")}, budget),
        lambda: check_weights(weights, budget),
    ):
        with pytest.raises(DivergenceError) as caught:
            fail()
        found.append(str(caught.value))
    return found


def test_every_warning_is_treated_in_the_documents() -> None:
    page = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
    text = " ".join(page.read_text(encoding="utf-8").split())
    sections = text[text.index("## Warnings of a run") : text.index("## Out of memory")]
    treated = {words.lower() for words in re.findall(r'\*\*"(.+?)"\*\*', sections)}
    said = [message.lower() for message in every_warning()]
    assert len(said) > 20
    assert [text for text in said if not any(words in text for words in treated)] == []
    by_the_reward = {"the classifier", "raised"}
    assert {
        words for words in treated - by_the_reward if not any(words in x for x in said)
    } == set()
