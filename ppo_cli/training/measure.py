"""A few small steps and evaluations of a run, measured: time, memory. The run stays as it was."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from ppo_cli.config.schema import RunConfig
from ppo_cli.evaluation.draw_samples import BATCH_SIZE as EVALUATED_AT_ONCE
from ppo_cli.training.run import Training
from ppo_cli.utils import memory
from ppo_cli.utils.random_state import random_state, set_random_state

STEP_BUDGET = 12.0  # seconds for the largest measured step
EVALUATION_BUDGET = 5.0  # seconds for the largest measured evaluation
FIRST = 4  # samples of the smallest mini-batch
FIRST_PROMPTS = 8  # of the smallest evaluation
SAFE_SHARE = 0.8  # of the available memory, which a measured step may take


@dataclass(frozen=True)
class Shape:
    """Sizes of a step: samples of a mini-batch, mini-batches, and mini-batches of an update."""

    mini: int
    minis: int
    accumulated: int

    @classmethod
    def of(cls, config: RunConfig) -> Shape:
        """The shape of the run's steps."""
        ppo = config.ppo
        minis = ppo.batch_size // ppo.mini_batch_size
        return cls(ppo.mini_batch_size, minis, ppo.gradient_accumulation_steps)

    @property
    def samples(self) -> int:
        """Samples of the batch."""
        return self.mini * self.minis


