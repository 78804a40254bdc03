"""The sum of rewards: weights, schedules, None, contributions, classifiers as terms."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_cli import RewardSum, SentimentReward
from ppo_cli.config.reward import RewardConfig, WeightSchedule
from ppo_cli.errors import MissingPackageError, UsageError
from ppo_cli.ppo.statistics import RUN_STATISTICS, TERM, grouped
from ppo_cli.rewards.batch import RewardBatch
from ppo_cli.rewards.loading import load_reward
from ppo_cli.rewards.reward_sum import Term, as_term
from tests.rewards.test_sentiment import GOOD, make_classifier, make_word_tokenizer, save

CPU = torch.device("cpu")
TOKENS = [torch.tensor(row) for row in ([5, 6, 9], [9, 6], [7])]
BATCH = RewardBatch(
    ["q aa aa aa", "r b", "s"], ["q", "r", "s"], [" aa aa aa", " b", ""], {}, TOKENS, {9}
)


def letters(responses: list[str]) -> list[int | None]:
    return [len(text) or None for text in responses]


def loaded(*terms: dict[str, Any], **section: Any) -> RewardSum:
    return load_reward(RewardConfig.model_validate({"terms": list(terms), **section}), CPU)


def test_the_total_is_the_sum_of_weights_times_values_and_none_adds_nothing() -> None:
    reward = RewardSum({"letters": letters, "two": lambda texts: [2.0] * 3}, {"letters": -0.5})
    found = reward.score(BATCH)
    assert found.total.tolist() == [-2.5, 1.0, 2.0]
    assert found.parts["letters"].tolist() == [-4.5, -1.0, 0.0]
    assert found.applies["letters"].tolist() == [True, True, False]
    assert found.probability is None
    statistics = found.statistics()
    assert statistics["env/rewards/letters/mean"] == pytest.approx(-5.5 / 3)
    assert statistics["env/rewards/letters/std"] == pytest.approx(2.3629, abs=1e-4)
    assert statistics["env/rewards/letters/none"] == pytest.approx(1 / 3)
    assert statistics["env/rewards/letters/weight"] == -0.5
    assert {TERM.sub("NAME", key) for key in statistics} <= set(RUN_STATISTICS)
    shown = grouped(statistics, False)["Reward and Value Function Estimation"]
    assert len(shown) == 8 and all(meaning for _, _, meaning in shown)
    # In scripts.
    assert reward(BATCH.texts, responses=BATCH.responses).tolist() == [-2.5, 1.0, 2.0]
    for wrong in ({}, {"letters": 3}):
        with pytest.raises(UsageError):
            RewardSum(wrong)
    with pytest.raises(UsageError, match="weight for 'words'"):
        RewardSum({"letters": letters}, {"words": 1.0})


def test_a_weight_follows_its_schedule_and_an_evaluation_takes_its_end() -> None:
    schedule = WeightSchedule(start=1.0, end=3.0, steps=4)
    reward = RewardSum.of_terms([Term("letters", as_term(letters, "letters"), schedule)])
    totals = [reward.score(BATCH, step).total[1].item() for step in (0, 1, 4, 9)]
    assert totals == [2.0, 3.0, 6.0, 6.0]
    assert reward.score(BATCH).total[1].item() == 6.0


def test_costs_are_the_penalties_of_the_section() -> None:
    reward = loaded(
        {"cost": "length", "target_length": 1, "weight": 0.5},
        {"cost": "repetition"},
        {"cost": "missing_eos", "weight": 2},
    )
    assert reward.score(BATCH).total.tolist() == pytest.approx([-1.0 - 0.5, -0.5 - 2, -2.0])
    with pytest.raises(UsageError, match="response_ids"):
        reward(BATCH.texts, queries=BATCH.queries, responses=BATCH.responses)


def test_only_terms_for_unfinished_texts_score_them() -> None:
    def total(texts: list[str], queries: list[str], label: list[int]) -> list[float]:
        assert queries == ["q", "q", "r"] and label == [4, 4, 5]
        return [float(len(text)) for text in texts]

    def never(texts: list[str]) -> list[float]:
        raise AssertionError

    schedule = WeightSchedule(start=10.0, end=0.0, steps=1)
    reward = RewardSum.of_terms(
        [
            Term("total", as_term(total, "total"), schedule),
            Term("never", as_term(never, "never"), is_partial=False),
        ]
    )
    batch = RewardBatch(["q ab", "r"], ["q", "r"], [" ab", ""], {"label": [4, 5]}, TOKENS[:2])
    score = reward.unfinished(batch, every=2, step=0)
    assert score(["q", "q a", "r"]).tolist() == [10.0, 30.0, 10.0]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    labels = {0: "sad", 1: "joy", 2: "love"}
    model = make_classifier(id2label=labels, label2id={v: k for k, v in labels.items()})
    return save(tmp_path_factory.mktemp("emotions"), model)


def test_several_labels_are_added_with_their_weights(classifier: str) -> None:
    texts = list(GOOD)
    one = [SentimentReward(classifier, label) for label in ("sad", "joy", "love")]
    logits, chances = (torch.stack(x) for x in zip(*(r.scores(texts) for r in one), strict=True))
    both = SentimentReward(classifier, ["joy", "love"])
    assert both.label == "joy + love"
    assert torch.allclose(both(texts), logits[1] + logits[2])
    score, chance = SentimentReward(
        classifier, {"love": 2.0, "sad": -1.0}, output="probability"
    ).measure(texts)
    assert torch.allclose(score, 2 * chances[2] - chances[0])
    assert torch.allclose(chance, chances[2])
    both.probe()  # says nothing of several labels
    with pytest.raises(UsageError, match="joy and 1 name one label"):
        SentimentReward(classifier, ["joy", "1"])


def test_a_classifier_reads_its_template_with_its_tokenizer(
    classifier: str, tmp_path: Path
) -> None:
    plain = SentimentReward(classifier, "joy")
    batch = RewardBatch(["w1 w2"], ["w1"], [" w2"])
    term = {"model": classifier, "sentiment": "joy"}
    assert loaded(term).score(batch).total == plain(["w1 w2"])
    filled = loaded({**term, "template": "w5 {response} w6 {query}"}).score(batch).total
    assert filled == plain(["w5  w2 w6 w1"]) != plain(["w1 w2"])
    # A tokenizer without [CLS] and [SEP], whose chat template says where the turns are.
    other = make_word_tokenizer(special=False)
    other.chat_template = (
        "{% for m in messages %}{{ m.role[0:0] }}[SEP] {{ m.content }} {% endfor %}[CLS]"
    )
    other.add_special_tokens({"additional_special_tokens": ["[SEP]", "[CLS]"]})
    other.save_pretrained(tmp_path)
    chat = {**term, "template": "chat", "tokenizer": str(tmp_path)}
    reward = loaded(chat)
    read: list[Any] = []
    inner = reward.classifiers[0]
    inner._logits = lambda texts, rows: read.extend(rows) or torch.zeros(len(rows), 3)
    said = RewardBatch(["w1 w2"], ["w1"], ["w2 [SEP] w3"])
    reward.score(said)
    ids = other.convert_tokens_to_ids
    tokens = read[0]["input_ids"]
    assert tokens[0] == ids("[SEP]") and tokens[-1] == ids("[CLS]")
    assert tokens.count(ids("[SEP]")) == 2  # that of the response is text
    without = {key: value for key, value in chat.items() if key != "tokenizer"}
    with pytest.raises(UsageError, match="has no chat template"):
        loaded(without).score(said)


def test_the_first_classifier_gives_the_probability_and_the_sections_label(classifier: str) -> None:
    terms = [{"cost": "length"}, {"model": classifier, "weight": 0.1, "output": "probability"}]
    reward = loaded(*terms, sentiment="love", batch_size=7)
    assert reward.label == "love" and reward.output == "sum"
    assert reward.title == "length_cost + classifier"
    assert reward.classifiers[0].batch_size == 7
    found = reward.score(BATCH)
    assert found.probability is not None
    assert torch.allclose(found.parts["classifier"], 0.1 * found.probability)


def test_vader_scores_words(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import vaderSentiment.vaderSentiment  # noqa: F401
    except ImportError:
        with pytest.raises(MissingPackageError, match=r"ppo-cli\[lexicon\]"):
            loaded({"lexicon": "vader"})
        stand_in = types.ModuleType("vaderSentiment.vaderSentiment")
        stand_in.SentimentIntensityAnalyzer = StandIn  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vaderSentiment", types.ModuleType("vaderSentiment"))
        monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", stand_in)
    batch = RewardBatch(["x bad good", "x good bad"], ["x bad", "x good"], [" good", " bad"])
    good, bad = loaded({"lexicon": "vader", "template": "{response}"}).score(batch).total.tolist()
    assert good > 0.3 > -0.3 > bad
    whole = loaded({"lexicon": "vader"}).score(batch).total.tolist()
    assert whole[0] == whole[1]


class StandIn:
    """VADER, where it is not installed."""

    def polarity_scores(self, text: str) -> dict[str, float]:
        return {"compound": 0.5 * (text.count("good") - text.count("bad"))}
