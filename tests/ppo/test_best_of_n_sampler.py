"""`BestOfNSampler`: the best of several responses to each query."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from ppo_cli import BestOfNSampler, LengthSampler
from tests.conftest import make_gpt2, make_policy, make_tokenizer

TOKENIZER = make_tokenizer()
QUERIES = [[5, 6, 7], [8, 9]]


def last_number(texts: list[str]) -> list[float]:
    """A score that no two different last tokens share."""
    return [float(text.split()[-1][1:]) for text in texts]


def make(model: Any = None, score: Any = last_number, **settings: Any) -> BestOfNSampler:
    settings = {"length_sampler": LengthSampler(2, 6), **settings}
    return BestOfNSampler(model or make_policy(), TOKENIZER, score, **settings)


@pytest.mark.parametrize(
    ("queries", "count"),
    [
        (QUERIES[0], 1),
        (QUERIES, 2),
        (torch.tensor(QUERIES[1]), 1),
        ([torch.tensor(query) for query in QUERIES], 2),
    ],
)
def test_a_query_may_have_any_form(queries: Any, count: int) -> None:
    config = GenerationConfig(min_length=-1, top_k=0, top_p=1.0, do_sample=True, pad_token_id=79)
    results = make(generation_config=config).generate(queries)
    assert len(results) == count and all(len(result) == 1 for result in results)
    starts = ["t5 t6 t7 ", "t8 t9 "] if count == 2 else [results[0][0][:5]]
    assert all(r[0].startswith(s) for r, s in zip(results, starts, strict=True))


@pytest.mark.parametrize(("size", "best"), [(1, 1), (10, 3), (6, 4)])
def test_the_best_of_all_samples_are_returned_in_order(size: int, best: int) -> None:
    seen: list[list[str]] = []

    def score(texts: list[str]) -> list[float]:
        seen.append(texts)
        return last_number(texts)

    results = make(score=score, sample_size=size, n_candidates=best).generate(QUERIES)
    assert [len(texts) for texts in seen] == [size, size]  # one call a query
    for texts, result in zip(seen, results, strict=True):
        assert size == 1 or len({*texts}) > 1  # they are sampled
        assert last_number(result) == sorted(last_number(texts), reverse=True)[:best]
        assert {*result} <= {*texts}


def test_a_seed_decides_texts_and_lengths_and_nothing_else() -> None:
    model = make_policy()

    def texts(seed: int | None) -> list[list[list[str]]]:
        sampler = make(model, seed=seed, sample_size=2, n_candidates=2)
        return [sampler.generate(QUERIES) for _ in range(2)]

    first = texts(1)
    torch.manual_seed(0)
    np.random.seed(0)
    assert first == texts(1) != texts(2) and first[0] != first[1]
    drawn = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    assert drawn == (torch.rand(1), np.random.rand())
    torch.manual_seed(0)
    unseeded = texts(None)
    assert unseeded != texts(None)


def test_settings_of_sampling_have_effect() -> None:
    model, one = make_gpt2(), {"length_sampler": lambda: 4, "sample_size": 8, "n_candidates": 8}
    greedy = GenerationConfig(do_sample=False)
    assert len({*make(model, generation_config=greedy, **one).generate(QUERIES[0])[0]}) == 1
    sampler = make(model, **one)
    assert len({*sampler.generate(QUERIES[0])[0]}) > 1
    rows: list[int] = []

    def record(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        rows.append(len(ids))
        return torch.zeros(len(ids), dtype=torch.bool)

    own = {"top_k": 1, "stopping_criteria": [record]}
    assert len({*sampler.generate(QUERIES[0], device="cpu", batch_size=3, **own)[0]}) == 1
    assert {*rows} == {3, 2}  # eight in all
    ended = make(model, **one | {"length_sampler": lambda: 30}).generate(
        QUERIES[0], skip_special_tokens=False, eos_token_id=[*range(40)]
    )
    assert all(text.split()[-1] in {f"t{i}" for i in range(40)} for text in ended[0])
    special = make(model, score=lambda texts: [len(t) for t in texts], **one)
    only_end = {"eos_token_id": 79, "suppress_tokens": [*range(79)]}
    assert special.generate(QUERIES[1], **only_end)[0][0] == "t8 t9"
    assert special.generate(QUERIES[1], False, **only_end)[0][0] == "t8 t9 t79"


def test_what_is_wrong_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenizer must be a PreTrainedTokenizerBase, got str"):
        BestOfNSampler(make_gpt2(), "gpt2", last_number, LengthSampler(2, 6))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model must be a language model, got Linear"):
        make(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"n_candidates is 5: it must be from 1 to sample_size"):
        make(n_candidates=5)
    sampler = make()
    for query in ([], [[]], torch.ones(1, 2, dtype=torch.long), "text"):
        with pytest.raises(ValueError, match="tokenized_query must be"):
            sampler.generate(query)
    with pytest.raises(ValueError, match="the model is on cpu, not on cuda:1: move it there"):
        sampler.generate(QUERIES, device="cuda:1")
    with pytest.raises(ValueError, match="max_new_tokens is the length_sampler's here"):
        sampler.generate(QUERIES, max_new_tokens=3)
    for scores in ([1.0], [float("nan")] * 4):
        with pytest.raises(ValueError, match="queries_to_scores must return 4 finite numbers"):
            make(score=lambda texts, scores=scores: scores).generate(QUERIES)
