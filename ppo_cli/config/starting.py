"""A first configuration from a few answers: model, prompts, reward."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ppo_cli.config.commented import commented_yaml
from ppo_cli.config.loading import DEFAULT_CONFIG, checked, read_config
from ppo_cli.utils.text import escape_controls
from ppo_cli.utils.yaml_io import load_yaml

EMBEDDED = "embedded"
FOR_OTHER_MODELS = "gpt2-imdb-shaped"  # small steps by KL, whatever the model's size
FUNCTION = re.compile(r".+\.py:\w+|\w+(\.\w+)*:\w+")
HEADING = """\
# Written by ppo-cli init, with the settings of {base} where it was not told others.
# Check it, and see what it takes: ppo-cli train --config {file} --dry-run

"""
URL = re.compile(r"https?://.+")
OF_SOURCE = ("subset", "split", "text_column", "min_characters")  # keys that belong to one source


@dataclass(frozen=True)
class Answers:
    """What a configuration is made from; None leaves what the shipped one has.

    Attributes:
        model: policy.
        prompts, column: source of the prompts, and its column of texts.
        reward: a classifier; or a function or URL, where the schema knows these.
        sentiment: label to train towards.
        adapter: whether to train a low-rank adapter.
        steps: number of steps.
        output: run directory.
    """

    model: str | None = None
    prompts: str | None = None
    column: str | None = None
    reward: str | None = None
    sentiment: str | None = None
    adapter: bool = False
    steps: int | None = None
    output: str | None = None


def base_of(model: str | None) -> str:
    """Name of the shipped configuration whose settings suit a model."""
    return DEFAULT_CONFIG if model in (None, EMBEDDED) else FOR_OTHER_MODELS


def starting_config(
    answers: Answers, base: str, assignments: Sequence[str], *, file: str, every_key: bool
) -> str:
    """The text of a configuration, with comments.

    Args:
        answers: what the user wants.
        base: name of the configuration that gives all other settings.
        assignments: `section.key=value` each, as for `load_config`.
        file: name of the file that it is written to, for its heading.
        every_key: also list the keys that keep their defaults.

    Raises:
        ConfigError: a value is wrong.
    """
    values = read_config(base)
    places = _apply(answers, values)
    config = checked(values, f"configuration {base}", assignments, places)
    heading = HEADING.format(base=base, file=shlex.quote(escape_controls(file)))
    text = heading + commented_yaml(values, every_key=every_key)
    if checked(load_yaml(text, file, {}), file) != config:
        raise AssertionError(f"{file} would hold other settings than those that were checked")
    return text


def _apply(answers: Answers, values: dict[str, Any]) -> dict[tuple[str, ...], str]:
    """Put answers into `values`; return which option gave which key."""
    places: dict[tuple[str, ...], str] = {}

    def put(section: str, key: str, value: Any, option: str) -> None:
        if value is not None:
            values.setdefault(section, {})[key] = value
            places[section, key] = f"option --{option}"

    if answers.prompts not in (None, values.get("prompts", {}).get("source")):
        old = values.get("prompts", {})
        values["prompts"] = {"source": "", **{k: v for k, v in old.items() if k not in OF_SOURCE}}
    put("policy", "model", answers.model, "model")
    put("policy", "adapter", {} if answers.adapter else None, "adapter")
    put("prompts", "source", answers.prompts, "prompts")
    put("prompts", "text_column", answers.column, "column")
    if (key := _reward_key(answers.reward)) != "model":
        values["reward"] = {}
    put("reward", key, answers.reward, "reward")
    put("reward", "sentiment", answers.sentiment, "sentiment")
    put("run", "steps", answers.steps, "steps")
    put("run", "output", answers.output, "output")
    return places


def _reward_key(reward: str | None) -> str:
    if reward is not None and URL.fullmatch(reward):
        return "url"
    return "function" if reward is not None and FUNCTION.fullmatch(reward) else "model"
