"""A notebook in a real kernel, started once: what its cells keep of a run, and how things show."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from ppo_cli import PPOConfig
from ppo_cli.config.loading import load_config
from ppo_cli.evaluation.bootstrap import Interval
from tests.conftest import SMALL_RUN, make_batch, make_trainer
from tests.test_security import EVIL, evil_comparison

ATTACK = "<script>alert(1)</script>\x1b[2J"
SHOWN = "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[2J"
CELLS = {
    "train": f"""
import ppo_cli
summary = ppo_cli.train({SMALL_RUN!r}, {{"run.steps": 3, "run.eval_every": 2, "run.output": "run"}})
""",
    "summary": "summary",
    "many": f"""
from ppo_cli.cli import notebook
from ppo_cli.cli.display import make_display
from ppo_cli.evaluation.samples import Sample
from ppo_cli.reporting.summary import StepReport
import json

notebook.MIN_INTERVAL = 0
row = json.loads(open("run/metrics.jsonl").readline())
sample = Sample({ATTACK!r}, {ATTACK!r}, 1.0, None)
with make_display(False) as display:
    for step in range(1, 101):
        display.show(StepReport(step, 100, row | {{"step": step}}, [sample]))
""",
    "command": f"!{sys.executable} -m ppo_cli stats run --follow",
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The outputs of each cell."""
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS.values()]
    book = nbformat.v4.new_notebook(cells=cells)
    place = {"metadata": {"path": str(tmp_path_factory.mktemp("book"))}}
    # Commands of other tests set the backend, which a kernel sets if nothing else has.
    variables = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    client = NotebookClient(book, timeout=600, kernel_name="python3", resources=place)
    client.execute(env=variables)
    return dict(zip(CELLS, (cell.outputs for cell in book.cells), strict=True))


def displayed(outputs: list[Any], kind: str) -> list[str]:
    return [output["data"][kind] for output in outputs if kind in output.get("data", {})]


def test_a_cell_keeps_the_newest_state_of_a_run_and_its_curves(
    outputs: dict[str, list[Any]],
) -> None:
    (page,) = displayed(outputs["train"], "text/html")
    for wanted in ("step 3/3, 0:00 left", "mean score", "held-out"):
        assert wanted in page, wanted
    (picture,) = displayed(outputs["train"], "image/png")
    assert picture.startswith("iVBORw0KGgo")  # the beginning of a PNG in base64
    assert "step 3 of 3" not in page and len(json.dumps(outputs["train"])) < 300_000


def test_the_size_of_a_cell_does_not_grow_with_the_steps(outputs: dict[str, list[Any]]) -> None:
    pages = [displayed(outputs[name], "text/html") for name in ("train", "many")]
    assert [len(found) for found in pages] == [1, 1]
    assert len(pages[1][0]) < 2 * len(pages[0][0]) < 20_000
    assert "step 100/100" in pages[1][0]
    assert SHOWN in pages[1][0] and "<script" not in pages[1][0]


def test_no_cell_has_control_codes(outputs: dict[str, list[Any]]) -> None:
    assert "\\u001b" not in json.dumps(outputs)
    (command,) = outputs["command"]
    assert command["text"].startswith("step 3/3  score ")
    assert "run has finished, after 3 of 3 steps" in command["text"]


def test_the_summary_shows_reference_and_tuned_model(outputs: dict[str, list[Any]]) -> None:
    (page,) = displayed(outputs["summary"], "text/html")
    for wanted in ("run: 3 of 3 steps", "reference", "tuned", "perplexity", "<details>"):
        assert wanted in page, wanted
    (plain,) = displayed(outputs["summary"], "text/plain")
    assert plain.startswith("TrainingSummary(run: 3 of 3 steps") and len(plain) < 200


def cells(page: str) -> list[list[str]]:
    """The text of each row of the tables in a page; bold is between asterisks."""
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [
        [re.sub(r"<[^>]*>", "", re.sub(r"</?b>", "*", cell)) for cell in re.split("</t[dh]>", row)][
            :-1
        ]
        for row in rows
    ]


def test_a_trainer_shows_models_sizes_and_its_newest_step() -> None:
    trainer = make_trainer(mini_batch_size=4)
    assert "KL" not in trainer._repr_html_() and "steps: 0" in repr(trainer)
    stats = trainer.step(*make_batch())
    about = dict(row for row in cells(trainer._repr_html_()) if len(row) == 2)
    assert about["policy"].startswith("GPT2LMHeadModel, ") and about["steps"] == "1"
    assert about["batch"] == "8 samples in mini-batches of 4, 4 epochs"
    assert "cpu" in about["device"] and about["reference"] == "GPT2LMHeadModel"
    shown = {row[0]: row[1] for row in cells(trainer._repr_html_()) if len(row) == 3}
    for key in ("ppo/loss/total", "ppo/returns/mean"):  # one that is folded away, too
        assert shown[key] == f"{stats[key]:.5g}", key
    assert repr(trainer).startswith("PPOTrainer(policy: GPT2LMHeadModel")
    assert "steps: 1)" in repr(trainer)


def test_a_configuration_marks_what_differs_from_its_defaults() -> None:
    secret = {"wandb": {"api_key": "opensesame"}}
    config = PPOConfig(
        batch_size=8, mini_batch_size=8, lam=0.5, exp_name=EVIL, tracker_kwargs=secret
    )
    rows = cells(config._repr_html_())
    assert ["step", "*lam*", "*0.5*", "0.95"] in rows
    assert ["step", "gamma", "1.0"] in rows
    assert "opensesame" not in config._repr_html_() + repr(config)
    assert "lam=0.5, " in repr(config)
    assert EVIL not in config._repr_html_() and "\x1b" not in config._repr_html_()
    run = load_config("tiny", assignments=["ppo.lam=0.5", "run.seed=3"])
    found = {(row[0], row[1]): row[2:] for row in cells(run._repr_html_())}
    assert found["run", "*seed*"] == ["*3*", "0"]
    assert found["run", "keep"] == ["2"]


def test_a_comparison_shows_verdict_means_differences_and_samples() -> None:
    comparison = evil_comparison()
    page = comparison._repr_html_()
    assert "<script" not in page and "\x1b" not in page and "<img" not in page
    rows = cells(page)
    assert ["mean score", "1.000", "1.000"] in rows
    assert any(row[1:3] == ["+0.000", "-1.000 to +1.000"] for row in rows)
    assert "There is no clear difference between [red]" in page and "includes zero." in page
    assert len(repr(comparison)) < 1000
    better = dataclasses.replace(
        comparison,
        differences=[
            dataclasses.replace(
                comparison.differences[0], difference=Interval(0.5, 0.25, 0.75), win_rate=0.75
            )
        ],
    )
    assert "better on 75% of 2 prompts" in repr(better)
