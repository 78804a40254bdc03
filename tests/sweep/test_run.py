"""Sweeps with a stand-in for `train`: choice of values, pruning, stops, failures, kills."""

from __future__ import annotations

import csv
import signal
from pathlib import Path
from typing import Any

import pytest

from ppo_cli.config.loading import load_config
from ppo_cli.config.schema import RunConfig
from ppo_cli.errors import MissingPackageError, PPOCliError, UsageError
from ppo_cli.sweep import run as sweep_run
from ppo_cli.sweep.run import surroundings
from ppo_cli.training.run_directory import RunDirectory
from ppo_cli.training.run_list import find_runs
from tests.conftest import SMALL_RUN
from tests.sweep.fake_train import (
    FakeTrain,
    Fault,
    fakes,  # noqa: F401
    killed,
    make_sweep,
    run,
)

pytestmark = pytest.mark.usefixtures("fakes")
KEY = "ppo.init_kl_coef"


def tried(summary: Any, key: str = KEY) -> list[Any]:
    """The values of a parameter, in the order of the trials."""
    return [t.parameters[key] for t in sorted(summary.trials, key=lambda t: t.number)]


def test_each_trial_is_a_run_with_its_own_values(tmp_path: Path) -> None:
    space = "parameters: {ppo.init_kl_coef: {low: 0.01, high: 0.2, log: true}, " + (
        "ppo.ppo_epochs: {low: 1, high: 3}, ppo.lam: {low: 0.5, high: 1, step: 0.25}, "
        "ppo.lr_scheduler_type: [linear, cosine], ppo.max_grad_norm: [null, 1.5]}\ntrials: 6"
    )
    summary = run(make_sweep(tmp_path, space))
    assert summary.count("finished") == 6
    for trial in summary.trials:
        made = RunDirectory(trial.folder).config()
        assert trial.parameters[KEY] == made.ppo.init_kl_coef
        assert made.ppo.ppo_epochs in (1, 2, 3) and made.ppo.lam in (0.5, 0.75, 1.0)
        assert made.ppo.lr_scheduler_type == trial.parameters["ppo.lr_scheduler_type"]
        assert made.ppo.max_grad_norm == trial.parameters["ppo.max_grad_norm"]
        assert (made.run.steps, made.run.seed) == (3, 0)
    assert len(set(tried(summary))) == 6 and len({*tried(summary, "ppo.ppo_epochs")}) > 1
    assert [path.name for path in find_runs(tmp_path)] == [f"trial-{n:03}" for n in range(6)]
    best = max(summary.trials, key=lambda t: t.value or 0)
    assert summary.best == summary.trials[0] == best
    values = [trial.value for trial in summary.trials]
    assert values == sorted(values, key=lambda value: -(value or 0))
    configuration = load_config(str(tmp_path / "sweep" / "best.yaml"))
    own = RunDirectory(best.folder).config()
    assert configuration.ppo == own.ppo and configuration.run.output is None
    assert configuration.run.model_copy(update={"output": own.run.output}) == own.run
    rows = list(csv.DictReader((tmp_path / "sweep" / "trials.csv").open()))
    assert [float(row["eval/score"]) for row in rows] == [
        trial.value for trial in sorted(summary.trials, key=lambda t: t.number)
    ]


def test_a_grid_tries_each_combination_once(tmp_path: Path) -> None:
    space = (
        "parameters: {ppo.ppo_epochs: [1, 2], ppo.lam: {low: 0.5, high: 1, step: 0.25}}\n"
        "sampler: grid\ntrials: 99"
    )
    sweep = make_sweep(tmp_path, space)
    assert sweep.planned == 6
    found = run(sweep).trials
    combinations = {(t.parameters["ppo.ppo_epochs"], t.parameters["ppo.lam"]) for t in found}
    assert combinations == {(e, lam) for e in (1, 2) for lam in (0.5, 0.75, 1.0)}
    assert len(found) == 6


def test_the_best_keeps_the_limit_of_kl(tmp_path: Path) -> None:
    summary = run(make_sweep(tmp_path, "max_kl: 4\nsampler: random\ntrials: 6"))
    kept = [trial for trial in summary.trials if trial.keeps(4)]
    assert 0 < len(kept) < 6 and list(summary.trials[: len(kept)]) == kept
    assert summary.best == max(kept, key=lambda t: t.value or 0)
    (tmp_path / "none").mkdir()
    summary = run(make_sweep(tmp_path / "none", "max_kl: 0.1\ntrials: 1"))
    assert summary.best is None and not (tmp_path / "none" / "sweep" / "best.yaml").exists()


