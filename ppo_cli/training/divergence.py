"""Divergence: statistics, responses and scores from which training cannot go on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ppo_cli.config.schema import RunConfig
from ppo_cli.errors import (
    DivergenceError,
    ModelError,
    NumericalError,
    UsageError,
    is_lost_process,
    is_out_of_memory,
)
from ppo_cli.models.sharding import local_part
from ppo_cli.training.diagnostics import stronger_kl_penalty
from ppo_cli.utils import processes

MIN_RESPONSES = 8  # fewer responses may be alike by chance
UNWATCHED = "ppo/val/var_explained"  # divides by a variance that may be tiny


def check_texts(responses: Sequence[str], config: RunConfig) -> None:
    """Raise `DivergenceError` where the share of equal responses reaches `run.collapse_limit`."""
    limit = config.run.collapse_limit
    if limit is None or len(responses) < MIN_RESPONSES:
        return
    text, count = Counter(responses).most_common(1)[0]
    if count / len(responses) >= limit:
        raise DivergenceError(
            f"{count} of {len(responses)} responses are {text[:40]!r}: the text has collapsed. "
            f"Likely remedy: {stronger_kl_penalty(config)} (run.collapse_limit is {limit:g})"
        )


def check_numbers(numbers: Mapping[str, float], config: RunConfig) -> None:
    """Raise `DivergenceError` where a statistic is not finite or KL reaches `run.kl_limit`."""
    limit = config.run.kl_limit
    for key, value in numbers.items():
        if key != UNWATCHED and not math.isfinite(value):
            raise NumericalError(
                f"{key} is {value}, not finite. Likely remedy: {_smaller_steps(config)}"
            )
    kl = numbers["objective/kl"]
    if limit is not None and abs(kl) >= limit:
        raise DivergenceError(
            f"objective/kl is {kl:.4g}, over run.kl_limit ({limit:g}): the policy moves too far "
            f"from its reference. Likely remedy: {stronger_kl_penalty(config)}"
        )


def check_weights(model: torch.nn.Module, config: RunConfig) -> None:
    """Raise `NumericalError` where a trainable weight is not finite."""
    weights = [p.detach() for p in model.parameters() if p.requires_grad]
    # Of a sharded model the norm is a part of the whole on each process.
    norm = float(processes.total(torch.nn.utils.get_total_norm(list(map(local_part, weights)))))
    if not math.isfinite(norm):
        raise NumericalError(
            f"the norm of the weights is {norm}: a gradient was not finite. Likely remedy: "
            f"{_smaller_steps(config)}"
        )


def _smaller_steps(config: RunConfig) -> str:
    """The remedy for numbers that are not finite."""
    first = f"ppo.learning_rate ({config.ppo.learning_rate:g})"
    if config.step_size != first:  # an adaptive rate may have started too high
        return f"lower {first} and {config.step_size}, or set ppo.max_grad_norm"
    return f"lower {first} or set ppo.max_grad_norm"


@contextmanager
def classifier_faults(name: str) -> Iterator[None]:
    """Turn errors of the reward into `DivergenceError`, lack of memory and of processes excepted.

    Args:
        name: of the classifier; functions and endpoints raise errors that name them.
    """
    try:
        yield
    except (ModelError, UsageError) as error:
        raise DivergenceError(str(error)) from error
    except Exception as error:
        if is_out_of_memory(error) or (processes.count() > 1 and is_lost_process(error)):
            raise
        message = " ".join(str(error).split())[:200] or "no message"
        raise DivergenceError(
            f"the classifier {name} raised {type(error).__name__} ({message}). Likely remedy: "
            "another reward.model"
        ) from error
