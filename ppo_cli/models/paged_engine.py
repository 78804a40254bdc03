"""Sampling by transformers' continuous batching, which keeps keys and values in pages."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

from ppo_cli.errors import ModelError, UsageError, is_out_of_memory
from ppo_cli.kernels.patches import fast_layers
from ppo_cli.models.capabilities import REFUSALS
from ppo_cli.models.decode_loop import not_finite
from ppo_cli.models.engine import EngineSamples, check_options
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.models.transformers_generate import PURE_SAMPLING
from ppo_cli.utils import processes
from ppo_cli.utils.device import modes_kept
from ppo_cli.utils.text import shortened

PAGE = 16  # tokens; responses are short, and a page belongs to one sequence
MIN_PAGE = 4  # transformers' own limit
READ_AT_ONCE = 1024  # tokens of queries in one forward pass, at most
WAIT = 1.0  # seconds after which a dead thread is noticed
OURS = ("return_logprobs", "seed", "max_requests_per_batch", "auto_switch_to_flash",
        "drop_unsupported_processors", "per_request_processors", "max_queue_size",
        "use_default_compile_configs", "max_cached_graphs", "block_size")  # fmt: skip
"""Settings of `ContinuousBatchingConfig` that are set here, or that it no longer reads."""
FIELDS = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
LOGGER = "ContinuousBatchingLogger"


class PagedEngine:
    """Samples from the policy itself: no weights are copied, an adapter is in place.

    Each call of `sample` has pages of its own, so that nothing of earlier weights is left in them
    and the update has the memory.

    Args:
        policy: gives the policy inside a block in which random numbers are the trainer's.
        rows: sequences in a forward pass at most; None for all.
        options: further settings of `ContinuousBatchingConfig`.

    Raises:
        UsageError: there is no such setting, or it cannot have this value.
    """

    def __init__(
        self,
        policy: Callable[[], AbstractContextManager[Any]],
        rows: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._policy = policy
        self._rows = rows
        self._options = dict(options or {})
        check_options(self._options, FIELDS - {*OURS}, "ContinuousBatchingConfig")
        self._page = self._options.get("page_size", PAGE)
        if type(self._page) is not int or self._page < MIN_PAGE:
            raise UsageError(
                f"rollout.engine_kwargs: page_size ({shortened(str(self._page), 40)}) must be a "
                f"whole number of tokens, {MIN_PAGE} at least"
            )

    def refresh(self) -> None:
        """Do nothing: it is the policy's own weights that are read."""

    def sample(
        self,
        queries: Sequence[Tensor],
        limits: Sequence[int],
        params: SamplingParams,
        uniforms: Tensor | None = None,
    ) -> EngineSamples:
        """Draw a response to each query, see `SamplingEngine`."""
        with self._policy() as policy, modes_kept(policy), fast_layers(), _quiet():
            whole = policy.pretrained_model
            model = whole.get_base_model() if policy.is_peft_model else whole
            try:
                manager = self._manager(model, queries, limits, params)
                outputs = _outputs(manager, queries, limits, params)
            except REFUSALS as error:
                if is_out_of_memory(error):
                    raise
                raise _failed(model, error, self._options) from error
            device = policy.device
        return EngineSamples(
            [torch.tensor(output.generated_tokens, device=device) for output in outputs],
            [torch.tensor(output.logprobs, dtype=torch.float32) for output in outputs],
        )

    def _manager(
        self,
        model: Any,
        queries: Sequence[Tensor],
        limits: Sequence[int],
        params: SamplingParams,
    ) -> Any:
        """A manager with as many pages as the longest rows of one forward pass need."""
        rows = min(self._rows or len(queries), len(queries))
        lengths = [len(query) + limit for query, limit in zip(queries, limits, strict=True)]
        pages = sorted(length // self._page + 1 for length in lengths)
        settings: dict[str, Any] = {
            "page_size": self._page,
            "num_blocks": sum(pages[-rows:]),
            "max_batch_tokens": max(rows, min(sum(map(len, queries)), READ_AT_ONCE)),
            "safety_margin": 0.0,  # there are pages for all rows
        }
        if "auto_switch_to_flash" in FIELDS:  # not in transformers 5.18, which does what it can
            settings["auto_switch_to_flash"] = False  # it may fetch kernels, which are code
        drawing = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p")}
        return model.init_continuous_batching(
            generation_config=GenerationConfig(
                **PURE_SAMPLING | drawing, eos_token_id=_ends(params), max_new_tokens=max(limits)
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                **settings | self._options,
                max_requests_per_batch=rows,
                return_logprobs=True,
                # Processes draw the same number, and need different ones.
                seed=int(torch.randint(2**31, ())) + processes.index(),
                drop_unsupported_processors=False,
            ),
        )


def _outputs(
    manager: Any, queries: Sequence[Tensor], limits: Sequence[int], params: SamplingParams
) -> list[Any]:
    """The result of each query.

    All are there before the thread begins, so that the rows of its forward passes, and with them
    the random numbers of each, are the same in every run.
    """
    names = [
        manager.add_request(
            query.tolist(), request_id=str(i), max_new_tokens=limit, eos_token_id=_ends(params)
        )
        for i, (query, limit) in enumerate(zip(queries, limits, strict=True))
    ]
    results: dict[str, Any] = {}
    with _no_collections():
        manager.start()
        try:
            while len(results) < len(names):
                result = manager.get_result(timeout=WAIT)
                if result is None and not manager.is_running():
                    raise RuntimeError("its thread ended before all responses were there")
                if result is not None and result.error is not None:
                    raise RuntimeError(result.error)
                if result is not None:
                    results[result.request_id] = result
        finally:
            manager.stop(hard_stop=len(results) < len(names))
            manager.destroy()
    return [results[name] for name in names]


def _ends(params: SamplingParams) -> list[int]:
    return list(params.stop_token_ids) or [-1]  # which is no token


def _failed(model: Any, error: Exception, options: Mapping[str, Any]) -> Exception:
    """The error for what continuous batching raised."""
    if "probability tensor" in str(error):
        return not_finite()
    said = shortened(str(error) or type(error).__name__, 200)
    return ModelError(
        f"transformers' continuous batching cannot sample from a {type(model).__name__} as it is "
        f"set up ({said}): set rollout.engine=transformers"
        + (", or change rollout.engine_kwargs" if options else "")
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """What its thread raises is in the result; without the log of it, and its traceback."""
    logger = logging.getLogger(LOGGER)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _no_collections() -> Iterator[None]:
    """The manager collects garbage when it stops: among what is made in the block alone.

    Otherwise it looks at every object of the process, for most of a second.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