def test_another_objective_is_made_low(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, "objective: ppo/loss/total\ndirection: minimize")
    summary = run(sweep)
    values = [trial.value or 0 for trial in summary.trials]
    assert values == sorted(values) and max(values) < 0
    assert sweep._study.direction.name == "MINIMIZE"
    (tmp_path / "wrong").mkdir()
    wrong = "objective: ppo/los/total\ndirection: maximize"
    with pytest.raises(PPOCliError, match=r"all for the same reason: its metrics have no ppo/los"):
        run(make_sweep(tmp_path / "wrong", wrong))


def test_seeds_are_repeats_and_a_trial_counts_with_their_mean(tmp_path: Path) -> None:
    FakeTrain.outcome = staticmethod(lambda config, step: (config.run.seed, config.run.seed / 2))
    summary = run(make_sweep(tmp_path, "seeds: [3, 7]\ntrials: 2\nmax_kl: 2.6"))
    names = [f"trial-{t:03}/seed-{seed}" for t in (0, 1) for seed in (3, 7)]
    assert [str(p.relative_to(tmp_path / "sweep")) for p in find_runs(tmp_path)] == names
    assert [(t.value, t.kl, t.spread) for t in summary.trials] == [(5.0, 2.5, 2.0)] * 2
    assert summary.best is not None and summary.best.by_seed == {"3": 3.0, "7": 7.0}
    (tmp_path / "number").mkdir()
    text = "seeds: 2\nset: {run.steps: 3, run.eval_every: 1}\ntrials: 1"
    run(make_sweep(tmp_path / "number", text))
    assert [fake.config.run.seed for fake in FakeTrain.started[-2:]] == [0, 1]


@pytest.mark.parametrize("pruner", ["median", "hyperband", "none"])
def test_a_run_that_is_worse_than_others_is_ended(pruner: str, tmp_path: Path) -> None:
    def worse_and_worse(config: RunConfig, step: int) -> tuple[float, float]:
        return -float(str(config.run.output)[-3:]), 1.0

    FakeTrain.outcome = staticmethod(worse_and_worse)
    text = f"pruner: {pruner}\ntrials: 5\nset: {{run.steps: 9, run.eval_every: 1}}"
    sweep = make_sweep(tmp_path, text)
    summary = run(sweep)
    pruned = [t.number for t in summary.trials if t.state == "pruned"]
    ended_by = {fake.signals[0] for fake in FakeTrain.started if fake.signals}
    if pruner == "none":
        assert not pruned and not ended_by and len(FakeTrain.trainings) == 45
        return
    assert ended_by == {signal.SIGTERM}
    assert len(FakeTrain.trainings) < 45
    if pruner == "median":  # startup_trials is 2
        assert pruned == [2, 3, 4]
        states = {t.number: t.state.name for t in sweep._study.get_trials()}
        assert states == {0: "COMPLETE", 1: "COMPLETE"} | dict.fromkeys(range(2, 5), "PRUNED")
        assert summary.trials[-1].value == -4.0 and summary.trials[-1].step is not None
        (tmp_path / "later").mkdir()
        later = make_sweep(tmp_path / "later", f"{text}\nstartup_trials: 4")
        assert [t.number for t in run(later).trials if t.state == "pruned"] == [4]


def test_a_trial_that_fails_is_recorded_and_the_sweep_goes_on(tmp_path: Path) -> None:
    def some_fail(config: RunConfig, step: int) -> Any:
        if config.ppo.init_kl_coef > 0.08:
            return Fault(2, 1, f"KL is {config.ppo.init_kl_coef}: too far")
        return 1.0, 1.0

    FakeTrain.outcome = staticmethod(some_fail)
    summary = run(make_sweep(tmp_path, "sampler: random\ntrials: 5"))
    failed = [trial for trial in summary.trials if trial.state == "failed"]
    assert 0 < len(failed) < 5 and summary.count("finished") == 5 - len(failed)
    for trial in failed:
        value = trial.parameters[KEY]
        assert value > 0.08 and trial.why == f"KL is {value}: too far more of it"
    assert [t.state for t in summary.trials[-len(failed) :]] == ["failed"] * len(failed)


def test_where_the_first_all_fail_for_one_reason_the_sweep_gives_up(tmp_path: Path) -> None:
    def fail(config: RunConfig, step: int) -> Fault:
        return Fault(1, 1, f"out of memory, {config.ppo.init_kl_coef}")

    FakeTrain.outcome = staticmethod(fail)
    with pytest.raises(PPOCliError, match="first 3 trials failed, all for the same reason: out of"):
        run(make_sweep(tmp_path, "trials: 9"))
    assert len(FakeTrain.started) == 3


