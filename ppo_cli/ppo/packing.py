"""Ragged queries and responses -> rectangular token rows and the positions that count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class TokenBatch:
    """B sequences of query and response, as a model reads them.

    Rows are padded on the right whatever side the tokenizer pads, so that positions and with them
    log-probabilities do not depend on it. Response tokens that a mask leaves out are read as
    context but do not count: they have no place in the (B, R) grids.

    Attributes:
        input_ids: (B, T) query, response, padding.
        attention_mask: (B, T) 1 for tokens, 0 for padding.
        targets: (B, R) the response tokens that count, moved to the left.
        sources: (B, R) column of `input_ids` just before each target, where it is predicted.
        mask: (B, R) True where there is a target.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    sources: Tensor
    mask: Tensor

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
        for i, (query, response) in enumerate(zip(queries, responses, strict=True)):
            if query.numel() == 0:
                raise ValueError(f"query {i} has no tokens: begin it with the bos token")
            counts = torch.ones_like(response, dtype=torch.bool)
            if response_masks is not None:
                counts = response_masks[i].bool()
                if counts.shape != response.shape:
                    raise ValueError(
                        f"response mask {i} has shape {tuple(counts.shape)}, "
                        f"its response {tuple(response.shape)}"
                    )
            rows.append(torch.cat([query, response]))
            targets.append(response[counts])
            sources.append(counts.nonzero().squeeze(1) + query.numel() - 1)
        lengths = torch.tensor([row.numel() for row in rows])
        counted = torch.tensor([target.numel() for target in targets])
        return cls(
            input_ids=pad_sequence(rows, True, pad_token_id).to(device),
            attention_mask=_prefix_mask(lengths, int(lengths.max())).long().to(device),
            targets=pad_sequence(targets, True, 0).to(device),
            sources=pad_sequence(sources, True, 0).to(device),
            mask=_prefix_mask(counted, int(counted.max())).to(device),
        )

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def select(self, indices: Tensor) -> TokenBatch:
        """The sequences at `indices` (b,), cut to the longest of them."""
        width = int(self.attention_mask[indices].sum(1).max())
        counted = int(self.mask[indices].sum(1).max())
        return TokenBatch(
            self.input_ids[indices, :width],
            self.attention_mask[indices, :width],
            self.targets[indices, :counted],
            self.sources[indices, :counted],
            self.mask[indices, :counted],
        )

    @property
    def flat_sources(self) -> Tensor:
        """(N,) the positions of `sources` in `input_ids` laid out flat, sequence by sequence."""
        rows = torch.arange(len(self), device=self.sources.device).unsqueeze(1)
        return (rows * self.input_ids.shape[1] + self.sources)[self.mask]

    @property
    def flat_targets(self) -> Tensor:
        """(N,) the tokens of `targets`, sequence by sequence."""
        return self.targets[self.mask]

    def to_grid(self, flat: Tensor) -> Tensor:
        """(N,) numbers, one a counted token -> (B, R), zero outside the mask."""
        return flat.new_zeros(self.mask.shape).masked_scatter(self.mask, flat)

    def to_rows(self, grid: Tensor) -> Tensor:
        """(B, R) -> (B, T - 1) as TRL lays it out: at t what concerns token t + 1; else zero."""
        rows = grid.new_zeros(len(self), max(self.input_ids.shape[1] - 1, 1))
        index = torch.where(self.mask, self.sources, 0)
        return rows.scatter_add(1, index, grid * self.mask)


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
