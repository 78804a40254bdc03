"""What a sweep will take: one run's estimate, by `train --dry-run`, times their number."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from ppo_cli.config.sweep_loading import SweepSettings
from ppo_cli.errors import PPOCliError
from ppo_cli.sweep.directory import SweepDirectory
from ppo_cli.sweep.run import COMMAND, surroundings


def estimate_run(
    settings: SweepSettings, jobs: int, command: Sequence[str] = COMMAND
) -> Mapping[str, Any]:
    """What one run takes with the settings that all share, measured with a trial's share of cores.

    Raises:
        PPOCliError: `train --dry-run` fails; with its message and exit code.
    """
    folder = SweepDirectory(settings.output).trial(0)
    arguments = [
        *command, "train", "--config", settings.config,
        *(part for text in settings.assignments for part in ("--set", text)),
        "--output", str(folder), "--dry-run", "--json",
    ]  # fmt: skip
    done = subprocess.run(
        arguments,
        env=surroundings(jobs, settings.base.run.device)[0],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        start = next((i for i, x in enumerate(lines) if x.startswith("error: ")), 0)
        message = "\n".join(line.removeprefix("error: ").strip() for line in lines[start:])
        error = PPOCliError(f"a run of the sweep is not possible: {message}")
        error.exit_code = done.returncode
        raise error
    found: Mapping[str, Any] = json.loads(done.stdout)
    return found
