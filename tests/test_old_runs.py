"""A run directory that release 0.1 wrote: today's code goes on with it and reads it.

`fixtures/run-0.1` holds the inputs (a random two-layer GPT-2, a random classifier, prompts), `run`
after 2 of its 4 steps, and in `finished` what that release made of the same run after 4 steps.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from ppo_cli.kernels.switch import is_enabled
from tests.forked import Done, ppo_cli

OLD = Path(__file__).parent / "fixtures" / "run-0.1"
NOT_COMPARED = ("time/", "perf/")
WEIGHTS = ("model.safetensors", "value_head.safetensors")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A copy of the inputs and of the run."""
    return shutil.copytree(OLD, tmp_path / "home")


def succeeded(done: Done) -> Done:
    assert done.code == 0, done.err
    return done


def metrics(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(NOT_COMPARED)} for row in rows]


def config(run: Path) -> Any:
    return yaml.safe_load((run / "run.yaml").read_text())["config"]


@pytest.mark.skipif(
    not is_enabled("decode_loop"), reason="the samples of the run are those of the decode loop"
)
def test_a_run_of_release_0_1_goes_on_to_the_same_end(home: Path) -> None:
    succeeded(ppo_cli("train", "--output", "run", "--resume", "--quiet", cwd=home))
    found, expected = metrics(home / "run/metrics.jsonl"), metrics(OLD / "finished/metrics.jsonl")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert [list(row) for row in found] == [list(row) for row in expected]
    assert found[:2] == expected[:2]  # the old lines are kept as they were
    for row, same in zip(found, expected, strict=True):
        assert row == pytest.approx(same, rel=1e-2, abs=1e-3)  # processors differ in last digits
    settings, old_settings = config(home / "run"), config(OLD / "run")
    for section, values in old_settings.items():  # keys that came later have their defaults
        assert settings[section].items() >= values.items()
    for name in WEIGHTS:
        start, end = load_file(OLD / "run" / name), load_file(OLD / "finished" / name)
        weights = load_file(home / "run" / name)
        assert weights.keys() == end.keys()
        # Two more steps move the weights far more than the tolerance.
        assert max((end[key] - start[key]).abs().max().item() for key in end) > 5e-3
        for key in end:
            if key.endswith("attn.c_attn.bias"):
                continue  # the gradient of the keys' bias is rounding noise, which Adam scales up
            assert (weights[key] - end[key]).abs().max().item() < 5e-4, key


def test_every_command_reads_a_run_of_release_0_1(home: Path) -> None:
    def run(*arguments: Any) -> Done:
        return succeeded(ppo_cli(*arguments, cwd=home))

    done = run("compare", "run", "--samples", 4, "--format", "json")
    assert [model["model"] for model in json.loads(done.out)["models"]] == ["run", "reference"]
    assert "warning" not in done.err  # the inputs are those that the run recorded
    done = run("generate", "run", "--reference", "--prompt", "t1 t2", "--format", "jsonl")
    samples = [json.loads(line) for line in done.out.splitlines()]
    assert [sample["model"] for sample in samples] == ["run", "reference"]
    assert all(isinstance(sample["score"], float) for sample in samples)
    statistics = json.loads(run("stats", "run", "--json").out)
    last = json.loads((OLD / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert statistics["step"] == 2 and statistics["objective/kl"] == last["objective/kl"]
    run("plot", "run", "--output", "picture.svg")
    assert (home / "picture.svg").stat().st_size > 1000
