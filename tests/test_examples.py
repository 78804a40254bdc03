"""The programs in examples/: each runs offline with tiny models, and saves a policy."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ppo_cli import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    TextEnvironment,
)
from ppo_cli.data.embedded import TRAIN_SEED, classifier_folder, policy_folder
from ppo_cli.data.embedded.grammar import reviews
from tests.conftest import make_chat_tokenizer, make_gpt2, save_seq2seq

EXAMPLES = Path(__file__).parent.parent / "examples"
POLICY, CLASSIFIER = str(policy_folder()), str(classifier_folder())
SMALL = ["--steps", "1", "--batch-size", "8"]


@pytest.fixture
def texts(tmp_path: Path) -> str:
    file = tmp_path / "texts.txt"
    lines = [text for r in reviews(300, TRAIN_SEED) if len(text := r.text) > 200]
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


def load(name: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, output: Path, *arguments: str) -> AutoModelForCausalLMWithValueHead:
    """A step of an example; the policy that it saved."""
    means = load(name).main([*SMALL, "--output", str(output), *arguments])
    assert means and all(map(math.isfinite, means))
    kind = AutoModelForSeq2SeqLMWithValueHead if name == "t5" else AutoModelForCausalLMWithValueHead
    return kind.from_pretrained(output)


def moved(policy: AutoModelForCausalLMWithValueHead, base: str = POLICY) -> set[str]:
    """Names of the weights that are not the base's."""
    before = type(policy).from_pretrained(base).state_dict()
    return {key for key, value in policy.state_dict().items() if not value.equal(before[key])}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_tested(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 120
    assert f"python examples/{path.name}" in source
    assert f'run("{path.stem}"' in Path(__file__).read_text(encoding="utf-8")


def test_sentiment(tmp_path: Path, texts: str, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["--model", POLICY, "--classifier", CLASSIFIER, "--sentiment", "negative"]
    assert moved(run("sentiment", tmp_path / "out", *models, "--texts", texts, "--steps", "2"))
    assert re.search(r"^step 2: reward -?\d+\.\d+, KL -?\d", capsys.readouterr().out, re.MULTILINE)


def test_control_codes(tmp_path: Path, texts: str) -> None:
    models = ["--model", POLICY, "--classifier", CLASSIFIER]
    assert moved(run("control_codes", tmp_path / "out", *models, "--texts", texts))
    reward = load("control_codes").control_reward
    logits = [torch.tensor(value) for value in (-3.0, 0.0, 3.0)]
    assert [reward("[positive]", x) for x in logits] == [-3, 0, 3]
    assert [reward("[negative]", x) for x in logits] == [3, 0, -3]
    assert [reward("[neutral]", x) for x in logits] == [-2, 4, -2]


def test_detoxify(tmp_path: Path, texts: str) -> None:
    models = ["--model", POLICY, "--classifier", CLASSIFIER, "--label", "positive"]
    found = moved(run("detoxify", tmp_path / "out", *models, "--prompts", texts))
    assert found and not any(".h.0." in key or ".h.1." in key for key in found)  # frozen
    repetition = load("detoxify").repetition
    assert repetition(torch.tensor([1, 2, 3])) == repetition(torch.tensor([1])) == 0
    assert repetition(torch.tensor([1, 2, 1, 2, 1])) == 0.5


def test_long_prompts(tmp_path: Path, texts: str, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["--model", POLICY, "--reward-model", CLASSIFIER, "--label", "positive"]
    limits = ["--max-prompt-tokens", "80", "--max-new-tokens", "12"]
    policy = run("long_prompts", tmp_path / "out", *models, *limits, "--questions", texts)
    assert policy.is_peft_model
    kept, count = re.findall(r"(\d+) of (\d+) prompts have at most 80", capsys.readouterr().out)[0]
    assert 0 < int(kept) < int(count)


def test_multi_adapter(tmp_path: Path, texts: str) -> None:
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(
        POLICY, num_labels=1, pad_token_id=0
    )
    settings = LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False)
    reward_model = get_peft_model(classifier, settings).eval()
    reward_model.save_pretrained(tmp_path / "reward")
    models = ["--model", POLICY, "--reward-adapter", str(tmp_path / "reward")]
    policy = run("multi_adapter", tmp_path / "out", *models, "--texts", texts, "--dtype", "float32")
    assert policy.is_peft_model and "reward_adapter" not in policy.pretrained_model.peft_config

    both = AutoModelForCausalLMWithValueHead.from_pretrained(
        tmp_path / "out", reward_adapter=str(tmp_path / "reward")
    )
    rows = [torch.tensor([5, 6, 7]), torch.tensor([8, 9])]
    scores = load("multi_adapter").rewards(both, rows, -1)
    expected = [reward_model(row[None]).logits[0, 0] for row in rows]
    torch.testing.assert_close(scores, expected)


def test_t5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file = save_seq2seq(tmp_path / "t5"), tmp_path / "prompts.txt"
    rows = [" ".join(f"t{3 + (7 * i + j) % 50}" for j in range(9)) for i in range(24)]
    file.write_text("\n".join(rows))
    models = ["--model", model, "--classifier", CLASSIFIER, "--texts", str(file)]
    assert moved(run("t5", tmp_path / "out", *models), model)
    assert "step 1: reward" in capsys.readouterr().out
    assert "AutoModelForSeq2SeqLMWithValueHead" in (tmp_path / "out/README.md").read_text()


def test_text_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_chat_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    ends = {"bos_token_id": 256, "eos_token_id": 256}
    make_gpt2(vocab_size=len(tokenizer), n_positions=320, **ends).save_pretrained(
        tmp_path / "model"
    )
    model = ["--model", str(tmp_path / "model")]
    assert moved(run("text_environment", tmp_path / "out", *model), str(tmp_path / "model"))

    def turn(self: Any, queries: list[Tensor], batch_size: int = 16) -> list[Tensor]:
        """What a policy writes that has learnt it."""
        texts = [AutoTokenizer.from_pretrained(tmp_path / "model").decode(q) for q in queries]
        tasks = [re.findall(r"What is (\S+)\?\n", text)[-1] for text in texts]
        answers = [re.search(r"<call>(-?\d+)<response>$", text) for text in texts]
        turns = [
            f"Result = {answer[1]}<submit>" if answer else f"<request><calculator>{task}<call>"
            for task, answer in zip(tasks, answers, strict=True)
        ]
        return [tokenizer(text, return_tensors="pt").input_ids[0] for text in turns]

    monkeypatch.setattr(TextEnvironment, "_generate_batched", turn)
    module = load("text_environment")
    assert module.main([*SMALL, "--output", str(tmp_path / "out"), *model]) == [1]
    with pytest.raises(ValueError, match="only"):
        module.calculator("__import__('os')")
