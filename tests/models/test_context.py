"""The context length: under every name in a configuration, and in a forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from ppo_cli.models.context import context_length
from tests.conftest import SMALL, make_gpt2, make_policy


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("GPT2", {"n_positions": 7}, 7),
        ("Llama", {"max_position_embeddings": 7}, 7),
        ("Mpt", {"max_seq_len": 7}, 7),
        ("Dbrx", {"max_seq_len": 7}, 7),
        ("CTRL", {"n_positions": 7}, 7),
        ("XLNet", {}, None),  # whose configuration says -1
        ("Mamba", {}, None),
        ("T5", {}, None),
        ("T5", {"n_positions": 7}, None),  # what it was trained on
        ("Bart", {"max_position_embeddings": 7}, 7),
        ("Bloom", {"seq_length": 7}, None),  # what it was trained on
        ("PreTrained", {"seq_length": 7}, 7),
        ("PreTrained", {"max_sequence_length": 7}, 7),
        ("PreTrained", {"n_ctx": 7}, 7),
        ("PreTrained", {"n_ctx": 7, "max_position_embeddings": 9}, 9),
        ("PreTrained", {"n_ctx": 7, "max_position_embeddings": -1}, 7),
        ("PreTrained", {"max_position_embeddings": 10**30}, None),
        ("PreTrained", {"max_position_embeddings": None}, None),
        ("Gemma3", {"text_config": {"max_position_embeddings": 7}}, 7),
    ],
)
def test_the_limit_is_found_under_every_name(
    kind: str, settings: dict[str, Any], expected: int | None
) -> None:
    config = getattr(transformers, f"{kind}Config")(**settings)
    assert context_length(config) == expected


@pytest.mark.parametrize("kind", ["GPT2", "Roberta", "Mpt", "OPT", "Llama"])
def test_a_model_reads_as_many_tokens_as_it_is_said_to(kind: str) -> None:
    limits = {"GPT2": "n_positions", "Mpt": "max_seq_len"}
    settings = {**SMALL, "pad_token_id": 1}
    del settings["max_position_embeddings"]
    settings[limits.get(kind, "max_position_embeddings")] = 12
    if kind == "Mpt":
        settings |= {"d_model": 16, "n_heads": 2, "n_layers": 1}
    if kind == "OPT":
        settings |= {"word_embed_proj_dim": 16, "ffn_dim": 16}
    config = getattr(transformers, f"{kind}Config")(**settings, is_decoder=True)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    length = context_length(model)
    assert length == (10 if kind == "Roberta" else 12)
    model(torch.full((1, length), 2))
    if kind != "Llama":  # whose positions go on
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, length + 1), 2))


def test_a_policy_has_the_context_length_of_its_model() -> None:
    assert context_length(make_policy()) == context_length(make_gpt2()) == 48
