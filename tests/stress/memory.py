"""Resident memory over a long run on the embedded model: it does not grow after the first steps."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

from ppo_cli.config.loading import load_config
from ppo_cli.training.build import build_training

SETTINGS = [
    "ppo.batch_size=16", "ppo.mini_batch_size=16", "ppo.learning_rate=1e-5", "run.device=cpu",
    "prompts.held_out=8",
]  # fmt: skip


def resident() -> float:
    """MB of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> int:
    """Print the memory every 100 steps; 1 where it grew by more than 1 % between the halves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    seen: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as name:
        places = [f"run.steps={options.steps}", f"run.output={name}/run"]
        training = build_training(load_config("tiny", assignments=[*SETTINGS, *places]))
        for report in training.steps():
            if report.step % 100 == 0:
                seen[report.step] = resident()
                print(f"step {report.step:5}: {seen[report.step]:7.1f} MB", flush=True)
        training.finish()
    sizes = list(seen.values())
    half = len(sizes) // 2
    growth = median(sizes[half:]) / median(sizes[:half]) - 1
    print(f"from the first half's median to the second's: {100 * growth:+.2f} %")
    return growth > 0.01


if __name__ == "__main__":
    sys.exit(main())
