"""Devices: choice, precision, transfers, threads and memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ppo_cli.errors import UsageError
from ppo_cli.utils import launcher


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device`, without waiting for a GPU."""
    # CUDA copies memory that is not pinned before this returns, so `tensor` may change afterwards.
    return tensor.to(device, non_blocking=device.type == "cuda")


def fetch(rows: Sequence[Tensor]) -> Sequence[Tensor]:
    """Copy 1-D tensors to the CPU in one transfer."""
    return torch.cat(list(rows)).cpu().split([len(row) for row in rows])


@contextmanager
def modes_kept(model: torch.nn.Module) -> Iterator[None]:
    """Restore the training mode of every module when the block ends."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps` -> a device of this machine.

    Of several processes on a machine each has a GPU of its own.

    Raises:
        UsageError: the device is not on this machine, or `name` is none of these.
    """
    if launcher.count() > 1 and name != "cpu":
        return _device_of_process(name)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not (kind == "cuda" and index.isdigit())):
        raise UsageError(f"device {name!r} is none of auto, cpu, cuda, cuda:N, mps")
    available = {
        "cpu": True,
        "cuda": torch.cuda.device_count() > int(index or 0),
        "mps": torch.backends.mps.is_available(),
    }
    if not available[kind]:
        there = (
            f"cuda:0 to cuda:{torch.cuda.device_count() - 1}"
            if torch.cuda.is_available()
            else ("cpu" + (", mps" if torch.backends.mps.is_available() else ""))
        )
        raise UsageError(f"device {name!r} is not on this machine; there is {there} (or use auto)")
    return torch.device("cuda", int(index or 0)) if kind == "cuda" else torch.device(kind)


def _device_of_process(name: str) -> torch.device:
    """`auto` or `cuda` for one of several processes: the GPU of its number, or the processor."""
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if name not in ("auto", "cuda"):
        raise UsageError(
            f"device {name!r} is for one process, and there are {launcher.count()}: use auto, cuda "
            "or cpu"
        )
    index, there = launcher.local_index(), torch.cuda.device_count()
    if index >= there:
        raise UsageError(
            f"{index + 1} processes or more on a machine with {there} GPUs: start one for each "
            "GPU, or set --device cpu"
        )
    return torch.device("cuda", index)


def machine(device: torch.device, precision: str) -> dict[str, Any]:
    """What the last digits of a run depend on, for its record.

    Args:
        device: the run's.
        precision: accelerate's name of it.
    """
    name = device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "cpu":
        name = f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    precision = "fp32" if precision == "no" else precision
    return {
        "device": name,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "processes": launcher.count(),
    }


def take_threads(recorded: Any) -> str | None:
    """Set the number of threads to that of the start of a run: the order of sums depends on it.

    Nothing changes on a machine with fewer processors.

    Args:
        recorded: the number in the run's record.

    Returns:
        A message; None where nothing changes.
    """
    here = torch.get_num_threads()
    if not isinstance(recorded, int) or not 0 < recorded <= (os.cpu_count() or 1):
        return None
    if recorded == here:
        return None
    torch.set_num_threads(recorded)
    threads = "1 thread" if recorded == 1 else f"{recorded} threads"
    return f"computing with {threads}, as the run was started, not with {here}"


def mixed_precision(name: str | bool, device: torch.device) -> str:
    """`auto`, `fp32`, `bf16` or `fp16` -> accelerate's name, which is also accepted.

    `auto` is bfloat16 if the hardware of `device` supports it, else float32. Trainable weights
    are always float32.

    Raises:
        UsageError: there is no such precision, or float16 is asked for without a CUDA GPU.
    """
    if name == "auto":
        return "bf16" if computes_bfloat16(device) else "no"
    if name == "fp16" and device.type != "cuda":
        raise UsageError(f"precision fp16 needs a CUDA GPU, not {device.type}: use bf16 or fp32")
    known = {"fp32": "no", "no": "no", False: "no", "bf16": "bf16", "fp16": "fp16", "fp8": "fp8"}
    if not isinstance(name, (str, bool)) or name not in known:  # False is how YAML reads a bare no
        raise UsageError(f"precision {name!r} is none of auto, fp32, bf16, fp16")
    return known[name]


def computes_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(bool(getattr(torch.cpu, probe, bool)()) for probe in probes)
    return False


def accelerator_settings(device: torch.device) -> dict[str, Any]:
    """Keyword arguments that make `accelerate.Accelerator` use `device`."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return {"cpu": True} if device.type == "cpu" else {}
