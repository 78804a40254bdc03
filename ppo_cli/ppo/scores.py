"""What happens to scores before they become rewards: scaling, clipping, calibrated potentials."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppo_cli.config.ppo import PPOSettings

DECAY = 0.9
"""Weight of an observation one step later: the policy changes, and its texts with it."""
SMALLEST_STD = torch.finfo(torch.float32).eps
"""Scores with a standard deviation of no more than this count as equal."""
PRIOR = 30.0
"""Observations that the line of the next position counts as."""


class RunningMoments:
    """Mean and standard deviation of all scores so far.

    Source: Chan et al. 1979, "Updating formulae and a pairwise algorithm for computing sample
    variances". The count starts at 1e-24, as in TRL, so that nothing is divided by zero.
    """

    def __init__(self) -> None:
        self.mean = 0.0
        self.std = 1.0
        self.var = 1.0
        self.count = 1e-24

    def update(self, values: Tensor) -> tuple[float, float]:
        """Add `values` (N,). Returns their own mean and unbiased standard deviation."""
        values = values.cpu().double()  # not every device has float64
        count = values.numel()
        mean = values.mean().item()
        var = values.var(unbiased=False).item()
        delta = mean - self.mean
        total = self.count + count
        squares = var * count + self.var * self.count + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.var = squares / total
        self.std = (squares / max(total - 1, 1)) ** 0.5
        self.count = total
        return mean, (var * count / max(count - 1, 1)) ** 0.5

    def is_settled(self, config: PPOSettings) -> bool:
        """Whether there are as many scores as `score_scaling_samples` asks for, and they differ."""
        wanted = config.score_scaling_samples
        return wanted is not None and self.count >= wanted and self.std > SMALLEST_STD

    def state_dict(self) -> dict[str, float]:
        """The four moments, for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a `state_dict`."""
        vars(self).update(state)


def scale_scores(scores: Tensor, moments: RunningMoments, config: PPOSettings) -> Tensor:
    """Scores, or potentials, scaled and clipped as `config` says.

    With `use_score_scaling`: `(s - mean) / std`, the mean only with `use_score_norm`; then
    `score_clip`. Equal scores have no scale, so they are not divided.

    Args:
        scores: any shape.
        moments: of the scores so far, those of this step included.
        config: `use_score_scaling`, `use_score_norm` and `score_clip` are read.
    """
    if config.use_score_scaling:
        if config.use_score_norm:
            scores = scores - moments.mean
        eps = torch.finfo(scores.dtype).eps
        if moments.std > eps:
            scores = scores / (moments.std + eps)
    clip = config.score_clip
    return scores if clip is None else scores.clamp(-clip, clip)


class PotentialCalibration:
    """Linear regressions from potentials to final scores, one for each number of tokens before.

    The best potential is the expected final score: then the effect of a token shows at once, and a
    low lambda keeps out the noise of later tokens. The score of an unfinished text is too extreme,
    more so the shorter the text is (film reviews: the slope of the final score on it is 0.4 before
    the first of 15 tokens, 0.95 before the last). A least-squares line corrects that. Each line is
    drawn towards the line of the next position, and the last one towards the identity, so that few
    observations do no harm.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(0, 5, dtype=torch.float64)  # n, x, y, x * x, x * y by position

    def update(self, potentials: Tensor, scores: Tensor, mask: Tensor) -> None:
        """Add a batch to the observations.

        Args:
            potentials: (B, R), 0 outside the mask.
            scores: (B,).
            mask: (B, R).
        """
        # On the CPU, as not every device has float64.
        counts = mask.cpu().double()
        x = potentials.cpu().double() * counts
        y = scores.cpu().double().unsqueeze(1) * counts
        terms = torch.stack([counts, x, y, x * x, x * y], dim=-1)
        batch = terms.sum(0)
        sums = DECAY * self._sums
        rows = max(len(sums), len(batch))
        self._sums = _longer(sums, rows) + _longer(batch, rows)

    def __call__(self, potentials: Tensor, mask: Tensor) -> Tensor:
        """Expected scores (B, R) of potentials (B, R), 0 outside the mask; call `update` first."""
        lines = torch.tensor(self.lines()[: potentials.shape[1]]).to(potentials)
        return (lines[:, 0] + lines[:, 1] * potentials) * mask

    def lines(self) -> list[tuple[float, float]]:
        """Offset and slope for each number of tokens before, from 0 up."""
        offset, slope = 0.0, 1.0
        lines = []
        for n, x, y, xx, xy in reversed(self._sums.tolist()):
            if n > 0:
                weight = n / (n + PRIOR)
                variance = xx / n - (x / n) ** 2
                if variance > 1e-9 * xx / n:  # otherwise equal potentials, apart from rounding
                    slope += weight * ((xy / n - x / n * y / n) / variance - slope)
                offset += weight * (y / n - slope * x / n - offset)
            lines.append((offset, slope))
        return lines[::-1]

    def state_dict(self) -> dict[str, Any]:
        """The observations, for a checkpoint."""
        return {"sums": self._sums.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self._sums = torch.tensor(state["sums"], dtype=torch.float64).reshape(-1, 5)


def _longer(sums: Tensor, rows: int) -> Tensor:
    return torch.nn.functional.pad(sums, (0, 0, 0, rows - len(sums)))
