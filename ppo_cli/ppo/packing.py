"""Ragged queries and responses -> the token rows that a model reads, the positions that count."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ppo_cli.kernels.attention import block_mask
from ppo_cli.utils.device import fetch, send

# Tokens that a packed row aims at. Attention costs as much a token as its row is long, so rows stay
# short; far fewer tokens would leave more of each row empty.
ROW_TOKENS = 64


@dataclass(frozen=True)
class TokenBatch:
    """B sequences of query and response.

    Response tokens that a mask leaves out are read as context but do not count: they have no place
    in the (B, R) grids. Layout is worked out on the CPU, so that a GPU need not be waited for.

    Attributes:
        input_ids: (B, T) query, response, padding, on the CPU.
        targets: (B, R) the response tokens that count, moved to the left, on the CPU.
        sources: (B, R) column of `input_ids` just before each target, on the CPU.
        counts: (B,) how many targets each sequence has, on the CPU.
        device: where the grids live.
    """

    input_ids: Tensor
    targets: Tensor
    sources: Tensor
    counts: Tensor
    device: torch.device

    @classmethod
    def from_lists(
        cls,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        response_masks: Sequence[Tensor] | None,
        pad_token_id: int,
        device: torch.device,
    ) -> TokenBatch:
        """Lay out B queries and responses, 1-D tensors of token ids each.

        Raises:
            ValueError: a query without a token (nothing predicts its first response token), or a
                mask that is not as long as its response.
        """
        rows, targets, sources = [], [], []
        for i, (query, response) in enumerate(zip(fetch(queries), fetch(responses), strict=True)):
            if query.numel() == 0:
                raise ValueError(f"query {i} has no tokens: begin it with the bos token")
            counts = torch.ones_like(response, dtype=torch.bool)
            if response_masks is not None:
                counts = response_masks[i].bool().cpu()
                if counts.shape != response.shape:
                    raise ValueError(
                        f"response mask {i} has shape {tuple(counts.shape)}, "
                        f"its response {tuple(response.shape)}"
                    )
            rows.append(torch.cat([query, response]))
            targets.append(response[counts])
            sources.append(counts.nonzero().squeeze(1) + query.numel() - 1)
        return cls(
            input_ids=pad_sequence(rows, True, pad_token_id),
            targets=pad_sequence(targets, True, 0),
            sources=pad_sequence(sources, True, 0),
            counts=torch.tensor([target.numel() for target in targets]),
            device=device,
        )

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def select(self, indices: Tensor) -> TokenBatch:
        """The sequences at `indices` (b,), grids cut to the longest of them."""
        counts = self.counts[indices]
        width = int(counts.max())
        return TokenBatch(
            self.input_ids[indices],
            self.targets[indices, :width],
            self.sources[indices, :width],
            counts,
            self.device,
        )

    @cached_property
    def mask(self) -> Tensor:
        """(B, R) True where there is a target, on `device`."""
        return send(self._counted, self.device)

    @cached_property
    def cells(self) -> Tensor:
        """(N,) where the tokens that count stand in a (B, R) grid laid out flat, on `device`."""
        return send(self._counted.flatten().nonzero().squeeze(1), self.device)

    @cached_property
    def flat_targets(self) -> Tensor:
        """(N,) the tokens of `targets`, sequence by sequence, on `device`."""
        return send(self.targets[self._counted], self.device)

    @property
    def _counted(self) -> Tensor:
        return _prefix_mask(self.counts, self.targets.shape[1])

    @property
    def _read(self) -> Tensor:
        """(B,) tokens of each sequence up to the one that predicts its last target."""
        last = (self.sources * self._counted).amax(1) + 1 if self.sources.shape[1] else self.counts
        return last * (self.counts > 0)

    @cached_property
    def padded(self) -> tuple[dict[str, Tensor], Tensor]:
        """One sequence a row, padded on the right whatever side the tokenizer pads.

        Returns:
            `input_ids` and `attention_mask` (B, t) by name, and the (N,) flat positions in them
            where `flat_targets` are predicted. Tokens that predict nothing are left out.
        """
        lengths = self._read.clamp(min=1)
        width = int(lengths.max())
        inputs = {
            "input_ids": self.input_ids[:, :width],
            "attention_mask": _prefix_mask(lengths, width).long(),
        }
        return self._placed(inputs, torch.arange(len(self)) * width)

    @cached_property
    def packed(self) -> tuple[dict[str, Tensor], Tensor]:
        """Several sequences a row, about `ROW_TOKENS` together, with next to no padding.

        Returns:
            `input_ids` and `position_ids` (b, t), which begin anew with each sequence, and the (N,)
            flat positions where `flat_targets` are predicted. Sequences without targets, and tokens
            that predict nothing, are left out.
        """
        lengths = self._read
        if not lengths.any():
            lengths = torch.ones_like(lengths)  # a model has to read something
        rows, offsets = balanced_rows(lengths.tolist(), max(ROW_TOKENS, int(lengths.max())))
        row, offset = torch.tensor(rows), torch.tensor(offsets)
        width = int((offset + lengths).max())
        starts = row * width + offset
        tokens = _prefix_mask(lengths, self.input_ids.shape[1])
        columns = torch.arange(tokens.shape[1]).expand_as(tokens)
        places = (starts.unsqueeze(1) + columns)[tokens]
        shape = (int(row.max()) + 1, width)
        input_ids = torch.zeros(shape, dtype=torch.long)
        position_ids = torch.zeros(shape, dtype=torch.long)  # so padding stands alone
        input_ids.view(-1)[places] = self.input_ids[tokens]
        position_ids.view(-1)[places] = columns[tokens]
        return self._placed({"input_ids": input_ids, "position_ids": position_ids}, starts)

    @cached_property
    def packed_mask(self) -> Tensor:
        """(b, 1, t, t) which tokens of a row of `packed` each of them may attend to."""
        return block_mask(self.packed[0]["position_ids"])

    def _placed(
        self, inputs: dict[str, Tensor], starts: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        positions = (starts.unsqueeze(1) + self.sources)[self._counted]
        inputs = {key: send(value, self.device) for key, value in inputs.items()}
        return inputs, send(positions, self.device)

    def alike(self, switch: int | None, *, equal: bool) -> list[Tensor]:
        """Sequences that are read together, (b,) indices of each group.

        Args:
            switch: longer ones are read apart from the others; None for no such length.
            equal: only sequences of equal length are read together.
        """
        lengths = self._read
        keys = lengths if equal else lengths > (switch or lengths.max())
        return [(keys == key).nonzero().squeeze(1) for key in keys.unique()]

    def flat_places(self, indices: Tensor) -> Tensor:
        """(n,) where the tokens of the sequences at `indices` stand in `flat_targets`."""
        starts = self.counts.cumsum(0) - self.counts
        places = [torch.arange(int(self.counts[i])) + starts[i] for i in indices]
        return send(torch.cat(places), self.device)

    def to_grid(self, flat: Tensor) -> Tensor:
        """(N,) numbers, one a counted token -> (B, R), zero outside the mask."""
        empty = flat.new_zeros(self.targets.numel())
        return empty.index_copy(0, self.cells, flat).view(self.targets.shape)

    def grid_of(
        self,
        name: str,
        rows: Sequence[Tensor] | None,
        responses: Sequence[Tensor],
        response_masks: Sequence[Tensor] | None,
    ) -> Tensor | None:
        """B tensors of a number a response token -> (B, R), those of tokens that do not count out.

        Raises:
            ValueError: not as many numbers as tokens, or one that is not finite; it says `name`.
        """
        if rows is None:
            return None
        if len(rows) != len(self):
            raise ValueError(f"{name} must be {len(self)} tensors - got {len(rows)}")
        for i, (row, response) in enumerate(zip(rows, responses, strict=True)):
            if row.shape != response.shape or not bool(row.isfinite().all()):
                raise ValueError(
                    f"{name}[{i}] must be {len(response)} finite numbers, one a response token - "
                    f"got shape {tuple(row.shape)}"
                )
        flat = torch.cat([row.detach().float().cpu() for row in rows])
        if response_masks is not None:
            flat = flat[torch.cat([mask.bool().cpu() for mask in response_masks])]
        return self.to_grid(flat.to(self.device))

    def flat(self, grid: Tensor) -> Tensor:
        """(B, R) -> (N,), what `to_grid` undoes."""
        return grid.flatten()[self.cells]

    def to_rows(self, grid: Tensor) -> Tensor:
        """(B, R) -> (B, T - 1) as TRL lays it out: at t what concerns token t + 1; else zero."""
        rows = grid.new_zeros(len(self), max(self.input_ids.shape[1] - 1, 1))
        index = send(self.sources * self._counted, self.device)
        return rows.scatter_add(1, index, grid * self.mask)


def balanced_rows(lengths: Sequence[int], target: int) -> tuple[list[int], list[int]]:
    """Spread sequences over rows of about `target` tokens, as short as their number allows.

    Rows are given the length that they must have at least, then one more at a time, until the
    sequences fit: each, the longest first, into the row with the least room that is enough
    (Coffman, Garey and Johnson 1978, "An application of bin-packing to multiprocessor
    scheduling"). Sequences without tokens are put at the start of row 0.

    Returns:
        row and first column of each sequence.
    """
    count = max(round(sum(lengths) / target), 1)
    return min((_rows(lengths, count), _rows(lengths, count + 1)), key=lambda rows: rows[2])[:2]


def _rows(lengths: Sequence[int], count: int) -> tuple[list[int], list[int], int]:
    """Row and first column of each sequence in `count` rows, and the places that these have."""
    order = sorted((i for i in range(len(lengths)) if lengths[i]), key=lambda i: -lengths[i])
    width = max(-(-sum(lengths) // count), max(lengths))
    while (found := _fitted(lengths, order, count, width)) is None:
        width += 1
    return *found, count * width


def _fitted(
    lengths: Sequence[int], order: list[int], count: int, width: int
) -> tuple[list[int], list[int]] | None:
    """Row and first column of each sequence in `count` rows of `width`, if it fits."""
    rows, columns = [0] * len(lengths), [0] * len(lengths)
    room = [(width, row) for row in range(count)]  # sorted
    for i in order:
        place = bisect.bisect_left(room, (lengths[i], 0))
        if place == len(room):
            return None
        left, rows[i] = room.pop(place)
        columns[i] = width - left
        bisect.insort(room, (left - lengths[i], rows[i]))
    return rows, columns


def _prefix_mask(lengths: Tensor, width: int) -> Tensor:
    """(B,) lengths -> (B, width), True at the first `length` places of each row."""
    return torch.arange(width) < lengths.unsqueeze(1)


def checked_batch(
    queries: Any, responses: Any, scores: Any, response_masks: Any, batch_size: int
) -> Tensor:
    """The scores as a (B,) float32 tensor, once everything passed to `step()` has its form.

    Raises:
        ValueError: something is no list of `batch_size` tensors of at most one dimension, or a
            score is not one finite number.
    """
    lists = {"queries": queries, "responses": responses, "scores": scores}
    if response_masks is not None:
        lists["response_masks"] = response_masks
    for name, items in lists.items():
        if not isinstance(items, list):
            raise ValueError(f"{name} must be a list of tensors - got {type(items)}")
        if len(items) != batch_size:
            raise ValueError(
                f"Batch size ({batch_size}) does not match number of examples - but got "
                f"{len(items)} for: {name}"
            )
        for item in items:
            if not isinstance(item, Tensor):
                raise ValueError(f"Elements in {name} must be tensors - got {type(item)}")
            if item.dim() > 1:
                raise ValueError(f"{name} must be 1-dimensional - got shape {tuple(item.shape)}")
    for i, score in enumerate(scores):
        if score.numel() != 1 or not bool(score.isfinite().all()):
            raise ValueError(f"scores[{i}] must be one finite number - got {score.tolist()}")
    return torch.stack([score.detach().reshape(()).float().cpu() for score in scores])
