"""`ppo-cli generate`: its options reach the sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ppo_cli.evaluation import draw_samples
from ppo_cli.models.sampling import sample_responses
from ppo_cli.models.sampling_params import SamplingParams
from tests.conftest import EOS, make_gpt2, make_tokenizer
from tests.test_bad_input import run_here  # noqa: F401
from tests.test_words import Run


def test_sampling_options_reach_the_sampler(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_here: Run,  # noqa: F811
) -> None:
    make_gpt2().save_pretrained(tmp_path / "model")
    make_tokenizer(pad=3).save_pretrained(tmp_path / "model")
    used = []

    def spy(model: Any, queries: Any, limits: Any, params: Any, **kwargs: Any) -> Any:
        used.append((params, list(limits)))
        return sample_responses(model, queries, limits, params, **kwargs)

    monkeypatch.setattr(draw_samples, "sample_responses", spy)
    command = ["generate", "model", "--no-score", "--prompt", "t1 t2", "-n", "2"]
    options = ["--temperature", "0.5", "--top-k", "7", "--top-p", "0.9", "--max-new-tokens", "3"]
    assert run_here([*command, *options], tmp_path)[0] == 0
    assert run_here(command, tmp_path)[0] == 0
    ends: dict[str, Any] = {"stop_token_ids": (EOS,), "pad_token_id": 3}
    assert used == [
        (SamplingParams(temperature=0.5, top_k=7, top_p=0.9, **ends), [3, 3]),
        (SamplingParams(**ends), [30, 30]),
    ]
