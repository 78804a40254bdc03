"""The arguments of `PPOTrainer.step`, checked and laid out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppo_cli.ppo.packing import TokenBatch
from ppo_cli.utils import processes


class StepInputs(NamedTuple):
    """A batch to learn from: its tokens, scores (B,), and potentials (B, R) or None."""

    tokens: TokenBatch
    scores: Tensor
    potentials: Tensor | None


def step_inputs(
    queries: list[Tensor],
    responses: list[Tensor],
    scores: list[Tensor],
    response_masks: list[Tensor] | None,
    potentials: list[Tensor] | None,
    *,
    batch_size: int,
    pad_token_id: int | None,
    device: torch.device,
    decoder_start: int | None = None,
) -> StepInputs:
    """Check and lay out the arguments of `PPOTrainer.step`, which describes them.

    Args:
        batch_size: of this process.
        pad_token_id: fills up shorter rows.
        device: of the grids.
        decoder_start: token with which responses of an encoder-decoder begin; None for others.

    Returns:
        The batch of all processes, in their order.

    Raises:
        ValueError: as in `PPOTrainer.step`, on all processes where it is raised on one.
    """
    lists = (queries, responses, response_masks, potentials)
    parts = processes.gather_from(_own_part, lists, scores, batch_size, decoder_start)
    queries, responses, response_masks, potentials = (
        _joined([part[i] for part, _ in parts]) for i in range(len(lists))
    )
    score_tensor = torch.cat([part for _, part in parts])
    tokens = TokenBatch.from_lists(
        queries, responses, response_masks, pad_token_id or 0, device, decoder_start
    )
    if not tokens.counts.any():
        raise ValueError("no response token counts: responses are empty or masked throughout")
    grid = potentials_grid(tokens, potentials, responses, response_masks)
    return StepInputs(tokens, score_tensor.to(device), grid)


def _own_part(
    lists: Sequence[list[Tensor] | None],
    scores: list[Tensor],
    batch_size: int,
    decoder_start: int | None,
) -> tuple[list[list[Tensor] | None], Tensor]:
    """This process's part of the batch, checked; on the CPU where others are to get it."""
    queries, responses, response_masks, _ = lists
    checked = checked_batch(queries, responses, scores, response_masks, batch_size)
    if decoder_start is not None:
        check_starts(responses or (), decoder_start)
        lists = [queries, *(rows and [row[1:] for row in rows] for rows in lists[1:])]
    if processes.count() == 1:
        return [*lists], checked
    sent = [tensors and [tensor.detach().cpu() for tensor in tensors] for tensors in lists]
    return sent, checked


def _joined(parts: Sequence[list[Tensor] | None]) -> Any:
    """The processes' lists of tensors as one; None where they have none."""
    lists = [part for part in parts if part is not None]
    if lists and len(lists) < len(parts):
        raise ValueError("response_masks and potentials are given by all processes, or by none")
    return [tensor for part in lists for tensor in part] if lists else None


def as_rows(tensors: Any) -> Any:
    """Tensors without a dimension, as `squeeze()` makes them of one token, with one."""
    if not isinstance(tensors, list):
        return tensors
    return [
        row.reshape(1) if isinstance(row, Tensor) and row.dim() == 0 else row for row in tensors
    ]


def check_ids(rows: Tensor, vocabulary: int | None, name: str) -> None:
    """Raise `ValueError` where rows (B, T) hold ids that the model has no embedding for.

    Args:
        rows: token ids.
        vocabulary: number of ids of the model; None where it is not known.
        name: of the rows, for the message.
    """
    wrong = rows < 0
    if vocabulary is not None:
        wrong = wrong | (rows >= vocabulary)
    if wrong.any():
        i, place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name} {i}: the token id {int(rows[i, place])} is not in the model's vocabulary of "
            f"{vocabulary}: use the model's tokenizer, or resize_token_embeddings for new tokens"
        )


def checked_batch(
    queries: Any, responses: Any, scores: Any, response_masks: Any, batch_size: int
) -> Tensor:
    """Check the form of the batch passed to `step()`. Returns the scores as a (B,) float32 tensor.

    Raises:
        ValueError: an argument is not a list of `batch_size` tensors of at most one dimension, or a
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
            is_ids = name in ("queries", "responses")
            if is_ids and (item.is_floating_point() or item.dtype == torch.bool):
                raise ValueError(f"{name} must be token ids, integers - got {item.dtype}")
    for i, score in enumerate(scores):
        if score.numel() != 1 or not bool(score.isfinite().all()):
            raise ValueError(f"scores[{i}] must be one finite number - got {score.tolist()}")
    return torch.stack([score.detach().reshape(()).float().cpu() for score in scores])


def check_starts(responses: Sequence[Tensor], decoder_start: int) -> None:
    """Raise `ValueError` where a response does not begin with the decoder's start token."""
    for i, response in enumerate(responses):
        if response.dim() != 1 or response[:1].tolist() != [decoder_start]:
            raise ValueError(
                f"responses[{i}] must begin with the decoder's start token ({decoder_start}), as "
                f"`generate` returns it - got {response.flatten()[:3].tolist()}"
            )


def potentials_grid(
    tokens: TokenBatch,
    potentials: Sequence[Tensor] | None,
    responses: Sequence[Tensor],
    response_masks: Sequence[Tensor] | None,
) -> Tensor | None:
    """B tensors with a number for each response token -> (B, R), without tokens that do not count.

    Raises:
        ValueError: a tensor has another length than its response, or a number is not finite.
    """
    if potentials is None:
        return None
    if len(potentials) != len(tokens):
        raise ValueError(f"potentials must be {len(tokens)} tensors - got {len(potentials)}")
    for i, (row, response) in enumerate(zip(potentials, responses, strict=True)):
        if row.shape != response.shape or not bool(row.isfinite().all()):
            raise ValueError(
                f"potentials[{i}] must be {len(response)} finite numbers, one a response token - "
                f"got shape {tuple(row.shape)}"
            )
    flat = torch.cat([row.detach().float().cpu() for row in potentials])
    if response_masks is not None:
        flat = flat[torch.cat([mask.bool().cpu() for mask in response_masks])]
    return tokens.to_grid(flat.to(tokens.device))
