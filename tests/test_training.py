"""`Training` in this process: what a run is made of before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppo_cli.config_source import load_config
from ppo_cli.training import Training


def test_each_pass_takes_every_prompt_once_in_an_order_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["prompts.limit=64", "prompts.held_out=8", "run.device=cpu"]
    sizes = ["ppo.batch_size=16", "ppo.mini_batch_size=16"]
    training = Training(load_config("tiny", assignments=[*settings, *sizes]))
    prompts = {id(prompt.input_ids): i for i, prompt in enumerate(training.prompts.train)}

    def order(number: int) -> list[int]:
        steps = range(number * 4, number * 4 + 4)
        return [prompts[id(ids)] for step in steps for ids in training._batch(step)["input_ids"]]

    first, second = order(0), order(1)
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second
    assert first == order(0)
    assert list(tmp_path.iterdir()) == []
