"""Functions of `trl.core` that PPO scripts import, with the names and arguments of TRL 0.11.4.

What the trainer itself uses is that: `masked_mean`, `masked_var`, `masked_whiten`, `LengthSampler`,
`set_seed`, and the sampling behind `respond_to_batch`. Left out is what diffusion models need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import TopKLogitsWarper, TopPLogitsWarper

from ppo_cli.data.prompts import LengthSampler
from ppo_cli.kernels.lm_head import entropy
from ppo_cli.models.sampling import sample_responses
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.ppo.advantages import masked_mean, masked_var, masked_whiten
from ppo_cli.ppo.device_cache import PPODecorators
from ppo_cli.utils.random_state import set_seed

__all__ = [
    "WANDB_PADDING",
    "LengthSampler",
    "PPODecorators",
    "clip_by_value",
    "convert_to_scalar",
    "entropy_from_logits",
    "flatten_dict",
    "logprobs_from_logits",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "respond_to_batch",
    "set_seed",
    "stack_dicts",
    "stats_to_np",
    "top_k_top_p_filtering",
    "whiten",
]

WANDB_PADDING = -1
"""Fills up the shorter rows of `stack_dicts`."""


def respond_to_batch(
    model: Any,
    queries: Tensor | Sequence[Tensor],
    txt_len: int = 20,
    top_k: int = 0,
    top_p: float = 1,
) -> Tensor:
    """Sample `txt_len` tokens to each query, with dropout off; an end token does not end them.

    Args:
        model: a policy, or a causal language model of transformers.
        queries: (B, T) token ids, or B tensors of any lengths; every id is read, also of padding.
        txt_len: number of new tokens.
        top_k, top_p: as in `SamplingParams`.

    Returns:
        (B, txt_len) token ids.

    Raises:
        UsageError: a query is empty, or too long for the model.
    """
    settings = SamplingParams(top_k=top_k, top_p=top_p)
    return torch.stack(sample_responses(model, list(queries), [txt_len] * len(queries), settings))


def top_k_top_p_filtering(
    logits: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    filter_value: float = -float("inf"),
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """Logits (B, V) with `filter_value` for tokens that top-k or top-p sampling does not draw."""
    options = {"filter_value": filter_value, "min_tokens_to_keep": min_tokens_to_keep}
    if top_k > 0:
        logits = TopKLogitsWarper(top_k, **options)(None, logits)
    if 0 <= top_p < 1:
        logits = TopPLogitsWarper(top_p, **options)(None, logits)
    return logits


def logprobs_from_logits(logits: Tensor, labels: Tensor, gather: bool = True) -> Tensor:
    """Log-probabilities (B, T) of `labels` (B, T); all of them, (B, T, V), without `gather`."""
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1) if gather else logprobs


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropies (...), nats, of the distributions with `logits` (..., V)."""
    return entropy(logits)


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale to variance 1 and, with `shift_mean`, to mean 0."""
    return masked_whiten(values, torch.ones_like(values, dtype=torch.bool), shift_mean)


def clip_by_value(x: Tensor, tensor_min: Tensor | float, tensor_max: Tensor | float) -> Tensor:
    """`x` between two bounds, each a number or a tensor."""
    return x.clamp(max=tensor_max).clamp(min=tensor_min)


def flatten_dict(nested: Mapping[str, Any], sep: str = "/") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a/b": 1}`.

    Raises:
        ValueError: a key contains the separator.
    """
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if sep in key:
            raise ValueError(f"separator '{sep}' not allowed to be in key '{key}'")
        inner = flatten_dict(value, sep) if isinstance(value, Mapping) else None
        flat |= {key: value} if inner is None else {f"{key}{sep}{k}": v for k, v in inner.items()}
    return flat


def stack_dicts(stats_dicts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Dictionaries with the same keys -> a row each, flattened, padded with `WANDB_PADDING`."""
    return {
        key: pad_sequence(
            [stats[key].flatten() for stats in stats_dicts],
            batch_first=True,
            padding_value=WANDB_PADDING,
        )
        for key in stats_dicts[0]
    }


def stats_to_np(stats_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as NumPy arrays, numbers as floats."""
    arrays = {}
    for key, value in stats_dict.items():
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        is_number = isinstance(value, (int, float, np.number, np.bool_))
        arrays[key] = float(value) if is_number else value
    return arrays


def convert_to_scalar(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors and arrays of one element, of no dimension or one, as numbers."""
    return {
        key: value.item()
        if isinstance(value, (Tensor, np.ndarray)) and tuple(value.shape) in ((), (1,))
        else value
        for key, value in stats.items()
    }
