"""What a run will take: its estimate, and the table of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from ppo_cli.reporting.layout import cell


@dataclass(frozen=True)
class Times:
    """Parts of a run, in seconds each, and how often they come."""

    startup: float
    step: float
    steps: int
    evaluation: float
    evaluations: int
    saving: float

    @property
    def total(self) -> float:
        """Seconds from the command to its end."""
        steps, evaluations = self.steps * self.step, self.evaluations * self.evaluation
        return self.startup + steps + evaluations + self.saving


@dataclass(frozen=True)
class Space:
    """Bytes of some memory or of a disk: needed at most, and available."""

    kind: str
    needed: int
    available: int

    @property
    def fits(self) -> bool:
        """Whether there is enough."""
        return self.needed <= self.available


@dataclass(frozen=True)
class Estimate:
    """What the rest of a run takes.

    Attributes:
        samples: responses of all its steps.
        times: None where nothing was measured.
        spaces: memory and disk; memory only where it was measured.
        measured: what the numbers rest on.
        remedies: settings that make the run fit; none where it does.
    """

    samples: int
    steps: int
    times: Times | None
    spaces: Sequence[Space]
    measured: str
    remedies: Sequence[str]

    @property
    def lacking(self) -> list[Space]:
        """What there is too little of."""
        return [space for space in self.spaces if not space.fits]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; times in seconds, spaces in bytes."""
        values = dataclasses.asdict(self)
        if self.times is not None:
            values["times"]["total"] = self.times.total
        values["spaces"] = [
            dataclasses.asdict(space) | {"fits": space.fits} for space in self.spaces
        ]
        return values | {"fits": not self.lacking}


def estimate_table(estimate: Estimate) -> Table:
    """One row for each thing that a run takes."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    steps, samples = estimate.steps, estimate.samples
    table.add_row("steps", f"{steps:,} of {samples // max(steps, 1):,} samples, {samples:,} in all")
    if (times := estimate.times) is not None:
        parts = [
            f"{times.steps:,} x {seconds(times.step)}",
            f"{times.evaluations} evaluations x {seconds(times.evaluation)}",
            f"{seconds(times.startup)} to start",
            f"{seconds(times.saving)} to save",
        ]
        table.add_row("time", f"about {seconds(times.total)}: {', '.join(parts)}")
    for space in estimate.spaces:
        there = "free" if space.kind == "disk" else "available"
        sizes = f"about {size(space.needed)} of {size(space.available)} {there}"
        table.add_row(space.kind, sizes if space.fits else f"{sizes}: too little")
    table.add_row("measured", cell(estimate.measured))
    return table


def seconds(value: float) -> str:
    """A duration in two units at most: `0.42 s`, `1 min 35 s`, `3 h 10 min`."""
    if value < 9.95:
        return f"{value:.2g} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """A number of bytes in MiB or GiB."""
    if count < 2**30:
        return f"{count / 2**20:.0f} MiB"
    return f"{count / 2**30:,.1f} GiB"
