"""The sampling engine of a run, and how far its log-probabilities are from the policy's."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from ppo_cli.config.schema import RolloutConfig
from ppo_cli.errors import MissingPackageError, ModelError, UsageError
from ppo_cli.models.engine import EngineSamples, SamplingEngine
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.models.sharding import is_sharded
from ppo_cli.ppo.forward import token_forward
from ppo_cli.ppo.packing import TokenBatch
from ppo_cli.ppo.trainer import PPOTrainer
from ppo_cli.utils import processes
from ppo_cli.utils.device import modes_kept

TRIED_QUERIES = 4
TRIED_TOKENS = 8  # of a response, at most
MAX_GAP_AT_START = 0.2  # nats per token; rounding is far below, another distribution above


class OwnLoop:
    """Samples with `PPOTrainer.generate`, which reads the policy's own weights.

    Args:
        trainer: has the policy.
        rows: sequences in a forward pass at most; None for all.
    """

    def __init__(self, trainer: PPOTrainer, rows: int | None = None) -> None:
        self._trainer = trainer
        self._rows = rows

    def refresh(self) -> None:
        """Do nothing: it is the policy's own weights that are read."""

    def sample(
        self,
        queries: Sequence[Tensor],
        limits: Sequence[int],
        params: SamplingParams,
        uniforms: Tensor | None = None,
    ) -> EngineSamples:
        """Draw a response to each query, see `SamplingEngine`; without log-probabilities."""
        responses = self._trainer.generate(
            list(queries),
            length_sampler=iter(limits).__next__,
            batch_size=self._rows or len(queries),
            return_prompt=False,
            uniforms=uniforms,
            **params.generation_kwargs(),
        )
        if self._trainer.is_encoder_decoder:  # the start token is not sampled
            responses = [response[1:] for response in responses]
        return EngineSamples(responses, None)


def check_engine(config: RolloutConfig) -> None:
    """Raise `MissingPackageError` where the engine's package is not installed."""
    if config.engine != "vllm":
        return
    found = find_spec("vllm")
    if found is None or found.origin is None:  # a folder of that name is no package
        raise MissingPackageError(
            "rollout.engine=vllm needs a package that is not installed: pip install "
            "'ppo-cli[vllm]', or set rollout.engine to transformers or paged"
        )


def make_engine(
    config: RolloutConfig,
    trainer: PPOTrainer,
    queries: Sequence[Tensor],
    *,
    is_trusted: bool = False,
) -> SamplingEngine:
    """The engine that a configuration asks for.

    Args:
        config: its engine, settings and sizes are read.
        trainer: has the policy.
        queries: those to train on; the longest of them counts.
        is_trusted: whether the policy's own code may run.

    Raises:
        UsageError: the engine has no such setting, or cannot follow this policy.
        ModelError: the engine does not start.
    """
    rows, options = config.batch_size, config.engine_kwargs
    if trainer.is_encoder_decoder and config.engine != "transformers":
        raise UsageError(
            f"rollout.engine={config.engine} does not sample from an encoder-decoder: set "
            "rollout.engine to transformers"
        )
    if config.engine == "paged":
        from ppo_cli.models.paged_engine import PagedEngine

        return PagedEngine(trainer.sampling_from, rows, options)
    if config.engine == "vllm":
        from ppo_cli.models.vllm_engine import VLLMEngine

        if is_sharded(trainer.model):
            raise UsageError(
                "rollout.engine=vllm does not take the weights of a sharded policy: set "
                "rollout.engine to transformers or paged, or start without FSDP"
            )
        return VLLMEngine(
            trainer.accelerator.unwrap_model(trainer.model),
            trainer.accelerator,
            trainer.tokenizer,
            longest=max(map(len, queries)) + config.output_max_length - 1,
            rows=rows,
            is_trusted=is_trusted,
            options=options,
        )
    return OwnLoop(trainer, rows)


def try_engine(
    engine: SamplingEngine,
    trainer: PPOTrainer,
    queries: Sequence[Tensor],
    params: SamplingParams,
    limit: int,
) -> None:
    """Draw a few short responses, and compare their log-probabilities with the policy's.

    Args:
        engine: the run's; there is nothing to try of `OwnLoop`.
        trainer: has the policy.
        queries: to train on; the first few are used.
        params: how tokens are drawn, without top-k and top-p.
        limit: tokens of the run's longest response.

    Raises:
        ModelError: the engine cannot sample from the policy, or draws from something else.
    """
    if isinstance(engine, OwnLoop):
        return
    queries = queries[:TRIED_QUERIES]
    engine.refresh()
    drawn = engine.sample(queries, [min(limit, TRIED_TOKENS)] * len(queries), params)
    if drawn.logprobs is None:
        return
    device = trainer.accelerator.device
    tokens = TokenBatch.from_lists(queries, drawn.responses, None, 0, device)
    model = trainer.accelerator.unwrap_model(trainer.model)
    with torch.no_grad(), modes_kept(model):
        model.eval()
        expected = token_forward(model, tokens, params.temperature).logprobs
    gap = logprob_gap(torch.cat(drawn.logprobs), expected.cpu())["sampling/logprob_gap"]
    if not gap <= MAX_GAP_AT_START:
        raise ModelError(
            f"{type(engine).__name__}: the log-probabilities of its samples are {gap:.2g} nats per "
            "token from the policy's, so it does not draw from the policy: set "
            "rollout.engine=transformers"
        )


def sampling_statistics(
    drawn: EngineSamples, queries: Sequence[Tensor], rows: Tensor
) -> dict[str, float]:
    """`logprob_gap` of a batch's samples; empty without the engine's log-probabilities.

    Args:
        drawn: the B samples.
        queries: B tensors of token ids, 1-D.
        rows: (B, T - 1) the policy's log-probabilities in TRL's layout: column t belongs to
            token t + 1 of query and response.
    """
    if drawn.logprobs is None:
        return {}
    of_policy = [
        row[len(query) - 1 :][: len(logprobs)]
        for row, query, logprobs in zip(rows, queries, drawn.logprobs, strict=True)
    ]
    both = torch.stack([torch.cat(drawn.logprobs), torch.cat(of_policy)])
    return logprob_gap(*torch.cat(processes.gather_tensors([both]), dim=1))


def logprob_gap(engine: Tensor, policy: Tensor) -> dict[str, float]:
    """How far an engine's log-probabilities (N,) of its samples are from the policy's (N,).

    Returns:
        `sampling/logprob_gap`, the mean absolute difference, and `sampling/kl`, an estimate of the
        KL divergence of the engine from the policy per token that is never negative (k3 of
        Schulman 2020, http://joschu.net/blog/kl-approx.html).
    """
    log_ratio = policy.double() - engine.double()
    return {
        "sampling/logprob_gap": log_ratio.abs().mean().item(),
        "sampling/kl": (log_ratio.exp() - 1 - log_ratio).mean().item(),
    }
