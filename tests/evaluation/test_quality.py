"""Measures of samples: against numbers worked out by hand, and against whole distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ppo_cli.evaluation.likelihoods import likelihoods
from ppo_cli.evaluation.quality import Likelihoods, Quality
from ppo_cli.evaluation.samples import Sample
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.utils.ngrams import distinct, most_common, repetition
from tests.conftest import make_policy


def test_distinct_counts_words_over_all_texts() -> None:
    texts = ["a good film", "A good story."]
    assert distinct(texts, 1) == pytest.approx(5 / 7)  # a good film story .
    assert distinct(texts, 2) == pytest.approx(4 / 5)  # "a good" twice
    assert distinct([], 2) == 0
    assert distinct(["one"], 2) == 0


def test_repetition_is_within_a_text() -> None:
    assert repetition(["so so so so"]) == pytest.approx(2 / 3)
    assert repetition(["a b c", "a b c"]) == 0
    assert repetition(["so so so so", "a b"]) == pytest.approx(1 / 3)
    assert repetition([]) == 0


def test_most_common() -> None:
    assert most_common(["x", "y", "x", "z"]) == 0.5
    assert most_common([]) == 0


def test_quality_of_samples() -> None:
    samples = [Sample("q", "good good", 2.0, 0.9), Sample("q", "bad film here", -1.0, 0.2)]
    read = Likelihoods(
        kl=np.array([1.0, 3.0]),
        entropy=np.array([2.0, 8.0]),
        reference_nll=np.array([4.0, 6.0]),
        tokens=np.array([2.0, 3.0]),
    )
    quality = Quality.of(samples, read)
    assert quality.score == 0.5
    assert quality.probability == pytest.approx(0.55)
    assert quality.on_target == 0.5
    assert quality.kl == 2
    assert quality.entropy == 2
    assert quality.perplexity == pytest.approx(math.exp(2))
    assert quality.length == 2.5
    assert quality.as_dict()["samples"] == 2


Policies = tuple[AutoModelForCausalLMWithValueHead, AutoModelForCausalLMWithValueHead]


@pytest.fixture
def two_policies() -> Policies:
    return make_policy(seed=0), make_policy(seed=1)


def test_likelihoods_against_plain_forwards(two_policies: Policies) -> None:
    policy, reference = two_policies
    queries = [torch.tensor([3, 4]), torch.tensor([5]), torch.tensor([6, 7, 8])]
    responses = [torch.tensor([9, 10, 11]), torch.tensor([12]), torch.tensor([], dtype=torch.long)]
    policy.train()
    found = likelihoods(policy, reference, queries, responses)
    assert policy.training
    policy.eval()
    reference.eval()
    for i, (query, response) in enumerate(zip(queries, responses, strict=True)):
        ids = torch.cat([query, response]).unsqueeze(0)
        with torch.no_grad():
            p, q = (model(ids)[0][0].double().softmax(-1) for model in (policy, reference))
        kl = entropy = nll = 0.0
        for t in range(len(query) - 1, ids.shape[1] - 1):
            kl += float((p[t] * (p[t] / q[t]).log()).sum())
            entropy -= float((p[t] * p[t].log()).sum())
            nll -= float(q[t, ids[0, t + 1]].log())
        assert found.kl[i] == pytest.approx(kl, rel=1e-4, abs=1e-6)
        assert found.entropy[i] == pytest.approx(entropy, rel=1e-4, abs=1e-6)
        assert found.reference_nll[i] == pytest.approx(nll, rel=1e-4, abs=1e-6)
    assert found.tokens.tolist() == [3, 1, 0]


def test_likelihoods_do_not_depend_on_the_batch(
    two_policies: Policies, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, reference = two_policies
    queries = [torch.tensor([3, 4]), torch.tensor([5]), torch.tensor([6, 7, 8])]
    responses = [torch.tensor([9, 10, 11]), torch.tensor([12]), torch.tensor([2, 3])]
    whole = likelihoods(policy, reference, queries, responses)
    monkeypatch.setattr("ppo_cli.evaluation.likelihoods.LOGITS_BYTES", 1)
    alone = likelihoods(policy, reference, queries, responses)
    np.testing.assert_allclose(whole.kl, alone.kl, rtol=1e-4)
    np.testing.assert_allclose(whole.reference_nll, alone.reference_nll, rtol=1e-4)