def test_a_wrong_request_of_a_run_stops_the_sweep_at_once(tmp_path: Path) -> None:
    FakeTrain.outcome = staticmethod(lambda *_: Fault(1, 2, "no model is named x"))
    sweep = make_sweep(tmp_path, jobs=2)
    with pytest.raises(UsageError, match=r"trial 0: no model is named x more of it\nnothing is"):
        run(sweep)
    assert len(FakeTrain.started) == 2 and FakeTrain.started[1].signals == [signal.SIGTERM]
    sweep.directory.unlock()
    FakeTrain.outcome = staticmethod(lambda *_: (1.0, 1.0))
    assert run(make_sweep(tmp_path, resume=True)).count("finished") == 3


def test_values_that_do_not_go_together_fail_without_a_run(tmp_path: Path) -> None:
    space = "parameters: {ppo.batch_size: [16, 32], ppo.mini_batch_size: [16, 32]}\n"
    summary = run(make_sweep(tmp_path, space + "sampler: grid\ntrials: 4"))
    assert (summary.count("finished"), summary.count("failed")) == (3, 1)
    assert "batch_size (16) must be a multiple" in summary.trials[-1].why
    assert len(FakeTrain.started) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_and_a_resumed_sweep_goes_on(number: int, tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, jobs=2)
    for progress in sweep.run():
        if progress.what == "ended":
            sweep.stop(number)
    sweep.directory.unlock()
    assert [fake.signals for fake in FakeTrain.started] == [[], [number]]
    states = {t.number: t.state.name for t in sweep._study.get_trials()}
    assert states == {0: "COMPLETE", 1: "RUNNING"}
    summary = run(make_sweep(tmp_path, resume=True))
    assert summary.count("finished") == 3
    assert ["--resume" in fake.arguments for fake in FakeTrain.started] == [
        False,
        False,
        True,
        False,
    ]
    assert len(FakeTrain.trainings) == len({*FakeTrain.trainings}) == 9


def test_a_sweep_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    text = "pruner: median\nseeds: [0, 1]"
    (tmp_path / "whole").mkdir()
    whole = run(make_sweep(tmp_path / "whole", text))
    made = [(Path(run).name, step) for run, step in FakeTrain.trainings]
    total = sum(1 for _ in made)
    for events in (2, 10):
        FakeTrain.trainings.clear()
        folder = tmp_path / f"killed-{events}"
        folder.mkdir()
        killed(make_sweep(folder, text), events)
        journal = folder / "sweep" / "study.journal"
        with journal.open("ab") as file:  # killed while optuna wrote, and had its lock
            file.write(b'{"op_code": 5, "wor')
        journal.with_name("study.journal.lock").symlink_to(journal)
        summary = run(make_sweep(folder, text, resume=True))
        assert tried(summary) == tried(whole)
        same = [
            [(t.number, t.state, t.value, t.step) for t in one.trials] for one in (summary, whole)
        ]
        assert same[0] == same[1]
        assert len(FakeTrain.trainings) == len({*FakeTrain.trainings}) == total


def test_a_trial_whose_runs_had_all_ended_is_recorded_without_another(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, "trials: 2")
    killed(sweep, 4)  # its last evaluation came, its end did not
    assert len(FakeTrain.started) == 1
    assert RunDirectory(tmp_path / "sweep" / "trial-000").recorded()["ended"]["as"] == "finished"
    assert run(make_sweep(tmp_path, "trials: 2", resume=True)).count("finished") == 2
    assert len(FakeTrain.started) == 2


def test_what_a_process_of_the_killed_sweep_still_writes_is_waited_for(tmp_path: Path) -> None:
    killed(make_sweep(tmp_path), 2)
    run_of_it = FakeTrain.started[0].directory
    run_of_it.lock.acquire()
    sweep = make_sweep(tmp_path, resume=True)
    seen = []
    for progress in sweep.run():
        seen.append((progress.what, progress.trial.number))
        if progress.what == "waits":
            run_of_it.unlock()
    assert seen[:2] == [("waits", 0), ("begins", 0)]
    assert "--resume" in FakeTrain.started[1].arguments


