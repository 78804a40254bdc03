"""The decode loop behind sampling: a cache allocated once, ended rows dropped, one draw a row."""

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
from ppo_cli.kernels.cuda_graph import NotReplayable, Replayed
from ppo_cli.kernels.kv_cache import hold_still, roomy_cache
from ppo_cli.kernels.switch import is_enabled
from ppo_cli.models.capabilities import reads_still_cache
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead

DROP_SHARE = 0.25  # of the rows have ended: worth copying the cache without them
FEWEST_REPLAYS = 6  # of a step: worth recording it, which takes as long as some of it
REPLAYS_AT_ONCE = 8  # before the GPU is asked whether rows are left

_not_replayable: WeakSet[AutoModelForCausalLMWithValueHead] = WeakSet()
# Models of which a step was recorded, and how many hooks they had, which may make them another.
_proven: WeakKeyDictionary[AutoModelForCausalLMWithValueHead, int] = WeakKeyDictionary()


@torch.no_grad()
def decode_responses(
    policy: AutoModelForCausalLMWithValueHead,
    input_ids: Tensor,
    attention_mask: Tensor,
    limits: Sequence[int],
    end_ids: set[int],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> list[Tensor]:
    """Sample a response to each query. The policy must allow `reads_packed`.

    Each row has random numbers of its own, drawn before the first token, so that a response does
    not depend on when others end. A CUDA GPU records one step and replays it for the others.

    Args:
        policy: in eval mode.
        input_ids: (B, T) queries, padded on the left.
        attention_mask: (B, T).
        limits: B numbers of new tokens at most.
        end_ids: tokens that end a response.
        temperature: divides the logits.
        top_k: draw among so many most probable tokens; 0 for all.
        top_p: draw among the most probable tokens that together have this probability.
        watch: told with each token the rows (b,) that have one to come, and its logits (b, V);
            nothing is recorded then.

    Returns:
        B tensors of token ids, 1-D, each with its end token if one was drawn.

    Raises:
        NumericalError: a probability is not finite.
    """
    chances = torch.rand(len(limits), max(limits), device=input_ids.device)
    warp = _warpers(temperature, top_k, top_p)

    def start() -> tuple[_Drawn, _GrowingStep]:
        drawn = _Drawn(chances, limits, end_ids)
        return drawn, _GrowingStep(policy, input_ids, attention_mask, warp, drawn, watch)

    if watch is None and _is_worth_recording(policy, max(limits)):
        try:
            return _by_replays(*start())
        except NotReplayable:
            _not_replayable.add(policy)
    return _step_by_step(*start())


@torch.no_grad()
def decode_whole(
    policy: AutoModelForCausalLMWithValueHead,
    input_ids: Tensor,
    limits: Sequence[int],
    end_ids: set[int],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    watch: Callable[[Tensor, Tensor], None] | None = None,
) -> list[Tensor]:
    """As `decode_responses`, by a plain forward pass of the whole rows for each token.

    Args:
        policy: in eval mode; any causal model will do.
        input_ids: (B, T) queries of equal length, without padding.
        limits, end_ids, temperature, top_k, top_p, watch: as there.
    """
    chances = torch.rand(len(limits), max(limits), device=input_ids.device)
    drawn, warp = _Drawn(chances, limits, end_ids), _warpers(temperature, top_k, top_p)
    rows = torch.arange(len(limits), device=input_ids.device)
    ids = input_ids
    while True:
        logits = policy.pretrained_model(input_ids=ids, use_cache=False).logits[:, -1].float()
        if watch is not None:
            watch(rows, logits)
        tokens = drawn.add(warp(ids, logits), rows)
        if not drawn.rows_left():
            return drawn.responses()
        ids = torch.cat([ids, tokens.unsqueeze(1)], 1)


def _step_by_step(drawn: _Drawn, step: _GrowingStep) -> list[Tensor]:
    step()
    while left := drawn.rows_left():
        step.drop_ended(left)
        step()
    return drawn.responses()


def _by_replays(drawn: _Drawn, first: _GrowingStep) -> list[Tensor]:
    """The first step reads the queries; all others do the same as each other."""
    policy, hooks = first.policy, _hooks(first.policy)
    first()
    if not drawn.rows_left():
        return drawn.responses()
    step = Replayed(_StillStep(first), policy.device, proven=_proven.get(policy) == hooks)
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
        and policy.device.type == "cuda"
        and longest - 2 >= FEWEST_REPLAYS
        and all(parameter.device == policy.device for parameter in policy.parameters())
        and policy not in _not_replayable
        and policy.allows(reads_still_cache)
    )


