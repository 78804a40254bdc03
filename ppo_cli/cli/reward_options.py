"""What the commands say of a reward that runs code or asks a server."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ppo_cli.config.reward import RewardConfig


def reward_lines(reward: RewardConfig | None) -> Iterator[str]:
    """A line for each file whose code runs, and for each server that texts are sent to."""
    from ppo_cli.config.functions import function_file

    functions: dict[str, list[str]] = {}
    for spec in () if reward is None else reward.foreign:
        if spec.startswith(("http://", "https://")):
            yield f"the reward sends texts to {spec}"
        elif path := function_file(spec):
            functions.setdefault(str(path.absolute()), []).append(spec.rpartition(":")[2])
    for file, names in functions.items():
        yield f"the reward runs the code of {file} ({', '.join(names)})"


def consent(reward: RewardConfig) -> str:
    """The options that a later command needs to run the same reward, each after a space."""
    return "".join(f" --reward {shlex.quote(spec)}" for spec in reward.foreign)
