"""The protocol of sampling engines: what draws the responses that a policy is trained on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ppo_cli.errors import UsageError, did_you_mean
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.utils.text import shortened


class EngineSamples(NamedTuple):
    """What an engine drew.

    Attributes:
        responses: B tensors of token ids, 1-D, on the policy's device; each with its end token if
            one was drawn, without an encoder-decoder's start token.
        logprobs: B tensors, float32, 1-D, on the CPU: the log-probability of each token in the
            distribution that it was drawn from. None where the engine does not tell.
    """

    responses: list[Tensor]
    logprobs: list[Tensor] | None


class SamplingEngine(Protocol):
    """Draws responses from a policy."""

    def refresh(self) -> None:
        """Take over the policy's weights as they are now; to be called before each `sample`."""

    def sample(
        self,
        queries: Sequence[Tensor],
        limits: Sequence[int],
        params: SamplingParams,
        uniforms: Tensor | None = None,
    ) -> EngineSamples:
        """Draw a response to each query, with dropout off.

        Args:
            queries: B tensors of token ids, 1-D, none empty.
            limits: B limits; a response ends there or after its first stop token.
            params: how tokens are drawn.
            uniforms: (B, R) random numbers in [0, 1), with which several processes draw what one
                would, R the largest limit. An engine that draws by itself does not use them.

        Raises:
            ModelError: the engine cannot sample from this model.
            NumericalError: a probability is not finite.
        """


def check_options(options: Mapping[str, Any], known: Collection[str], what: str) -> None:
    """Raise `UsageError` where `rollout.engine_kwargs` names what an engine does not take.

    Args:
        options: the settings.
        known: names that may be given.
        what: the class of transformers or trl that takes them.
    """
    for name in options:
        if name not in known:
            near = did_you_mean(name, known) or f" There are {', '.join(sorted(known))}"
            raise UsageError(
                f"rollout.engine_kwargs: {shortened(name, 40)} is no setting of {what} that can be "
                f"given here.{near}"
            )
