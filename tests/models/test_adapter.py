"""The modules of a new adapter, and refusals before any weight is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from ppo_cli.config.policy import ADAPTERS, AdapterConfig, PolicyConfig
from ppo_cli.errors import ModelError, UsageError
from ppo_cli.models.adapter import peft_config
from ppo_cli.models.loading import load_policy
from ppo_cli.models.saving import write_model
from tests.conftest import SMALL, make_gpt2, make_tokenizer

BLOCK = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def make_model(kind: str) -> Any:
    """A random model of two small layers."""
    torch.manual_seed(0)
    if kind == "GPT2":
        return make_gpt2()
    settings: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
    if kind == "ModernBertDecoder":
        settings["pad_token_id"] = 0
    if kind == "Phimoe":
        settings |= {"num_local_experts": 2, "num_experts_per_tok": 2}
    if kind in ("Mamba", "FalconMamba"):
        settings |= {"state_size": 4, "time_step_rank": 2}
    if kind == "Gemma3":
        text = {**settings, "sliding_window": 8, "layer_types": ["full_attention"] * 2}
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
        vision |= {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
        settings = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4}
        settings |= {"image_token_index": 70, "boi_token_index": 71, "eoi_token_index": 72}
    config = getattr(transformers, f"{kind}Config")(**settings)
    return transformers.AutoModelForCausalLM.from_config(config)


def save(kind: str, folder: Path) -> str:
    make_model(kind).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def load(model: str, **adapter: Any) -> Any:
    return load_policy(PolicyConfig(model=model, adapter=AdapterConfig(**adapter)))


def adapted(policy: Any) -> set[str]:
    """Names of the modules below an adapter."""
    return {
        name.partition(".lora_A")[0].removeprefix("base_model.model.")
        for name, _ in policy.pretrained_model.named_parameters()
        if ".lora_A" in name
    }


@pytest.mark.parametrize(
    ("kind", "wanted", "expected"),
    [
        ("GPT2", None, {"c_attn"}),  # peft's choice
        ("GPT2", ["c_attn"], {"c_attn"}),
        ("GPT2", ["attn.c_proj", "c_fc"], {"c_proj", "c_fc"}),
        ("GPT2", ["all-linear"], {"c_attn", "c_proj", "c_fc"}),
        ("GPT2", [r".*\.1\.mlp\.c_\w+"], {"c_fc", "c_proj"}),
        ("Llama", None, {"q_proj", "v_proj"}),
        ("Llama", ["q_proj"], {"q_proj"}),
        ("Gemma3", None, BLOCK),
        ("Mamba", None, {"in_proj", "x_proj"}),
        ("FalconMamba", None, {"in_proj", "x_proj"}),
        ("Phimoe", None, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("Helium", None, BLOCK),
        ("ModernBertDecoder", None, {"q_proj", "k_proj", "v_proj", "Wo", "Wi"}),
    ],
)
def test_the_modules_that_are_adapted_are_those_asked_for_or_the_language_models(
    kind: str, wanted: list[str] | None, expected: set[str], tmp_path: Path
) -> None:
    policy = load(save(kind, tmp_path), target_modules=wanted)
    names = adapted(policy)
    assert {name.rpartition(".")[2] for name in names} == expected
    assert not any("vision" in name or "lm_head" in name for name in names)
    if wanted and wanted[0].startswith(".*"):
        assert all(".1.mlp." in name for name in names)
    elif "attn.c_proj" not in (wanted or ()):  # in every layer that has them
        every = [name for name, _ in policy.pretrained_model.named_modules()]
        layers = [n for n in every if n.rpartition(".")[2] in expected and "vision" not in n]
        assert len(names) == len(layers)
    policy(torch.tensor([[1, 2, 3, 4, 5, 6]]))[0].square().sum().backward()
    weights = dict(policy.pretrained_model.named_parameters())
    for name in names:
        assert weights[f"base_model.model.{name}.lora_B.default.weight"].grad.abs().sum() > 0


def test_rank_scale_and_dropout_are_those_of_the_configuration(tmp_path: Path) -> None:
    policy = load(save("GPT2", tmp_path), r=3, alpha=12, dropout=0.25)
    layer = policy.pretrained_model.get_submodule("base_model.model.transformer.h.0.attn.c_attn")
    assert layer.lora_A["default"].weight.shape[0] == 3
    assert layer.scaling == {"default": 4}
    assert layer.lora_dropout["default"].p == 0.25


@pytest.mark.parametrize(
    ("kind", "wanted", "parts"),
    [
        ("GPT2", ["c_atn"], ["no module 'c_atn'", "Did you mean 'c_attn'"]),
        ("GPT2", ["c_attn", "xyz"], ["no module 'xyz'", "c_attn, c_fc, c_proj"]),
        ("GPT2", ["attn.c_fc"], ["no module 'attn.c_fc'"]),
        ("GPT2", ["ln_f"], ["peft refuses", "LayerNorm", "c_attn, c_fc, c_proj"]),
        ("GPT2", [".*q_proj"], ["peft refuses", "c_attn, c_fc, c_proj"]),
        ("GPT2", [], ["peft refuses", "c_attn, c_fc, c_proj"]),
        ("Mamba", ["in_proj", "out_proj"], ["peft refuses", "'out_proj'", "in_proj, x_proj"]),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_weights_are_read(
    kind: str, wanted: list[str], parts: list[str], tmp_path: Path
) -> None:
    folder = save(kind, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UsageError) as error:
        load(folder, target_modules=wanted)
    for part in ["policy.adapter.target_modules", folder, *parts]:
        assert part in str(error.value)


def test_without_peft_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save("GPT2", tmp_path / "base")
    get_peft_model(make_gpt2(), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "own")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"policy\.adapter needs peft: pip install"):
        load(folder)
    with pytest.raises(ModelError, match=r"own is an adapter, which needs peft: pip install"):
        load_policy(PolicyConfig(model=str(tmp_path / "own")))


def test_a_model_that_is_not_causal_is_refused_with_an_adapter_as_without(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SMALL)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    for adapter in (None, AdapterConfig()):
        with pytest.raises(UsageError, match="BertForMaskedLM is not a causal language model"):
            load_policy(PolicyConfig(model=str(tmp_path), adapter=adapter))


def test_a_model_that_has_an_adapter_keeps_it_and_it_is_said(tmp_path: Path) -> None:
    save("GPT2", tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_fc"], fan_in_fan_out=True)
    get_peft_model(base, lora).save_pretrained(tmp_path / "own")
    with pytest.warns(UserWarning, match="the model has an adapter"):
        policy = load(str(tmp_path / "own"), target_modules=["c_attn"])
    assert {name.rpartition(".")[2] for name in adapted(policy)} == {"c_fc"}


# What each key must have changed: a part of the names or of the numbers of the weights.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "DoRA": ("lora_magnitude_vector", {"peft_type": "LORA", "use_dora": True}),
    "IA3": ("ia3_l", {"peft_type": "IA3"}),
    "LoHa": ("hada_w1_a", {"peft_type": "LOHA", "r": 2, "alpha": 4}),
    "LoKr": ("lokr_w1", {"peft_type": "LOKR", "r": 2, "decompose_factor": 4}),
    "VeRA": ("vera_lambda_b", {"peft_type": "VERA", "r": 4, "vera_dropout": 0.0}),
    "OFT": ("oft_R", {"peft_type": "OFT", "oft_block_size": 4}),
    "HRA": ("hra_u", {"peft_type": "HRA", "r": 2}),
    "MiSS": ("miss_block", {"peft_type": "MISS", "r": 4}),
    "FourierFT": ("fourierft_spectrum", {"peft_type": "FOURIERFT", "n_frequency": 9}),
    "VB-LoRA": ("vblora_logits_A", {"peft_type": "VBLORA", "num_vectors": 8, "vector_length": 4}),
    "RandLoRA": ("randlora_lambda", {"peft_type": "RANDLORA", "r": 4}),
    "LN tuning": ("ln_tuning_layers", {"peft_type": "LN_TUNING"}),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save("Llama", tmp_path_factory.mktemp("llama"))


def test_every_method_is_tried_here() -> None:
    assert {settings["peft_type"] for _, settings in METHODS.values()} == set(ADAPTERS)


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_of_each_method_trains_is_merged_and_reads_back(
    name: str, llama: str, tmp_path: Path
) -> None:
    part, settings = METHODS[name]
    policy = load(llama, **settings).eval()
    trained = [n for n, p in policy.pretrained_model.named_parameters() if p.requires_grad]
    assert any(part in n for n in trained)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    with policy.pretrained_model.disable_adapter():
        before = policy(ids)[0].detach()
    policy(ids)[0].square().sum().backward()
    with torch.no_grad():
        for _, parameter in policy.pretrained_model.named_parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1 / float(parameter.grad.norm() + 1e-9))
    after = policy(ids)[0].detach()
    assert (after - before).abs().max() > 1e-4
    write_model(policy, make_tokenizer(), tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(plain(ids).logits, after, rtol=1e-3, atol=1e-4)
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(ids).logits, after, rtol=1e-3, atol=1e-4)


def test_keys_of_peft_reach_its_configuration(llama: str) -> None:
    policy = load(
        llama,
        lora_alpha=5,
        lora_dropout=0.5,
        use_rslora=True,
        layers_to_transform=[1],
        rank_pattern={"q_proj": 3},
        modules_to_save=["norm"],
    )
    config = policy.pretrained_model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 5, 0.5)
    assert all(".layers.1." in name for name in adapted(policy))
    weights = dict(policy.pretrained_model.named_parameters())
    path = "base_model.model.model.layers.1.self_attn.{}.lora_A.default.weight"
    assert weights[path.format("q_proj")].shape[0] == 3
    assert weights[path.format("v_proj")].shape[0] == 16
    assert any("norm.modules_to_save" in n for n, p in weights.items() if p.requires_grad)
    # Where a setting is not given, peft's own default holds, not LoRA's.
    assert peft_config(AdapterConfig(peft_type="vera")).r == peft.VeraConfig().r
    assert AdapterConfig.model_validate(AdapterConfig(peft_type="VERA").model_dump()).r is None


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"use_dorra": True}, ["LORA has no key 'use_dorra'", "Did you mean 'use_dora'"]),
        ({"peft_type": "IA3", "r": 4}, ["IA3 has no key 'r'"]),
        ({"inference_mode": True}, ["no key 'inference_mode' that can be set here"]),
        ({"eva_config": {}}, ["no key 'eva_config' that can be set here"]),
        ({"bias": "some"}, ["peft refuses it"]),
        ({"init_lora_weights": "pissa"}, ["init_lora_weights", "changes the weights of the base"]),
        ({"layer_replication": [[0, 1]]}, ["layer_replication: it changes the base"]),
        ({"modules_to_save": ["lm_hed"]}, ["modules_to_save", "no module 'lm_hed'"]),
        ({"layers_to_transform": [0, 2]}, ["the layers 0 to 1, not 2"]),
        ({"rank_pattern": {"k_proj": 2}}, ["rank_pattern: 'k_proj' fits none", "q_proj"]),
        ({"target_parameters": ["x.weight"]}, ["target_parameters", "no parameter 'x.weight'"]),
        ({"peft_type": "LOKR", "r": 2, "target_modules": ["lm_head", "norm"]}, ["peft refuses"]),
    ],
    ids=str,
)
def test_keys_that_peft_does_not_have_are_refused(
    settings: dict[str, Any], parts: list[str], llama: str
) -> None:
    with pytest.raises(UsageError) as error:
        load(llama, **settings)
    for part in ["policy.adapter", *parts]:
        assert part in str(error.value)


def test_a_method_that_the_architecture_lacks_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"peft refuses LOKR .*Conv1D.* choose LORA"):
        load(save("GPT2", tmp_path), peft_type="LOKR")


def test_an_adapter_names_its_base_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("GPT2", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    config = load("base").pretrained_model.peft_config["default"]
    assert config.base_model_name_or_path == str(tmp_path / "base")
