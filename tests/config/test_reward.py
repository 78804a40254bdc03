"""The reward's section: one classifier, or terms, from a file, `--set` and `--reward`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ppo_cli.config.loading import load_config, validate
from ppo_cli.config.reward import RewardConfig, WeightSchedule
from ppo_cli.config.reward_options import parse_option, with_consent
from ppo_cli.config.schema import RunConfig
from ppo_cli.errors import ConfigError

SENTIMENT = {("reward", "sentiment"): "negative"}


def rewarded(*options: str, add: bool = False, sets: tuple[str, ...] = ()) -> RunConfig:
    overrides = SENTIMENT if add else {}
    return load_config("tiny", assignments=sets, overrides=overrides, rewards=options)


def terms(config: RunConfig) -> list[dict[str, Any]]:
    return [term.model_dump(mode="json") for term in config.reward.terms or ()]


def test_the_option_replaces_the_classifier_or_is_added_to_it() -> None:
    alone = rewarded("r.py:short", "r.py:long=0.5")
    assert terms(alone) == [
        {"function": "r.py:short"},
        {"function": "r.py:long", "weight": 0.5},
    ]
    assert str(alone.output) == "ppo-short-long"
    assert alone.reward.score_every is None  # which the classifier of this configuration has
    both = rewarded("r.py:short", add=True, sets=("reward.model=mine", "reward.output=probability"))
    assert terms(both) == [
        {"model": "mine", "output": "probability"},
        {"function": "r.py:short"},
    ]
    assert str(both.output) == "ppo-bad"
    assert both.reward.score_every == 3
    three = load_config(
        "three-rewards", overrides=SENTIMENT, rewards=["package.module:f"], assignments=()
    )
    assert three.reward.names == ["sentiment", "keywords", "repetition_cost", "f"]


def test_a_list_is_short_for_terms_and_survives_being_written(tmp_path: Path) -> None:
    listed = [
        {"function": "r.py:f", "weight": {"start": 1, "end": 0, "steps": 4}},
        {"cost": "length"},
    ]
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"reward": listed}))
    config = load_config(str(file))
    # The file of a function is looked for beside the configuration.
    assert config.reward.foreign == [f"{tmp_path}/r.py:f"]
    assert config.reward.names == ["f", "length_cost"]
    assert validate(config.model_dump(mode="json")) == config
    file.write_text(yaml.safe_dump({"reward": {"terms": listed}}))
    assert load_config(str(file)) == config


def test_names_are_told_apart() -> None:
    section = {"terms": [{"function": "a.py:f"}, {"function": "b.py:f"}, {"url": "http://h:1/x"}]}
    assert RewardConfig.model_validate(section).names == ["f", "f-2", "h"]


def test_a_schedule_goes_from_start_to_end_and_stays() -> None:
    schedule = WeightSchedule(start=1.0, end=0.0, steps=4)
    assert [schedule.at(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b.py:f", {"function": "a/b.py:f"}),
        ("a=b.py:f=-2", {"function": "a=b.py:f", "weight": -2.0}),
        ("a.b:f=.5", {"function": "a.b:f", "weight": 0.5}),
        ("http://h/x=2", {"url": "http://h/x", "weight": 2.0}),
        ("https://h/x?k=2", {"url": "https://h/x?k=2"}),
    ],
)
def test_an_option_names_a_function_or_an_address_and_a_weight(text: str, expected: Any) -> None:
    assert parse_option(text) == expected


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ([{"weight": 2}], r"terms\.0.*says nothing"),
        ([{"model": "x", "cost": "length"}], "has model and cost"),
        ([{"function": "r.py"}], r"names no function.*FILE\.py:FUNCTION"),
        (
            [{"function": "r.py:f", "output": "probability"}],
            "output is not for a term with function",
        ),
        ([{"url": "ftp://h"}], "no address"),
        ([{"model": "x", "template": "{words}"}], r"other fields than \{text\}"),
        ([{"lexicon": "vader", "template": "chat"}], "template chat is for a classifier"),
        ([{"model": "x", "name": "a b"}], "name"),
        ([{"model": "x", "name": "scaling"}], "scaling and clipping"),
        ([{"model": "x", "name": "a"}, {"cost": "length", "name": "a"}], "called 'a'"),
        ([{"cost": "length", "weight": {"start": 0, "end": 1}}], r"terms\.0\.weight\.steps"),
        ([{"cost": "length", "weight": "much"}], r"terms\.0\.weight: .*number"),
        ([{"model": "x", "sentiment": {"a": "b"}}], r"sentiment\.a: .*number"),
        ({"terms": [{"cost": "length"}], "model": "x"}, "model is of a reward without terms"),
        ({"terms": [{"cost": "length"}], "sentiment": "joy"}, r"sentiment \(joy\) has no effect"),
        ({"terms": [{"cost": "length"}], "length_cost": 1.0}, "length_cost is there twice"),
        ({"terms": [{"function": "r.py:f"}], "score_every": 2}, "partial: true"),
    ],
)
def test_what_has_no_meaning_or_no_effect_is_refused(section: Any, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        validate({"reward": section})


@pytest.mark.parametrize(
    ("options", "settings", "wanted"),
    [
        (["r.py"], {}, r"--reward r\.py: .*FILE\.py:FUNCTION"),
        (["r.py:f=much"], {}, "'much' is no number"),
        (["r.py:f=nan"], {}, r"--reward r\.py:f=nan: .*finite"),
        (["r.py:f"], {"sets": ("reward.model=x",)}, r"--set reward\.model=x.*--sentiment"),
        (["r.py:f"], {"sets": ("reward.score_every=2",)}, r"--set reward\.score_every=2"),
        ([], {"add": True, "sets": ("reward.terms=[{model: x, sentiment: joy}]",)}, "--sentiment"),
    ],
)
def test_options_without_an_effect_are_refused(options: Any, settings: Any, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        rewarded(*options, **settings)


def test_consent_names_the_file_where_it_is_now_and_changes_nothing_else() -> None:
    section = {"terms": [{"function": "old/r.py:f", "weight": 2.0}, {"url": "http://h/x"}]}
    reward = RewardConfig.model_validate(section)
    assert with_consent(reward, []) == (reward, [])
    moved, allowed = with_consent(reward, ["new/r.py:f"])
    assert moved.foreign == ["new/r.py:f", "http://h/x"] and allowed == ["new/r.py:f"]
    assert with_consent(reward, ["old/r.py:f=2", "http://h/x"])[0] == reward
    for other in ("old/r.py:g", "old/s.py:f", "http://h/y", "old/r.py:f=3"):
        with pytest.raises(ValueError, match="--reward"):
            with_consent(reward, [other])
