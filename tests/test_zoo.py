"""Some of the families that `make zoo` trains, from configuration to saved folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stress.zoo import verdict

TRAINED = ("llama", "qwen3_moe", "gemma3n_text", "bloom", "mamba", "electra", "bart")


@pytest.mark.parametrize("family", TRAINED)
def test_a_family_is_trained_saved_and_read_again(family: str, tmp_path: Path) -> None:
    assert verdict(family, tmp_path) == ("trained", "")


@pytest.mark.parametrize(
    ("family", "why"), [("cpmant", "looks ahead"), ("prophetnet", "its own forward pass")]
)
def test_a_family_that_cannot_be_tuned_is_refused(family: str, why: str, tmp_path: Path) -> None:
    found, reason = verdict(family, tmp_path)
    assert found == "refused"
    assert why in reason
    assert not (tmp_path / "run").exists()
