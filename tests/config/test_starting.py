"""A configuration that `init` writes: its settings, its comments, its file."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from ppo_cli.cli.init import init
from ppo_cli.config import commented
from ppo_cli.config.commented import commented_yaml
from ppo_cli.config.loading import load_config, read_config
from ppo_cli.config.schema import RunConfig
from ppo_cli.config.starting import Answers, starting_config
from ppo_cli.errors import ConfigError, UsageError
from ppo_cli.utils.yaml_io import load_yaml


def write(*assignments: str, base: str = "tiny", every_key: bool = False, **answers: Any) -> str:
    return starting_config(
        Answers(**answers), base, assignments, file="ppo.yaml", every_key=every_key
    )


def read(text: str) -> dict[str, Any]:
    data: dict[str, Any] = load_yaml(text, "text", {})
    return data


def test_without_answers_it_is_the_shipped_configuration(tmp_path: Path) -> None:
    file = tmp_path / "ppo.yaml"
    file.write_text(write())
    assert load_config(str(file)) == load_config("tiny")
    assert max(map(len, file.read_text().splitlines())) <= 90


def test_each_answer_has_its_key() -> None:
    data = read(
        write(
            "ppo.gamma=0.9",
            base="gpt2-imdb-shaped",
            model="gpt2",
            prompts="reviews.csv",
            column="review",
            reward="me/classifier",
            sentiment="2",
            adapter=True,
            steps=7,
            output="out",
        )
    )
    assert data["policy"]["model"] == "gpt2" and data["policy"]["adapter"] == {}
    assert (data["prompts"]["source"], data["prompts"]["text_column"]) == ("reviews.csv", "review")
    assert (data["reward"]["model"], data["reward"]["sentiment"]) == ("me/classifier", "2")
    assert (data["run"]["steps"], data["run"]["output"]) == (7, "out")
    assert data["ppo"]["gamma"] == 0.9
    # Of the shipped source, what belongs to that source alone is left out.
    assert not data["prompts"].keys() & {"subset", "split", "min_characters"}
    assert data["prompts"]["held_out"] == 256
    assert read(write(base="gpt2-imdb-shaped"))["prompts"]["subset"] == "plain_text"


def test_every_key_has_its_description_and_all_lists_every_key() -> None:
    text = write(every_key=True)
    whole = read(re.sub(r"^  #(?=\S)", "  ", text, flags=re.MULTILINE))
    defaults = RunConfig().model_dump(mode="json")
    assert {s: set(keys) for s, keys in whole.items()} == {s: set(k) for s, k in defaults.items()}
    assert "  # Lambda of generalised advantage estimation.\n  lam: 0.9\n" in text
    assert "  # Discount per token.\n  #gamma: 1.0\n" in text
    short = write()
    assert "gamma: " not in short and " gamma," in short  # among the other keys


def test_keys_in_sections_and_lists_of_sections_are_described(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = commented_yaml({"policy": {"adapter": {"r": 4, "target_modules": ["a", "b"]}}})
    assert re.search(r"    # Rank[^\n]*\n(    # [^\n]*\n)*    r: 4\n", text)
    assert read(text)["policy"]["adapter"] == {"r": 4, "target_modules": ["a", "b"]}

    class Terms:  # a schema in which `reward` is a section or a list of them
        @staticmethod
        def model_json_schema() -> dict[str, Any]:
            schema = RunConfig.model_json_schema()
            one = {"$ref": "#/$defs/RewardConfig"}
            schema["properties"]["reward"] = {"anyOf": [one, {"type": "array", "items": one}]}
            return schema

        def model_dump(self, mode: str) -> dict[str, Any]:
            return RunConfig().model_dump(mode=mode)

    monkeypatch.setattr(commented, "RunConfig", Terms)
    terms = [{"model": "a", "sentiment": "x"}, {"model": "b"}]
    text = commented_yaml({"reward": terms})
    assert read(text)["reward"] == terms
    assert text.count("# Label to train towards") == 1
    assert text.count("hub id of a sequence classifier") == 2


def test_settings_of_a_run_may_be_the_start(tmp_path: Path) -> None:
    record = "versions: {}\nconfig: {run: {steps: 3, output: old}, ppo: {lam: 0.5}}\n"
    (tmp_path / "run.yaml").write_text(record)
    assert read_config(str(tmp_path))["run"] == {"steps": 3, "output": None}
    assert read(write(base=str(tmp_path)))["ppo"]["lam"] == 0.5


@pytest.mark.parametrize(
    ("answers", "assignments", "words"),
    [
        ({"model": " "}, (), "option --model: .*is empty"),
        ({"prompts": "a\nb"}, (), "option --prompts: .*control character"),
        ({}, ("ppo.gama=1",), "Did you mean 'gamma'"),
        ({"model": "hf_abcdefghijklmnopqrstuvwxyz"}, (), "password or token"),
        ({}, ("ppo.mini_batch_size=33",), "multiple"),
    ],
)
def test_a_wrong_answer_is_refused(answers: Any, assignments: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        write(*assignments, **answers)


def ask(file: str, **options: Any) -> None:
    names = ("model", "prompts", "column", "reward", "sentiment", "adapter", "steps", "output")
    given = dict.fromkeys((*names, "base", "assignments"))
    switches = {"every_key": False, "ask": True, "overwrite": False}
    init(file, **{**given, **switches, **options})


def test_at_a_terminal_it_asks_for_what_no_option_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    answers = {"Model": "gpt2", "Texts": "reviews.csv", "Column": "review", "Label": "negative"}
    asked = []

    def prompt(question: str, default: str, err: bool) -> str:
        asked.append(question.split()[0])
        return answers.get(asked[-1], default)

    monkeypatch.setattr(typer, "prompt", prompt)
    monkeypatch.setattr(typer, "confirm", lambda *_, **__: True)
    for stream in (sys.stdin, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    ask("new.yaml", reward="me/classifier")
    assert asked == ["Model", "Texts", "Column", "Label"]
    config = load_config("new.yaml")
    assert config.policy.model == "gpt2" and config.policy.adapter is not None
    assert (config.prompts.text_column, config.reward.sentiment) == ("review", "negative")
    assert config.reward.model == "me/classifier"
    assert "ppo-cli train --config new.yaml --dry-run" in capsys.readouterr().err

    asked.clear()
    with pytest.raises(UsageError, match=r"new\.yaml exists.*--overwrite"):
        ask("new.yaml")
    ask("new.yaml", ask=False, overwrite=True)
    assert asked == []
    assert load_config("new.yaml") == load_config("tiny")
    capsys.readouterr()
    ask("-", ask=False)
    assert read(capsys.readouterr().out)["policy"]["model"] == "embedded"
