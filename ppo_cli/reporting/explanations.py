"""What `stats --explain` says of the keys of the statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ppo_cli.errors import UsageError, did_you_mean
from ppo_cli.evaluation.quality import MEASURES, all_statistics
from ppo_cli.ppo.statistics import TERM, Statistic
from ppo_cli.reporting.layout import Explained, cell

ALL = "all"
POINTER = "what a figure means: ppo-cli stats --explain KEY (or the name of a measure, such as KL)"


def explained(names: Iterable[str]) -> dict[str, Statistic]:
    """The statistics that are named: by key, by a measure's name as tables have it, or `all`.

    Raises:
        UsageError: there is none of that name.
    """
    known = all_statistics()
    measures = {name: f"eval/{m.key}" for m in MEASURES for name in (m.key, m.name.lower())}
    found: dict[str, Statistic] = {}
    for name in names:
        key = measures.get(name.lower(), name)
        if name == ALL:
            found |= known
        elif (of_all := TERM.sub("NAME", key)) in known:
            found[key] = known[of_all]
        else:
            near = did_you_mean(name, [*known, *measures])
            raise UsageError(f"no statistic is called '{name}'.{near} '--explain all' lists them")
    return found


def explanations(
    statistics: Mapping[str, Statistic], values: Mapping[str, float]
) -> list[RenderableType]:
    """A block for each statistic, or for all of them a list.

    Args:
        statistics: by key.
        values: what they are in a run, by key; empty without one.
    """
    if statistics.keys() >= all_statistics().keys():
        return [Explained([(key, "", about.meaning) for key, about in statistics.items()])]
    parts: list[RenderableType] = []
    for key, about in statistics.items():
        grid = Table.grid(padding=(0, 2, 0, 0))
        for name, text in as_dict(about, values.get(key)).items():
            shown = text if isinstance(text, str) else f"{text:.5g}"
            grid.add_row(cell(name.replace("_", " "), style="dim"), cell(shown))
        parts += [Text("")] if parts else []
        parts += [cell(key, style="bold"), Padding(grid, (0, 0, 0, 2))]
    return parts


def as_dict(about: Statistic, value: float | None) -> dict[str, Any]:
    """What is known of a statistic, and its value in a run unless that is None."""
    texts = {
        "meaning": f"{about.meaning}. {about.detail}" if about.detail else about.meaning,
        "unit": about.unit,
        "formula": about.formula,
        "healthy": about.healthy,
        "if_not": about.remedy,
    }
    known: dict[str, Any] = {name: text for name, text in texts.items() if text}
    return known if value is None else known | {"value": value}
