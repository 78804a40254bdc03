"""How the policy's weights are loaded: dtype, attention, and layers that are not trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from ppo_cli.config.policy import PolicyConfig
from ppo_cli.errors import UsageError
from ppo_cli.models.loading import load_policy, refuse_untrainable
from tests.conftest import make_batch, make_gpt2, make_tokenizer, make_trainer


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A folder with a model of bfloat16 weights."""
    make_gpt2().bfloat16().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def load(base: str, **settings: Any) -> Any:
    return load_policy(PolicyConfig.model_validate({"model": base, **settings}))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.float32),
        ("float16", torch.float16),
        ("bfloat16", torch.bfloat16),
        ("auto", torch.bfloat16),
    ],
)
def test_weights_have_the_dtype_that_is_asked_for(
    dtype: str | None, expected: torch.dtype, base: str
) -> None:
    settings = {} if dtype is None else {"dtype": dtype}
    policy = load(base, **settings)
    assert {p.dtype for p in policy.pretrained_model.parameters()} == {expected}
    assert policy.v_head.summary.weight.dtype == torch.float32
    adapted = load(base, adapter={"r": 2}, **settings)
    trained = [p.dtype for p in adapted.parameters() if p.requires_grad]
    assert set(trained) == {torch.float32}
    refuse_untrainable(adapted)


def test_an_adapter_learns_on_a_base_of_bfloat16(base: str) -> None:
    policy = load(base, adapter={"r": 2}, dtype="bfloat16")
    trainer = make_trainer(policy, learning_rate=1e-2)
    trainer.step(*make_batch())
    moved = [p for n, p in policy.named_parameters() if "lora_B" in n]
    assert moved
    assert all(p.abs().max() > 0 for p in moved)


def test_weights_that_would_lose_their_updates_are_refused_or_warned_of(base: str) -> None:
    with pytest.raises(UsageError, match=r"policy\.dtype float16 is for weights that are not"):
        refuse_untrainable(load(base, dtype="float16"))
    with pytest.warns(UserWarning, match="weights of bfloat16 are trained"):
        refuse_untrainable(load(base, dtype="bfloat16"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_model_has_the_attention_that_is_asked_for(attention: str, base: str) -> None:
    policy = load(base, attn_implementation=attention, adapter={"r": 2})
    assert policy.config._attn_implementation == attention


@pytest.mark.parametrize(
    ("attention", "part"),
    [
        ("spda", "no 'spda'. Did you mean 'sdpa'"),
        ("owner/kernel", "transformers has no 'owner/kernel'"),
        ("flash_attention_2", "flash_attention_2 needs a package that is not installed"),
    ],
)
def test_an_attention_that_is_not_there_is_refused(attention: str, part: str, base: str) -> None:
    with pytest.raises(UsageError) as error:
        load(base, attn_implementation=attention)
    assert str(error.value).startswith("policy.attn_implementation: ")
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("chosen", "frozen"),
    [
        ([0], ["transformer.h.0."]),
        ([1, "wte"], ["transformer.h.1.", "transformer.wte."]),
        (["mlp", "h.0.attn"], ["transformer.h.0.mlp.", "transformer.h.1.mlp.", "h.0.attn."]),
    ],
    ids=str,
)
def test_frozen_layers_stay_and_all_others_move(
    chosen: list[int | str], frozen: list[str], base: str
) -> None:
    policy = load(base, freeze_layers=chosen)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    trainer = make_trainer(policy, learning_rate=1e-2)
    for seed in range(2):
        trainer.step(*make_batch(seed=seed))
    for name, parameter in policy.named_parameters():
        is_frozen = any(part in name for part in frozen)
        assert torch.equal(parameter, before[name]) is is_frozen, name


@pytest.mark.parametrize(
    ("chosen", "part"),
    [
        ([2], "the layers 0 to 1, not 2"),
        (["mpl"], "no module 'mpl'. Did you mean 'mlp'"),
        (["transformer"], "nothing of the model is left to train"),
    ],
    ids=str,
)
def test_layers_that_are_not_there_are_refused(
    chosen: list[int | str], part: str, base: str
) -> None:
    with pytest.raises(UsageError) as error:
        load(base, freeze_layers=chosen)
    assert str(error.value).startswith("policy.freeze_layers: ")
    assert part in str(error.value)


def test_frozen_layers_and_an_adapter_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="freeze_layers and adapter exclude each other"):
        PolicyConfig.model_validate({"freeze_layers": [0], "adapter": {}})
