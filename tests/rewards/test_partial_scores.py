"""Potentials and potential-based shaping: what is scored, and what each token is credited with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ppo_cli.models.sampling import Rollout
from ppo_cli.ppo.advantages import generalized_advantages, shaping_rewards
from ppo_cli.rewards.partial_scores import potentials
from tests.conftest import make_batch, make_policy, make_silent_policy, make_trainer


class Characters:
    """A tokenizer whose texts spell the token ids."""

    def batch_decode(self, rows: Sequence[list[int]], **_: Any) -> list[str]:
        return [" ".join(map(str, row)) for row in rows]


def total(texts: Sequence[str]) -> Tensor:
    return torch.tensor([float(sum(map(int, text.split()))) for text in texts])


def rollout(*pairs: tuple[list[int], list[int]]) -> Rollout:
    queries, responses = zip(*pairs, strict=True)
    count = [""] * len(pairs)
    return Rollout(
        [torch.tensor(q) for q in queries],
        [torch.tensor(r, dtype=torch.long) for r in responses],
        count,
        count,
        [None] * len(pairs),
    )


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, [[1, 11, 111, 1111, 11111], [3], []]),
        (2, [[1, 1, 111, 111, 11111], [3], []]),
        (3, [[1, 1, 1, 1111, 1111], [3], []]),
        (9, [[1, 1, 1, 1, 1], [3], []]),
    ],
)
def test_the_text_is_scored_as_it_stood_before_each_token(
    every: int, expected: list[list[float]]
) -> None:
    drawn = rollout(([1], [10, 100, 1000, 10000, 5]), ([1, 2], [7]), ([4], []))
    found = potentials(drawn, Characters(), total, every)
    assert [row.tolist() for row in found] == expected


def test_no_response_has_no_potentials() -> None:
    assert [len(row) for row in potentials(rollout(([1], [])), Characters(), total, 1)] == [0]


def test_shaping_adds_to_each_sequence_what_no_response_can_change() -> None:
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    phi = torch.tensor([[1.0, 5.0, -2.0, 3.0], [7.0, 2.0, 99.0, 99.0]])
    rewards = shaping_rewards(phi, mask, 1.0)
    assert rewards.tolist() == [[4.0, -7.0, 5.0, -3.0], [-5.0, -2.0, 0.0, 0.0]]
    assert rewards.sum(1).tolist() == [-1.0, -7.0]
    assert shaping_rewards(phi, mask, 0.5)[0].tolist() == [1.5, -6.0, 3.5, -3.0]


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_shaping_does_what_adding_the_potentials_to_the_values_would(
    lam: float, gamma: float
) -> None:
    g = torch.Generator().manual_seed(0)
    values, rewards, phi = (torch.randn(3, 5, generator=g) for _ in range(3))
    mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
    shaped, _ = generalized_advantages(
        values, rewards + shaping_rewards(phi, mask, gamma), mask, gamma, lam
    )
    direct, _ = generalized_advantages(values + phi, rewards, mask, gamma, lam)
    torch.testing.assert_close(shaped, direct)


def test_a_step_credits_each_token_with_the_change_of_its_potential() -> None:
    """With lambda 0, no KL and values of 0, the advantage is that change alone."""
    policy = make_silent_policy()
    settings = {"calibrate_potentials": False, "advantage_norm": "none", "ppo_epochs": 1}
    trainer = make_trainer(policy, lam=0.0, **settings)
    queries, responses, scores = make_batch()
    phi = [torch.arange(len(r)).float() * (i + 1) for i, r in enumerate(responses)]
    stats = trainer.step(queries, responses, scores, potentials=phi)
    expected = []
    for i in np.random.RandomState(0).permutation(8):
        expected += [i + 1] * (len(responses[i]) - 1)
        expected.append(float(scores[i]) - float(phi[i][-1]))
    np.testing.assert_allclose(stats["ppo/policy/advantages"], expected, rtol=1e-4, atol=1e-5)
    assert stats["ppo/mean_scores"] == pytest.approx(float(torch.stack(scores).mean()))


def test_masked_tokens_take_no_part() -> None:
    queries, responses, scores = make_batch()
    masks = [torch.arange(len(r)) % 2 == 0 for r in responses]
    phi = [torch.randn(len(r)) for r in responses]
    changed = [torch.where(m, p, 1e3) for m, p in zip(masks, phi, strict=True)]
    stats = [
        make_trainer(make_policy()).step(queries, responses, scores, masks, potentials=p)
        for p in (phi, changed)
    ]
    for key in ("ppo/policy/advantages", "ppo/returns/mean"):
        np.testing.assert_array_equal(stats[0][key], stats[1][key])


@pytest.mark.parametrize("bad", ["short", "few", "nan"])
def test_wrong_potentials_are_refused(bad: str) -> None:
    queries, responses, scores = make_batch()
    phi = [torch.zeros(len(r)) for r in responses]
    if bad == "few":
        phi = phi[:-1]
    else:
        phi[3] = torch.zeros(len(responses[3]) + 1) if bad == "short" else phi[3] * torch.nan
    what = "8 tensors" if bad == "few" else r"potentials\[3\] must be \d+ finite numbers"
    with pytest.raises(ValueError, match=what):
        make_trainer().step(queries, responses, scores, potentials=phi)
