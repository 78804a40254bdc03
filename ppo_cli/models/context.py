"""The context length: how many tokens a model can read."""

from __future__ import annotations

from typing import Any

from ppo_cli.models.encoder_decoder import is_encoder_decoder

LIMITS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
)
"""Names of the context length in configurations, the commonest first."""
RELATIVE = {
    "bloom": "seq_length",
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5", "switch_transformers"), "n_positions"),
}
"""Models whose positions are distances, without a limit: this says how long their texts were in
training."""
UNLIMITED = 10**7
"""Values from here on stand for no limit."""


def context_length(model: Any) -> int | None:
    """The largest number of tokens that a model can read, None for no limit.

    Args:
        model: a `transformers` model, or its configuration. In some models, such as RoBERTa,
            positions begin after the padding index, so that they read fewer tokens than the
            configuration says: only the model itself shows that.
    """
    config = getattr(model, "config", model)
    found = [_limit(one) for one in (config.get_text_config(), config)]
    length = next((limit for limit in found if limit is not None), None)
    return None if length is None else length - _unused_positions(model)


def context_used(model: Any, query: int, new: int) -> int:
    """Places of the context that a query and a response of `new` tokens take.

    The encoder and the decoder of an encoder-decoder have a context each.
    """
    return max(query, new) if is_encoder_decoder(model) else query + new


def _limit(config: Any) -> int | None:
    unread = RELATIVE.get(getattr(config, "model_type", ""))
    names = [name for name in LIMITS if name != unread]
    values = [getattr(config, name, None) for name in names]
    return next((v for v in values if isinstance(v, int) and 0 < v < UNLIMITED), None)


def _unused_positions(model: Any) -> int:
    """Number of rows of the position embeddings before the first token's."""
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
