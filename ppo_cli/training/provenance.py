"""Code and machine that make a run: versions of packages, git commit, and how they differ."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("ppo-cli", "torch", "transformers", "accelerate", "trl", "datasets")


def code() -> dict[str, Any]:
    """`versions` and `git_commit` as `run.yaml` records them."""
    return {"versions": _versions(), "git_commit": _git_commit()}


def what_differs(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How code and machine differ from their record: `torch 2.9.0 (now 2.9.1)`.

    Args:
        was, now: `versions`, `git_commit`, `machine` and `kernels`, as `run.yaml` has them. A
            value that one of the two lacks is not compared.
    """
    before, after = flat_record(was), flat_record(now)
    return [
        f"{key} {value} (now {after[key]})"
        for key, value in before.items()
        if key in after and after[key] != value
    ]


def flat_record(record: Mapping[str, Any]) -> dict[str, str]:
    """Versions, machine, git commit and fast paths of a `run.yaml`, by name."""
    values: dict[str, Any] = {}
    for section in ("versions", "machine"):
        if isinstance(found := record.get(section), dict):
            values |= found
    if commit := record.get("git_commit"):
        values["git commit"] = str(commit)[:12]
    if isinstance(paths := record.get("kernels"), dict):
        used = [str(name) for name, state in paths.items() if state == "used"]
        values["fast paths"] = ", ".join(used) or "none"
    return {key: str(value) for key, value in values.items()}


def _versions() -> dict[str, str]:
    """Versions of Python and of the packages that determine a run's numbers."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
