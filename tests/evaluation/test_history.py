"""Which weights a run keeps and when it ends early: the rules, and runs that follow them."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ppo_cli.config.schema import RunSettings
from ppo_cli.errors import DivergenceError
from ppo_cli.evaluation.history import Evaluation, EvaluationHistory
from ppo_cli.reporting.summary import TrainingSummary
from ppo_cli.training.run import Training
from tests.evaluation.test_held_out import make as make_any
from tests.evaluation.test_held_out import rows
from tests.evaluation.test_held_out import train as train_any
from tests.stress.kill import contents, differences

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

# ---------------------------------------------------------------- rules, without a model


def history_after(evaluations: list[Evaluation], settings: RunSettings) -> EvaluationHistory:
    history = EvaluationHistory()
    for evaluation in evaluations:
        history = history.after(evaluation, settings)
    return history


def made_up(seed: int, count: int = 9) -> list[Evaluation]:
    random = np.random.RandomState(seed)  # few values, so that scores and limits are met exactly
    pairs = zip(random.randint(0, 4, count), random.randint(0, 6, count), strict=True)
    return [Evaluation(10 * (i + 1), float(s), float(kl)) for i, (s, kl) in enumerate(pairs)]


def test_with_a_budget_the_best_is_the_highest_score_near_it_or_else_the_nearest() -> None:
    settings = RunSettings(kl_budget=4)

    def best(*pairs: tuple[float, float]) -> int | None:
        found = [Evaluation(i, score, kl) for i, (score, kl) in enumerate(pairs)]
        newest = history_after(found, settings).best
        return newest and newest.step

    assert best((1.0, 3.7), (2.0, 4.3), (1.5, 4.0), (9.0, 4.5), (9.0, 3.5)) == 1
    assert best((1.0, 1.0), (0.5, 2.0), (3.0, 8.0)) == 1  # none within 10 %
    assert best((1.0, 1.0)) == 0
    assert best((9.0, 2000.0)) is None  # beyond kl_limit


def test_an_evaluation_over_the_ceiling_is_best_only_where_none_is_below() -> None:
    settings = RunSettings(kl_ceiling=4)
    low, near, high = Evaluation(1, 1.0, 0.5), Evaluation(2, 2.0, 4.7), Evaluation(3, 9.0, 4.9)
    assert history_after([high, low], settings).best == low
    assert history_after([low, near, high], settings).best == near
    assert history_after([Evaluation(4, 9.9, 6.0), high], settings).best == high


def test_a_run_takes_its_ceiling_from_the_configuration(tmp_path: Path) -> None:
    controller = make(tmp_path / "run", "run.kl_ceiling=3", "ppo.init_kl_coef=0.2").trainer.kl_ctl
    controller.update(1.0, 8)
    assert controller.value == 0.2
    controller.update(6.0, 8)
    assert controller.value > 1


LIMITS: list[tuple[float | None, float | None]] = [
    (None, None),
    (3, None),
    (None, 2),
    (4, 2),
    (1, 5),
]


@pytest.mark.parametrize(("kl_limit", "stop_kl"), LIMITS)
@pytest.mark.parametrize("seed", range(20))
def test_the_best_is_the_first_of_the_highest_within_the_limits(
    seed: int, kl_limit: float | None, stop_kl: float | None
) -> None:
    settings = RunSettings(kl_limit=kl_limit, stop_kl=stop_kl)
    evaluations = made_up(seed)
    history = history_after(evaluations, settings)
    limit = min(v for v in (kl_limit, stop_kl, float("inf")) if v is not None)
    within = sorted((-e.score, e.step) for e in evaluations if e.kl <= limit)
    assert history.newest == evaluations[-1]
    assert (history.best and history.best.step) == (within[0][1] if within else None)
    since = within[0][1] if within else 0
    assert history.stale == len([e for e in evaluations if e.step > since])
    assert EvaluationHistory.from_dict(json.loads(json.dumps(history.as_dict()))) == history


def test_a_best_outside_of_limits_that_were_lowered_is_no_longer_one() -> None:
    before = history_after([Evaluation(10, 1.0, 5.0)], RunSettings())
    assert before.within(RunSettings(kl_limit=5)) == before
    assert before.within(RunSettings(kl_limit=4)).best is None


def test_a_kl_that_is_no_number_is_within_no_limit() -> None:
    assert history_after([Evaluation(10, 1.0, float("nan"))], RunSettings()).best is None


REASONS: list[tuple[dict[str, Any], list[tuple[float, float]], str | None]] = [
    # settings, score and KL of the evaluations, what the reason holds
    ({}, [(9, 0), (8, 900), (7, 0)], None),
    ({"target_score": 2}, [(1.9, 1)], None),
    ({"target_score": 2}, [(2, 1)], "run.target_score"),
    ({"target_score": 2, "kl_limit": 5}, [(3, 6)], None),
    ({"target_score": 2, "stop_kl": 5}, [(3, 6)], "run.stop_kl"),
    ({"stop_kl": 5}, [(1, 5)], None),
    ({"stop_kl": 5}, [(1, 5.1)], "KL of 5.1, over run.stop_kl (5)"),
    ({"stop_kl": 5}, [(1, 6), (1, 4)], None),
    ({"patience": 2}, [(1, 0), (0, 0)], None),
    ({"patience": 2}, [(1, 0), (0, 0), (1, 0)], "2 evaluations without a new best since step 10"),
    ({"patience": 2}, [(1, 0), (0, 0), (2, 0), (1, 0)], None),
    ({"patience": 2, "kl_limit": 5}, [(1, 6), (2, 6)], "without a new best at all"),
]


@pytest.mark.parametrize(("changes", "found", "wanted"), REASONS)
def test_reasons_to_stop(
    changes: dict[str, Any], found: list[tuple[float, float]], wanted: str | None
) -> None:
    settings = RunSettings(**changes)
    evaluations = [Evaluation(10 * (i + 1), *pair) for i, pair in enumerate(found)]
    reason = history_after(evaluations, settings).reason_to_stop(settings)
    assert (reason is None) == (wanted is None)
    assert wanted is None or wanted in (reason or "")


# ---------------------------------------------------------------- runs

SHORT = ("rollout.output_min_length=4", "rollout.output_max_length=8")


def make(folder: Path, *changes: str, resume: bool = False) -> Training:
    return make_any(folder, *SHORT, *changes, resume=resume)


def train(folder: Path, *changes: str, resume: bool = False) -> TrainingSummary:
    return train_any(folder, *SHORT, *changes, resume=resume)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives the evaluations of later runs the scores of a script, step by step."""

    def script(scores: dict[int, float], kl: dict[int, float] | None = None) -> None:
        from ppo_cli.evaluation.held_out import HeldOutEvaluation

        original = HeldOutEvaluation.evaluate

        def evaluate(self: HeldOutEvaluation, step: int) -> Any:
            _, numbers = original(self, step)
            distance = (kl or {}).get(step, 1.0)
            changed = {"eval/score": scores[step], "eval/kl": distance}
            return Evaluation(step, scores[step], distance), numbers | changed

        monkeypatch.setattr(HeldOutEvaluation, "evaluate", evaluate)

    return script


