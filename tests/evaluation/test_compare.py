"""Comparisons in this process, with small models and a classifier that counts."""

from __future__ import annotations

import csv
import io
import json
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from torch import Tensor

from ppo_cli.config.schema import PolicyConfig, RewardConfig, RunConfig
from ppo_cli.data.rows import Row
from ppo_cli.errors import PPOCliError, UsageError
from ppo_cli.evaluation import compare as comparison
from ppo_cli.evaluation import generate
from ppo_cli.evaluation.best_of_n import win_rate
from ppo_cli.evaluation.comparison_result import Comparison, json_schema
from ppo_cli.evaluation.generate import Request, Source
from ppo_cli.reporting.comparison_page import comparison_html
from ppo_cli.reporting.comparison_tables import (
    comparison_csv,
    comparison_markdown,
    comparison_tables,
)
from ppo_cli.utils.text import json_text
from tests.conftest import VOCABULARY, make_gpt2, make_tokenizer

PARTS = (
    "distinct-2",
    "perplexity",
    "gained most",
    "lost most",
    "95 % interval",
    "best of n responses",
    "share of its gain",
    "ratio of the kls",
    "each model beside best-of-n",
    "would be needed",
)
PROMPTS = ["t1 t2", "t3", "t4 t5 t6", "t7"]


