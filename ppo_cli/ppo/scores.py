"""From what a text promises to the score that may be expected: potentials, calibrated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DECAY = 0.9
"""What an observation counts a step later: the policy moves, and what its texts come to with it."""
PRIOR = 30.0
"""Observations that the line of the position after counts as."""


class PotentialCalibration:
    """Lines that turn potentials into expected scores, one for each number of tokens before.

    As a potential nothing serves better than the expected score itself: then what a token changes
    is known at once, and a low lambda keeps out what later tokens add by chance. The score of an
    unfinished text exaggerates, the more the less of it is there (film reviews: the slope of the
    final score on it is 0.4 before the first of 15 tokens, 0.95 before the last). A least-squares
    line takes that away; it is drawn towards that of the position after, and the last one towards
    the potential as it is, so that few observations do no harm.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(0, 5, dtype=torch.float64)  # n, x, y, x * x, x * y by position

    def update(
        self,
        potentials: Tensor,
        scores: Tensor,
        mask: Tensor,
        total: Callable[[Tensor], Tensor] = lambda sums: sums,
    ) -> None:
        """Take in a batch.

        Args:
            potentials: (B, R), 0 outside the mask.
            scores: (B,).
            mask: (B, R).
            total: adds up (R, 5), on the CPU, over the processes of a distributed run, each with
                its own R.
        """
        # On the CPU, as not every device has float64.
        counts = mask.cpu().double()
        x = potentials.cpu().double() * counts
        y = scores.cpu().double().unsqueeze(1) * counts
        terms = torch.stack([counts, x, y, x * x, x * y], dim=-1)
        batch = total(terms.sum(0)).cpu()
        sums = DECAY * self._sums
        rows = max(len(sums), len(batch))
        self._sums = _longer(sums, rows) + _longer(batch, rows)

    def __call__(self, potentials: Tensor, mask: Tensor) -> Tensor:
        """Expected scores (B, R) of potentials (B, R), 0 outside the mask; `update` comes first."""
        lines = torch.tensor(self.lines()[: potentials.shape[1]]).to(potentials)
        return (lines[:, 0] + lines[:, 1] * potentials) * mask

    def lines(self) -> list[tuple[float, float]]:
        """Offset and slope for each number of tokens before, from 0 up."""
        offset, slope = 0.0, 1.0
        found = []
        for n, x, y, xx, xy in reversed(self._sums.tolist()):
            if n > 0:
                weight = n / (n + PRIOR)
                variance = xx / n - (x / n) ** 2
                if variance > 1e-9 * xx / n:  # else the same everywhere, but for rounding
                    slope += weight * ((xy / n - x / n * y / n) / variance - slope)
                offset += weight * (y / n - slope * x / n - offset)
            found.append((offset, slope))
        return found[::-1]

    def state_dict(self) -> dict[str, Any]:
        """What was taken in, for a checkpoint."""
        return {"sums": self._sums.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._sums = torch.tensor(state["sums"], dtype=torch.float64).reshape(-1, 5)


def _longer(sums: Tensor, rows: int) -> Tensor:
    return torch.nn.functional.pad(sums, (0, 0, 0, rows - len(sums)))
