"""`ppo_cli.core`: functions that PPO scripts import from `trl.core`, against torch's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from ppo_cli import core
from ppo_cli.data.prompts import LengthSampler
from ppo_cli.ppo import device_cache
from ppo_cli.utils.random_state import set_seed
from tests.conftest import EOS, VOCABULARY, make_gpt2, make_policy, make_trainer

VALUES, MASK = torch.tensor([1.0, 2, 4, 9]), torch.tensor([0.0, 1, 1, 0])
INSIDE = VALUES[1:3]


def test_every_name_is_there_and_ours_serve() -> None:
    assert all(hasattr(core, name) for name in core.__all__)
    assert core.set_seed is set_seed and core.LengthSampler is LengthSampler


def test_masked_statistics_are_those_of_the_values_inside() -> None:
    assert core.masked_mean(VALUES, MASK) == INSIDE.mean()
    assert core.masked_var(VALUES, MASK) == INSIDE.var()
    assert core.masked_var(VALUES, MASK, unbiased=False) == INSIDE.var(unbiased=False)
    rows, masks = torch.stack([VALUES, VALUES]), torch.stack([MASK, 1 - MASK])
    assert core.masked_mean(rows, masks, axis=1).tolist() == [3, 5]
    assert core.masked_mean(rows, masks, axis=0).tolist() == VALUES.tolist()
    for shift_mean in (True, False):
        inside = core.masked_whiten(VALUES, MASK, shift_mean)[1:3]
        torch.testing.assert_close(inside, core.whiten(INSIDE, shift_mean))
        assert inside.var() == pytest.approx(1)
        assert inside.mean() == pytest.approx(0 if shift_mean else 3, abs=1e-6)


def test_logits_give_log_probabilities_and_entropies() -> None:
    logits, labels = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    expected = Categorical(logits=logits)
    torch.testing.assert_close(core.logprobs_from_logits(logits, labels), expected.log_prob(labels))
    torch.testing.assert_close(core.logprobs_from_logits(logits, labels, False), expected.logits)
    torch.testing.assert_close(core.entropy_from_logits(logits), expected.entropy())


def test_clip_by_value_takes_tensors_and_numbers() -> None:
    x = torch.tensor([-2.0, 0.5, 2.0])
    assert core.clip_by_value(x, -1, 1).tolist() == [-1, 0.5, 1]
    low, high = torch.tensor([-3.0, 1, 0]), torch.tensor([-1.0, 3, 1])
    assert core.clip_by_value(x, low, high).tolist() == [-2, 1, 1]
    assert core.clip_by_value(x, low, 1).tolist() == [-2, 1, 1]


def test_top_k_and_top_p_leave_the_likeliest_tokens() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def kept(**settings: Any) -> list[int]:
        return core.top_k_top_p_filtering(logits, **settings)[0].isfinite().nonzero()[:, 0].tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=3) == [0, 1, 2] and kept(top_p=0.7) == [0, 1]
    assert kept(top_k=3, top_p=0.5) == [0] and kept(top_p=0.0, min_tokens_to_keep=2) == [0, 1]


def test_dictionaries_are_flattened_stacked_and_turned_into_numbers() -> None:
    assert core.flatten_dict({"a": {"b": {"c": 1}, "d": 2}, "e": {}}) == {"a/b/c": 1, "a/d": 2}
    with pytest.raises(ValueError, match="separator '/' not allowed to be in key 'x/y'"):
        core.flatten_dict({"a": {"x/y": 1}})
    ragged = [{"k": torch.tensor([[1.0, 2], [3, 4]])}, {"k": torch.tensor([5.0])}]
    assert core.stack_dicts(ragged)["k"].tolist() == [[1, 2, 3, 4], [5, -1, -1, -1]]
    stats = {"t": torch.tensor([1, 2], dtype=torch.bfloat16), "one": torch.ones(1), "n": 3, "s": ""}
    arrays = core.stats_to_np(stats)
    assert isinstance(arrays["t"], np.ndarray) and arrays["t"].tolist() == [1, 2]
    assert type(arrays["n"]) is float and arrays["s"] == ""
    scalars = core.convert_to_scalar({**arrays, "zero": np.array(2.0), "grid": torch.ones(1, 1)})
    assert scalars["one"] == 1 and type(scalars["one"]) is type(scalars["zero"]) is float
    assert scalars["t"] is arrays["t"] and isinstance(scalars["grid"], Tensor)


@pytest.mark.parametrize("make", [make_policy, make_gpt2])
def test_respond_to_batch_samples_rows_of_one_length(make: Any) -> None:
    model = make(resid_pdrop=0.5)
    queries = torch.randint(EOS, (64, 3), generator=torch.Generator().manual_seed(0))
    best = model.eval()(input_ids=queries)[0][:, -1].argmax(-1)
    responses = core.respond_to_batch(model.train(), queries, txt_len=9, top_k=1)
    assert responses.shape == (64, 9) and torch.equal(responses[:, 0], best)
    assert model.training
    torch.manual_seed(1)
    free = core.respond_to_batch(model, list(queries), txt_len=2)
    assert free.shape == (64, 2) and free.max() < VOCABULARY and not torch.equal(free[:, 0], best)
    torch.manual_seed(1)
    assert torch.equal(core.respond_to_batch(model, queries, txt_len=2), free)


def test_the_device_cache_is_emptied_where_the_configuration_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(
        device_cache, "clear_device_cache", lambda garbage_collection: calls.append(True)
    )

    @core.PPODecorators.empty_device_cache()
    def method() -> int:
        return 7

    make_trainer(optimize_device_cache=False)
    assert method() == 7 and calls == []
    make_trainer(optimize_device_cache=True)
    assert method() == method() == 7 and calls == [True, True]
    make_trainer()
