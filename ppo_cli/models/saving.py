"""Writing a policy as a model folder, with a check that the folder holds the policy."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ppo_cli.errors import ModelError, is_out_of_memory
from ppo_cli.models.capabilities import precision, same
from ppo_cli.models.plain_forward import sample_logits
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.models.processor import copy_processor
from ppo_cli.models.quantization import is_quantized
from ppo_cli.models.reference import create_adapter_reference
from ppo_cli.models.state_names import HEAD, plain_names
from ppo_cli.utils.files import settle, writing
from ppo_cli.utils.inventory import UNFINISHED_MODEL, Inventory

Kept = Literal["both", "merged", "adapter"]
"""What is saved of a policy with an adapter: the merged model with the adapter beside it, in
`ADAPTER_FOLDER`, or one of the two alone."""
ADAPTER_FOLDER = "adapter"
MODEL_NAMES = re.compile(
    r"(config|generation_config|adapter_config)\.json|model\.safetensors\.index\.json"
    r"|(model(-\d{5}-of-\d{5})?|adapter_model)\.safetensors|adapter/.*"
)
"""Files of a model that another choice, or another number of shards, does not have."""


def save_folder(
    policy: AutoModelForCausalLMWithValueHead,
    tokenizer: Any,
    inventory: Inventory,
    kept: Kept | None = None,
) -> None:
    """Write policy, value head and tokenizer as a model folder.

    The files are first written to another folder. Once transformers loads from them a model with
    the policy's logits, each of them replaces its predecessor.

    Args:
        policy, tokenizer: are written.
        inventory: the list of the folder's files; the folder exists.
        kept: as for `write_model`.

    Raises:
        ModelError: that model has other logits; nothing is replaced.
        UsageError: it would replace a file that is not on the folder's list.
    """
    folder = inventory.folder
    unfinished = folder / UNFINISHED_MODEL
    try:
        with writing(folder):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()  # fails where it is a link
            write_model(policy, tokenizer, unfinished, kept)
            settle(unfinished)
            names = [
                path.relative_to(unfinished).as_posix()
                for path in sorted(unfinished.rglob("*"))
                if path.is_file()
            ]
            inventory.add(names, unfinished)
            inventory.remove(name for name in inventory.listed(MODEL_NAMES) if name not in names)
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (unfinished / name).replace(folder / name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_model(
    policy: AutoModelForCausalLMWithValueHead,
    tokenizer: Any,
    folder: Path,
    kept: Kept | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write policy, value head, tokenizer and processor files into an empty folder.

    The files are read again, and give the policy's logits.

    Args:
        policy, tokenizer: are written.
        folder: exists, and is empty.
        kept: what is written of a policy with an adapter. None for both, or for the adapter alone
            where the base is quantised. A merged model that would not be the policy is left out of
            both, with a warning.
        dtype: of the merged weights; None for that of the base's files where it loses nothing.

    Raises:
        ModelError: the files do not hold the policy.
    """
    if not policy.is_peft_model:
        kept = "merged"
    elif kept is None:
        kept = "adapter" if is_quantized(policy.pretrained_model) else "both"
    if kept != "adapter" and not _is_written_rightly(policy, folder, dtype):
        if kept == "merged":
            raise ModelError(
                "the model that transformers reads from the files is not the one that was trained "
                f"({type(policy.pretrained_model).__name__} keeps something that its files do not "
                "hold), so they are not saved. The checkpoints hold the trained weights; give "
                "another policy.model, or another policy.adapter"
            )
        warnings.warn(
            "the model with its adapter merged is not the one that was trained, so the adapter is "
            "saved alone",
            stacklevel=2,
        )
        shutil.rmtree(folder)
        folder.mkdir()
        kept = "adapter"
    if kept != "merged":
        place = folder if kept == "adapter" else folder / ADAPTER_FOLDER
        _write_adapter(policy, place, with_head=kept == "adapter")
    tokenizer.save_pretrained(folder)
    copy_processor(policy, folder)


def _write_adapter(
    policy: AutoModelForCausalLMWithValueHead, folder: Path, *, with_head: bool
) -> None:
    """Write the adapter as peft does, and the value head beside it; check that nothing is missing.

    Raises:
        ModelError: the files do not hold all that was trained.
    """
    if with_head:
        policy.save_pretrained(folder)
    else:
        policy.pretrained_model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # a form that nobody has filled in
    from peft import load_peft_weights, set_peft_model_state_dict

    expected = sample_logits(policy)
    twin = create_adapter_reference(policy)
    with torch.no_grad():  # what the files lack stays wrong
        for name, parameter in policy.pretrained_model.named_parameters():
            if parameter.requires_grad:
                twin.pretrained_model.get_parameter(name).normal_()
    set_peft_model_state_dict(
        twin.pretrained_model, load_peft_weights(str(folder), device=str(policy.device))
    )
    if not same(sample_logits(twin), expected, *_tolerance(policy, expected)):
        raise ModelError(
            "the adapter's files do not hold all that was trained, so they are not saved. The "
            "checkpoints hold the trained weights; give another policy.adapter"
        )


def _is_written_rightly(
    policy: AutoModelForCausalLMWithValueHead, folder: Path, dtype: torch.dtype | None
) -> bool:
    expected = sample_logits(policy)
    ways = [policy.merged, lambda: policy.merged(untied=True)] if policy.is_peft_model else []
    for whole in ways or [lambda: policy]:
        shutil.rmtree(folder)
        folder.mkdir()
        model = whole()
        if not same(sample_logits(model), expected, *_tolerance(policy, expected)):
            continue
        if dtype is not None:
            model.pretrained_model.to(dtype)
        stored = getattr(policy.pretrained_model, "stored_dtype", None) if dtype is None else dtype
        _write(model, folder, stored)
        if _has_logits(model, folder, sample_logits(model)):
            return True
    return False


def _write(
    policy: AutoModelForCausalLMWithValueHead, folder: Path, stored: torch.dtype | None
) -> None:
    """Write a policy, in the dtype of the stored weights where that changes none of them."""
    weights = plain_names(policy.state_dict())
    lower = {} if stored is None else {key: value.to(stored) for key, value in weights.items()}
    body = [key for key in lower if not key.startswith(HEAD)]
    if not body or not all(torch.equal(lower[k].to(weights[k].dtype), weights[k]) for k in body):
        policy.save_pretrained(folder)
        return
    policy.save_pretrained(folder, state_dict={**weights, **{key: lower[key] for key in body}})
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["dtype"] = str(stored).removeprefix("torch.")
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _has_logits(policy: AutoModelForCausalLMWithValueHead, folder: Path, expected: Tensor) -> bool:
    """Whether the model that transformers loads from `folder` has the logits `expected`.

    True, with a warning, where there is no memory for that model.
    """
    own_code = type(policy.pretrained_model).__module__.startswith("transformers_modules")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model = policy.transformers_parent_class.from_pretrained(
            folder, dtype=policy.pretrained_model.dtype, trust_remote_code=own_code
        )
        logits = sample_logits(model.eval())
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        warnings.warn(f"{folder.parent}: no memory is left to check the saved model", stacklevel=2)
        return True
    finally:
        transformers_logging.set_verbosity(verbosity)
    return same(logits, expected, *_tolerance(policy, expected))


def _tolerance(
    policy: AutoModelForCausalLMWithValueHead, expected: Tensor
) -> tuple[torch.dtype, Tensor]:
    """Precision and scale for the comparison, which is made on the CPU."""
    is_cpu = policy.device.type == "cpu"
    dtype = precision(policy.pretrained_model) if is_cpu else torch.bfloat16
    return dtype, expected.abs().max()
