"""Which settings make a run fit into memory."""

from __future__ import annotations

from collections.abc import Sequence

from ppo_cli.config.schema import RunConfig
from ppo_cli.reporting.estimate import Space, size
from ppo_cli.training.measure import MeasuredStep, at_size


def remedies(
    config: RunConfig, steps: Sequence[MeasuredStep], space: Space, resident: float
) -> list[str]:
    """Settings that make a run fit, the best first; at least one.

    Args:
        config: the run's settings.
        steps: measured ones; none where not even the smallest fits.
        space: of memory: what the run needs, and what there is.
        resident: bytes that are in use between two steps.
    """
    found = []
    if steps and resident < space.available:
        found += _smaller_sampling(config, steps, space, resident)
        found += _smaller_updates(config, steps, space, resident)
        if found and not config.ppo.gradient_checkpointing:
            found.append("ppo.gradient_checkpointing=true keeps fewer activations, for more time")
    if config.policy.adapter is None:
        found.append(
            "policy.adapter={} trains a low-rank adapter: no second model as the reference, and "
            "hardly any gradients and moments"
        )
    if config.policy.num_shared_layers is None and config.policy.adapter is None:
        found.append("policy.num_shared_layers=N freezes the N lower layers and shares them")
    return [*found, "a smaller policy.model, or a machine with more memory"]


def _smaller_updates(
    config: RunConfig, steps: Sequence[MeasuredStep], space: Space, resident: float
) -> list[str]:
    """The largest mini-batch that fits, with as many accumulated as leave the result the same."""
    mini, accumulated = config.ppo.mini_batch_size, config.ppo.gradient_accumulation_steps
    points = [(step.shape.mini, step.peak_updating) for step in steps]
    if at_size(points, mini, resident) <= space.available:
        return []
    for parts in range(2, mini + 1):
        if mini % parts:
            continue
        needed = at_size(points, mini // parts, resident)
        if needed <= space.available:
            return [
                f"ppo.mini_batch_size={mini // parts} with "
                f"ppo.gradient_accumulation_steps={accumulated * parts} takes about "
                f"{size(needed)} and leaves the result the same"
            ]
    return []


def _smaller_sampling(
    config: RunConfig, steps: Sequence[MeasuredStep], space: Space, resident: float
) -> list[str]:
    """The largest power of two of sequences at once that fits, where sampling is what does not."""
    points = [(step.chunk, step.peak_sampling) for step in steps]
    at_once = config.rollout.batch_size or config.ppo.batch_size

    def needed(sequences: int) -> float:
        return at_size(points, sequences, resident)

    if needed(at_once) <= space.available:
        return []
    fitting = [2**i for i in range(at_once.bit_length()) if needed(2**i) <= space.available]
    if not fitting:
        return []
    return [f"rollout.batch_size={fitting[-1]} takes about {size(needed(fitting[-1]))} in sampling"]
