"""Every keyword of `from_pretrained` and `save_pretrained` is used, or refused by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from ppo_cli import AutoModelForCausalLMWithValueHead
from ppo_cli.errors import UsageError
from tests.conftest import make_gpt2, make_policy

Policy = AutoModelForCausalLMWithValueHead


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "gpt2"
    make_gpt2().save_pretrained(path)
    return path


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"load_in_8bit": True}, r"load_in_8bit is .* pass quantization_config=BitsAndBytesConfig"),
    ({"load_in_4bit": True}, r"load_in_4bit is .* pass quantization_config=BitsAndBytesConfig"),
    ({"use_auth_token": True}, r"use_auth_token is .* pass token=\.\.\. instead"),
    ({"peft_config": {"r": 4}}, "must be a configuration of peft, .* got dict"),
]
UNKNOWN: list[tuple[dict[str, Any], str]] = [
    ({"sumary_dropout_prob": 0.9}, "'sumary_dropout_prob'. Did you mean 'summary_dropout_prob'"),
    ({"torch_dtyp": torch.float16}, "'torch_dtyp'. Did you mean 'torch_dtype'"),
]


@pytest.mark.parametrize(("keywords", "message"), REFUSED + UNKNOWN, ids=str)
def test_keywords_beside_a_folder_are_named_where_nothing_takes_them(
    keywords: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        Policy.from_pretrained(folder, **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        *REFUSED,
        ({"sumary_dropout_prob": 0.9}, "sumary_dropout_prob has no .* mean 'summary_dropout_prob'"),
        ({"dtype": torch.bfloat16}, "dtype has no effect .* loaded already. Give it to the call"),
        ({"device_map": "auto"}, "device_map has no effect"),
    ],
    ids=str,
)
def test_keywords_beside_a_model_are_named_where_they_have_no_effect(
    keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Policy.from_pretrained(make_gpt2(), **keywords)


def test_keywords_that_ask_for_nothing_are_taken(folder: Path) -> None:
    nothing = {"load_in_8bit": False, "use_auth_token": None}
    loaded = Policy.from_pretrained(folder, **nothing)
    taken = Policy.from_pretrained(
        make_gpt2(),
        **nothing,
        dtype=None,
        summary_dropout_prob=0.7,
        peft_config=LoraConfig(target_modules=["c_attn"]),
    )
    assert loaded.pretrained_model.dtype == torch.float32
    assert taken.v_head.dropout.p == 0.7
    assert taken.is_peft_model


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "must be a folder, a hub id, or a model of transformers or peft, got NoneType"),
        (make_policy(), "the AutoModelForCausalLMWithValueHead is a policy already"),
        (torch.nn.Linear(2, 2), "got Linear"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_model_is_refused_by_name(source: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Policy.from_pretrained(source)


def test_an_adapter_that_transformers_loaded_is_refused(folder: Path, tmp_path: Path) -> None:
    adapter = LoraConfig(target_modules=["c_attn"], task_type="CAUSAL_LM")
    Policy.from_pretrained(folder, peft_config=adapter).save_pretrained(tmp_path)
    for keywords in ({}, {"peft_config": adapter}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        with pytest.raises(UsageError, match=r"this GPT2LMHeadModel with an adapter .* merge it"):
            Policy.from_pretrained(model, **keywords)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.add_adapter(adapter)
    with pytest.raises(UsageError, match="adapter of its own making"):
        Policy(model)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"safe_serialization": False}, "always written as safetensors"),
        ({"max_shard_sise": "1GB"}, "'max_shard_sise'. Did you mean 'max_shard_size'"),
        ({"repo_id": "a/b"}, "there is no keyword 'repo_id'"),
    ],
    ids=str,
)
def test_keywords_of_saving_are_used_or_named(
    keywords: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        make_policy().save_pretrained(tmp_path, **keywords)
    assert not list(tmp_path.iterdir())
    make_policy().save_pretrained(tmp_path, safe_serialization=True, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
