"""What a run's statistics say that its user should know: what was seen, what it means, what to do.

Each rule speaks once a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ppo_cli.config.schema import RunConfig
from ppo_cli.training import symptoms
from ppo_cli.training.symptoms import BEGINNING, FEWEST_AT_END, MEMORY, History, Row


@dataclass(frozen=True)
class Rule:
    """One thing to look out for.

    Attributes:
        name: what it is known by.
        needs: steps before it has anything to say.
        find: history and configuration -> the advice, None where there is nothing to say.
    """

    name: str
    needs: int
    find: Callable[[History, RunConfig], str | None]


RULES = (
    Rule("negative KL", 3, symptoms.negative_kl),
    Rule("foreign samples", MEMORY, symptoms.foreign_samples),
    Rule("skips", 1, symptoms.skips),
    Rule("large updates", 3, symptoms.large_updates),
    Rule("far away", 3, symptoms.far_away),
    Rule("value head", 2 * MEMORY, symptoms.value_head),
    Rule("entropy", 2 * BEGINNING, symptoms.entropy),
    Rule("equal scores", 5, symptoms.equal_scores),
    Rule("short", 2 * BEGINNING, symptoms.short),
    Rule("no end", 5, symptoms.no_end),
)
CLOSING_RULES = (
    Rule("count of skips", 2, symptoms.count_skips),
    Rule("climbing", FEWEST_AT_END, symptoms.climbing),
    Rule("no gain", FEWEST_AT_END, symptoms.no_gain),
)


class Adviser:
    """Follows a run and says what its statistics mean, each thing once.

    Args:
        config: of the run; its settings are named in the remedies.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._history = History()
        self._said: set[str] = set()

    def take(self, row: Row) -> list[str]:
        """A step's statistics -> what is to be said for the first time."""
        self._history.add(row)
        advice = self._new(RULES)
        return [f"step {self._history.step}: {text}" for text in advice]

    def recall(self, rows: Iterable[Row]) -> None:
        """Begin anew with steps that were made, and advised on, before."""
        self._history = History()
        for row in rows:
            if all(key in row for key in symptoms.READ):
                self.take(row)

    def closing(self) -> list[str]:
        """What is to be said at the end of a run that made all of its steps."""
        return self._new(CLOSING_RULES)

    def _new(self, rules: Iterable[Rule]) -> list[str]:
        found = []
        for rule in rules:
            if rule.name in self._said or self._history.count < rule.needs:
                continue
            if (advice := rule.find(self._history, self._config)) is not None:
                self._said.add(rule.name)
                found.append(advice)
        return found
