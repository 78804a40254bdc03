"""Best-of-n: draw several responses to a query and keep those with the highest scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ppo_cli.errors import UsageError
from ppo_cli.models.encoder_decoder import is_encoder_decoder
from ppo_cli.models.sampling import sample_responses
from ppo_cli.models.sharding import gathered
from ppo_cli.models.transformers_generate import new_token_limits
from ppo_cli.ppo.accelerator import require
from ppo_cli.ppo.generation import generation_settings
from ppo_cli.utils.random_state import random_state, set_random_state, set_seed


class BestOfNSampler:
    """Draws `sample_size` responses to each query and returns the best `n_candidates` texts.

    The arguments are those of TRL 0.11.4. `ppo-cli compare --best-of-n` measures such a sampler.

    Args:
        model: a policy, or a causal language model of transformers or peft.
        tokenizer: the model's.
        queries_to_scores: called with the texts of a query, each the query and a response; returns
            a score for each.
        length_sampler: called once per query for the number of new tokens.
        sample_size: responses drawn to each query.
        seed: of the responses and their lengths; the random numbers of the program around the
            sampler stay as they are. None draws from those.
        n_candidates: texts returned for each query.
        generation_config: settings of sampling; without one they are as in `PPOTrainer.generate`:
            temperature 1, no top-k, no top-p.

    Raises:
        ValueError: `tokenizer` or `model` is none, or `n_candidates` exceeds `sample_size`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        queries_to_scores: Callable[[list[str]], Sequence[float] | Sequence[Tensor] | Tensor],
        length_sampler: Callable[[], int],
        sample_size: int = 4,
        seed: int | None = None,
        n_candidates: int = 1,
        generation_config: GenerationConfig | None = None,
    ) -> None:
        require("tokenizer", tokenizer, PreTrainedTokenizerBase)
        if not hasattr(model, "generate"):
            raise ValueError(f"model must be a language model, got {type(model).__name__}")
        if not 1 <= n_candidates <= sample_size:
            raise ValueError(
                f"n_candidates is {n_candidates}: it must be from 1 to sample_size ({sample_size})"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.queries_to_scores = queries_to_scores
        self.length_sampler = length_sampler
        self.gen_config = generation_config
        self.sample_size = sample_size
        self.n_candidates = n_candidates
        self._random: dict[str, Any] | None = None
        if seed is not None:
            before = random_state()
            set_seed(seed)
            self._random = random_state()
            set_random_state(before)

    def generate(
        self,
        tokenized_query: Tensor | Sequence[int] | Sequence[Tensor] | Sequence[Sequence[int]],
        skip_special_tokens: bool = True,
        device: str | int | torch.device | None = None,
        batch_size: int = 16,
        **generation_kwargs: Any,
    ) -> list[list[str]]:
        """The best texts of each query, the best first.

        Args:
            tokenized_query: token ids of a query, as a 1-D tensor or a list, or a list of those.
            skip_special_tokens: leave special tokens out of the texts.
            device: where the model is; the queries are moved there. Another one is refused.
            batch_size: sequences in a forward pass.
            generation_kwargs: settings of `transformers`' `generate`; they change
                `generation_config`. The length is the `length_sampler`'s.

        Returns:
            For each query a list of `n_candidates` texts, each the query and a response; of an
            encoder-decoder the response alone.

        Raises:
            ValueError: `tokenized_query` has another form, a query is empty or too long, the model
                is elsewhere, or there is not one finite score for each text.
        """
        queries = _as_queries(tokenized_query)
        if device is not None and torch.device(device).type != self.model.device.type:
            raise UsageError(f"the model is on {self.model.device}, not on {device}: move it there")
        if lengths := {"max_new_tokens", "max_length"} & {*generation_kwargs}:
            raise UsageError(f"{lengths.pop()} is the length_sampler's here: leave it out")
        if self.gen_config is not None:
            generation_kwargs.setdefault("generation_config", self.gen_config)
        settings = generation_settings(
            generation_kwargs, tokenizer=self.tokenizer, policy=self.model, temperature=1.0
        )
        with gathered(self.model), self._own_random_numbers():
            limits = new_token_limits(queries, self.length_sampler, {})
            repeated = [i for i in range(len(queries)) for _ in range(self.sample_size)]
            rows, row_limits = [queries[i] for i in repeated], [limits[i] for i in repeated]
            responses = sample_responses(
                self.model, rows, row_limits, settings, batch_size=batch_size
            )
        ids = responses
        if not is_encoder_decoder(self.model):
            ids = [torch.cat([q.to(r.device), r]) for q, r in zip(rows, responses, strict=True)]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=skip_special_tokens)
        size = self.sample_size
        return [self._best(texts[i : i + size]) for i in range(0, len(texts), size)]

    def _best(self, texts: list[str]) -> list[str]:
        scores = torch.as_tensor([float(score) for score in self.queries_to_scores(texts)])
        if len(scores) != len(texts) or not scores.isfinite().all():
            raise UsageError(
                f"queries_to_scores must return {len(texts)} finite numbers, one for each text - "
                f"got {scores.tolist()}"
            )
        return [texts[i] for i in scores.topk(self.n_candidates).indices]

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Draw from the sampler's own random numbers inside the block, if it was given a seed."""
        if self._random is None:
            yield
            return
        before = random_state()
        set_random_state(self._random)
        try:
            yield
        finally:
            self._random = random_state()
            set_random_state(before)


def _as_queries(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor) and given.dim() == 1:
        return [given]
    if isinstance(given, (list, tuple)) and given:
        if all(isinstance(one, int) for one in given):
            return [torch.tensor(given)]
        queries = [torch.as_tensor(one).flatten() for one in given]
        if all(len(query) for query in queries):
            return queries
    raise UsageError(
        "tokenized_query must be the token ids of a query, as a 1-D tensor or a list, or a list of "
        f"those, none empty - got {type(given).__name__}"
    )
