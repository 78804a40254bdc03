"""Sharding by FSDP2: what is asked of accelerate, what is refused, and how models are sharded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import environ
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    ParallelismConfig,
    fsdp2_prepare_model,
    parse_flag_from_env,
)
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from ppo_cli.errors import UsageError
from ppo_cli.models.capabilities import rope_switch
from ppo_cli.models.encoder_decoder import plain_inputs
from ppo_cli.models.plain_forward import model_name, undisturbed
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.models.quantization import is_quantized
from ppo_cli.models.sharding import set_freeing
from ppo_cli.utils import launcher
from ppo_cli.utils.hub import first_line

RAM_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"
RECIPE = "use FSDP2 (configs/accelerate/fsdp2.yaml)"
# Other ways of accelerate to divide a model: keywords, variable that its launcher sets, name.
OTHERS = (
    (("deepspeed_plugin", "deepspeed_plugins"), "ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
    (("megatron_lm_plugin",), "ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    (("torch_tp_plugin",), "ACCELERATE_USE_TP", "tensor parallelism"),
)


def load_whole_models() -> str | None:
    """Have transformers load whole models in each process, also where `accelerate launch` says no.

    Returns:
        A warning where it said so, which is its default.
    """
    if not all(map(parse_flag_from_env, ("ACCELERATE_USE_FSDP", RAM_EFFICIENT))):
        return None
    environ[RAM_EFFICIENT] = "false"
    return (
        "fsdp_cpu_ram_efficient_loading is switched off: each process checks the model before it "
        "is sharded, so all of them load it"
    )


def with_sharding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `Accelerator`, with those that sharding needs if it is asked for.

    Raises:
        UsageError: as `check_sharding`.
    """
    plugin, mesh, precision = check_sharding(settings)
    if plugin is None:
        return dict(settings)
    if plugin.auto_wrap_policy is None:  # one group would gather the whole model in each forward
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
    if precision == "bf16" and plugin.mixed_precision_policy is None:
        # accelerate's own would also round the sums of gradients, and log-probabilities.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    settings = {**settings, "fsdp_plugin": plugin}
    if settings.get("cpu") or parse_flag_from_env("ACCELERATE_USE_CPU"):
        if mesh is None and torch.accelerator.is_available():  # the default mesh is of GPUs then
            settings["parallelism_config"] = ParallelismConfig(dp_shard_size=launcher.count())
        _shard_on_processors(plugin)
    return settings


def check_sharding(
    settings: Mapping[str, Any],
) -> tuple[FullyShardedDataParallelPlugin | None, ParallelismConfig | None, str]:
    """What keyword arguments of `Accelerator`, or `accelerate launch`, say about sharding.

    Returns:
        The plugin (None without sharding), the mesh of processes if there is one, the precision.

    Raises:
        UsageError: what is asked for would not be done, or not rightly.
    """
    for keywords, variable, name in OTHERS:
        if parse_flag_from_env(variable) or any(settings.get(key) for key in keywords):
            raise UsageError(
                f"{name} is not supported: it steps, clips and saves in ways of its own, and "
                f"shards nothing that FSDP2 does not: {RECIPE}"
            )
    plugin = settings.get("fsdp_plugin")
    if plugin is None and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        _check_version(int(environ.get("FSDP_VERSION", "1")))
        plugin = FullyShardedDataParallelPlugin()
    mesh = settings.get("parallelism_config")
    if mesh is None and parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        mesh = ParallelismConfig()
    _check_mesh(mesh, plugin)
    precision = settings.get("mixed_precision") or environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if not isinstance(plugin, FullyShardedDataParallelPlugin):
        return None, mesh, precision  # accelerate refuses other types
    _check_plugin(plugin, precision)
    return plugin, mesh, precision


def _shard_on_processors(plugin: FullyShardedDataParallelPlugin) -> None:
    """Have accelerate shard on processors, too: it would silently not do so.

    Its state is the same as on GPUs then; nothing after it asks for the device.
    """
    if AcceleratorState._shared_state:
        return  # of an earlier accelerator; `settle_sharding` compares
    state = PartialState(cpu=True)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin


