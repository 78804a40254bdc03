"""What a run will take, from a few measured steps.

A step costs: sampling (one call for each `rollout.batch_size` sequences), updates (one pass over
each mini-batch in each epoch), and the rest, which grows with the batch. Each has a fixed part, so
each is measured in two sizes, and a line through both gives the size that the run has.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ppo_cli.config.schema import RunConfig
from ppo_cli.evaluation.draw_samples import BATCH_SIZE as EVALUATED_AT_ONCE
from ppo_cli.reporting.estimate import Estimate, Space, Times
from ppo_cli.training.measure import (
    MeasuredEvaluation,
    MeasuredStep,
    Shape,
    at_size,
    measure_evaluation,
    measure_steps,
    unchanged,
)
from ppo_cli.training.remedies import remedies
from ppo_cli.training.run import Training
from ppo_cli.utils import memory

WRITE_RATE = 400e6  # bytes per second of files with checksum and sync: an assumption
NOT_MEASURED = "nothing: only steps and sizes are known"
ROUGH = "; rough, at most: the fixed part of a step is counted for each sample"
NO_ROOM = "nothing: the weights' gradients and Adam's moments alone do not fit"


@dataclass(frozen=True)
class ModelBytes:
    """Bytes of the policy's weights, and of those that train."""

    weights: int
    trainable: int

    @classmethod
    def of(cls, training: Training) -> ModelBytes:
        """Count the parameters of a run's policy."""
        policy = training.trainer.accelerator.unwrap_model(training.trainer.model)
        parameters = list(policy.parameters())
        trainable = [p for p in parameters if p.requires_grad]
        return cls(sum(p.nbytes for p in parameters), sum(p.nbytes for p in trainable))

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint: the trained weights and Adam's two moments."""
        return 3 * self.trainable


def estimate(training: Training, startup: float, *, measure: bool = True) -> Estimate:
    """Estimate time, memory and disk of the rest of a run that is ready to start.

    Args:
        training: the run; it is left as it was, and nothing is written.
        startup: seconds that building it took.
        measure: take a few small steps and evaluations; without them time and memory are unknown.

    Raises:
        DivergenceError: a measured step failed.
    """
    config, sizes = training.config, ModelBytes.of(training)
    left = config.run.steps - training.step
    saves = checkpoint_count(config, training.step)
    kept = min(config.run.keep + 2, saves)  # with the best, and the one that is being written
    needed = kept * sizes.checkpoint + 2 * sizes.weights
    found = Estimate(
        samples=left * config.ppo.batch_size,
        steps=left,
        times=None,
        spaces=[Space("disk", needed, _free_disk(config.output))],
        measured=NOT_MEASURED,
        remedies=[],
    )
    if not measure or left < 1:
        return found
    device = training.trainer.accelerator.device
    kind = "GPU memory" if device.type == "cuda" else "memory"
    available, before = memory.available(device), memory.peak_so_far(device)
    # A resumed run has Adam's moments already.
    least = memory.used(device) + (1 if training.step else 3) * sizes.trainable
    if least > available:
        space = Space(kind, least, available)
        advice = remedies(config, [], space, least)
        return replace(found, spaces=[space, *found.spaces], measured=NO_ROOM, remedies=advice)
    with unchanged(training):
        steps = measure_steps(training)
        evaluations = measure_evaluation(training)
        resident = memory.used(device)
    # At the end, transformers loads the saved model once more, in the computer's memory.
    at_end = resident + (0 if device.type == "cuda" else sizes.weights)
    in_steps = step_peaks(steps, config, resident)
    peaks = [before, at_end, *in_steps, *(evaluation.peak for evaluation in evaluations)]
    space = Space(kind, int(max(peaks)), available)
    times = Times(
        startup=startup,
        step=step_seconds(steps, config),
        steps=left,
        evaluation=evaluation_seconds(evaluations, len(training.prompts.held_out)),
        evaluations=evaluation_count(config, training.step),
        saving=(saves * sizes.checkpoint + 3 * sizes.weights) / WRITE_RATE,
    )
    advice = [] if space.fits else remedies(config, steps, space, resident)
    is_rough = len(steps) == 1 and steps[0].shape != Shape.of(config)
    sizes_measured = (
        f"steps of {_listed([step.shape.samples for step in steps])} samples, evaluations of "
        f"{_listed([evaluation.prompts for evaluation in evaluations])} prompts"
    )
    return replace(
        found,
        times=times,
        spaces=[space, *found.spaces],
        measured=sizes_measured + ROUGH * is_rough,
        remedies=advice,
    )


def step_seconds(steps: Sequence[MeasuredStep], config: RunConfig) -> float:
    """Seconds of a step of the run."""
    full = Shape.of(config)
    if steps[-1].shape == full:
        return steps[-1].seconds
    chunk = min(config.rollout.batch_size or full.samples, full.samples)
    sampling = at_size([(step.chunk, step.sampling) for step in steps], chunk)
    updating = at_size([(step.shape.mini, step.updating) for step in steps], full.mini)
    rest = at_size([(step.shape.samples, step.rest) for step in steps], full.samples)
    return sampling * -(-full.samples // chunk) + updating * full.minis + rest


def step_peaks(
    steps: Sequence[MeasuredStep], config: RunConfig, resident: float
) -> tuple[float, float]:
    """Bytes in use at most in a step of the run: while it samples and scores, and afterwards.

    Args:
        steps: measured ones.
        config: the run's settings.
        resident: bytes in use between two steps.
    """
    full = Shape.of(config)
    chunk = min(config.rollout.batch_size or full.samples, full.samples)
    sampling = at_size([(s.chunk, s.peak_sampling) for s in steps], chunk, resident)
    updating = at_size([(s.shape.mini, s.peak_updating) for s in steps], full.mini, resident)
    return sampling, updating


def evaluation_seconds(evaluations: Sequence[MeasuredEvaluation], prompts: int) -> float:
    """Seconds of an evaluation on all held-out prompts, which are sampled some at a time."""
    if evaluations[-1].prompts == prompts:
        return evaluations[-1].seconds
    at_once = min(prompts, EVALUATED_AT_ONCE)
    return at_size([(e.prompts, e.seconds) for e in evaluations], at_once) * prompts / at_once


def evaluation_count(config: RunConfig, done: int) -> int:
    """Evaluations that are left: the reference's, those after steps, two or three at the end."""
    every, steps = config.run.eval_every, config.run.steps
    between = steps // every - done // every if every else 0
    at_the_end = 2 if every and steps % every == 0 else 3
    of_best = max(config.run.best_of_n or [0])  # responses of the reference to each prompt
    return 1 + between + at_the_end + of_best


def checkpoint_count(config: RunConfig, done: int) -> int:
    """Checkpoints that are left at most: every evaluation may be the best so far."""
    run = config.run
    intervals = [every for every in (run.checkpoint_every, run.eval_every) if every]
    at = {step for every in intervals for step in range(0, run.steps + 1, every)}
    return len([step for step in at | {0, run.steps} if step > done or step == 0 == done])


def _listed(sizes: Sequence[int]) -> str:
    return " and ".join(map(str, sizes))


def _free_disk(folder: Path) -> int:
    there = (place for place in (folder, *folder.absolute().parents) if os.path.isdir(place))
    return shutil.disk_usage(next(there)).free
