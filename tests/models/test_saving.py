"""The saved folder, read by plain transformers, is the policy that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ppo_cli.config.policy import AdapterConfig, PolicyConfig
from ppo_cli.errors import ModelError
from ppo_cli.models.loading import load_policy
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead as Policy
from ppo_cli.models.saving import save_folder
from ppo_cli.utils.inventory import Inventory
from tests.conftest import make_gpt2, make_tokenizer
from tests.models.test_self_check import make_model, with_adapter

IDS = torch.tensor([[1, 2, 3, 4, 5, 6]])
ENDS = ["wte", "lm_head"]
ADAPTED: dict[str, tuple[str, dict[str, Any], bool]] = {
    # Family, the adapter's settings, whether input and output embeddings stay one weight.
    "attention": ("gpt2", {"target_modules": ["c_attn"]}, True),
    "output layer": ("gpt2", {"target_modules": ["c_attn", "lm_head"]}, False),
    "input embeddings": ("gpt2", {"target_modules": ["c_attn", "wte"]}, False),
    "both saved": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ENDS}, False),
    "some tokens": (
        "gpt2",
        {"target_modules": ["c_attn"], "trainable_token_indices": [1, 2]},
        True,
    ),
    "untied": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, False),
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("name", ADAPTED)
def test_a_merged_adapter_has_the_logits_of_the_policy(name: str, tmp_path: Path) -> None:
    family, settings, tied = ADAPTED[name]
    policy = Policy(with_adapter(make_model(family), **settings)).eval()
    expected = logits(policy.pretrained_model)
    save_folder(policy, make_tokenizer(), Inventory(tmp_path))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(saved), expected, rtol=1e-4, atol=1e-4)
    assert (saved.get_input_embeddings().weight is saved.lm_head.weight) is tied
    torch.testing.assert_close(logits(policy.pretrained_model), expected)  # it goes on


def test_a_model_that_divides_its_weights_in_eval_mode_saves_those_it_had(tmp_path: Path) -> None:
    model = make_model("rwkv")
    assert model.config.rescale_every == 1
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    expected = logits(model)  # divides them
    policy = Policy(model)
    torch.testing.assert_close(logits(policy.pretrained_model), expected, rtol=1e-4, atol=1e-4)
    for name, parameter in policy.pretrained_model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    save_folder(policy, make_tokenizer(), Inventory(tmp_path))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(saved), expected, rtol=1e-4, atol=1e-4)


class Shifted(nn.Linear):
    """Adds what no file holds."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + torch.arange(self.out_features)


