"""Bases of 8- and 4-bit weights, on the CPU. Skipped where the library that quantises is absent."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from ppo_cli import AutoModelForCausalLMWithValueHead as Policy
from ppo_cli.config.policy import PolicyConfig
from ppo_cli.errors import MissingPackageError, UsageError
from ppo_cli.models import quantization
from ppo_cli.models.loading import load_policy, refuse_quantized_weights
from ppo_cli.models.plain_forward import sample_logits
from ppo_cli.models.saving import write_model
from tests.conftest import SMALL, make_batch, make_gpt2, make_tokenizer, make_trainer

WIDE = {**SMALL, "hidden_size": 64, "intermediate_size": 64, "num_key_value_heads": 2}
LIBRARIES = ("bitsandbytes", "torchao")
needs = {
    name: pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"{name} is not installed"
    )
    for name in LIBRARIES
}
FOUR = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
EIGHT = {"load_in_8bit": True}
AO = {"load_in_8bit": True, "quant_method": "torchao"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of two models whose layers are of different classes."""
    folders = {}
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE))
    for name, model in (("gpt2", make_gpt2(n_embd=64)), ("llama", llama)):
        folders[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(folders[name])
        make_tokenizer().save_pretrained(folders[name])
    return folders


def numbers(parameter: Any) -> torch.Tensor:
    """A parameter, or the numbers in a tensor of torchao's."""
    return getattr(parameter, "qdata", parameter)


def load(base: str, adapter: dict[str, Any] | None = None, **settings: Any) -> Any:
    config = {"model": base, "quantization": settings, "adapter": adapter or {"r": 2}}
    return load_policy(PolicyConfig.model_validate(config))


@pytest.mark.parametrize(
    ("base", "settings", "bits"),
    [
        pytest.param("gpt2", FOUR, torch.uint8, marks=needs["bitsandbytes"]),
        pytest.param("llama", EIGHT, torch.int8, marks=needs["bitsandbytes"]),
        pytest.param("llama", AO, None, marks=needs["torchao"]),
    ],
    ids=["gpt2, 4 bits", "llama, 8 bits", "llama, torchao"],
)
def test_an_adapter_learns_on_a_quantised_base(
    base: str, settings: dict[str, Any], bits: torch.dtype | None, bases: dict[str, str],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Also: the adapter is saved alone, reads back on the base, and is merged exactly."""
    policy = load(bases[base], **settings)
    assert quantization.is_quantized(policy)
    assert bits is None or bits in {p.dtype for p in policy.parameters()}
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    trainer = make_trainer(policy, learning_rate=1e-2)
    assert trainer.ref_model is None  # the base is there once
    for seed in range(2):
        trainer.step(*make_batch(seed=seed))
    for name, parameter in policy.named_parameters():
        is_trained = "lora_" in name or "v_head" in name
        assert torch.equal(numbers(parameter), numbers(before[name])) is not is_trained, name
    expected = sample_logits(policy.eval())
    write_model(policy, make_tokenizer(), tmp_path)
    assert (tmp_path / "adapter_config.json").is_file()
    assert not (tmp_path / "config.json").exists()
    again = load_policy(
        PolicyConfig.model_validate({"model": str(tmp_path), "quantization": settings})
    )
    assert torch.equal(sample_logits(again.eval()), expected)
    assert torch.equal(again.v_head.summary.weight, policy.v_head.summary.weight)
    if settings is EIGHT:
        return  # it rounds its inputs as well, which a merged model does not
    whole = tmp_path / "whole"
    whole.mkdir()
    write_model(policy, make_tokenizer(), whole, "merged")
    plain = AutoModelForCausalLM.from_pretrained(whole)
    torch.testing.assert_close(sample_logits(plain.eval()), expected, rtol=1e-3, atol=1e-3)
    assert not quantization.is_quantized(plain)


@needs["bitsandbytes"]
@pytest.mark.parametrize(
    "change",
    [
        {"bnb_4bit_quant_type": "fp4"},
        {"bnb_4bit_use_double_quant": True},
        {"bnb_4bit_compute_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_each_setting_of_4_bits_changes_the_numbers(
    change: dict[str, Any], bases: dict[str, str]
) -> None:
    plain, changed = (load(bases["llama"], **{**FOUR, **extra}) for extra in ({}, change))
    assert not torch.equal(sample_logits(plain.eval()), sample_logits(changed.eval()))


@needs["bitsandbytes"]
def test_the_threshold_of_8_bits_changes_the_numbers(bases: dict[str, str]) -> None:
    plain, changed = (
        load(bases["llama"], load_in_8bit=True, llm_int8_threshold=value) for value in (6.0, 1.0)
    )
    assert not torch.equal(sample_logits(plain.eval()), sample_logits(changed.eval()))


@needs["bitsandbytes"]
def test_the_precision_of_products_follows_the_policys(bases: dict[str, str]) -> None:
    for settings, expected in (
        ({"precision": "bf16"}, torch.bfloat16),
        ({"precision": "fp32"}, torch.float32),
        ({"precision": "fp32", "dtype": "bfloat16"}, torch.bfloat16),
    ):
        config = {"model": bases["llama"], "quantization": {"load_in_4bit": True}, **settings}
        policy = load_policy(PolicyConfig.model_validate(config))
        layer = policy.pretrained_model.model.layers[0].self_attn.q_proj
        assert layer.compute_dtype == expected
        assert policy.pretrained_model.model.norm.weight.dtype == getattr(
            torch, settings.get("dtype", "float32")
        )


@needs["torchao"]
def test_a_model_whose_layers_cannot_be_quantised_is_refused(bases: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"none of the layers of .* can be quantised"):
        load(bases["gpt2"], **AO)


@needs["bitsandbytes"]
def test_a_model_that_is_quantised_already_is_refused(
    bases: dict[str, str], tmp_path: Path
) -> None:
    load(bases["llama"], **FOUR).pretrained_model.unload().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="quantised already"):
        load(str(tmp_path), **FOUR)


@pytest.mark.parametrize("library", LIBRARIES)
def test_without_the_library_it_is_said_what_to_install(
    library: str, bases: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        MissingPackageError, match=rf"{library}: pip install 'ppo-cli\[{library}\]'"
    ):
        load(bases["llama"], load_in_8bit=True, quant_method=library)


def test_a_quantised_policy_needs_an_adapter(bases: dict[str, str], tmp_path: Path) -> None:
    own = tmp_path / "own"
    Policy.from_pretrained(bases["gpt2"], peft_config=load_policy_adapter()).save_pretrained(own)
    refuse_quantized_weights(_quantised(str(own)))  # it is an adapter
    for model in ("embedded", bases["gpt2"]):
        with pytest.raises(UsageError, match=r"policy\.quantization needs an adapter"):
            refuse_quantized_weights(_quantised(model))


def load_policy_adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"])


def _quantised(model: str) -> PolicyConfig:
    return PolicyConfig.model_validate({"model": model, "quantization": {"load_in_8bit": True}})