class _Drawn:
    """What B rows have drawn, kept on their device, so that it need not be waited for.

    Args:
        chances: (B, R) random numbers, one a token.
        limits: B numbers of tokens at most, R the largest.
        end_ids: tokens that end a row.

    Attributes:
        going: (B,) whether a row has not ended.
        longest: R.
    """

    def __init__(self, chances: Tensor, limits: Sequence[int], end_ids: set[int]) -> None:
        device, self.longest = chances.device, chances.shape[1]
        self.going = torch.ones(len(limits), dtype=torch.bool, device=device)
        self._chances = chances
        self._limits = torch.tensor(limits, device=device)
        self._ends = torch.tensor(sorted(end_ids), dtype=torch.long, device=device)
        self._tokens = torch.zeros(chances.shape, dtype=torch.long, device=device)
        self._lengths = torch.zeros_like(self._limits)
        self._place = torch.zeros(1, dtype=torch.long, device=device)
        self._finite = torch.ones((), dtype=torch.bool, device=device)

    def add(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Draw a token (b,) for each of `rows` (b,), with logits (b, V). Other rows have ended."""
        tokens, finite = draw(logits, self._chances[rows, self._place])
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
    """A token more for each row: reads as much of the cache as there is.

    Arguments as in `decode_responses`. The first call reads the queries.
    """

    def __init__(
        self,
        policy: AutoModelForCausalLMWithValueHead,
        input_ids: Tensor,
        attention_mask: Tensor,
        warp: LogitsProcessorList,
        drawn: _Drawn,
        watch: Callable[[Tensor, Tensor], None] | None = None,
    ) -> None:
        self.watch = watch
        count, self.width = input_ids.shape
        self.policy, self.warp, self.drawn = policy, warp, drawn
        self.cache = roomy_cache(policy.config, self.width + drawn.longest)
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

        A row that does not stays at its position: further on the context may be over.
        """
        logits = self.policy.next_logits(ids, mask, positions, self.projection, self.cache)
        if self.watch is not None:
            self.watch(self.rows, logits)
        tokens = self.drawn.add(self.warp(ids, logits), self.rows)
        return tokens.unsqueeze(1), self.drawn.going[self.rows].unsqueeze(1)

    def drop_ended(self, left: int) -> None:
        """Go on without the rows that have ended, where few enough are `left`."""
        if left > (1 - DROP_SHARE) * len(self.rows):
            return
        kept = self.drawn.going[self.rows].nonzero().squeeze(1)
        self.cache.batch_select_indices(kept)
        self.rows, self.ids, self.positions, self.mask = (
            tensor[kept] for tensor in (self.rows, self.ids, self.positions, self.mask)
        )


class _StillStep:
    """A token more for each row: the same work on the same tensors every time.

    Args:
        begun: has read the queries; its cache is taken over.
    """

    def __init__(self, begun: _GrowingStep) -> None:
        self._begun = begun
        self._slot = begun.rows.new_tensor([begun.width - 1])
        room = hold_still(begun.cache, self._slot)
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


def draw(logits: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
    """One token (B,) a row of logits (B, V), by inverting the distribution at `chances` (B,).

    Source: Devroye 1986, "Non-Uniform Random Variate Generation", III.2, sequential search.
    The sums are float64, where there is such a type: 50,000 float32 terms would lose rare tokens.

    Returns:
        The tokens, and a scalar that says whether all probabilities are finite. A row where they
        are not has some token or other.
    """
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    sums = logits.float().softmax(-1).cumsum(-1, dtype=exact)
    total = sums[:, -1:]
    places = torch.searchsorted(sums, chances.unsqueeze(1).to(exact) * total, right=True)
    return places.squeeze(1).clamp(max=logits.shape[1] - 1), total.isfinite().all()


def not_finite() -> NumericalError:
    """What to raise where probabilities are not finite."""
    return NumericalError(
        "the policy's probabilities are not finite any more: its last update went too far. "
        "Lower ppo.learning_rate or set ppo.max_grad_norm"
    )


def _warpers(temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        warpers.append(TopKLogitsWarper(int(top_k)))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(float(top_p)))
    return warpers
