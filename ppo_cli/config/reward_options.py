"""The option `--reward`: terms of a new reward, or consent to those that a run names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ppo_cli.config.functions import FUNCTION, function_parts
from ppo_cli.config.reward import OF_ONE_CLASSIFIER, RewardConfig, check_url


def parse_option(text: str) -> dict[str, Any]:
    """The term of `--reward FILE.py:FUNCTION[=WEIGHT]`, or of an address instead of the function.

    Raises:
        ValueError: it names neither, or the weight is no number.
    """
    is_url = text.startswith(("http://", "https://"))
    spec, equals, weight = text.rpartition("=")
    if FUNCTION.fullmatch(text) or not equals or (is_url and "?" in text):
        spec, weight = text, ""
    term: dict[str, Any] = {"url": check_url(spec)} if is_url else {"function": spec}
    if not is_url:
        function_parts(spec)
    if weight or spec != text:
        try:
            term["weight"] = float(weight)
        except ValueError:
            raise ValueError(f"its weight '{weight}' is no number: give one, such as 0.5") from None
    return term


def with_option(section: dict[str, Any], terms: Sequence[dict[str, Any]], *, add: bool) -> None:
    """Make `terms` the terms of the section `reward`, or add them to what it has.

    Args:
        section: the section as nested plain values, changed in place.
        terms: of `parse_option`.
        add: keep what the section has, its one classifier as a term.
    """
    old = section.get("terms")
    one = {key: section.pop(key) for key in OF_ONE_CLASSIFIER if key in section}
    if old is None:
        old = [{"model": "embedded", **one}]
    section["terms"] = [*(old if add else ()), *terms]
    if not add:
        section.pop("score_every", None)  # functions score finished texts


def with_consent(reward: RewardConfig, options: Sequence[str]) -> tuple[RewardConfig, list[str]]:
    """Take `--reward` as consent to what a run's reward names: its functions and endpoints.

    A function is named by its file's name too, so that it is found where the file is now.

    Returns:
        `reward` with the functions as the options name them, and the names that the options allow.

    Raises:
        ValueError: an option names nothing of the reward, or gives a term another weight.
    """
    terms, allowed = list(reward.terms or ()), []
    for text in options:
        option = parse_option(text)
        spec = option.get("function") or option["url"]
        found = [i for i, term in enumerate(terms) if _is_same(term.foreign, spec)]
        if not found:
            has = ", ".join(reward.foreign) or "none"
            raise ValueError(f"--reward {spec}: the run has no such term; it has {has}")
        for i in found:
            if option.get("weight", terms[i].weight) != terms[i].weight:
                raise ValueError(f"--reward {text}: the run has another weight: leave it out")
            if terms[i].function is not None:
                terms[i] = terms[i].model_copy(update={"function": spec})
        allowed.append(spec)
    if not allowed:
        return reward, []
    return reward.model_copy(update={"terms": terms}), allowed


def names_some(reward: RewardConfig, options: Sequence[str]) -> bool:
    """Whether one of the values of `--reward` names a function or an endpoint of `reward`."""
    specs = [option.get("function") or option["url"] for option in map(parse_option, options)]
    return any(_is_same(foreign, spec) for foreign in reward.foreign for spec in specs)


def _is_same(foreign: str | None, spec: str) -> bool:
    if foreign is None or foreign == spec:
        return foreign == spec
    parts = [FUNCTION.fullmatch(one) for one in (foreign, spec)]
    return (
        all(one and one["file"].endswith(".py") for one in parts)
        and len({(os.path.basename(one["file"]), one["name"]) for one in parts if one}) == 1
    )
