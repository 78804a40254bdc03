"""Keywords of `from_pretrained` and `save_pretrained`: each has an effect or is refused by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ppo_cli.errors import UsageError, did_you_mean

OLD_KEYWORDS = {
    "load_in_8bit": "quantization_config=BitsAndBytesConfig(load_in_8bit=True)",
    "load_in_4bit": "quantization_config=BitsAndBytesConfig(load_in_4bit=True)",
    "use_auth_token": "token=...",
    "use_flash_attention_2": 'attn_implementation="flash_attention_2"',
    "resume_training": "is_trainable=True",
}
"""Keywords of earlier releases of transformers, TRL and peft, and what replaces them."""

LOADING = (
    "attn_implementation", "cache_dir", "config", "device_map", "dtype", "force_download",
    "is_trainable", "local_files_only", "max_memory", "offload_folder", "peft_config",
    "quantization_config", "revision", "subfolder", "token", "torch_dtype", "trust_remote_code",
    "use_safetensors", "variant",
)  # fmt: skip
"""The keywords of `from_pretrained` that a misspelt one is most likely to be."""

UPLOADING = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")
"""Keywords of an upload, beside `push_to_hub`."""


def check_source(source: Any) -> None:
    """Raise `UsageError` unless `from_pretrained` can load from a source."""
    if isinstance(source, (str, Path, PreTrainedModel)) or hasattr(source, "get_base_model"):
        return
    kind = type(source).__name__
    if hasattr(source, "v_head"):
        raise UsageError(f"from_pretrained: the {kind} is a policy already, use it as it is")
    raise UsageError(
        "from_pretrained: the model must be a folder, a hub id, or a model of transformers or "
        f"peft, got {kind}"
    )


def refuse_own_adapter(model: Any) -> None:
    """Raise `UsageError` for a model whose adapter transformers loaded, without peft's class.

    That adapter is frozen, and cannot be switched off or saved as peft's are.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        kind = type(model).__name__
        raise UsageError(
            f"transformers loaded this {kind} with an adapter of its own making, which would stay "
            "frozen. Give the adapter's folder or hub id to from_pretrained of the policy, which "
            "trains it further; or merge it first: peft's PeftModel.from_pretrained(base, "
            "adapter).merge_and_unload(), then peft_config adds a new one"
        )


def check_adapter_config(config: Any) -> None:
    """Raise `UsageError` unless this is None or a configuration of peft."""
    if config is not None and not hasattr(config, "peft_type"):
        raise UsageError(
            "from_pretrained: peft_config must be a configuration of peft, such as "
            f"LoraConfig(r=16, task_type='CAUSAL_LM'), got {type(config).__name__}"
        )


def without_old(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords without those of earlier releases that ask for nothing, `load_in_8bit=False`.

    Raises:
        UsageError: one of them asks for something; the message says what replaces it.
    """
    for name, instead in OLD_KEYWORDS.items():
        if keywords.get(name):
            raise UsageError(
                f"from_pretrained: {name} is a keyword of earlier releases, pass {instead} instead"
            )
    return {name: value for name, value in keywords.items() if name not in OLD_KEYWORDS}


def refuse_beside_model(keywords: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise `UsageError` for what would have no effect beside a model that is loaded already.

    Args:
        keywords: the caller's, without those that are used.
        known: names of those that are used.
    """
    for name, value in keywords.items():
        if value is not None:
            near = "" if name in LOADING else did_you_mean(name, {*LOADING, *known})
            raise UsageError(
                f"from_pretrained: {name} has no effect on a model that is loaded already.{near} "
                "Give it to the call that loads the model, or pass the model's folder or hub id"
            )


@contextmanager
def unknown_keywords(given: Collection[str], known: Collection[str]) -> Iterator[None]:
    """Around a call of transformers' `from_pretrained`, which hands on what it does not know.

    Args:
        given: names of the caller's keywords.
        known: further ones that exist.

    Raises:
        UsageError: the model refuses one; the message names it.
    """
    try:
        yield
    except TypeError as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None or found[1] not in given:
            raise
        near = did_you_mean(found[1], {*LOADING, *known})
        raise UsageError(f"from_pretrained: there is no keyword '{found[1]}'.{near}") from error


def check_saving(model: Any, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of the `save_pretrained` of a model, of peft or transformers.

    Raises:
        UsageError: there is no such keyword, or the weights would be pickled.
    """
    known = {*signature(PreTrainedModel.save_pretrained).parameters}
    known |= {*signature(type(model).save_pretrained).parameters, "safe_serialization"}
    for name in keywords:
        if name not in known - {"kwargs", "self"}:
            near = did_you_mean(name, known)
            raise UsageError(f"save_pretrained: there is no keyword '{name}'.{near}")
    if not keywords.get("safe_serialization", True):
        raise UsageError(
            "save_pretrained: safe_serialization=False asks for pickled weights; they are always "
            "written as safetensors, leave it out"
        )
    return {name: value for name, value in keywords.items() if name != "safe_serialization"}
