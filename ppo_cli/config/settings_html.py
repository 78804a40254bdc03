"""Settings as HTML for notebooks: those that differ from the defaults first, the others folded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ppo_cli.config.secrets import without_secret_values
from ppo_cli.utils.html import folded, page, table, text
from ppo_cli.utils.text import json_text, shortened

MAX_VALUE = 200  # characters

Groups = Mapping[str, Mapping[str, Any]]
"""Name of a group -> its settings by key."""


def settings_html(title: str, groups: Groups, defaults: Groups) -> str:
    """HTML of settings; a value that may be a secret is not shown.

    Args:
        title: above them.
        groups: all settings.
        defaults: of every key.
    """
    hidden = without_secret_values(groups)
    changed, others = [], []
    for name, values in groups.items():
        for key, value in values.items():
            default = defaults[name][key]
            differs = value != default
            shown = _value(hidden[name][key])
            line = (text(name), text(key, strong=differs), text(shown, strong=differs))
            if differs:
                changed.append((*line, text(_value(without_secret_values(default, (key,))))))
            else:
                others.append(line)
    parts = [table(changed, ("", "differs from its default", "value", "default"), "l")]
    if not changed:
        parts = [text("every value is its default")]
    return page(
        title, *parts, folded(f"{len(others)} keys have their defaults", table(others, (), "l"))
    )


def _value(value: Any) -> str:
    shown = value if isinstance(value, str) else json_text(value, default=str)
    return shortened(shown, MAX_VALUE)
