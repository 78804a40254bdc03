"""Which fast paths a run takes, and why it does not take the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ppo_cli.kernels.gelu import has_fused_activations
from ppo_cli.kernels.matmul import is_large_weight, prefers_onednn
from ppo_cli.kernels.switch import PATHS, is_enabled, reason_off
from ppo_cli.kernels.tied_embeddings import has_tied_embeddings
from ppo_cli.models.capabilities import reads_static_cache
from ppo_cli.models.sampling import check_sampling
from ppo_cli.models.sharding import is_sharded
from ppo_cli.ppo.optimizer_step import OptimizerStep
from ppo_cli.ppo.trainer import PPOTrainer
from ppo_cli.utils.device import computes_bfloat16

USED = "used"
NEEDS_LOOP = "needs decode_loop"


def fast_paths(trainer: PPOTrainer) -> dict[str, str]:
    """Map the name of each path to `USED`, or to the reason why it is not taken.

    Args:
        trainer: of models that were checked, see `try_models`.
    """
    policy: Any = trainer.accelerator.unwrap_model(trainer.model)
    device, is_bf16 = trainer.accelerator.device, trainer.accelerator.mixed_precision == "bf16"
    on_cpu, on_cuda = device.type == "cpu", device.type == "cuda"
    units = is_bf16 and computes_bfloat16(device)
    reading = policy.reading()
    is_loop = check_sampling(policy, trainer.tokenizer.pad_token_id) == "loop"
    step = OptimizerStep(trainer.model, trainer.optimizer, trainer.accelerator, trainer.config)
    in_loop = None if is_loop else NEEDS_LOOP
    fused = has_fused_activations(policy)
    apart = "not for an encoder-decoder" if policy.is_encoder_decoder else None

    obstacles: dict[str, str | None] = {
        "matmul": _obstacle_to_matmul(policy, units=units) if on_cpu else "only on a CPU",
        "attention": _unless(on_cuda or (on_cpu and units), "only on a CPU in bfloat16")
        or _unless(_calls_sdpa(policy), "the model does not call scaled_dot_product_attention"),
        "lm_head": apart
        or _unless(
            reading.logits != "model", "the model's logits are not those of its output layer"
        ),
        "tied_embeddings": apart
        or _unless(reading.logits == "weights", "needs lm_head, by a plain layer")
        or _unless(
            policy.allows(has_tied_embeddings), "the embeddings are not tied or do not train"
        ),
        "packing": apart
        or _unless(reading.rows == "packed", "the model does not keep packed sequences apart"),
        "decode_loop": _unless(is_loop, "the model's own generate is needed"),
        "kv_cache": apart
        or in_loop
        or _unless(_has_plain_layers(policy), "all layers have windows, or no keys and values"),
        "cuda_graph": apart
        or _unless(not is_sharded(policy), "not for sharded weights")
        or _unless(on_cuda, "needs a CUDA GPU")
        or in_loop
        or _unless(
            is_enabled("kv_cache") and policy.allows(reads_static_cache),
            "the model reads no cache of a fixed size",
        ),
        "optimizer_in_backward": step.reason_after_backward,
        "kernel_caches": _unless(on_cpu, "only on a CPU"),
        "imports": "only in generate and compare",
        "gelu": None if fused else "the model has no such activation",
    }
    return {name: (obstacles[name] or USED) if is_enabled(name) else reason_off() for name in PATHS}


def report(paths: Mapping[str, str]) -> list[str]:
    """Lines for users: the paths that are taken, then the others, grouped by reason."""
    by_reason: dict[str, list[str]] = {USED: []}
    for name, how in paths.items():
        by_reason.setdefault(how, []).append(name)
    used = by_reason.pop(USED)
    others = [f"  not {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return [f"fast paths: {', '.join(used) or 'none'}", *others]


def _unless(condition: bool, obstacle: str) -> str | None:
    return None if condition else obstacle


def _obstacle_to_matmul(policy: nn.Module, *, units: bool) -> str | None:
    if units:
        return None
    if not prefers_onednn():
        return "torch's own products are as fast on this processor"
    large = any(p.dim() == 2 and is_large_weight(p) for p in policy.parameters())
    return _unless(large, "the weights are too small")


def _calls_sdpa(policy: Any) -> bool:
    return getattr(policy.config, "_attn_implementation", None) == "sdpa"


def _has_plain_layers(policy: Any) -> bool:
    return any(type(layer) is DynamicLayer for layer in DynamicCache(config=policy.config).layers)
