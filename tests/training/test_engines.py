"""Runs with another sampling engine: recorded, resumed, tried in a dry run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ppo_cli.config.loading import load_config
from ppo_cli.training.build import build_training
from ppo_cli.training.estimate import estimate
from ppo_cli.training.run import Training
from tests import vllm_standin
from tests.conftest import SMALL_RUN

SMALL = [
    *("rollout.output_min_length=4", "rollout.output_max_length=8", "run.checkpoint_every=1"),
    *("prompts.limit=24", "prompts.held_out=4", "ppo.batch_size=8", "ppo.mini_batch_size=8"),
]


def build(*settings: str, resume: bool = False) -> Training:
    return build_training(load_config(SMALL_RUN, assignments=[*SMALL, *settings]), resume=resume)


def rows(run: str) -> list[dict[str, Any]]:
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    timed = ("time/", "perf/")
    return [{k: v for k, v in json.loads(x).items() if not k.startswith(timed)} for x in lines]


def test_a_paged_run_equals_one_that_paused_for_an_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in build("rollout.engine=paged", "run.output=whole").steps():
        pass
    part = ["rollout.engine=paged", "run.output=part"]
    next(build(*part).steps())
    resumed = build(*part, resume=True)
    assert (found := estimate(resumed, startup=0.0).times) is not None and found.step > 0
    for _ in resumed.steps():
        pass
    assert rows("part") == rows("whole")
    assert Path("part/samples.jsonl").read_text() == Path("whole/samples.jsonl").read_text()
    for row in rows("whole"):
        assert 0 < row["sampling/logprob_gap"] < 1e-5 and 0 <= row["sampling/kl"] < 1e-9


def test_a_run_with_vllm_samples_from_the_weights_of_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with vllm_standin.installed() as made:
        for _ in build("rollout.engine=vllm", "run.output=run", "policy.adapter={}").steps():
            pass
    assert len(made) == 1 and made[0].settings["max_model_len"] > 8
    assert len(made[0].loaded) == 3 * len({*made[0].loaded})  # for the trial and each step
    assert [0 <= row["sampling/logprob_gap"] < 1e-5 for row in rows("run")] == [True, True]
