"""How many tokens a model reads at once."""

from __future__ import annotations

from typing import Any

LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
)
"""What configurations call it, the commonest first."""
UNLIMITED = 10**7
"""A limit from here on is a number that stands for none."""


def context_length(model: Any) -> int | None:
    """Most tokens that a model reads at once, None where nothing limits them.

    Args:
        model: a `transformers` model, or its configuration. Only the model itself shows where its
            positions begin after the padding index, as RoBERTa's do, so that it reads fewer tokens
            than its configuration says.
    """
    config = getattr(model, "config", model)
    found = [_limit(one) for one in (config.get_text_config(), config)]
    length = next((limit for limit in found if limit is not None), None)
    return None if length is None else length - _unused_positions(model)


def _limit(config: Any) -> int | None:
    # BLOOM's `seq_length` is what it was trained on; its positions are distances, without a limit.
    names = [
        name
        for name in LIMITS
        if (getattr(config, "model_type", None), name) != ("bloom", "seq_length")
    ]
    values = [getattr(config, name, None) for name in names]
    return next((v for v in values if isinstance(v, int) and 0 < v < UNLIMITED), None)


def _unused_positions(model: Any) -> int:
    """How many rows of the table of positions come before the first token's."""
    if not hasattr(model, "named_modules"):
        return 0
    return max(
        (
            module.padding_idx + 1
            for name, module in model.named_modules()
            if name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ),
        default=0,
    )
