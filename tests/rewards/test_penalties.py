"""Penalties of scores, and end tokens: against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_cli.cli.requests import resolve
from ppo_cli.config.loading import load_config
from ppo_cli.config.schema import RewardConfig
from ppo_cli.data.rows import Row
from ppo_cli.errors import UsageError
from ppo_cli.evaluation.compare import compare
from ppo_cli.evaluation.draw_samples import draw_rollout
from ppo_cli.evaluation.generate import Request, generate
from ppo_cli.models.loading import load_tokenizer
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.models.stop_tokens import end_tokens
from ppo_cli.ppo.statistics import RUN_STATISTICS
from ppo_cli.rewards.penalties import (
    check_penalties,
    penalised,
    penalty_statistics,
    score_penalties,
)
from ppo_cli.training.build import build_training
from ppo_cli.training.run_directory import RunDirectory
from tests.conftest import EOS, SMALL_RUN, VOCABULARY, make_gpt2, make_policy, make_tokenizer

TOKENS = [torch.tensor(row) for row in ([5, 6, 9], [9, 6], [7, 7, 7, 7, 2], [3])]
TEXTS = ["good film.", "film", "so so so so end", "so"]
SCORES = torch.tensor([1.0, -1.0, 0.5, 2.0])


def settings(**changes: Any) -> RewardConfig:
    return RewardConfig(**changes)


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ({}, [1.0, -1.0, 0.5, 2.0]),
        ({"missing_eos_penalty": 0.5}, [1.0, -1.5, 0.5, 1.5]),
        ({"length_cost": 0.1}, [0.7, -1.2, 0.0, 1.9]),
        ({"length_cost": 0.1, "target_length": 3}, [1.0, -1.1, 0.3, 1.8]),
        ({"repetition_cost": 2.0}, [1.0, -1.0, -0.5, 2.0]),  # of 4 pairs "so so" comes twice more
        (
            {"missing_eos_penalty": 0.5, "length_cost": 0.1, "repetition_cost": 2.0},
            [0.7, -1.7, -1.0, 1.4],
        ),
    ],
    ids=["none", "no end", "price per token", "target length", "repetition", "all"],
)
def test_penalised_scores_are_those_of_the_formula(
    terms: dict[str, float], expected: list[float]
) -> None:
    penalties = score_penalties(TOKENS, TEXTS, {9, 2}, settings(**terms))
    assert penalised(SCORES, penalties).tolist() == pytest.approx(expected, abs=1e-6)
    assert all((value >= 0).all() for value in penalties.values())
    statistics = penalty_statistics(SCORES, penalties)
    assert set(penalties) == set(terms) - {"target_length"}
    assert set(statistics) <= set(RUN_STATISTICS)
    if terms:
        mean = sum(expected) / 4
        assert statistics["env/shaped_reward_mean"] == pytest.approx(mean, abs=1e-6)
        lost = sum(value for key, value in statistics.items() if "shaped" not in key)
        assert lost == pytest.approx(SCORES.mean().item() - mean, abs=1e-6)
    else:
        assert statistics == {}


def test_a_response_without_tokens_did_not_end() -> None:
    none = [torch.tensor([], dtype=torch.long)]
    assert score_penalties(none, [""], {9}, settings(missing_eos_penalty=1.0)) == {
        "missing_eos_penalty": torch.tensor([1.0])
    }


def test_a_penalty_for_not_ending_needs_something_that_ends() -> None:
    check_penalties(settings(missing_eos_penalty=1.0), [9])
    check_penalties(settings(), [])
    with pytest.raises(UsageError, match=r"missing_eos_penalty.*rollout\.stop"):
        check_penalties(settings(missing_eos_penalty=1.0), [])


@pytest.fixture(scope="module")
def bpe() -> Any:
    return load_tokenizer("embedded")


def test_a_stop_text_ends_with_every_token_that_holds_it(bpe: Any) -> None:
    assert end_tokens(bpe) == [bpe.eos_token_id]
    texts = {i: bpe.decode([i]) for i in end_tokens(bpe, [".", "ing"]) if i != bpe.eos_token_id}
    assert bpe.convert_tokens_to_ids(".") in texts
    assert bpe("very charming").input_ids[-1] in texts
    assert all("." in text or "ing" in text for text in texts.values())
    others = set(range(len(bpe))) - set(texts) - {bpe.eos_token_id}
    assert not any("." in bpe.decode([i]) or "ing" in bpe.decode([i]) for i in others)


def test_of_special_tokens_the_whole_text_stops_alone() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|done|>"]})
    done = tokenizer.convert_tokens_to_ids("<|done|>")
    assert end_tokens(tokenizer, ["<|done|>"]) == [EOS, done]
    with pytest.raises(UsageError, match=r"'\|'"):
        end_tokens(tokenizer, ["t1", "|"])


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (EOS, None, [EOS]),
        (3, 4, [3, 4, EOS]),
        ([3, 5], [4, 3], [3, 4, 5, EOS]),
        (None, [EOS], [EOS]),
        (50256, [128001, 7], [7, EOS]),  # ids of a vocabulary that this model has not
        (VOCABULARY, -1, [EOS]),
    ],
)
def test_every_end_token_of_tokenizer_and_model_counts(
    config: Any, generation: Any, expected: list[int]
) -> None:
    policy = make_policy(eos_token_id=config)
    policy.generation_config.eos_token_id = generation
    assert end_tokens(make_tokenizer(), model=policy) == expected
    assert end_tokens(make_tokenizer(), ["t6"], policy) == sorted({*expected, *SIXES})


SIXES = [6, *range(60, 70)]  # the tokens that hold "t6"


def test_an_id_that_the_model_embeds_and_the_tokenizer_lacks_ends_too() -> None:
    policy = make_policy(vocab_size=VOCABULARY + 8)
    policy.generation_config.eos_token_id = VOCABULARY + 2
    assert end_tokens(make_tokenizer(), model=policy) == [EOS, VOCABULARY + 2]


def test_spaces_at_the_beginning_of_a_sentencepiece_token_count() -> None:
    class Pieces:
        eos_token_id, all_special_ids, name_or_path = None, (), "pieces"
        pieces = ("▁end", "end", "x")

        def __len__(self) -> int:
            return len(self.pieces)

        def batch_decode(self, rows: list[list[int]], **_: Any) -> list[str]:
            return [self.pieces[row[0]].replace("▁", "") for row in rows]

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [self.pieces[i] for i in ids]

    assert end_tokens(Pieces(), [" end"]) == [0]
    assert end_tokens(Pieces(), ["end"]) == [0, 1]


def test_samples_end_at_a_stop_token_which_they_hold(bpe: Any) -> None:
    policy, tokenizer = make_policy(), make_tokenizer()
    ends = end_tokens(tokenizer, ["t3", "t4"])  # 22 of 80 tokens
    queries = [torch.tensor([1, 2])] * 64
    params = SamplingParams(stop_token_ids=tuple(ends))
    rollout = draw_rollout(policy, tokenizer, queries, params, max_new_tokens=12, seed=0)
    ended = 0
    for response in rollout.response_texts:
        words = response.split()
        stops = [word for word in words if word.startswith(("t3", "t4"))]
        assert stops in ([], words[-1:])
        ended += bool(stops)
    assert ended > 30


SMALL = ["run.device=cpu", "run.steps=2", "run.checkpoint_every=0"]


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_learns_from_the_shaped_score_and_ends_where_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    terms = ["reward.missing_eos_penalty=1.5", "reward.length_cost=0.25"]
    config = load_config(SMALL_RUN, assignments=[*SMALL, *terms, 'rollout.stop=[".", "\\n"]'])
    training = build_training(config)
    for report in training.steps():
        stats = report.stats
        lost = stats["env/missing_eos_penalty"] + stats["env/length_cost"]
        assert stats["env/length_cost"] == pytest.approx(0.25 * stats["tokens/responses_len_mean"])
        shaped_mean = stats["env/shaped_reward_mean"]
        assert shaped_mean == pytest.approx(stats["env/reward_mean"] - lost, abs=1e-5)
        assert stats["ppo/mean_scores"] == pytest.approx(shaped_mean, abs=1e-5)
        assert all(s.response.find(".") in (-1, len(s.response) - 1) for s in report.samples)
    summary = training.finish()
    training.directory.unlock()
    judged = [*summary.before_samples, *summary.after_samples]
    assert all(s.response.find(".") in (-1, len(s.response) - 1) for s in judged)
    assert sum(s.response.endswith(".") for s in judged) > 4
    assert RunDirectory("ppo-good").config().rollout.stop == [".", "\n"]

    request = resolve(
        ["ppo-good"], reference=True, score=False, sentiment=None, classifier=None, device="cpu"
    )
    for source in request.sources:
        samples = generate(
            source,
            [Row("This movie")],
            samples_each=20,
            max_new_tokens=30,
            seed=0,
            device=request.device,
            reward=None,
        ).samples
        assert all(s.response.find(".") in (-1, len(s.response) - 1) for s in samples)
        assert sum(s.response.endswith(".") for s in samples) > 5


def test_a_stop_text_that_no_token_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(SMALL_RUN, assignments=[*SMALL, 'rollout.stop=[".", "the very end"]'])
    with pytest.raises(UsageError, match=r"rollout\.stop.*'the very end'"):
        build_training(config)
    assert list(tmp_path.iterdir()) == []


def make_chat_model(folder: Path) -> None:
    """A random model with many end tokens, none of which its tokenizer names."""
    bpe = load_tokenizer("embedded")
    bpe.eos_token, bpe.pad_token = None, bpe.convert_ids_to_tokens(bpe.eos_token_id)
    bpe.save_pretrained(folder)
    model = make_gpt2(vocab_size=len(bpe), initializer_range=0.02)
    model.generation_config.eos_token_id = list(range(len(bpe) // 2))
    model.config.eos_token_id = None
    model.save_pretrained(folder)


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_models_own_end_tokens_end_what_is_trained_evaluated_and_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_chat_model(tmp_path / "chat")
    lengths = ["rollout.output_min_length=1", "rollout.output_max_length=4"]
    changes = ["reward.missing_eos_penalty=1.5", "policy.model=chat", *lengths]
    training = build_training(load_config(SMALL_RUN, assignments=[*SMALL, *changes]))
    assert training.ppo_step.end_token_ids == list(range(len(training.tokenizer) // 2))
    fines = [report.stats["env/missing_eos_penalty"] for report in training.steps()]
    assert 0 < sum(fines) / 2 < 1.5 / 2  # half of the tokens end
    summary = training.finish()
    training.directory.unlock()
    assert 1 < summary.before["length"] < 3
    assert 1 < summary.after["length"] < 3

    def asked(*models: str) -> Request:
        return resolve(
            models, reference=True, score=True, sentiment=None, classifier="embedded", device="cpu"
        )

    result = compare(asked("ppo-good"), [], count=32, max_new_tokens=30, seed=0)
    assert [1 < model.quality["length"] < 3 for model in result.models] == [True, True]
    request = asked("chat")
    samples = generate(
        request.sources[0],
        [Row("This movie")],
        samples_each=32,
        max_new_tokens=30,
        seed=0,
        device=request.device,
        reward=None,
    ).samples
    lengths = [len(training.tokenizer(sample.response).input_ids) for sample in samples]
    assert 1 < sum(lengths) / 32 < 4
