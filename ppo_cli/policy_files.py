"""What a policy is loaded from: folders of transformers, of this project, of TRL, of adapters."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from ppo_cli.errors import UsageError
from ppo_cli.files import settle, writing
from ppo_cli.hub import refuse_missing
from ppo_cli.inventory import UNFINISHED_MODEL, Inventory

VALUE_HEAD_FILE = "value_head.safetensors"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def refuse_if_not_causal(config: Any, model_class: type | None = None) -> None:
    """Raise `UsageError`, naming the architecture, unless a model is a causal language model.

    Args:
        config: the model's; its `architectures` count where there is no class.
        model_class: the model's class.
    """
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    known = {name for names in causal for name in ((names,) if isinstance(names, str) else names)}
    named = (
        list(config.architectures or [])
        if model_class is None
        else [c.__name__ for c in model_class.__mro__ if issubclass(c, nn.Module)]
    )
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    is_causal = any(name in known or name.endswith("ForCausalLM") for name in named)
    if encoder_decoder or (named and not is_causal):
        raise UsageError(
            f"{named[0] if named else config.model_type} is not a causal language model: choose "
            "one whose architecture ends in ForCausalLM or LMHeadModel, such as gpt2"
        )


def load_causal(name: str, is_trainable: bool, *args: Any, **kwargs: Any) -> PreTrainedModel:
    """A causal language model, or one with an adapter, from a folder or the hub.

    Warns of weights that the model does not have; TRL's value heads among them are no cause.

    Args:
        name: folder or hub id.
        is_trainable: whether an adapter that is loaded can be trained further.
        args, kwargs: go to `from_pretrained`.

    Raises:
        ModelError: weights are missing.
    """
    kwargs.setdefault("trust_remote_code", False)  # None would ask on the terminal
    if (Path(name) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        # The adapter's files name its base model: trust in the one is none in the other.
        kwargs["trust_remote_code"] = False
        return AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=is_trainable, **kwargs)
    if "config" not in kwargs:
        hub = {key: kwargs[key] for key in (*HUB_KEYWORDS, "trust_remote_code") if key in kwargs}
        config = AutoConfig.from_pretrained(name, **hub)
        if not kwargs.get("trust_remote_code"):
            refuse_if_not_causal(config)
    # transformers' own report would name the value heads, too.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, *args, **kwargs, output_loading_info=True
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith("v_head.")]
    refuse_missing(name, info["missing_keys"])
    if unexpected:
        names = ", ".join(sorted(unexpected)[:5]) + (" ..." if len(unexpected) > 5 else "")
        warnings.warn(f"{name}: the weights file has the unknown {names}", stacklevel=4)
    return model


def find_value_head(name: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    """The value head's tensors, from our file or among the weights as TRL put them; or none."""

    def locate(file: str) -> str | None:
        return cached_file(
            name,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )

    if (ours := locate(VALUE_HEAD_FILE)) is not None:
        return _read_value_head(ours)
    for weights in WEIGHT_FILES:
        if (index := locate(f"{weights}.index.json")) is not None:
            placed = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            shards = {file for key, file in placed.items() if key.startswith("v_head.")}
            found = [_read_value_head(path) for file in shards if (path := locate(file))]
            return {key: value for head in found for key, value in head.items()}
        if (single := locate(weights)) is not None:
            return _read_value_head(single)
    return {}


def _read_value_head(path: str) -> dict[str, Tensor]:
    prefix = "v_head."
    if path.endswith(".safetensors"):
        with safe_open(path, "pt") as file:
            names = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            return {key.removeprefix(prefix): file.get_tensor(key).float() for key in names}
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}


def save_folder(policy: Any, tokenizer: Any, inventory: Inventory) -> None:
    """Write policy, value head and tokenizer as a plain model folder; an adapter is merged.

    Files appear whole, each replacing its forerunner.

    Args:
        policy, tokenizer: what is written.
        inventory: of the folder, which is there.

    Raises:
        UsageError: it would replace a file that is not on the folder's list.
    """
    folder = inventory.folder
    unfinished = folder / UNFINISHED_MODEL
    try:
        with writing(folder):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()  # fails where it is a link
            (policy.merged() if policy.is_peft_model else policy).save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            settle(unfinished)
            names = [
                path.relative_to(unfinished).as_posix()
                for path in sorted(unfinished.rglob("*"))
                if path.is_file()
            ]
            inventory.add(names, unfinished)
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (unfinished / name).replace(folder / name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
