"""The code that makes a run: versions of packages, and the commit of the repository around it."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("ppo-cli", "torch", "transformers", "accelerate", "trl", "datasets")


def code() -> dict[str, Any]:
    """`versions` and `git_commit` as `run.yaml` records them."""
    return {"versions": _versions(), "git_commit": _git_commit()}


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
