"""Multi-adapter RL: one base, an adapter as the policy and another one as the reward."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2ForSequenceClassification

from ppo_cli import AutoModelForCausalLMWithValueHead, create_reference_model
from ppo_cli.errors import ModelError, UsageError
from ppo_cli.ppo.reference import make_reference
from tests.conftest import make_batch, make_gpt2, make_trainer

LORA = LoraConfig(task_type="CAUSAL_LM", r=2)
QUERIES, RESPONSES, _ = make_batch()
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def make_reward_model(base: str, **changes: Any) -> PeftModel:
    """A sequence classifier of two labels with a random adapter and score."""
    torch.manual_seed(3)
    model = GPT2ForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=0)
    settings = {"task_type": "SEQ_CLS", "r": 4, "init_lora_weights": False, **changes}
    return get_peft_model(model, LoraConfig(**settings)).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A base, and a reward adapter of it."""
    base, reward = (str(tmp_path_factory.mktemp(name)) for name in ("base", "reward"))
    make_gpt2().save_pretrained(base)
    make_reward_model(base).save_pretrained(reward)
    return base, reward


def load(folders: tuple[str, str], **kwargs: Any) -> AutoModelForCausalLMWithValueHead:
    base, reward = folders
    return AutoModelForCausalLMWithValueHead.from_pretrained(
        base, peft_config=copy.deepcopy(LORA), **{"reward_adapter": reward, **kwargs}
    )


def adapter(policy: Any, name: str) -> dict[str, Tensor]:
    """Copies of an adapter's weights."""
    named = policy.pretrained_model.named_parameters()
    return {key: value.detach().clone() for key, value in named if f".{name}." in key}


def last_scores(policy: Any) -> Tensor:
    scores = policy.compute_reward_score(IDS, MASK)
    assert scores.shape == (2, 4, 2) and scores.dtype == torch.float32
    return scores[torch.arange(2), MASK.sum(1) - 1]


def test_scores_are_the_reward_models(folders: tuple[str, str]) -> None:
    base, reward = folders
    classifier = GPT2ForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=0)
    expected = PeftModel.from_pretrained(classifier, reward).eval()(IDS, MASK).logits
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(LORA))
    for policy in (
        load(folders),
        AutoModelForCausalLMWithValueHead.from_pretrained(
            model, peft_config=copy.deepcopy(LORA), reward_adapter=Path(reward)
        ),
        AutoModelForCausalLMWithValueHead.from_pretrained(adapted, reward_adapter=reward),
    ):
        assert policy.supports_rm_adapter and policy.rm_adapter_name == "reward_adapter"
        torch.testing.assert_close(last_scores(policy), expected)
    assert not torch.allclose(expected, expected.new_zeros(()), atol=1e-2)


def test_the_reward_adapter_may_be_on_the_hub(folders: tuple[str, str], tmp_path: Path) -> None:
    repository = tmp_path / "models--me--judge"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    shutil.copytree(folders[1], repository / "snapshots" / "abc")
    policy = load(folders, reward_adapter="me/judge", cache_dir=str(tmp_path))
    torch.testing.assert_close(last_scores(policy), last_scores(load(folders)))


def test_the_policy_learns_and_the_reward_adapter_stays(folders: tuple[str, str]) -> None:
    policy = load(folders, reward_adapter_name="judge", summary_dropout_prob=0.0).train()
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained and not any("judge" in name or name.startswith("score") for name in trained)
    trainer = make_trainer(policy)
    assert trainer.ref_model is None
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for n, p in policy.named_parameters() if "judge" in n or "score" in n}

    before, reward, scored = adapter(policy, "default"), adapter(policy, "judge"), None
    for _ in range(2):  # the second step begins after the scoring of the first
        rows = [torch.cat(pair) for pair in zip(QUERIES, RESPONSES, strict=True)]
        scores = [policy.compute_reward_score(row[None])[0, -1, 1] for row in rows]
        assert scored is None or torch.equal(scored, torch.stack(scores))
        scored = torch.stack(scores)
        assert policy.pretrained_model.active_adapter == "default"
        assert policy.pretrained_model.training
        assert [name for name, p in policy.named_parameters() if p.requires_grad] == trained
        stats = trainer.step(QUERIES, RESPONSES, scores)
    assert stats["objective/kl"] != 0  # from the base: neither adapter is on in the reference
    assert all(p.grad is None for name, p in policy.named_parameters() if name not in trained)
    after = adapter(policy, "default")
    assert all(not torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(value, reward[key]) for key, value in adapter(policy, "judge").items())


def test_the_reference_and_what_is_saved_are_the_policys(
    folders: tuple[str, str], tmp_path: Path
) -> None:
    policy = load(folders)
    with torch.no_grad():
        for name, parameter in policy.pretrained_model.named_parameters():
            if ".default." in name:
                parameter.normal_()
    expected = policy(IDS[:1])[0]
    torch.testing.assert_close(create_reference_model(policy)(IDS[:1])[0], expected)
    merged = policy.merged()
    torch.testing.assert_close(merged(IDS[:1])[0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="no reward adapter"):
        merged.compute_reward_score(IDS)

    policy.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "value_head.safetensors"
    }  # fmt: skip
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained(
        tmp_path, reward_adapter=folders[1], is_trainable=False
    )
    torch.testing.assert_close(loaded(IDS[:1])[0], expected)
    torch.testing.assert_close(last_scores(loaded), last_scores(policy))
    assert not any(p.requires_grad for p in loaded.pretrained_model.parameters())
    reference = make_reference(loaded, None, None)  # the adapter was trained before: not the base
    assert reference is not None
    torch.testing.assert_close(reference(IDS[:1])[0], expected)


def test_what_does_not_go_together_is_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    base, reward = folders
    with pytest.raises(ValueError, match="must be a folder or hub id of an adapter, not a dict"):
        load(folders, reward_adapter={})
    with pytest.raises(UsageError, match="pass peft_config, too"):
        AutoModelForCausalLMWithValueHead.from_pretrained(base, reward_adapter=reward)
    with pytest.raises(UsageError, match="'default', choose another name"):
        load(folders, reward_adapter_name="default")
    with pytest.raises(UsageError, match=r"is no adapter \(it has no adapter_config.json\)"):
        load(folders, reward_adapter=base)
    other = {"task_type": "CAUSAL_LM", "r": 2}
    get_peft_model(make_gpt2(), LoraConfig(**other)).save_pretrained(tmp_path / "plain")
    with pytest.raises(ModelError, match="have no layer 'score': train it on AutoModelForSeq"):
        load(folders, reward_adapter=str(tmp_path / "plain"))
    make_gpt2(n_embd=32).save_pretrained(tmp_path / "wide")
    make_reward_model(str(tmp_path / "wide")).save_pretrained(tmp_path / "of-wide")
    with pytest.raises(UsageError, match=r"of-wide does not go with the policy: .*size"):
        load(folders, reward_adapter=str(tmp_path / "of-wide"))
    make_gpt2(n_layer=3).save_pretrained(tmp_path / "deep")
    make_reward_model(str(tmp_path / "deep")).save_pretrained(tmp_path / "of-deep")
    with pytest.raises(ModelError, match=r"of-deep is an adapter of another base: .*h\.2\."):
        load(folders, reward_adapter=str(tmp_path / "of-deep"))
