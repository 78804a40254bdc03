"""What differs between the architectures and releases of transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

from ppo_cli.utils.device import modes_kept


def keep_weights_as_stored(model: Any) -> None:
    """Keep a model from changing its weights in eval mode; its outputs stay the same.

    RWKV divides them for the range of float16: the divided weights would be trained and saved.
    bitsandbytes packs 4-bit weights anew on some processors: it rounds their scales by that, and
    fails for many shapes.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if not getattr(model.config, "rescale_every", 0):
        return
    for module in model.modules():
        if getattr(module, "layers_are_rescaled", False):
            with modes_kept(module):
                module.train()
                module._rescale_layers()
    model.config.rescale_every = 0


def hidden_size(model: Any) -> int:
    """Width of a causal language model's last hidden states."""
    config = model.config.get_text_config()
    for name in ("word_embed_proj_dim", "hidden_size"):  # OPT projects its states to the first
        if isinstance(width := getattr(config, name, None), int):
            return width
    return int(model.get_output_embeddings().weight.shape[-1])


def untie_embeddings(model: Any) -> None:
    """Give a model's output layer its own copy of the weight that it shares with the embeddings."""
    config = model.config
    layer = model.get_output_embeddings()
    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


def activation_checkpointing(model: Any, name: str) -> Any:
    """A model's attribute for checkpointing; `{}` in `name` stands for "activation" or "gradient".

    Later releases of transformers 5 have the first name, earlier ones the second.
    """
    new = name.format("activation")
    return getattr(model, new) if hasattr(model, new) else getattr(model, name.format("gradient"))
