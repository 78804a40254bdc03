"""A run that is built but not started: its batches; and the pace in its summary."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppo_cli.config.loading import load_config
from ppo_cli.reporting.summary import Pace
from ppo_cli.training.build import build_training
from tests.conftest import SMALL_RUN


def row(step: float, sampling: float, scoring: float, optimising: float, rate: float) -> dict:
    times = {"time/sampling": sampling, "time/scoring": scoring, "time/optimising": optimising}
    return {**times, "time/step": step, "perf/tokens_per_second": rate, "objective/kl": 1.0}


@pytest.mark.parametrize(
    ("metrics", "expected", "text"),
    [
        ([], (0, 0, 0, 0), "0 tokens/s: sampling 0%, scoring 0%, optimising 0%"),
        (
            [row(4, 1, 0.5, 2, 2500)],
            (2500, 0.25, 0.125, 0.5),
            "2,500 tokens/s: sampling 25%, scoring 12%, optimising 50%",
        ),
        (  # a slow step counts for more than a fast one
            [row(1, 0.5, 0.25, 0.25, 1000), row(3, 0.5, 0.25, 2.25, 200)],
            (1600 / 4, 0.25, 0.125, 0.625),
            "400 tokens/s: sampling 25%, scoring 12%, optimising 62%",
        ),
        (
            [row(4, 1, 0.5, 2, 2500), {"step": 2, "time/step": 9.0}],
            (2500, 0.25, 0.125, 0.5),
            "2,500 tokens/s: sampling 25%, scoring 12%, optimising 50%",
        ),
    ],
    ids=["no steps", "one step", "two steps", "a damaged step"],
)
def test_the_pace_of_a_run_is_tokens_and_times_over_the_time_of_its_steps(
    metrics: list[dict], expected: tuple[float, ...], text: str
) -> None:
    pace = Pace.of(metrics)
    shares = (pace.sampling, pace.scoring, pace.optimising)
    assert (pace.tokens_per_second, *shares) == pytest.approx(expected)
    assert str(pace) == text


@pytest.mark.usefixtures("fresh_accelerate")
def test_each_pass_takes_every_prompt_once_in_an_order_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    training = build_training(load_config(SMALL_RUN, assignments=["run.device=cpu"]))
    prompts = {id(prompt.input_ids): i for i, prompt in enumerate(training.prompts.train)}

    def order(number: int) -> list[int]:
        steps = range(number * 4, number * 4 + 4)
        return [
            prompts[id(ids)] for step in steps for ids in training.ppo_step.batch(step)["input_ids"]
        ]

    first, second = order(0), order(1)
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second
    assert first == order(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("fresh_accelerate")
def test_several_responses_to_a_query_stand_in_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["prompts.limit=8", "run.device=cpu", "ppo.responses_per_query=4"]
    training = build_training(load_config(SMALL_RUN, assignments=settings))
    seen: list[int] = []
    for step in (0, 1):
        ids = [id(query) for query in training.ppo_step.batch(step)["input_ids"]]
        assert ids == [ids[i - i % 4] for i in range(16)]
        seen += ids[::4]
    assert len(set(seen)) == len(seen) == 8  # a pass over all prompts
