"""Names and packages of the experiment trackers that accelerate knows; no torch."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec

from ppo_cli.errors import MissingPackageError, did_you_mean

PACKAGES = {
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Tracker -> packages, of which one is enough. The extra has the tracker's name."""


def as_names(log_with: str | list[str] | None) -> list[str]:
    """The trackers that a value of `log_with` names, each once."""
    given = [log_with] if isinstance(log_with, str) else log_with or []
    return list(dict.fromkeys(given))


def check_names(log_with: str | list[str] | None) -> str | list[str] | None:
    """`log_with`, if it names trackers; else raises `ValueError`."""
    for name in as_names(log_with):
        if name not in PACKAGES:
            near = did_you_mean(name, PACKAGES) or f" There are {', '.join(PACKAGES)}"
            raise ValueError(f"there is no tracker '{name}'.{near}")
    return log_with


def check_installed(names: Iterable[str]) -> None:
    """Raise `MissingPackageError` where a tracker's package is not installed."""
    for name in names:
        if not any(map(_is_installed, PACKAGES[name])):
            raise MissingPackageError(
                f"the tracker {name} needs a package that is not installed: "
                f"pip install 'ppo-cli[{name}]'"
            )


def _is_installed(package: str) -> bool:
    module = package.removesuffix("-skinny")
    try:  # as accelerate does: a folder of that name, such as wandb makes, is no package
        return find_spec(module) is not None and bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False
