"""Multi-adapter RL: an adapter that scores texts, on the base that the policy's adapter is on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ppo_cli.errors import ModelError, UsageError
from ppo_cli.models.pretrained import find_adapter
from ppo_cli.utils.hub import first_line, loading_errors

SCORE = re.compile(r"(^|\.)score\.(weight|bias)$")
"""Weights of a sequence classifier's last layer, which peft saves with the adapter."""


def load_reward_adapter(model: Any, source: str, name: str, **hub: Any) -> nn.Linear:
    """Add a trained reward adapter to a policy, frozen, and read the layer that scores.

    Args:
        model: the `peft.PeftModel` of the policy; its own adapter stays the active one.
        source: folder or hub id of an adapter of a sequence classifier with the same base.
        name: what the adapter is called in `model`.
        hub: keywords of the hub, see `pretrained.HUB_KEYWORDS`.

    Returns:
        The layer from hidden states (H,) to scores (L,), float32 and frozen.

    Raises:
        UsageError: the policy has an adapter of this name, `source` is no adapter, or peft cannot
            add it to the policy's.
        ModelError: its weights are not those of a sequence classifier with this base.
    """
    if name in model.peft_config:
        raise UsageError(
            f"reward_adapter_name: the policy's own adapter is called {name!r}, choose another name"
        )
    with loading_errors(source):
        adapter = find_adapter(source, **hub)
    if adapter is None:
        raise UsageError(
            f"reward_adapter: {source} is no adapter (it has no adapter_config.json): give the "
            "folder or hub id of a peft adapter of a sequence classifier"
        )
    score = _score_layer(adapter.folder, source).to(model.device)
    try:
        loaded = model.load_adapter(adapter.folder, name, torch_device=str(model.device))
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise UsageError(
            f"reward_adapter: {source} does not go with the policy: {first_line(error)}"
        ) from error
    unknown = [key for key in loaded.unexpected_keys if not SCORE.search(key)]
    if loaded.missing_keys or unknown:
        raise ModelError(
            f"reward_adapter: {source} is an adapter of another base: its weights and the policy's "
            f"differ in {(loaded.missing_keys + unknown)[0]}"
        )
    return score


@contextmanager
def adapter_active(model: Any, name: str) -> Iterator[None]:
    """Use another adapter inside the block. Which parameters are trained does not change."""
    before = model.active_adapter
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.set_adapter(name)  # peft lets the active adapter train, and no other
    try:
        yield
    finally:
        model.set_adapter(before)
        for parameter, is_trained in trained:
            parameter.requires_grad_(is_trained)


def _score_layer(folder: str, source: str) -> nn.Linear:
    from peft import load_peft_weights

    weights = load_peft_weights(folder, device="cpu")
    found = {key.rpartition(".")[2]: weights[key] for key in weights if SCORE.search(key)}
    if "weight" not in found:
        raise ModelError(
            f"reward_adapter: the weights of {source} have no layer 'score': train it on "
            "AutoModelForSequenceClassification with task_type SEQ_CLS, so that peft saves it"
        )
    labels, hidden = found["weight"].shape
    score = nn.Linear(hidden, labels, bias="bias" in found)
    score.load_state_dict(found)
    return score.requires_grad_(False)