def test_more_trials_can_be_asked_for_but_no_other_space(tmp_path: Path) -> None:
    first = run(make_sweep(tmp_path, "trials: 2"))
    more = run(make_sweep(tmp_path, "trials: 2", resume=True, trials=3))
    assert tried(more)[:2] == tried(first) and len(more.trials) == 3
    for text, key in (
        ("sampler_seed: 3", "sampler_seed"),
        ("set: {run.steps: 4, run.eval_every: 1}", "run.steps"),
        ("parameters: {ppo.init_kl_coef: {low: 0.01, high: 0.3}}", f"parameters.{KEY}.high"),
    ):
        with pytest.raises(UsageError, match=rf"begun with other settings \({key}\)"):
            make_sweep(tmp_path, text, resume=True)


def test_a_base_that_changes_meanwhile_stops_the_sweep(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(Path(SMALL_RUN).read_text())
    sweep = make_sweep(tmp_path, "config: base.yaml")  # found beside the file of the sweep

    def change(config: RunConfig, step: int) -> tuple[float, float]:
        base.write_text(Path(SMALL_RUN).read_text().replace("lam: 1.0", "lam: 0.9"))
        return 1.0, 1.0

    FakeTrain.outcome = staticmethod(change)
    with pytest.raises(UsageError, match=r"base\.yaml was changed while the sweep ran"):
        run(sweep)
    assert len(FakeTrain.started) == 1


def sizes(folder: Path, number: int) -> set[str]:
    """Which kinds of files a trial has."""
    run_of_it = folder / "sweep" / f"trial-{number:03}"
    kept = {"records"} if (run_of_it / "metrics.jsonl").exists() else set()
    kept |= {"model"} if (run_of_it / "model.safetensors").exists() else set()
    return kept | ({"checkpoints"} if any(run_of_it.glob("checkpoints/step-*")) else set())


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("all", {"records", "model", "checkpoints"}),
        ("models", {"records", "model"}),
        ("best", {"records"}),
    ],
)
def test_what_stays_of_a_trial(keep: str, kept: set[str], tmp_path: Path) -> None:
    summary = run(make_sweep(tmp_path, f"keep: {keep}"))
    assert summary.best is not None
    for trial in summary.trials:
        expected = {"records", "model", "checkpoints"} if trial == summary.best else kept
        assert sizes(tmp_path, trial.number) == expected, trial.number


def test_the_directory_is_replaced_on_request_alone(tmp_path: Path) -> None:
    run(make_sweep(tmp_path, "trials: 2"))
    with pytest.raises(UsageError, match="continue it with --resume, replace it with --overwrite"):
        make_sweep(tmp_path)
    settings = make_sweep(tmp_path, "trials: 2", resume=True)
    with pytest.raises(UsageError, match="is in use by process"):
        make_sweep(tmp_path, "trials: 2", resume=True)
    settings.directory.unlock()
    (tmp_path / "sweep" / "trial-001" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds trial-001/notes\.txt, which no sweep wrote"):
        sweep_run.open_sweep(settings.settings, overwrite=True)
    (tmp_path / "sweep" / "trial-001" / "notes.txt").unlink()
    made = sweep_run.open_sweep(settings.settings, overwrite=True)
    assert not (tmp_path / "sweep" / "trial-000").exists() and made.results() == []
    made.directory.unlock()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "sweep").mkdir()
    (tmp_path / "other" / "sweep" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is no directory of a sweep"):
        make_sweep(tmp_path / "other")
    with pytest.raises(UsageError, match="holds no sweep to resume"):
        make_sweep(tmp_path / "other", resume=True)


def test_jobs_run_side_by_side_and_share_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_run, "usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-a")
    assert [env["OMP_NUM_THREADS"] for env in surroundings(4, "cpu")] == ["2"] * 4
    assert [env["CUDA_VISIBLE_DEVICES"] for env in surroundings(4, "auto")] == [
        "4", "5", "GPU-a", "4",
    ]  # fmt: skip
    for jobs, device in ((1, "auto"), (2, "cuda:1"), (2, "cpu")):
        visible = {env["CUDA_VISIBLE_DEVICES"] for env in surroundings(jobs, device)}
        assert visible == {"4,5,GPU-a"}
    sweep = make_sweep(tmp_path, jobs=3)
    most = 0
    for _ in sweep.run():
        most = max(most, sum(active.is_running for active in sweep.active))
    assert most == 3
    assert [fake.env["CUDA_VISIBLE_DEVICES"] for fake in FakeTrain.started[:3]] == [
        "4", "5", "GPU-a",
    ]  # fmt: skip
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [env["OMP_NUM_THREADS"] for env in surroundings(2, "cpu")] == ["3", "3"]


def test_without_optuna_one_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'ppo-cli\[sweep\]'") as caught:
        make_sweep(tmp_path)
    assert caught.value.exit_code == 2 and not (tmp_path / "sweep").exists()
