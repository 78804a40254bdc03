"""`export`: a run's model in a folder of its own, as transformers, peft and TRL read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_cli import AutoModelForCausalLMWithValueHead as Policy
from ppo_cli.config.loading import validate
from ppo_cli.errors import ModelNotFoundError, UsageError
from ppo_cli.models.loading import load_policy
from ppo_cli.models.saving import save_folder
from ppo_cli.training import export
from ppo_cli.training.export import export_model
from ppo_cli.training.run_directory import RunDirectory
from tests.conftest import make_gpt2, make_tokenizer

IDS = torch.tensor([[1, 2, 3, 4, 5, 6]])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.fixture
def base(tmp_path: Path) -> str:
    folder = tmp_path / "base"
    make_gpt2().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def make_run(base: str, adapter: dict[str, Any] | None) -> tuple[RunDirectory, Policy]:
    """A run that has ended, with an adapter that changes something."""
    config = validate({"policy": {"model": base, "adapter": adapter}})
    directory = RunDirectory(Path(base).with_name("run"))
    directory.create(config, False)
    directory.unlock()
    policy = load_policy(config.policy).eval()
    with torch.no_grad():
        for _, parameter in policy.pretrained_model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    kept = config.policy.adapter.save if config.policy.adapter else None
    save_folder(policy, make_tokenizer(), directory.inventory, kept)
    return directory, policy


@pytest.mark.parametrize("save", ["both", "adapter"])
def test_a_run_is_exported_whole_and_as_its_adapter(save: str, base: str, tmp_path: Path) -> None:
    directory, policy = make_run(base, {"r": 2, "save": save})
    expected = logits(policy.pretrained_model)
    whole, small, adapter = (tmp_path / "new" / name for name in ("whole", "small", "adapter"))
    assert export_model(directory, whole).form == "merged"
    export_model(directory, small, dtype=torch.bfloat16)
    exported = export_model(directory, adapter, form="adapter", dtype=torch.bfloat16)
    assert exported.base == base
    plain = AutoModelForCausalLM.from_pretrained(whole)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    assert {v.dtype for v in load_file(small / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(small).dtype == torch.bfloat16
    weights = load_file(adapter / "adapter_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    torch.testing.assert_close(logits(adapted), expected, rtol=0.05, atol=0.05)
    for folder in (whole, small, adapter):
        head = Policy.from_pretrained(folder).v_head.summary.weight
        assert torch.equal(head, policy.v_head.summary.weight)
        assert len(AutoTokenizer.from_pretrained(folder)) == len(make_tokenizer())
    assert sorted(path.name for path in whole.parent.iterdir()) == ["adapter", "small", "whole"]


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_for_trl_the_value_head_is_among_the_weights(form: Any, base: str, tmp_path: Path) -> None:
    """TRL up to 0.11 takes `v_head.*` from model.safetensors, of an adapter's folder as well."""
    directory, policy = make_run(base, {"r": 2})
    export_model(directory, tmp_path / "trl", form=form, for_trl=True)
    weights = load_file(tmp_path / "trl" / "model.safetensors")
    head = {key for key in weights if key.startswith("v_head.")}
    assert head == {"v_head.summary.weight", "v_head.summary.bias"}
    assert torch.equal(weights["v_head.summary.weight"], policy.v_head.summary.weight)
    assert (len(weights) == len(head)) is (form == "adapter")
    (tmp_path / "trl" / "value_head.safetensors").unlink()  # ours, which TRL does not know
    again = Policy.from_pretrained(tmp_path / "trl")
    assert torch.equal(again.v_head.summary.weight, policy.v_head.summary.weight)
    torch.testing.assert_close(logits(again.pretrained_model), logits(policy.pretrained_model))


def test_what_is_not_there_is_not_exported(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = make_run(base, {"r": 2, "save": "merged"})
    target = tmp_path / "target"
    with pytest.raises(UsageError, match=r"--resume --set policy\.adapter\.save=both"):
        export_model(directory, target, form="adapter")
    (directory.path / "preprocessor_config.json").write_text("{}")
    export_model(directory, target)  # which an empty folder may be
    assert (target / "preprocessor_config.json").read_text() == "{}"
    before = sorted(path.name for path in target.iterdir())
    with pytest.raises(UsageError, match="exists and is not empty"):
        export_model(directory, target)
    for place in (directory.path / "model", directory.path / "checkpoints" / "x"):
        with pytest.raises(UsageError, match="lies in a run directory"):
            export_model(directory, place)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "settle", full)
    with pytest.raises(OSError, match="No space left"):
        export_model(directory, tmp_path / "other")
    assert sorted(path.name for path in target.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run", "target"]


def test_a_run_without_an_adapter_or_a_model_says_so(base: str, tmp_path: Path) -> None:
    directory, policy = make_run(base, None)
    with pytest.raises(UsageError, match="all weights were trained"):
        export_model(directory, tmp_path / "target", form="adapter")
    export_model(directory, tmp_path / "target")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert torch.equal(logits(plain), logits(policy.pretrained_model))
    directory.inventory.remove(["config.json", "tokenizer.json", "tokenizer_config.json"])
    with pytest.raises(ModelNotFoundError, match="--resume"):
        export_model(directory, tmp_path / "third")
