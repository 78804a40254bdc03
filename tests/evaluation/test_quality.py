"""Measures of samples: against numbers worked out by hand, and against whole distributions."""

from __future__ import annotations

import io
import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from rich.console import Console

from ppo_cli.config.schema import RunConfig
from ppo_cli.evaluation import quality
from ppo_cli.evaluation.comparison_result import ModelResult, ScoredSamples, json_schema
from ppo_cli.evaluation.likelihoods import likelihoods
from ppo_cli.evaluation.quality import (
    Likelihoods,
    Measure,
    Quality,
    evaluation_statistics,
    explained_statistics,
)
from ppo_cli.evaluation.samples import Sample
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.ppo.statistics import grouped
from ppo_cli.reporting.comparison_tables import measures
from ppo_cli.reporting.model_card import run_card
from ppo_cli.reporting.tables import summary_table
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
    found = Quality.of(samples, read)
    assert found["score"] == 0.5
    assert found["probability"] == pytest.approx(0.55)
    assert found["on_target"] == 0.5
    assert found["kl"] == 2
    assert found["entropy"] == 2
    assert found["perplexity"] == pytest.approx(math.exp(2))
    assert found["length"] == 2.5
    assert found.as_dict()["samples"] == 2
    without = Quality.of(samples, read, has_reference=False)
    assert found.values.keys() - without.values.keys() == {"kl", "perplexity"}


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


def test_a_new_entry_of_the_list_is_in_every_table_and_document(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shouting = Measure(
        "shouting",
        "shouting",
        "share of responses with an exclamation mark",
        2,
        lambda samples, _: float(np.mean(["!" in sample.response for sample in samples])),
        of_each=lambda samples, _: np.array(["!" in s.response for s in samples], dtype=float),
        of_reference=True,
        document_key="mean_shouting",
    )
    monkeypatch.setattr(quality, "MEASURES", (*quality.MEASURES, shouting))
    samples = [Sample("q", "good!", 1.0, 0.9), *[Sample("q", "a film", 0.0, 0.4)] * 3]
    read = Likelihoods(*np.ones((4, 4)))
    found = Quality.of(samples, read)
    statistics = evaluation_statistics(found, found)
    assert statistics["eval/shouting"] == statistics["eval/reference_shouting"] == 0.25
    assert statistics.keys() == explained_statistics().keys()
    groups = grouped(statistics, False, explained_statistics())
    rows = groups["Evaluation on Held-out Prompts"]
    assert ("eval/shouting", 0.25, shouting.meaning) in rows
    scored = ScoredSamples("m", samples, read, against_reference=True)
    result = ModelResult.of(scored)
    document = result.as_dict()
    assert document["mean_shouting"] == 0.25
    assert document["mean_shouting_interval"]["mean"] == 0.25
    TypeAdapter(ModelResult).validate_json(json.dumps(document), strict=True)
    fields = json.loads(json_schema())["$defs"]["ModelVerdict"]["properties"]
    assert fields["mean_shouting"]["description"] == f"S{shouting.meaning[1:]}."
    assert ("shouting", "0.25") in measures("HIGH", [result])
    summary: Any = SimpleNamespace(
        run="run", label="HIGH", before=found, after=found, after_samples=samples, weights="last",
        steps=1, planned_steps=1, stopped_early=None, kl=0.0,
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=80)
    console.print(summary_table(summary))
    assert "shouting" in console.file.getvalue()  # type: ignore[attr-defined]
    assert f"| shouting | 0.25 | 0.25 | {shouting.meaning} |" in run_card(summary, RunConfig())