def model(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors") | load_file(folder / "value_head.safetensors")


def steps_kept(folder: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*"))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def lasts(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, torch.Tensor]]:
    """The model after each of some steps, from runs that ended there."""
    found = {}
    for step in (2, 6):
        folder = tmp_path_factory.mktemp("lasts") / "run"
        summary = train(folder, f"run.steps={step}", "run.weights=last", "run.eval_every=0")
        assert summary.weights.step == step
        found[step] = model(folder)
    assert not same(found[2], found[6])
    return found


UP_AND_DOWN = {2: 1.5, 4: 0.5, 6: 0.4, 7: 0.3, 8: 0.2}


def test_the_best_weights_are_left_and_the_run_goes_on_from_the_newest(
    lasts: dict[int, dict[str, torch.Tensor]], scripted: Any, tmp_path: Path
) -> None:
    scripted(UP_AND_DOWN)
    summary = train(tmp_path / "run", "run.steps=6", "run.checkpoint_every=4")
    assert (summary.weights.step, summary.steps, summary.stopped_early) == (2, 6, None)
    assert same(model(tmp_path / "run"), lasts[2])
    assert steps_kept(tmp_path / "run") == [2, 4, 6]  # the two newest and the best
    assert "step 2" in (tmp_path / "run" / "README.md").read_text()
    assert summary.as_dict()["weights"] == {"step": 2, "why": "best evaluation"}
    # Asked for the last weights instead, the same run has them without another step.
    changes = ["run.steps=6", "run.checkpoint_every=4", "run.weights=last"]
    assert train(tmp_path / "run", *changes, resume=True).weights.step == 6
    assert same(model(tmp_path / "run"), lasts[6])


def test_a_run_that_went_on_equals_one_that_never_paused(scripted: Any, tmp_path: Path) -> None:
    # The evaluation at the first end does not count later, for the KL coefficient neither.
    scripted({**UP_AND_DOWN, 5: 9.9}, kl=dict.fromkeys((2, 4, 5, 6, 8), 0.1))
    settings = ["run.checkpoint_every=2", "run.kl_budget=0.1", "ppo.use_score_scaling=true"]
    settings += ["ppo.score_scaling_samples=12"]
    train(tmp_path / "a", "run.steps=8", *settings)
    first = train(tmp_path / "b", "run.steps=5", *settings)
    assert first.weights.step == 5
    assert "eval/score" in rows(tmp_path / "b")[-1]
    train(tmp_path / "b", "run.steps=8", *settings, resume=True)
    steps = rows(tmp_path / "a")
    assert len({row["objective/kl_coef"] for row in steps}) == 8
    state = json.loads((tmp_path / "a/checkpoints/step-000008/state.json").read_text())
    assert state["trainer"]["kl_controller"]["scale"] != 1  # the evaluations were heard
    assert len({row["env/score_scale"] for row in steps[1:]}) == 1 != steps[0]["env/score_scale"]
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert set(differences(a, b)) <= {"run.yaml", "README.md"}  # which name the folder


def test_evaluations_over_the_limit_of_kl_are_not_taken(scripted: Any, tmp_path: Path) -> None:
    scripted(UP_AND_DOWN, kl={2: 40.0, 4: 20.0, 6: 40.0})
    assert train(tmp_path / "run", "run.steps=6", "run.kl_limit=30").weights.step == 4
    summary = train(tmp_path / "none", "run.steps=6", "run.kl_limit=15")
    assert summary.weights.step == 6
    assert "no evaluation was within run.kl_limit (15)" in summary.weights.why


def test_the_newest_stand_in_for_best_weights_that_are_damaged_or_gone(
    lasts: dict[int, dict[str, torch.Tensor]], scripted: Any, tmp_path: Path
) -> None:
    scripted(UP_AND_DOWN)
    train(tmp_path / "run", "run.steps=6")
    best = tmp_path / "run" / "checkpoints" / "step-000002"
    for harm in ("damaged", "gone"):
        if harm == "gone":
            shutil.rmtree(best)
        else:
            content = bytearray((best / "weights.safetensors").read_bytes())
            content[-100] ^= 4
            (best / "weights.safetensors").write_bytes(content)
        with pytest.warns(
            UserWarning, match=r"step 2 scored best .* the weights of step 6, the newest"
        ):
            summary = train(tmp_path / "run", "run.steps=6", resume=True)
        assert summary.weights.step == 6
        assert same(model(tmp_path / "run"), lasts[6])
        (tmp_path / "run" / "model.safetensors").unlink()


def test_divergence_leaves_the_best_model(
    lasts: dict[int, dict[str, torch.Tensor]],
    scripted: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scripted(UP_AND_DOWN)
    training = make(tmp_path / "run", "run.steps=8", "run.checkpoint_every=4")
    original = Training._one_step

    def fail(self: Training) -> Any:
        if self.step == 5:
            raise DivergenceError("it went wrong")
        return original(self)

    monkeypatch.setattr(Training, "_one_step", fail)
    held = "the checkpoint of step 4 and the model of step 2"
    with pytest.raises(DivergenceError, match=held):
        list(training.steps())
    training.directory.unlock()
    assert same(model(tmp_path / "run"), lasts[2])


def test_a_run_ends_early_says_so_and_stays_ended_until_the_setting_changes(
    scripted: Any, tmp_path: Path
) -> None:
    scripted({**UP_AND_DOWN, 10: 3.0})
    folder = tmp_path / "run"
    summary = train(folder, "run.steps=10", "run.patience=2")
    assert (summary.steps, summary.planned_steps, summary.weights.step) == (6, 10, 2)
    assert summary.stopped_early == "2 evaluations without a new best since step 2 (run.patience)"
    assert "ended early, after 6 of 10 steps: 2 evaluations" in (folder / "README.md").read_text()
    before = contents(folder)
    again = train(folder, "run.steps=10", "run.patience=2", resume=True)
    assert (again.steps, again.stopped_early) == (6, summary.stopped_early)
    assert differences(before, contents(folder)) == []
    resumed = make(folder, "run.steps=10", "run.patience=3", resume=True)
    assert resumed.stopped_early is None
    resumed.directory.unlock()
    longer = train(folder, "run.steps=10", "run.patience=4", resume=True)
    assert (longer.steps, longer.weights.step, longer.stopped_early) == (10, 10, None)


@pytest.mark.parametrize(
    ("setting", "kl", "steps", "best"),
    [
        ("run.target_score=1.5", {}, 2, 2),
        ("run.target_score=1.5", {2: 1e4}, 6, 4),  # reached too far away
        ("run.stop_kl=8", {4: 9.0}, 4, 2),
        ("run.stop_kl=8", {2: 9.0}, 2, None),
    ],
)
def test_ends_by_score_and_kl(
    setting: str, kl: dict[int, float], steps: int, best: int | None, scripted: Any, tmp_path: Path
) -> None:
    scripted(UP_AND_DOWN, kl)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        summary = train(tmp_path / "run", "run.steps=6", setting)
    assert (summary.steps, summary.weights.step) == (steps, best or steps)
    assert (summary.stopped_early is None) == (steps == 6)
    assert summary.stopped_early is None or setting.partition("=")[0] in summary.stopped_early
