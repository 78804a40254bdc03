"""Layers of a language model by number, and those that are not trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ppo_cli.errors import UsageError, did_you_mean
from ppo_cli.models.encoder_decoder import is_encoder_decoder
from ppo_cli.utils.text import shortened

KEY = "policy.freeze_layers"


def layer_stack(model: nn.Module) -> str | None:
    """Name of the list of a language model's layers, of an encoder-decoder's decoder; or None."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    if is_encoder_decoder(model):
        lists = {n: m for n, m in lists.items() if "decoder" in n.split(".")} or lists
    # The decoder's stack is the outermost list of as many modules as the model has layers;
    # experts and the like lie inside, projections of inputs beside it.
    count = _number_of_layers(model)
    stacks = [name for name, m in lists.items() if len(m) == count] or list(lists)
    return min(stacks, key=lambda name: (name.count("."), name), default=None)


def freeze_layers(model: Any, chosen: Sequence[int | str]) -> None:
    """Keep weights of a language model from being trained.

    Args:
        model: the language model, without a value head.
        chosen: numbers of its layers (in an encoder-decoder the decoder's), from 0, and names of
            modules, as `target_modules` has them.

    Raises:
        UsageError: the model lacks one of them, or nothing is left to train.
    """
    stack = layer_stack(model)
    for one in chosen:
        if isinstance(one, str):
            frozen = [m for name, m in model.named_modules() if f".{name}".endswith(f".{one}")]
            if not frozen:
                names = sorted({name.rpartition(".")[2] for name, _ in model.named_modules()})
                known = [name for name in names if name and not name.isdigit()]
                offer = did_you_mean(one, known) or f" There are {', '.join(known[:12])}"
                raise UsageError(f"{KEY}: the model has no module '{shortened(one, 40)}'.{offer}")
        else:
            layers = list(model.get_submodule(stack).children()) if stack else []
            if one >= len(layers):
                raise UsageError(
                    f"{KEY}: the model has the layers 0 to {len(layers) - 1}, not {one}"
                    if layers
                    else f"{KEY}: the model's layers are not found: name modules instead"
                )
            frozen = [layers[one]]
        for module in frozen:
            module.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"{KEY}: nothing of the model is left to train: leave some of it out")


def _number_of_layers(model: Any) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "num_hidden_layers", None)
