"""Commands with an encoder-decoder: its encoder reads the prompts, responses are scored alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ppo_cli.cli.requests import resolve
from ppo_cli.config.loading import load_config
from ppo_cli.data.prompts import PromptEncoder
from ppo_cli.data.rows import Row
from ppo_cli.evaluation.compare import compare
from ppo_cli.evaluation.dialogue import Dialogue
from ppo_cli.evaluation.generate import load_model
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.training.build import build_training
from ppo_cli.training.fast_paths import fast_paths
from tests.conftest import make_seq2seq_tokenizer, save_seq2seq

CODE = """
def first(texts, responses, queries):
    assert texts == responses  # a response is no continuation
    return [len(set(text.split())) / 10 for text in responses]
"""
SETTINGS = [
    "policy.precision=fp32", "prompts.source=prompts.txt", "prompts.held_out=4",
    "prompts.min_characters=0", "reward.terms=[{function: r.py:first, partial: true}]",
    "ppo.batch_size=8",
    "reward.score_every=2", "ppo.mini_batch_size=4", "ppo.ppo_epochs=2", "ppo.learning_rate=0.01",
    "rollout.output_min_length=2", "rollout.output_max_length=7", "run.steps=2",
    "run.eval_every=2", "run.checkpoint_every=1", "run.device=cpu", "run.samples_per_step=8",
    "policy.model=t5", "run.output=run",
]  # fmt: skip


def test_queries_keep_the_end_tokens_of_their_texts() -> None:
    tokenizer = make_seq2seq_tokenizer()
    settings = load_config("tiny").prompts
    for complete, ending in ((True, [1]), (False, [])):
        cut = PromptEncoder(tokenizer, settings, complete=complete)
        (found, empty) = cut.ids([Row("t5 t6 t7 t8 t9 t10 t11 t12 t13"), Row("")])
        count = len(found) - len(ending)
        assert found == [*range(5, 5 + count), *ending] and 2 <= count < 8
        assert empty == []


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_accelerate: None) -> Path:
    monkeypatch.chdir(tmp_path)
    save_seq2seq(tmp_path / "t5")
    (tmp_path / "r.py").write_text(CODE)
    rows = [" ".join(f"t{3 + (7 * i + j) % 50}" for j in range(9)) for i in range(24)]
    (tmp_path / "prompts.txt").write_text("\n".join(rows))
    return tmp_path / "run"


def finished(**options: Any) -> None:
    settings = load_config("tiny", assignments=SETTINGS)
    training = build_training(settings, consented=["r.py:first"], **options)
    if not options:
        assert {len(prompt.input_ids) for prompt in training.prompts.train} <= set(range(3, 9))
        assert {int(prompt.input_ids[-1]) for prompt in training.prompts.train} == {1}
        paths = fast_paths(training.trainer)
        assert paths["packing"] == paths["cuda_graph"] == "not for an encoder-decoder"
        assert paths["decode_loop"] == "used"
    list(training.steps())
    training.finish()
    training.directory.unlock()


def test_a_run_is_trained_resumed_compared_and_asked(run: Path) -> None:
    finished()
    moved = load_file(run / "model.safetensors"), load_file(run.parent / "t5/model.safetensors")
    assert not torch.equal(*(weights["shared.weight"] for weights in moved))
    card = (run / "README.md").read_text()
    assert "pipeline_tag: text2text-generation" in card
    assert "AutoModelForSeq2SeqLMWithValueHead.from_pretrained" in card
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert not any(
        row["response"].startswith(row["query"]) or "continues" in row for row in samples
    )
    metrics = (run / "metrics.jsonl").read_text()
    assert json.loads(metrics.splitlines()[-1])["objective/kl"] != 0

    # The second step again, from the first one's checkpoint.
    newest = max((run / "checkpoints").glob("step-*"))
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    finished(resume=True)
    again = load_file(run / "model.safetensors")
    assert all(torch.equal(weight, again[name]) for name, weight in moved[0].items())

    unset: dict[str, Any] = dict.fromkeys(("sentiment", "classifier"))
    given: dict[str, Any] = {"reference": True, "score": True, "device": "cpu", **unset}
    request = resolve(["run"], rewards=["r.py:first"], **given)
    result = compare(request, [], count=4, max_new_tokens=None, seed=0, best_of=[2])
    policy, reference = result.models
    assert policy.quality["kl"] > 0 and reference.quality["kl"] == 0
    assert result.best_of_n is not None and result.best_of_n.points[-1].n == 2

    loaded = load_model(request.sources[0], request.device)
    dialogue = Dialogue(loaded, request.prompts, SamplingParams(), max_new_tokens=3, seed=0)
    written: list[str] = []
    sample = dialogue.answer("t5 t6", written.append)
    assert "".join(written).split() == sample.response.split()
    assert sample.gap == "\n"
