"""What counts as a step gone wrong: numbers, texts and scores that training cannot go on from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ppo_cli.errors import DivergenceError, ModelError, NumericalError, is_out_of_memory

TOO_FAR = "lower ppo.learning_rate or set ppo.max_grad_norm"
TOO_LOOSE = "raise ppo.init_kl_coef or lower ppo.learning_rate"
SMALL_BATCH = 8
"""Fewer responses than these may be alike by chance."""
# This one divides by a variance that may be tiny.
UNWATCHED = "ppo/val/var_explained"


def check_texts(responses: Sequence[str], limit: float | None) -> None:
    """Raise `DivergenceError` where the share of responses that are alike reaches `limit`."""
    if limit is None or len(responses) < SMALL_BATCH:
        return
    text, count = Counter(responses).most_common(1)[0]
    if count / len(responses) >= limit:
        raise DivergenceError(
            f"{count} of {len(responses)} responses are {text[:40]!r}: the text has collapsed. "
            f"Likely remedy: {TOO_LOOSE} (run.collapse_limit is {limit:g})"
        )


def check_numbers(numbers: Mapping[str, float], kl_limit: float | None) -> None:
    """Raise `DivergenceError` where a statistic is not finite, or KL reaches `kl_limit`."""
    for key, value in numbers.items():
        if key != UNWATCHED and not math.isfinite(value):
            raise NumericalError(f"{key} is {value}, not finite. Likely remedy: {TOO_FAR}")
    kl = numbers["objective/kl"]
    if kl_limit is not None and abs(kl) >= kl_limit:
        raise DivergenceError(
            f"objective/kl is {kl:.4g}, over run.kl_limit ({kl_limit:g}): the policy runs away "
            f"from its reference. Likely remedy: {TOO_LOOSE}"
        )


def check_weights(model: torch.nn.Module) -> None:
    """Raise `NumericalError` where a trainable weight is not finite: its gradient was not."""
    weights = [p.detach() for p in model.parameters() if p.requires_grad]
    norm = torch.nn.utils.get_total_norm(weights).item()
    if not math.isfinite(norm):
        raise NumericalError(
            f"the norm of the weights is {norm}: a gradient was not finite. Likely remedy: "
            f"{TOO_FAR}"
        )


@contextmanager
def classifier_faults(name: str) -> Iterator[None]:
    """Make a `DivergenceError` of what the classifier `name` raises, but of lack of memory."""
    try:
        yield
    except ModelError as error:
        raise DivergenceError(str(error)) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:200] or "nothing more"
        raise DivergenceError(
            f"the classifier {name} raised {type(error).__name__} ({said}). Likely remedy: another "
            "reward.model"
        ) from error
