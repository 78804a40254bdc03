"""The decode loop of sampling: one allocation of the cache, and ended rows are dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ppo_cli.errors import NumericalError
from ppo_cli.kernels.cuda_graph import GraphedStep, NotCapturable
from ppo_cli.kernels.kv_cache import make_static, preallocated_cache
from ppo_cli.kernels.switch import is_enabled
from ppo_cli.models.capabilities import reads_static_cache
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.models.sharding import is_sharded

DROP_SHARE = 0.25  # share of ended rows from which on the cache is copied without them
FEWEST_REPLAYS = 6  # replays of a step that are worth the time of recording it
REPLAYS_AT_ONCE = 8  # between two checks whether rows are left, which wait for the GPU

LogitsCallback = Callable[[Tensor, Tensor], None]
"""Called for each token with the indices (b,) of the rows that it is drawn for, and their logits
(b, V)."""

_not_capturable: WeakSet[AutoModelForCausalLMWithValueHead] = WeakSet()
# Models of which a step was recorded, with their number of hooks, which may change what they do.
_proven: WeakKeyDictionary[AutoModelForCausalLMWithValueHead, int] = WeakKeyDictionary()


@torch.no_grad()
def decode_cached(
    policy: AutoModelForCausalLMWithValueHead,
    input_ids: Tensor,
    attention_mask: Tensor,
    limits: Sequence[int],
    params: SamplingParams,
    on_logits: LogitsCallback | None = None,
    uniforms: Tensor | None = None,
) -> list[Tensor]:
    """Sample a response to each query, with a cache. The policy must allow `reads_packed`.

    The random numbers of each row are drawn before the first token, so that a response does not
    depend on when others end. A CUDA GPU records one step and replays it for the others.

    Args:
        policy: in eval mode.
        input_ids: (B, T) queries, padded on the left.
        attention_mask: (B, T).
        limits: B limits on the new tokens.
        params: settings of sampling.
        on_logits: called with each token's logits; no step is recorded then.
        uniforms: (B, R) random numbers in [0, 1), one for each token; None draws them.

    Returns:
        B tensors of token ids, 1-D, each with its end token if one was drawn.

    Raises:
        NumericalError: a probability is not finite.
    """
    given = draw_uniforms(limits, input_ids.device) if uniforms is None else uniforms

    def start() -> tuple[Drawn, _GrowingStep]:
        drawn = Drawn(given, limits, params)
        return drawn, _GrowingStep(policy, input_ids, attention_mask, drawn, on_logits)

    if on_logits is None and _is_worth_recording(policy, max(limits)):
        try:
            return _by_replays(*start())
        except NotCapturable:
            _not_capturable.add(policy)
    return _step_by_step(*start())


@torch.no_grad()
def decode_uncached(
    policy: AutoModelForCausalLMWithValueHead,
    input_ids: Tensor,
    limits: Sequence[int],
    params: SamplingParams,
    on_logits: LogitsCallback | None = None,
    uniforms: Tensor | None = None,
) -> list[Tensor]:
    """As `decode_cached`, by a plain forward pass of the whole rows for each token.

    Args:
        policy: in eval mode; any causal model will do.
        input_ids: (B, T) queries of equal length, without padding.
        limits, params, on_logits, uniforms: as there.
    """
    given = draw_uniforms(limits, input_ids.device) if uniforms is None else uniforms
    drawn = Drawn(given, limits, params)
    rows = torch.arange(len(limits), device=input_ids.device)
    ids = input_ids
    while True:
        logits = policy.pretrained_model(input_ids=ids, use_cache=False).logits[:, -1].float()
        if on_logits is not None:
            on_logits(rows, logits)
        tokens = drawn.add(ids, logits, rows)
        if not drawn.rows_left():
            return drawn.responses()
        ids = torch.cat([ids, tokens.unsqueeze(1)], 1)


def draw_uniforms(
    limits: Sequence[int], device: torch.device, batch_size: int | None = None
) -> Tensor:
    """(B, R) random numbers in [0, 1), one for each token; R is the largest limit.

    Args:
        limits: B limits on the tokens.
        device: draws them.
        batch_size: they are drawn for so many sequences after each other; None for all at once.
    """
    size, longest = batch_size or len(limits), max(limits)
    parts = [limits[start : start + size] for start in range(0, len(limits), size)]
    drawn = [torch.rand(len(part), max(part), device=device) for part in parts]
    return torch.cat([torch.nn.functional.pad(d, (0, longest - d.shape[1])) for d in drawn])


def _step_by_step(drawn: Drawn, step: _GrowingStep) -> list[Tensor]:
    step()
    while left := drawn.rows_left():
        step.drop_ended(left)
        step()
    return drawn.responses()


def _by_replays(drawn: Drawn, first: _GrowingStep) -> list[Tensor]:
    """The first step reads the queries; all later steps are alike, and so are recorded once."""
    policy, hooks = first.policy, _hooks(first.policy)
    first()
    if not drawn.rows_left():
        return drawn.responses()
    step = GraphedStep(_StaticStep(first), policy.device, proven=_proven.get(policy) == hooks)
    step()
    _proven[policy] = hooks
    for done in range(1, drawn.longest - 1):
        if done % REPLAYS_AT_ONCE == 0 and not drawn.rows_left():
            break
        step()
    return drawn.responses()


def _hooks(policy: AutoModelForCausalLMWithValueHead) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in policy.modules())


def _is_worth_recording(policy: AutoModelForCausalLMWithValueHead, longest: int) -> bool:
    return (
        is_enabled("cuda_graph")
        and not is_sharded(policy)  # gathered weights are freed
        and policy.device.type == "cuda"
        and longest - 2 >= FEWEST_REPLAYS
        and all(parameter.device == policy.device for parameter in policy.parameters())
        and policy not in _not_capturable
        and policy.allows(reads_static_cache)
    )


class Drawn:
    """The tokens that B rows have drawn, kept on their device, so that nothing waits for it.

    Args:
        uniforms: (B, R) random numbers, one for each token.
        limits: B limits on the tokens, R the largest.
        params: settings of sampling.

    Attributes:
        going: (B,) whether a row has not ended.
        longest: R.
    """

    def __init__(self, uniforms: Tensor, limits: Sequence[int], params: SamplingParams) -> None:
        device, self.longest = uniforms.device, max(limits)
        uniforms = uniforms[:, : self.longest]
        self.going = torch.ones(len(limits), dtype=torch.bool, device=device)
        self._uniforms, self._warp = uniforms, _warpers(params)
        self._limits = torch.tensor(limits, device=device)
        self._ends = torch.tensor(params.stop_token_ids, dtype=torch.long, device=device)
        self._tokens = torch.zeros(uniforms.shape, dtype=torch.long, device=device)
        self._lengths = torch.zeros_like(self._limits)
        self._place = torch.zeros(1, dtype=torch.long, device=device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    def add(self, ids: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
        """Draw a token (b,) for each of `rows` (b,). All other rows have ended.

        Args:
            ids: (b, t) tokens that the rows have read.
            logits: (b, V) of what follows them.
            rows: (b,) their indices.
        """
        tokens, finite = draw(self._warp(ids, logits), self._uniforms[rows, self._place])
        self._tokens[rows, self._place] = tokens
        self._place += 1
        self._finite &= finite
        self._lengths += self.going
        at_end = (tokens.unsqueeze(1) == self._ends).any(1)
        self.going[rows] &= (self._lengths < self._limits)[rows] & ~at_end
        return tokens

    def rows_left(self) -> int:
        """How many rows have not ended. Waits for the device.

        Raises:
            NumericalError: a probability was not finite.
        """
        left, finite = torch.stack([self.going.sum(), self._finite]).tolist()
        if not finite:
            raise not_finite()
        return int(left)

    def responses(self) -> list[Tensor]:
        """B tensors of token ids, 1-D. Raises as `rows_left` does."""
        self.rows_left()
        lengths = self._lengths.tolist()
        return [row[:length] for row, length in zip(self._tokens, lengths, strict=True)]


class _GrowingStep:
    """Draws one more token for each row; the part of the cache that it reads grows.

    Arguments as in `decode_cached`. The first call reads the queries.
    """

    def __init__(
        self,
        policy: AutoModelForCausalLMWithValueHead,
        input_ids: Tensor,
        attention_mask: Tensor,
        drawn: Drawn,
        on_logits: LogitsCallback | None = None,
    ) -> None:
        self.on_logits = on_logits
        count, self.width = input_ids.shape
        self.policy, self.drawn = policy, drawn
        self.cache = preallocated_cache(policy.config, self.width + drawn.longest)
        self.projection = policy.ready_projection(rows=count, times=drawn.longest)
        self.rows = torch.arange(count, device=input_ids.device)  # that the cache has
        self.ids, self.positions = input_ids, (attention_mask.cumsum(1) - 1).clamp(min=0)
        self.mask = torch.nn.functional.pad(attention_mask, (0, drawn.longest), value=1)

    def __call__(self) -> None:
        self.ids, going = self.draw(self.ids, self.mask[:, : self.width], self.positions)
        self.positions = self.positions[:, -1:] + going
        self.width += 1

    def draw(self, ids: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The token (b, 1) that follows `ids` (b, t) in each row, and whether it goes on (b, 1).

        The position of a row that has ended stays: a later one may exceed the context.
        """
        logits = self.policy.next_logits(ids, mask, positions, self.projection, self.cache)
        if self.on_logits is not None:
            self.on_logits(self.rows, logits)
        tokens = self.drawn.add(ids, logits, self.rows)
        return tokens.unsqueeze(1), self.drawn.going[self.rows].unsqueeze(1)

    def drop_ended(self, left: int) -> None:
        """Drop the rows that have ended, where few enough are `left`."""
        if left > (1 - DROP_SHARE) * len(self.rows):
            return
        kept = self.drawn.going[self.rows].nonzero().squeeze(1)
        self.cache.batch_select_indices(kept)
        self.rows, self.ids, self.positions, self.mask = (
            tensor[kept] for tensor in (self.rows, self.ids, self.positions, self.mask)
        )