def test_a_model_that_its_files_do_not_hold_is_not_saved_over_another(tmp_path: Path) -> None:
    save_folder(Policy(make_gpt2()), make_tokenizer(), Inventory(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model = make_gpt2(seed=1, tie_word_embeddings=False)
    layer = Shifted(16, 80, bias=False)
    layer.weight = model.lm_head.weight
    model.lm_head = layer
    with pytest.raises(ModelError, match="not the one that was trained"):
        save_folder(Policy(model), make_tokenizer(), Inventory(tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_memory_for_the_check_the_model_is_saved_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.warns(UserWarning, match="no memory is left to check"):
        save_folder(Policy(make_gpt2()), make_tokenizer(), Inventory(tmp_path))
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("moved", [False, True])
def test_the_type_of_the_base_is_kept_where_it_loses_nothing(moved: bool, tmp_path: Path) -> None:
    make_gpt2().bfloat16().save_pretrained(tmp_path / "base")
    policy = Policy.from_pretrained(tmp_path / "base")
    assert policy.pretrained_model.dtype == torch.float32
    if moved:  # by less than bfloat16 can tell
        with torch.no_grad():
            policy.pretrained_model.transformer.ln_f.weight.add_(1e-5)
    folder = tmp_path / "run"
    folder.mkdir()
    save_folder(policy, make_tokenizer(), Inventory(folder))
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert saved.dtype == (torch.float32 if moved else torch.bfloat16)
    for name, weight in saved.state_dict().items():
        assert torch.equal(weight.float(), policy.pretrained_model.state_dict()[name]), name


def adapted(family: str = "gpt2") -> Policy:
    return Policy(with_adapter(make_model(family), target_modules=["c_attn"])).eval()


MERGED = {"config.json", "model.safetensors"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
BESIDE = {f"adapter/{name}" for name in ADAPTER}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_an_adapter_is_kept_beside_the_merged_model_or_one_of_them_alone(tmp_path: Path) -> None:
    """In any order in one folder: what an earlier choice wrote is gone."""
    policy, inventory = adapted(), Inventory(tmp_path)
    wanted: list[tuple[Any, set[str]]] = [
        (None, MERGED | BESIDE), ("adapter", ADAPTER), ("merged", MERGED), ("both", MERGED | BESIDE)
    ]  # fmt: skip
    for kept, names in wanted:
        save_folder(policy, make_tokenizer(), inventory, kept)
        assert files(tmp_path) & (MERGED | ADAPTER | BESIDE) == names
        assert "value_head.safetensors" in files(tmp_path)
        assert not inventory.strangers()


@pytest.mark.parametrize("kept", ["both", "adapter"])
def test_what_is_kept_is_read_by_whoever_reads_a_run(kept: Any, tmp_path: Path) -> None:
    make_gpt2().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    config = PolicyConfig(model=str(tmp_path / "base"), adapter=AdapterConfig(r=2))
    policy = load_policy(config)
    for name, parameter in policy.pretrained_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    expected = logits(policy.eval().pretrained_model)
    run = tmp_path / "run"
    run.mkdir()
    save_folder(policy, make_tokenizer(), Inventory(run), kept)
    adapter = run / "adapter" if kept == "both" else run
    ours = Policy.from_pretrained(run)
    assert torch.equal(ours.v_head.summary.weight, policy.v_head.summary.weight)
    readings = [
        ours.pretrained_model,
        load_policy(PolicyConfig(model=str(run))).pretrained_model,
        AutoModelForCausalLM.from_pretrained(run),
        AutoPeftModelForCausalLM.from_pretrained(adapter),
        PeftModel.from_pretrained(make_gpt2(), adapter),
    ]
    for model in readings:
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_merging_would_change_is_kept_as_its_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = adapted()
    monkeypatch.setattr(Policy, "merged", lambda self, untied=False: Policy(make_gpt2(seed=5)))
    with pytest.warns(UserWarning, match="the adapter is saved alone"):
        save_folder(policy, make_tokenizer(), Inventory(tmp_path))
    assert files(tmp_path) & (MERGED | ADAPTER | BESIDE) == ADAPTER
    with pytest.raises(ModelError, match="not the one that was trained"):
        save_folder(policy, make_tokenizer(), Inventory(tmp_path), "merged")


def test_an_adapter_of_which_something_is_missing_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = adapted()
    write = type(policy.pretrained_model).save_pretrained

    def partly(self: Any, folder: Any, **settings: Any) -> None:
        write(self, folder, **settings)
        file = Path(folder) / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, file)

    monkeypatch.setattr(type(policy.pretrained_model), "save_pretrained", partly)
    with pytest.raises(ModelError, match="do not hold all that was trained"):
        save_folder(policy, make_tokenizer(), Inventory(tmp_path), "adapter")
    assert not files(tmp_path) - {"ppo-cli.json"}


def test_the_files_of_a_processor_travel_along(tmp_path: Path) -> None:
    from tests.models.test_adapter import save

    base, run = tmp_path / "base", tmp_path / "run"
    save("Gemma3", base)
    run.mkdir()
    texts = {
        "preprocessor_config.json": '{"image_processor_type": "Gemma3ImageProcessor"}',
        "processor_config.json": '{"processor_class": "Gemma3Processor"}',
        "chat_template.jinja": "{{ messages[0].content }}",
    }
    for name, text in texts.items():
        (base / name).write_text(text)
    policy = load_policy(PolicyConfig(model=str(base), adapter=AdapterConfig(r=2)))
    save_folder(policy, make_tokenizer(), Inventory(run))
    for name, text in texts.items():
        assert (run / name).read_text() == text
    assert (run / "adapter").is_dir()
    plain = tmp_path / "plain"  # whose processor nothing would use
    make_gpt2().save_pretrained(plain)
    (plain / "preprocessor_config.json").write_text("{}")
    other = tmp_path / "other"
    other.mkdir()
    save_folder(Policy.from_pretrained(plain), make_tokenizer(), Inventory(other))
    assert not (other / "preprocessor_config.json").exists()
