"""CPU time of a training batch by one and by several processes: what sharing it costs.

    python tests/benchmarks/processes.py [--processes 2] [--models embedded,small,gpt2] [--profile]

Efficiency is the CPU time of one process over the sum of those of several, each on one thread. A
process with fewer rows takes more time a row, whether it shares them or not: so the script also
prints the efficiency that as many processes would have which share nothing.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ppo_cli.config.loading import load_config
from ppo_cli.models.loading import load_tokenizer
from ppo_cli.training.build import build_training
from ppo_cli.utils import processes
from tests.world import in_world

GOAL = 0.85


class Model(NamedTuple):
    """Sizes of a GPT-2 with random weights, and of its batches; no sizes: the embedded model."""

    sizes: dict[str, int]
    batch: int
    steps: int


MODELS = {
    "embedded": Model({}, 64, 8),
    "small": Model({"n_layer": 4, "n_head": 4, "n_embd": 128}, 64, 6),
    "gpt2": Model({"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257}, 8, 1),
}


def batch_seconds(
    model: str, folder: str, batch: int, steps: int, profile: bool, alone: bool
) -> float:
    """Median CPU seconds of a batch in this process: sampling, scoring, two epochs."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if alone:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            del os.environ[name]
    processes.start(600)
    settings = [
        "run.device=cpu", "policy.precision=fp32", f"ppo.batch_size={batch}",
        f"ppo.mini_batch_size={batch // 2}", "ppo.ppo_epochs=2", "rollout.output_min_length=24",
        "rollout.output_max_length=32", "run.kl_limit=null", "run.collapse_limit=null",
    ]  # fmt: skip
    overrides = {("policy", "model"): model, ("run", "output"): folder}
    training = build_training(load_config("tiny", assignments=settings, overrides=overrides))
    profiler, seconds = cProfile.Profile(), []
    for step in range(steps + 1):
        began = time.process_time()
        if profile and step and processes.is_main():
            profiler.enable()
        training.ppo_step.run(step)
        profiler.disable()
        seconds.append(time.process_time() - began)
    if profile and processes.is_main():
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(
            "processes.py|distributed|method 'wait'|_backward"
        )
    return median(seconds[1:])


def make_model(sizes: dict[str, int], folder: str) -> str:
    """A GPT-2 with random weights, saved with the embedded model's tokenizer; its folder."""
    tokenizer = load_tokenizer("embedded")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(**{"vocab_size": len(tokenizer), **sizes, **ends}, n_positions=256)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> int:
    """Measure and print; 1 where an efficiency is below the goal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    efficiencies = []
    for name in options.models.split(","):
        sizes, batch, steps = MODELS[name]
        with tempfile.TemporaryDirectory() as folder:
            model = make_model(sizes, f"{folder}/model") if sizes else "embedded"
            several = options.processes

            def cpu(count: int, rows: int, profile: bool = False, alone: bool = False) -> float:
                arguments = (model, f"{folder}/run", rows, steps, profile, alone)  # noqa: B023
                return sum(in_world(batch_seconds, *arguments, processes=count, seconds=3600))

            one = cpu(1, batch)
            sharing = cpu(several, batch, options.profile)
            apart = cpu(several, batch // several, alone=True)
        efficiencies.append(one / sharing)
        print(
            f"{name:10} batch of {batch}: {one:.3f} s of CPU by one process, {sharing:.3f} by "
            f"{several} (efficiency {one / sharing:.2f}), {apart:.3f} by {several} that share "
            f"nothing ({one / apart:.2f})",
            flush=True,
        )
    return int(min(efficiencies) < GOAL)


if __name__ == "__main__":
    sys.exit(main())