def settle_sharding(accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
    """Raise `UsageError` where sharding was asked for, and accelerate does not do it."""
    plugin = settings.get("fsdp_plugin")
    if plugin is not None and not accelerator.is_fsdp2:
        raise UsageError(
            "sharding (FSDP2) was asked for, but accelerate runs without "
            f"({accelerator.distributed_type.value}): an accelerator without it was made in this "
            "process before; make the sharded one first"
        )
    if plugin is not None:  # accelerate keeps that of the first accelerator in a process
        PartialState().fsdp_plugin = accelerator.state.fsdp_plugin = plugin


def _check_mesh(mesh: ParallelismConfig | None, plugin: Any) -> None:
    if mesh is None:
        return
    if mesh.non_data_parallel_size > 1:
        raise UsageError(
            "parallelism_config: tensor, context and sequence parallelism are not supported: leave "
            f"tp_size, cp_size and sp_size at 1, and {RECIPE}"
        )
    if mesh.dp_shard_size > 1 and plugin is None:
        raise UsageError(
            f"parallelism_config: dp_shard_size is {mesh.dp_shard_size}, but FSDP is not asked "
            f"for, so nothing would be sharded: {RECIPE}"
        )
    if plugin is not None and mesh.total_size != launcher.count():
        raise UsageError(
            f"parallelism_config: {mesh.dp_replicate_size} copies (dp_replicate_size) of "
            f"{mesh.dp_shard_size} parts (dp_shard_size) take {mesh.total_size} processes, and "
            f"{launcher.count()} were started: change the sizes, or start as many"
        )


def _check_version(version: int) -> None:
    if version != 2:
        raise UsageError(
            "FSDP1 is not supported: it clips, accumulates and saves in ways of its own, and "
            f"shards nothing that FSDP2 does not: set fsdp_version to 2, or {RECIPE}"
        )


def _check_plugin(plugin: FullyShardedDataParallelPlugin, precision: str) -> None:
    _check_version(plugin.fsdp_version)
    if launcher.count() == 1:
        raise UsageError(
            "sharding (FSDP2) was asked for, and there is one process: start several with "
            "accelerate launch or torchrun, or leave the sharding out"
        )
    refused = {
        "fsdp_cpu_ram_efficient_loading: each process checks the model before it is sharded, so "
        "all have to load it": plugin.cpu_ram_efficient_loading,
        "fsdp_offload_params: samples are drawn from gathered weights, on the device": isinstance(
            plugin.cpu_offload, CPUOffloadPolicy
        ),
        "fsdp_activation_checkpointing: set ppo.gradient_checkpointing to true instead": (
            plugin.activation_checkpointing
        ),
        "fsdp_ignored_modules: their gradients would not be averaged": plugin.ignored_modules,
        "mixed precision fp16: its scaler is not tried with shards; use bf16": precision == "fp16",
    }
    if reasons := [reason for reason, is_set in refused.items() if is_set]:
        raise UsageError(f"not supported with FSDP2: {'; '.join(reasons)}")


def refuse_unshardable(model: AutoModelForCausalLMWithValueHead) -> None:
    """Raise `UsageError` for a model that cannot be sharded, after its self-check."""
    uneven, why = ", so processes may need different numbers of forward passes", None
    if is_quantized(model.pretrained_model):
        why = "its weights are quantised"
    elif rope_switch(model.config) is not None:
        why = f"it reads long and short sequences apart (longrope){uneven}"
    elif model.reading().rows == "equal":
        why = f"it reads sequences of different lengths apart{uneven}"
    if why is not None:
        raise UsageError(
            f"{model_name(model)} cannot be sharded (FSDP2): {why}: use one process or DDP"
        )


@contextmanager
def sharding_errors(model: Any) -> Iterator[None]:
    """Around `prepare`: errors of accelerate and torch about a model that is sharded name it.

    Raises:
        UsageError: in place of them.
    """
    try:
        yield
    except (ValueError, KeyError, AssertionError, NotImplementedError) as error:
        if not (AcceleratorState._shared_state and AcceleratorState().is_fsdp2):
            raise
        why = first_line(error)
        raise UsageError(f"{model_name(model)} cannot be sharded (FSDP2): {why}") from error


def shard_reference(accelerator: Accelerator, reference: Any) -> Any:
    """Shard a reference as accelerate sharded the policy, by layers."""
    return fsdp2_prepare_model(accelerator, reference).eval()


def begin_sharded(accelerator: Accelerator, policy: Any, reference: Any = None) -> None:
    """Make the first forward pass of sharded models, which settles what their root is."""
    frees = accelerator.state.fsdp_plugin.reshard_after_forward
    for model in (policy, reference):
        if model is None:
            continue
        token = torch.zeros(1, dtype=torch.long, device=model.device)
        with torch.no_grad(), undisturbed(model):
            model(**plain_inputs(model, token, token))
        set_freeing(model, layers=frees, root=model is reference)
