"""`step()` of an encoder-decoder against TRL 0.11.4, recorded by `tests/parity/seq2seq.py`.

TRL leaves the first sampled token of each response out of its masks, and counts the start token as
part of a response; both are corrected here, so the comparison masks that token itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ppo_cli import AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer
from tests.conftest import make_tokenizer
from tests.parity.seq2seq import CASES, VOCABULARY, make_model

DATA = Path(__file__).parents[1] / "fixtures" / "parity_seq2seq"
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def model_from(tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> Any:
    policy = AutoModelForSeq2SeqLMWithValueHead(
        make_model(record["kind"], record["model"]), summary_dropout_prob=0.0
    )
    prefix = "policy_init/"
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    shared = next(v for k, v in state.items() if k.endswith("shared.weight"))
    tied = [k for k in policy.state_dict() if k.endswith(("lm_head.weight", "embed_tokens.weight"))]
    policy.load_state_dict(dict.fromkeys(tied, shared) | state)
    return policy


@pytest.mark.parametrize("case", CASES)
def test_step_gives_what_trl_gave(case: str) -> None:
    tensors = load_file(DATA / f"{case}.safetensors")
    record = json.loads((DATA / f"{case}.json").read_text())
    policy = model_from(tensors, record)
    config = PPOConfig(**record["ppo_config"])
    trainer = PPOTrainer(config, policy, None, make_tokenizer(VOCABULARY, pad=0, eos=1))
    assert config.is_encoder_decoder is True

    for number, step in enumerate(record["steps"]):
        responses = [torch.tensor(ids) for ids in step["responses"]]
        masks = [torch.arange(len(response)) >= 2 for response in responses]
        queries = [torch.tensor(ids) for ids in step["queries"]]
        scores = [torch.tensor(score) for score in step["scores"]]
        assert trainer.kl_ctl.value == pytest.approx(step["kl_coef_before"], rel=1e-5)
        stats = trainer.step(queries, responses, scores, masks)
        assert trainer.kl_ctl.value == pytest.approx(step["kl_coef_after"], rel=1e-5)
        step["stats"]["tokens/responses_len_mean"] -= 1  # the start token
        for key, expected in step["stats"].items():
            np.testing.assert_allclose(stats[key], expected, err_msg=key, **TOLERANCE)
        np.testing.assert_allclose(
            stats["objective/kl_dist"], tensors[f"step{number}/kl_dist"], **TOLERANCE
        )
        for key in ("logprobs", "ref_logprobs"):
            found, expected = stats[f"objective/{key}"], tensors[f"step{number}/{key}"].numpy()
            assert found.shape == expected.shape
            counts = np.zeros(found.shape, dtype=bool)
            for row, response in zip(counts, responses, strict=True):
                row[1 : len(response) - 1] = True
            np.testing.assert_allclose(found[counts], expected[counts], **TOLERANCE)

    final, moved = policy.state_dict(), 0.0
    for name, expected in tensors.items():
        # The keys' biases have no effect on any output: their gradients are rounding noise.
        if name.startswith("policy_final/") and not name.endswith("k_proj.bias"):
            found = final[name.removeprefix("policy_final/")]
            torch.testing.assert_close(found, expected, msg=name, **TOLERANCE)
            moved += float((expected - tensors[name.replace("policy_final", "policy_init")]).norm())
    assert moved > 0.1
