"""How tokens are drawn from a model's distribution, and which tokens end a response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SamplingParams:
    """Settings of sampling. The defaults sample from the model's own distribution.

    Attributes:
        temperature: divides the logits; above 0.
        top_k: draw among this many most probable tokens; 0 for all.
        top_p: draw among the most probable tokens that together have this probability; 1 for all.
        stop_token_ids: tokens that end a response, which includes them; empty for responses of
            full length.
        pad_token_id: fills up the shorter rows of a batch. Padding is masked, so any id will do.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def generation_kwargs(self) -> dict[str, Any]:
        """The same settings as keywords of transformers' `generate`."""
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "eos_token_id": list(self.stop_token_ids) or None,
            "pad_token_id": self.pad_token_id,
        }