class Counting:
    """Scores a text by the numbers of its words."""

    label, output = "HIGH", "logit"

    def scores(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        means = [np.mean([int(word[1:]) for word in text.split()]) for text in texts]
        values = torch.tensor(means, dtype=torch.float32) / VOCABULARY
        return values, values

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self.scores(texts)[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    for name, seed in (("base", 0), ("a", 1), ("b", 2), ("c", 3)):
        make_gpt2(seed).save_pretrained(home / name)
        make_tokenizer().save_pretrained(home / name)
    make_gpt2(4, vocab_size=VOCABULARY + 1).save_pretrained(home / "other")
    make_tokenizer(VOCABULARY + 1).save_pretrained(home / "other")
    return home


@pytest.fixture
def compare(folders: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(comparison, "load_classifier", lambda _: Counting())

    def run(*names: str, base: str | None = "base", column: bool = True, **settings: Any) -> Any:
        sources = [Source(name, str(folders / name)) for name in names]
        reference = None if base is None else Source("reference", str(folders / base))
        policy = PolicyConfig(model="none" if base is None else str(folders / base))
        run = None if base is None else RunConfig(policy=policy)
        request = Request(
            [*sources, *([reference] if column and reference else [])],
            RewardConfig(model="counting"),
            run,
            torch.device("cpu"),
            reference=reference,
        )
        defaults = {"count": 8, "max_new_tokens": 6, "seed": 1}
        return comparison.compare(request, [Row(t) for t in PROMPTS], **(defaults | settings))

    return run


def test_the_first_model_against_each_other_prompt_by_prompt(compare: Any) -> None:
    found: Comparison = compare("a", "b", "a")
    assert [m.model for m in found.models] == ["a", "b", "a", "reference"]
    scores = np.array([[answer.score for answer in row.responses] for row in found.rows])
    assert [m.quality["score"] for m in found.models] == pytest.approx(scores.mean(0).tolist())
    against_b, against_itself, _ = found.differences
    assert against_b.difference.mean == pytest.approx((scores[:, 0] - scores[:, 1]).mean())
    assert against_b.win_rate == np.mean(scores[:, 0] > scores[:, 1])
    interval = against_b.win_rate_interval
    assert 0 <= interval.low <= against_b.win_rate == interval.mean <= interval.high <= 1
    # Paired: the same model with the same random numbers writes the same, and ties count half.
    assert against_itself.difference.mean == 0 and against_itself.win_rate == 0.5
    rates = [item.best_of_n_win_rate for item in found.differences]
    assert rates == [None, None, win_rate(found.models[0].quality["kl"])]


def test_divergence_and_perplexity_are_those_of_the_reference(compare: Any, folders: Path) -> None:
    found: Comparison = compare("a")
    tuned, reference = (model.quality for model in found.models)
    assert reference["kl"] == 0 and reference["perplexity"] > 1
    assert tuned["kl"] > 0.01
    assert tuned["kl"] == pytest.approx(np.mean([row.responses[0].kl for row in found.rows]))
    assert found.models[0].intervals["kl"].mean == tuned["kl"]
    assert found.reference == str(folders / "base")
    # Perplexity again, from a plain forward of the reference over the texts.
    model, words = make_gpt2(0), 0
    surprise = 0.0
    for row in found.rows:
        query, response = (
            [int(w[1:]) for w in text.split()] for text in (row.query, row.responses[0].response)
        )
        if len(response) < row.responses[0].tokens:  # its end-of-text token is not in the text
            response.append(VOCABULARY - 1)
        ids = torch.tensor([query + response])
        logits = model(ids).logits[0].log_softmax(-1)
        surprise -= sum(
            float(logits[len(query) - 1 + i, token].detach()) for i, token in enumerate(response)
        )
        words += len(response)
    assert tuned["perplexity"] == pytest.approx(math.exp(surprise / words), rel=1e-4)


def test_without_its_column_the_reference_still_measures(compare: Any) -> None:
    with_column, without = compare("a", "b"), compare("a", "b", column=False)
    assert [m.model for m in without.models] == ["a", "b"]
    assert without.models == with_column.models[:2]


def test_another_vocabulary_has_no_kl_and_that_is_reported(compare: Any) -> None:
    reports: list[str] = []
    found = compare("other", "a", progress=reports.append)
    document = found.models[0].as_dict()
    assert document["kl"] is document["perplexity"] is document["kl_interval"] is None
    assert found.rows[0].responses[0].kl is None
    assert document["length"] > 0 and document["entropy"] > 0
    assert found.models[1].as_dict()["kl"] is not None
    assert [line for line in reports if "vocabulary" in line and "other" in line]


def test_models_without_a_run_have_no_reference_and_that_is_reported(compare: Any) -> None:
    reports: list[str] = []
    found = compare("a", "b", base=None, progress=reports.append)
    assert found.reference is None
    for key in ("kl", "perplexity"):
        assert [model.as_dict()[key] for model in found.models] == [None, None]
    assert [line for line in reports if "names a reference" in line]
    with pytest.raises(UsageError, match="--best-of-n"):
        compare("a", "b", base=None, best_of=[2])


def test_a_reference_that_is_gone_is_missed_only_where_it_is_sampled(compare: Any) -> None:
    reports: list[str] = []
    found = compare("a", "b", base="gone", column=False, progress=reports.append)
    assert found.reference is None and "kl" not in found.models[0].quality.values
    assert [line for line in reports if "no KL" in line and "gone" in line]
    with pytest.raises(PPOCliError, match="gone"):
        compare("a", "b", base="gone")
    with pytest.raises(PPOCliError, match="gone"):
        compare("a", "b", base="gone", column=False, best_of=[2])


def test_two_models_at_most_are_there_at_once(
    compare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[weakref.ref] = []
    most = []

    def load(*args: Any) -> Any:
        loaded = generate.load_model(*args)
        there.append(weakref.ref(loaded.model))
        most.append(sum(ref() is not None for ref in there))
        return loaded

    monkeypatch.setattr(comparison, "load_model", load)
    compare("a", "b", "c", best_of=[1])
    assert len(there) == 4 and max(most) == 2


def test_what_changed_most_comes_first_and_only_what_did(compare: Any) -> None:
    found: Comparison = compare("a", examples=2)
    gaps = [row.responses[0].score - row.responses[1].score for row in found.rows]
    gained = sorted((gap for gap in gaps if gap > 0), reverse=True)[:2]
    lost = sorted(gap for gap in gaps if gap < 0)[:2]
    assert [c.change for c in found.changes.gained] == pytest.approx(gained)
    assert [c.change for c in found.changes.lost] == pytest.approx(lost)
    assert [gaps[c.row] for c in found.changes.gained] == pytest.approx(gained)
    assert compare("a", "a", column=False).changes.gained == []


def test_best_of_n_draws_for_every_prompt(compare: Any) -> None:
    found: Comparison = compare("a", best_of=[4, 2], count=70)
    curve = found.best_of_n
    assert curve is not None
    assert [p.n for p in curve.points] == [1, 2, 4]
    assert (curve.prompts, curve.samples) == (70, 4)
    scores = [p.score for p in curve.points]
    assert scores == sorted(scores) and scores[0] == pytest.approx(curve.reference_score)
    reference = found.models[-1].quality
    assert curve.reference_score == pytest.approx(reference["score"], abs=0.05)
    assert [s.model for s in found.shares] == ["a"]
    assert found.shares[0].score == found.models[0].quality["score"]


def test_the_json_is_as_its_schema_says(compare: Any) -> None:
    schema = json.loads(json_schema())
    for part in (schema, *schema["$defs"].values()):
        assert part["additionalProperties"] is False
        assert part["description"]
        assert set(part["required"]) == set(part["properties"])
        for field in part["properties"].values():
            assert field.get("description") or "$ref" in field
    adapter = TypeAdapter(Comparison)
    for settings in ({"best_of": [1, 2]}, {"base": None}):
        text = json_text(compare("a", "other", **settings).as_dict())
        assert "NaN" not in text and "Infinity" not in text
        adapter.validate_json(text, strict=True)
    document = json.loads(text)
    for wrong in ({"extra": 1}, {"seed": "zero"}, {"rows": [{"query": "q"}]}):
        with pytest.raises(ValidationError):
            adapter.validate_python(document | wrong)


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c", "other", "b"]])
def test_every_format_shows_every_part_and_tables_fit(compare: Any, names: list[str]) -> None:
    found: Comparison = compare(*names, best_of=[2])
    console = Console(file=io.StringIO(), width=80, color_system=None)
    for table in comparison_tables(found, 2):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text.partition("means over")[2]  # a text may stop within a sentence
    words = [word for part in PARTS for word in part.split()]  # a narrow column breaks names
    assert [word for word in words if word not in text.lower()] == []
    for shown in (comparison_markdown(found), comparison_html(found)):
        plain = " ".join(shown.replace("\\", "").split()).lower()
        assert [part for part in PARTS if part not in plain] == []
    table = list(csv.DictReader(io.StringIO(comparison_csv(found))))
    assert len(table) == len(found.rows) * len(found.models)
    assert {"kl", "tokens", "score", "probability"} < set(table[0])
    assert float(table[0]["kl"]) == found.rows[0].responses[0].kl
    verdicts = {item.model: item for item in found.shares}
    for line in table:  # the reference has no verdict
        ratio = verdicts[line["model"]].kl_ratio if line["model"] in verdicts else None
        assert line["kl_ratio"] == ("" if ratio is None else str(ratio))
    assert "kl_ratio" not in comparison_csv(compare(*names))
