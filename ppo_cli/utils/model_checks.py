"""Checks of a loaded model: weights, tokenizer, and code that its configuration names."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator
from typing import Any

from ppo_cli.errors import ModelError
from ppo_cli.utils.hub import first_line

IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def refuse_missing(name: str, missing: Collection[str]) -> None:
    """Raise `ModelError` where weights are missing: they would be random numbers."""
    if missing:
        names = ", ".join(sorted(missing)[:5]) + (" ..." if len(missing) > 5 else "")
        raise ModelError(
            f"{name}: its weights lack {names}, which would be random numbers: save the "
            "whole model, or give another"
        )


def refuse_misshaped(name: str, mismatched: Collection[tuple[str, Any, Any]]) -> None:
    """Raise `ModelError` where weights have other shapes than the configuration says.

    Args:
        name: of the model.
        mismatched: name, shape in the file and shape in the model, of each such tensor.
    """
    if mismatched:
        shown = [f"{key} is {tuple(file)}, not {tuple(model)}" for key, file, model in mismatched]
        names = "; ".join(sorted(shown)[:3]) + (" ..." if len(shown) > 3 else "")
        raise ModelError(
            f"{name}: its weights do not fit its config.json: {names}. Put the config.json back "
            "that belongs to them, or save the whole model anew"
        )


def refuse_empty(name: str, tokenizer: Any) -> None:
    """Raise `ModelError` for a tokenizer without words: transformers makes one if none is found."""
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ModelError(f"{name} holds no tokenizer: save one beside the model (tokenizer.json)")


def refuse_unusable(name: str, tokenizer: Any) -> None:
    """Raise `ModelError` for a tokenizer whose files hold invalid values."""
    length = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, (int, float)) or length != length:
        raise ModelError(
            f"{name}: model_max_length in its tokenizer_config.json is {str(length)[:40]!r}, which "
            "is no number: put one there, or leave the key out"
        )
    try:
        tokenizer("a", truncation=True, max_length=1)
    except Exception as error:
        raise ModelError(
            f"{name}: its tokenizer does not work ({first_line(error)}): mend "
            "tokenizer_config.json, or save the tokenizer anew"
        ) from error


def refuse_nan(name: str, model: Any) -> None:
    """Raise `ModelError` where a weight is NaN.

    Args:
        name: of the model.
        model: a `torch.nn.Module`; weights of classes other than torch's own are not checked.
    """
    for key, weight in model.named_parameters():
        plain = type(weight.data).__name__ == "Tensor" and not weight.is_meta
        if not plain or not weight.is_floating_point() or weight.data.sum().isfinite():
            continue
        if weight.data.isnan().any():  # second, because it takes longer than a sum
            raise ModelError(
                f"{name}: its weights are damaged: {key.removeprefix('pretrained_model.')} holds "
                "NaN. Give another copy of the model"
            )


def implementations(name: str, config: Any, is_trusted: bool) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for code that a configuration names elsewhere.

    A configuration may name a kernel on the hub, `owner/name`, which transformers would fetch and
    run, or one of a package that is not installed. Unless the model is trusted, transformers' own
    code takes its place, with a warning.

    Args:
        name: the model's.
        config: its transformers configuration.
        is_trusted: whether code that it names may run.
    """
    keywords: dict[str, Any] = {}
    for key in IMPLEMENTATIONS:
        elsewhere = [value for value in _all_values(config, f"_{key}") if is_elsewhere(value)]
        if not elsewhere:
            continue
        if is_trusted and "/" in elsewhere[0]:
            keywords["allow_all_kernels"] = True
            continue
        consent = f"; to run it, read it and give --trust-remote-code {name}"
        warnings.warn(
            f"{name}: {key} {elsewhere[0]!r} in its config.json names code that it does not hold: "
            f"transformers' own takes its place{consent if '/' in elsewhere[0] else ''}",
            stacklevel=3,
        )
        setattr(config, f"_{key}", None)  # with the configurations inside it
        keywords["config"] = config
    return keywords


def _all_values(config: Any, key: str) -> Iterator[str]:
    """Texts under `key` in a configuration and in the configurations inside it."""
    if isinstance(value := getattr(config, key, None), str):
        yield value
    for inner in getattr(config, "sub_configs", {}):
        if (section := getattr(config, inner, None)) is not None:
            yield from _all_values(section, key)


def is_elsewhere(implementation: str) -> bool:
    """Whether an implementation is neither transformers' own nor that of an installed package."""
    from transformers import utils

    flash = re.search(r"flash_attention_(\d)$", implementation)
    available = flash and getattr(utils, f"is_flash_attn_{flash[1]}_available", None)
    return "/" in implementation or bool(flash and not (available and available()))
