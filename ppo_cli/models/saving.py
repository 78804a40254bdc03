"""Writing a policy as a plain model folder, with a check that the folder holds the policy."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from ppo_cli.errors import ModelError, is_out_of_memory
from ppo_cli.models.capabilities import precision, same
from ppo_cli.models.plain_forward import sample_logits
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.utils.files import settle, writing
from ppo_cli.utils.inventory import UNFINISHED_MODEL, Inventory


def save_folder(
    policy: AutoModelForCausalLMWithValueHead, tokenizer: Any, inventory: Inventory
) -> None:
    """Write policy, value head and tokenizer as a plain model folder; an adapter is merged.

    The files are first written to another folder. Once transformers loads from them a model with
    the policy's logits, each of them replaces its predecessor.

    Args:
        policy, tokenizer: are written.
        inventory: the list of the folder's files; the folder exists.

    Raises:
        ModelError: that model has other logits; nothing is replaced.
        UsageError: it would replace a file that is not on the folder's list.
    """
    folder = inventory.folder
    unfinished = folder / UNFINISHED_MODEL
    try:
        with writing(folder):
            if not _is_written_rightly(policy, unfinished):
                raise ModelError(
                    f"{folder}: the model that transformers reads from the files is not the one "
                    f"that was trained ({type(policy.pretrained_model).__name__} keeps something "
                    "that its files do not hold), so they are not saved. The checkpoints hold the "
                    "trained weights; give another policy.model, or another policy.adapter"
                )
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


def _is_written_rightly(policy: AutoModelForCausalLMWithValueHead, folder: Path) -> bool:
    expected = sample_logits(policy)
    ways = [policy.merged, lambda: policy.merged(untied=True)] if policy.is_peft_model else []
    for whole in ways or [lambda: policy]:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()  # fails where it is a link
        model = whole()
        if not same(sample_logits(model), expected, *_tolerance(policy, expected)):
            continue
        _write(model, folder, getattr(policy.pretrained_model, "stored_dtype", None))
        if _has_logits(model, folder, expected):
            return True
    return False


def _write(
    policy: AutoModelForCausalLMWithValueHead, folder: Path, stored: torch.dtype | None
) -> None:
    """Write a policy, in the dtype of the stored weights where that changes none of them."""
    weights = policy.state_dict()
    lower = {} if stored is None else {key: value.to(stored) for key, value in weights.items()}
    body = [key for key in lower if not key.startswith("v_head.")]
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
        model = AutoModelForCausalLM.from_pretrained(
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
