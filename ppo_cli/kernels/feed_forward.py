"""The last feed-forward network, on the positions that somebody reads.

After a model's last attention no position looks at another, so what is worked out there for the
others, as the prompt's, is thrown away.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ppo_cli.errors import UnsuitableModel

NAMES = {"mlp", "feed_forward", "ffn"}  # transformers' for it
WORTHWHILE_SHARE = 0.9  # of the positions: copying more takes as long as the others would


@contextmanager
def last_feed_forward_at(
    model: nn.Module, positions: Tensor, unread: float = 0.0
) -> Iterator[None]:
    """Inside, the model's last feed-forward network runs on `positions` alone, in this thread.

    Not for a forward pass that checkpointing repeats in the backward pass, outside the block.

    Args:
        model: one of which `ppo_cli.models.capabilities.ends_in_feed_forward` is true.
        positions: (N,) indices, each once, into the B * T positions laid out flat.
        unread: what the network answers at all others.

    Raises:
        UnsuitableModel: there is no such network, or it does not turn a tensor (B, T, H) into
            another.
    """
    networks = [each for name, each in model.named_modules() if name.split(".")[-1] in NAMES]
    if not networks:
        raise UnsuitableModel(f"{type(model).__name__} has no feed-forward network by a known name")
    thread = threading.get_ident()
    shapes: list[torch.Size] = []

    def narrow(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        if threading.get_ident() != thread:
            return None
        if len(args) != 1 or args[0].dim() != 3:
            raise UnsuitableModel(f"{type(module).__name__} takes more than one (B, T, H)")
        (hidden,) = args
        shapes.append(hidden.shape)
        return (hidden.flatten(0, 1).index_select(0, positions).unsqueeze(0),)

    def widen(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if threading.get_ident() != thread:
            return None
        if not isinstance(output, Tensor):
            raise UnsuitableModel(f"{type(module).__name__} returns more than one (B, T, H)")
        batch, length, _ = shapes.pop()
        width = output.shape[-1]
        whole = output.new_full((batch * length, width), unread)
        return whole.index_copy(0, positions, output.squeeze(0)).view(batch, length, width)

    # Others' hooks see what they would have seen.
    with (
        networks[-1].register_forward_pre_hook(narrow),
        networks[-1].register_forward_hook(widen, prepend=True),
    ):
        yield