@dataclass(frozen=True)
class MeasuredStep:
    """One measured step.

    Attributes:
        shape: its sizes.
        chunk: sequences in a call of sampling.
        sampling: seconds of a call of sampling.
        updating: seconds of a mini-batch, in all epochs.
        rest: seconds of everything else.
        peak_sampling, peak_updating: bytes in use at most, until the scores are known and after.
    """

    shape: Shape
    chunk: int
    sampling: float
    updating: float
    rest: float
    peak_sampling: int
    peak_updating: int

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        calls = -(-self.shape.samples // self.chunk)
        return self.sampling * calls + self.updating * self.shape.minis + self.rest


@dataclass(frozen=True)
class MeasuredEvaluation:
    """One measured evaluation of the policy: prompts, seconds, and bytes in use at most."""

    prompts: int
    seconds: float
    peak: int


def at_size(points: Sequence[tuple[float, float]], size: float, start: float = 0.0) -> float:
    """The value at `size` on a line through the first and the last point; it never falls.

    Args:
        points: sizes, rising, and the values measured there.
        size: for which the value is wanted.
        start: the value at size 0, used where only one size was measured.
    """
    (first, low), (last, high) = points[0], points[-1]
    if first == last:
        first, low = 0.0, start
    return high + max((high - low) / (last - first), 0.0) * (size - last)


@contextmanager
def unchanged(training: Training) -> Iterator[None]:
    """Measure in the block: weights do not move, no tracker is written to, state is restored."""
    trainer = training.trainer
    state, numbers = copy.deepcopy(trainer.state_dict()), random_state()
    config = trainer.config
    trainer.config = dataclasses.replace(config, log_with=None, push_to_hub_if_best_kwargs={})
    try:
        yield
    finally:
        trainer.config = config
        trainer.load_state_dict(state)
        trainer.optimizer.zero_grad(set_to_none=True)
        set_random_state(numbers)


def measure_steps(training: Training) -> list[MeasuredStep]:
    """Make a small step and one as large as time and memory allow, up to a step of the run.

    To be called in `unchanged`.

    Raises:
        DivergenceError: a step failed.
    """
    full = Shape.of(training.config)
    sizes = shapes(training.config)
    if len(sizes) == 1:
        _step(training, full)  # the first has costs of its own: memory, kernels
        return [_step(training, full)]
    small = sizes[0]
    first = _step(training, small)
    if first.seconds > STEP_BUDGET:
        return [first]
    first = _step(training, small)
    device = training.trainer.accelerator.device
    spare = memory.available(device) * SAFE_SHARE - memory.used(device)
    per_sample = max(first.peak_updating - memory.used(device), 1) / small.mini
    possible = [shape for shape in sizes[1:] if per_sample * shape.mini <= spare]
    seconds = first.seconds / small.samples
    # Twice the small size at least: from two that are close the fixed part cannot be told.
    larger = [
        shape
        for shape in possible
        if seconds * shape.samples <= STEP_BUDGET or shape.mini == 2 * small.mini
    ]
    return [first, _step(training, larger[-1])] if larger else [first]


def shapes(config: RunConfig) -> list[Shape]:
    """Shapes of steps that can stand for those of the run, from the smallest to the run's own.

    Where the run has several mini-batches, they have two: what one of them costs can be told then
    from what a batch costs.
    """
    full, per_query = Shape.of(config), config.ppo.responses_per_query
    minis = min(full.minis, 2)
    accumulated = min(full.accumulated, minis)
    sizes = range(min(FIRST, full.mini), full.mini + 1)
    found = [Shape(mini, minis, accumulated) for mini in sizes if mini * minis % per_query == 0]
    return found if found and found[-1] == full else [*found, full]


def measure_evaluation(training: Training) -> list[MeasuredEvaluation]:
    """Evaluate the policy on few held-out prompts; on all, or as many at once, if time allows."""
    total = len(training.prompts.held_out)
    first = _evaluation(training, min(FIRST_PROMPTS, total))
    affordable = int(EVALUATION_BUDGET / first.seconds * first.prompts)
    larger = total if affordable >= total else min(affordable, EVALUATED_AT_ONCE)
    return [first, _evaluation(training, larger)] if larger > first.prompts else [first]


def _step(training: Training, shape: Shape) -> MeasuredStep:
    """Make one step of `shape`, with learning rate zero."""
    trainer, config = training.trainer, training.config
    sizes: dict[str, Any] = {
        "batch_size": shape.samples,
        "mini_batch_size": shape.mini,
        "gradient_accumulation_steps": shape.accumulated,
    }
    trainer.config = dataclasses.replace(trainer.config, **sizes)
    small = config.model_copy(update={"ppo": dataclasses.replace(config.ppo, **sizes)})
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    step = training.ppo_step.resized(small, _even_lengths(config, shape.samples))
    watch = memory.MemoryWatch(trainer.accelerator.device)
    with watch.watching():
        started = time.perf_counter()
        numbers = step.run(0).statistics
        seconds = time.perf_counter() - started
    chunk = min(config.rollout.batch_size or shape.samples, shape.samples)
    scored = started + numbers["time/sampling"] + numbers["time/scoring"]
    updating = numbers["time/ppo/optimize_step"] + numbers["time/ppo/calc_stats"]
    peak_sampling, peak_updating = watch.peaks_around(scored)
    return MeasuredStep(
        shape=shape,
        chunk=chunk,
        sampling=numbers["time/sampling"] / -(-shape.samples // chunk),
        updating=updating / shape.minis,
        rest=seconds - numbers["time/sampling"] - updating,
        peak_sampling=peak_sampling,
        peak_updating=peak_updating,
    )


def _even_lengths(config: RunConfig, samples: int) -> Any:
    """Limits of responses spread evenly over their range: few samples have the mean of many."""
    low, high = config.rollout.output_min_length, config.rollout.output_max_length
    numbers = count()
    return lambda: low + (next(numbers) % samples * 2 + 1) * (high - low) // (2 * samples)


def _evaluation(training: Training, prompts: int) -> MeasuredEvaluation:
    watch = memory.MemoryWatch(training.trainer.accelerator.device)
    with watch.watching():
        started = time.perf_counter()
        training.held_out.of_policy(training.config.run.seed, prompts)
        seconds = time.perf_counter() - started
    return MeasuredEvaluation(prompts, seconds, watch.peak)
