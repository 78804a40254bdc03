"""What `doctor` found on a machine, and its tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ppo_cli.reporting.layout import cell


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, and what to do.

    Attributes:
        what, remedy: for users.
        stops: whether no run can be made because of it.
    """

    what: str
    remedy: str
    stops: bool = True


@dataclass(frozen=True)
class Feature:
    """An optional part of the program.

    Attributes:
        extra: the extra of the package that installs it.
        purpose: what it is for.
        missing: packages that are not installed, or not in a version that works.
    """

    extra: str
    purpose: str
    missing: Sequence[str]

    @property
    def status(self) -> str:
        """That it is installed, or how to install it."""
        if not self.missing:
            return "installed"
        return f"missing {', '.join(self.missing)}: pip install 'ppo-cli[{self.extra}]'"


@dataclass(frozen=True)
class MachineReport:
    """Facts by heading and name, optional parts, and problems."""

    facts: Mapping[str, Mapping[str, Any]]
    features: Sequence[Feature]
    problems: Sequence[Problem]

    @property
    def can_train(self) -> bool:
        """Whether no problem stops every run."""
        return not any(problem.stops for problem in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"can_train": self.can_train, **dataclasses.asdict(self)}


def machine_tables(report: MachineReport) -> list[RenderableType]:
    """A table for each heading, then the problems."""
    rows = {heading: dict(facts) for heading, facts in report.facts.items()}
    rows["optional"] = {f"{f.extra} ({f.purpose})": f.status for f in report.features}
    parts: list[RenderableType] = []
    for heading, facts in rows.items():
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(min_width=16)
        table.add_column()
        for name, value in facts.items():
            table.add_row(cell(name), cell(_shown(value)))
        parts += [Text(heading, style="bold"), table, Text("")]
    parts.append(Text("problems" if report.problems else "no problems found", style="bold"))
    for problem in report.problems:
        kind = "no run is possible" if problem.stops else "warning"
        parts.append(cell(f"{kind}: {problem.what}; {problem.remedy}"))
    return parts


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
