"""Ragged queries and responses -> rows of tokens for a model, positions that count, grids."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ppo_cli.kernels.attention import block_mask
from ppo_cli.utils.device import fetch, send

# Approximate length of a packed row. The cost of attention per token grows with the length of the
# row, so rows are short; in much shorter rows more places would be empty.
ROW_TOKENS = 64


class EncoderRows(NamedTuple):
    """What the encoder of an encoder-decoder reads: ids (B, S), padded on the right; lengths (B,).

    Both are on the CPU.
    """

    ids: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, queries: Sequence[Tensor]) -> EncoderRows:
        """The rows of B queries, 1-D each."""
        return cls(pad_sequence(list(queries), True, 0), torch.tensor([len(q) for q in queries]))

    def select(self, indices: Tensor) -> EncoderRows:
        """The rows at `indices` (b,), cut to the longest of them."""
        lengths = self.lengths[indices]
        return EncoderRows(self.ids[indices, : int(lengths.max())], lengths)

    @property
    def mask(self) -> Tensor:
        """(B, S) 1 for tokens, 0 for padding."""
        return _prefix_mask(self.lengths, self.ids.shape[1]).long()


@dataclass(frozen=True)
class TokenBatch:
    """B sequences of query and response; of an encoder-decoder what its decoder reads.

    Response tokens that a mask leaves out are context but do not count: they have no place in the
    (B, R) grids. The layout is computed on the CPU, so that nothing waits for a GPU.

    Attributes:
        input_ids: (B, T) query, response, padding; on the CPU.
        targets: (B, R) the response tokens that count, moved to the left; on the CPU.
        sources: (B, R) column of `input_ids` just before each target; on the CPU.
        counts: (B,) number of targets of each sequence; on the CPU.
        device: the device of the grids.
        encoder: the queries of an encoder-decoder, whose sequences are a start token and the
            response; None for a causal model.
    """

    input_ids: Tensor
    targets: Tensor
    sources: Tensor
    counts: Tensor
    device: torch.device
    encoder: EncoderRows | None = None

    @classmethod
    def from_lists(
        cls,
        queries: Sequence[Tensor],
        responses: Sequence[Tensor],
        response_masks: Sequence[Tensor] | None,
        pad_token_id: int,
        device: torch.device,
        decoder_start: int | None = None,
    ) -> TokenBatch:
        """Lay out B queries and responses, 1-D tensors of token ids each.

        Args:
            queries, responses: the responses of an encoder-decoder are without its start token.
            response_masks: B masks of the responses, 1-D; None where all tokens count.
            pad_token_id: fills up shorter rows.
            device: of the grids.
            decoder_start: token with which the decoder of an encoder-decoder begins; None for a
                causal model.

        Raises:
            ValueError: a query is empty, so that nothing predicts its first response token, or the
                length of a mask differs from its response's.
        """
        rows, targets, sources, encoder = [], [], [], []
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
            if decoder_start is not None:
                encoder.append(query)
                query = query.new_tensor([decoder_start])
            rows.append(torch.cat([query, response]))
            targets.append(response[counts])
            sources.append(counts.nonzero().squeeze(1) + query.numel() - 1)
        return cls(
            input_ids=pad_sequence(rows, True, pad_token_id),
            targets=pad_sequence(targets, True, 0),
            sources=pad_sequence(sources, True, 0),
            counts=torch.tensor([target.numel() for target in targets]),
            device=device,
            encoder=EncoderRows.of(encoder) if encoder else None,
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
            self.encoder and self.encoder.select(indices),
        )

    @cached_property
    def mask(self) -> Tensor:
        """(B, R) True where there is a target, on `device`."""
        return send(self._counted, self.device)

    @cached_property
    def cells(self) -> Tensor:
        """(N,) places of the tokens that count in a flattened (B, R) grid, on `device`."""
        return send(self._counted.flatten().nonzero().squeeze(1), self.device)

    @cached_property
    def flat_targets(self) -> Tensor:
        """(N,) the tokens of `targets`, sequence by sequence, on `device`."""
        return send(self.targets[self._counted], self.device)

    @property
    def _counted(self) -> Tensor:
        return _prefix_mask(self.counts, self.targets.shape[1])

    @property
    def _lengths(self) -> Tensor:
        """(B,) tokens of each sequence up to the one that predicts its last target."""
        last = (self.sources * self._counted).amax(1) + 1 if self.sources.shape[1] else self.counts
        return last * (self.counts > 0)

    @cached_property
    def padded(self) -> tuple[dict[str, Tensor], Tensor]:
        """One sequence per row, padded on the right whichever side the tokenizer pads.

        Returns:
            `input_ids` and `attention_mask` (B, t) by name, and the (N,) flat positions in them
            that predict `flat_targets`. Tokens that predict nothing are left out. For an
            encoder-decoder these are `decoder_input_ids` and `decoder_attention_mask`, and the
            others (B, S) are for its encoder.
        """
        lengths = self._lengths.clamp(min=1)
        width = int(lengths.max())
        inputs = {
            "input_ids": self.input_ids[:, :width],
            "attention_mask": _prefix_mask(lengths, width).long(),
        }
        if self.encoder is not None:
            inputs = {f"decoder_{name}": rows for name, rows in inputs.items()}
            inputs |= {"input_ids": self.encoder.ids, "attention_mask": self.encoder.mask}
        return self._with_positions(inputs, torch.arange(len(self)) * width)

    @cached_property
    def packed(self) -> tuple[dict[str, Tensor], Tensor]:
        """Several sequences per row, about `ROW_TOKENS` tokens together, with little padding.

        Returns:
            `input_ids` and `position_ids` (b, t), where positions start at 0 for each sequence, and
            the (N,) flat positions that predict `flat_targets`. Sequences without targets, and
            tokens that predict nothing, are left out.
        """
        lengths = self._lengths
        if not lengths.any():
            lengths = torch.ones_like(lengths)  # a model needs some input
        rows, offsets = balanced_rows(lengths.tolist(), max(ROW_TOKENS, int(lengths.max())))
        row, offset = torch.tensor(rows), torch.tensor(offsets)
        width = int((offset + lengths).max())
        starts = row * width + offset
        tokens = _prefix_mask(lengths, self.input_ids.shape[1])
        columns = torch.arange(tokens.shape[1]).expand_as(tokens)
        places = (starts.unsqueeze(1) + columns)[tokens]
        shape = (int(row.max()) + 1, width)
        input_ids = torch.zeros(shape, dtype=torch.long)
        position_ids = torch.zeros(shape, dtype=torch.long)  # each padding token by itself
        input_ids.view(-1)[places] = self.input_ids[tokens]
        position_ids.view(-1)[places] = columns[tokens]
        return self._with_positions({"input_ids": input_ids, "position_ids": position_ids}, starts)

    @cached_property
    def packed_mask(self) -> Tensor:
        """(b, 1, t, t) True where a token of a row of `packed` may attend to another."""
        return block_mask(self.packed[0]["position_ids"])

    def _with_positions(
        self, inputs: dict[str, Tensor], starts: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Rows on `device`, and the flat positions of `sources`; sequences begin at `starts`."""
        positions = (starts.unsqueeze(1) + self.sources)[self._counted]
        inputs = {key: send(value, self.device) for key, value in inputs.items()}
        return inputs, send(positions, self.device)

    def length_groups(self, switch: int | None, *, equal: bool) -> list[Tensor]:
        """Groups of sequences for separate forwards, as (b,) indices of each.

        Args:
            switch: sequences longer than this form a group; None for no such length.
            equal: each group holds sequences of one length only.
        """
        lengths = self._lengths
        keys = lengths if equal else lengths > (switch or lengths.max())
        if equal and self.encoder is not None:
            keys = keys + self.encoder.lengths * (int(lengths.max()) + 1)
        return [(keys == key).nonzero().squeeze(1) for key in keys.unique()]

    def flat_places(self, indices: Tensor) -> Tensor:
        """(n,) places in `flat_targets` of the tokens of the sequences at `indices`."""
        starts = self.counts.cumsum(0) - self.counts
        places = [torch.arange(int(self.counts[i])) + starts[i] for i in indices]
        return send(torch.cat(places), self.device)

    def to_grid(self, flat: Tensor) -> Tensor:
        """(N,) numbers, one for each token that counts -> (B, R), zero outside the mask."""
        empty = flat.new_zeros(self.targets.numel())
        return empty.index_copy(0, self.cells, flat).view(self.targets.shape)

    def flat(self, grid: Tensor) -> Tensor:
        """(B, R) -> (N,), the inverse of `to_grid`."""
        return grid.flatten()[self.cells]

    def to_rows(self, grid: Tensor) -> Tensor:
        """(B, R) -> (B, T - 1) in TRL's layout: column t belongs to token t + 1; zero elsewhere."""
        rows = grid.new_zeros(len(self), max(self.input_ids.shape[1] - 1, 1))
        index = send(self.sources * self._counted, self.device)
        return rows.scatter_add(1, index, grid * self.mask)