class _StaticStep:
    """Draws one more token for each row, with the same work on the same tensors every time.

    Args:
        begun: the step that has read the queries; its cache is used further.
    """

    def __init__(self, begun: _GrowingStep) -> None:
        self._begun = begun
        self._slot = begun.rows.new_tensor([begun.width - 1])
        room = make_static(begun.cache, self._slot)
        written = begun.mask[:, : begun.width - 1].bool()
        free = room - written.shape[1]
        self._mask = torch.nn.functional.pad(written, (0, free), value=False)[:, None, None]
        self._ids, self._positions = begun.ids.clone(), begun.positions.clone()

    def __call__(self) -> None:
        self._mask.index_fill_(3, self._slot, True)
        ids, going = self._begun.draw(self._ids, self._mask, self._positions)
        self._ids.copy_(ids)
        self._positions += going
        self._slot += 1


def draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token (B,) a row of logits (B, V), by inverting the distribution at `uniforms` (B,).

    Source: Devroye 1986, "Non-Uniform Random Variate Generation", III.2, sequential search.
    The sums are float64, where there is such a type: 50,000 float32 terms would lose rare tokens.

    Returns:
        The tokens, and a scalar: whether all probabilities are finite. A row where they are not
        gets an arbitrary token.
    """
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    sums = logits.float().softmax(-1).cumsum(-1, dtype=exact)
    total = sums[:, -1:]
    places = torch.searchsorted(sums, uniforms.unsqueeze(1).to(exact) * total, right=True)
    return places.squeeze(1).clamp(max=logits.shape[1] - 1), total.isfinite().all()


def not_finite() -> NumericalError:
    """The error for probabilities that are not finite."""
    return NumericalError(
        "the policy's probabilities are not finite any more: its last update went too far. "
        "Lower ppo.learning_rate or set ppo.max_grad_norm"
    )


def _warpers(params: SamplingParams) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if params.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        warpers.append(TopKLogitsWarper(int(params.top_k)))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(float(params.top_p)))
    return warpers
