"""Looks at the machine and the installation: what there is, what is missing, what is wrong.

Nothing is fetched and nothing is written; of a token only its presence is read.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from ppo_cli.data.embedded import classifier_folder, policy_folder
from ppo_cli.reporting.estimate import size
from ppo_cli.reporting.machine_report import Feature, MachineReport, Problem
from ppo_cli.utils.hub import first_line

PACKAGE = "ppo-cli"
PURPOSES = {
    "peft": "adapters",
    "wandb": "tracker",
    "tensorboard": "tracker",
}
FOR_DEVELOPERS = {"dev"}
LITTLE_SPACE = 2**30  # bytes; a run of GPT-2 small takes more
SMALLEST_MODEL = 10_000  # bytes; a pointer of Git LFS is smaller


def examine() -> MachineReport:
    """Look at everything."""
    problems: list[Problem] = [*_requirement_problems(), *_model_problems()]
    facts = {
        "versions": _versions(),
        "machine": _machine(problems),
        "hub": _hub(problems),
        "disk": _disk(problems),
    }
    return MachineReport(facts, _features(), problems)


def _versions() -> dict[str, str]:
    names = [requirement.name for requirement in _requirements()]
    found = {"python": f"{platform.python_version()} ({platform.system()} {platform.machine()})"}
    return found | {name: _version(name) or "missing" for name in (PACKAGE, *names)}


def _requirements(extra: str | None = None) -> list[Requirement]:
    """What the installed package needs, or what one of its extras adds."""
    try:
        lines = map(Requirement, requires(PACKAGE) or ())
    except PackageNotFoundError:
        return []  # run from its source without being installed
    chosen = []
    for line in lines:
        of_extra = line.marker is not None and "extra" in str(line.marker)
        applies = line.marker is None or line.marker.evaluate({"extra": extra or ""})
        if applies and of_extra == (extra is not None):
            chosen.append(line)
    return chosen


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _lacking(requirement: Requirement) -> str | None:
    """What is installed instead of a requirement; None where it is met."""
    found = _version(requirement.name)
    if found is None:
        return f"{requirement.name} (not installed)"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{requirement.name} {found} (needed: {requirement.specifier})"
    return None


def _requirement_problems() -> Iterator[Problem]:
    for requirement in _requirements():
        if (lacking := _lacking(requirement)) is not None:
            wanted = f"{requirement.name}{requirement.specifier}"
            yield Problem(f"package {lacking}", f"pip install '{wanted}'")


def _model_problems() -> Iterator[Problem]:
    for folder in (policy_folder(), classifier_folder()):
        weights = Path(folder) / "model.safetensors"
        if not weights.is_file() or weights.stat().st_size < SMALLEST_MODEL:
            yield Problem(
                f"the embedded model {weights} is missing or no model",
                f"install {PACKAGE} again, or run git lfs pull in a clone",
                stops=False,
            )


def _features() -> list[Feature]:
    try:
        extras = metadata(PACKAGE).get_all("Provides-Extra") or []
    except PackageNotFoundError:
        extras = []
    return [
        Feature(extra, PURPOSES.get(extra, "optional"), [*filter(None, map(_lacking, needed))])
        for extra in extras
        if extra not in FOR_DEVELOPERS and (needed := _requirements(extra))
    ]


def _machine(problems: list[Problem]) -> dict[str, Any]:
    """Device, precision and memory; everything that torch knows."""
    try:
        import torch

        from ppo_cli.utils import device as devices
        from ppo_cli.utils import memory
    except Exception as error:  # of any kind: a library of the system may be missing
        remedy = "install torch again, in a build for this machine"
        problems.append(Problem(f"torch cannot be imported ({first_line(error)})", remedy))
        return {"device": None}
    device = devices.resolve_device("auto")
    precision = devices.mixed_precision("auto", device)
    about = devices.machine(device, precision)
    try:
        product = torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
        works = bool((product == 8).all())
    except Exception as error:
        works, about["fault"] = False, first_line(error)
    if not works:
        fault = f"{device} does not compute ({about.pop('fault', 'a product is wrong')})"
        remedy = "install the build of torch for this GPU, or use --device cpu"
        problems.append(Problem(fault, remedy, stops=device.type == "cpu"))
    if device.type == "cpu" and shutil.which("nvidia-smi") and torch.version.cuda is None:
        what = "an NVIDIA driver is here, but this build of torch has no CUDA"
        problems.append(Problem(what, "install torch's CUDA build to use the GPU", stops=False))
    kind = "GPU memory" if device.type == "cuda" else "memory"
    return {
        "device": f"{device.type}: {about['device']}" if device.type == "cuda" else about["device"],
        "precision auto": about["precision"],
        "threads": about["threads"],
        "processors": os.cpu_count(),
        kind: f"{size(memory.available(device))} available",
        "fast paths": os.environ.get("PPO_CLI_KERNELS", "auto"),
    }


def _hub(problems: list[Problem]) -> dict[str, Any]:
    """The hub's cache, and whether there is a token."""
    try:
        from huggingface_hub import constants, get_token, scan_cache_dir
        from huggingface_hub.errors import CacheNotFound
    except ImportError:
        return {}  # a problem of the requirements

    folder = Path(constants.HF_HUB_CACHE)
    try:
        cache = scan_cache_dir(folder)
        count = len(cache.repos)
        kind = "repository" if count == 1 else "repositories"
        held = f"{size(cache.size_on_disk)} in {count} {kind}"
    except CacheNotFound:
        held = "empty"
    except OSError as error:
        held = f"cannot be read: {error.strerror}"
    if not os.access(_nearest(folder), os.W_OK):
        what = f"the cache {folder} cannot be written to, so nothing can be fetched from the hub"
        problems.append(Problem(what, "set HF_HOME to another folder", stops=False))
    source = ", by HF_TOKEN" if os.environ.get("HF_TOKEN") else ""
    return {
        "cache": str(folder),
        "cache holds": held,
        "token": f"set{source}" if get_token() else "not set",
        "offline": constants.HF_HUB_OFFLINE,
    }


def _disk(problems: list[Problem]) -> dict[str, Any]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    if not os.access(here, os.W_OK):
        what = f"{here} cannot be written to, and a run directory is made there by default"
        problems.append(Problem(what, "go elsewhere, or give --output", stops=False))
    if free < LITTLE_SPACE:
        what = f"only {size(free)} are free in {here}"
        problems.append(Problem(what, "free some space", stops=free == 0))
    return {"working folder": str(here), "free there": size(free)}


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())