def balanced_rows(lengths: Sequence[int], target: int) -> tuple[list[int], list[int]]:
    """Distribute sequences over rows of about `target` tokens.

    For a number of rows, the row length starts at its lower bound and grows by one until the
    sequences fit, by best fit in order of decreasing length (Coffman, Garey and Johnson 1978, "An
    application of bin-packing to multiprocessor scheduling"). Sequences without tokens are put at
    the start of row 0.

    Returns:
        Row and first column of each sequence.
    """
    count = max(round(sum(lengths) / target), 1)
    return min((_rows(lengths, count), _rows(lengths, count + 1)), key=lambda rows: rows[2])[:2]


def _rows(lengths: Sequence[int], count: int) -> tuple[list[int], list[int], int]:
    """Row and first column of each sequence in `count` rows, and the places in these rows."""
    order = sorted((i for i in range(len(lengths)) if lengths[i]), key=lambda i: -lengths[i])
    width = max(-(-sum(lengths) // count), max(lengths))
    while (fit := _best_fit(lengths, order, count, width)) is None:
        width += 1
    return *fit, count * width


def _best_fit(
    lengths: Sequence[int], order: list[int], count: int, width: int
) -> tuple[list[int], list[int]] | None:
    """Row and first column of each sequence in `count` rows of `width`; None if they do not fit."""
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
