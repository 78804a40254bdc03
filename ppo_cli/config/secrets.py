"""Passwords and tokens in a configuration: found, and hidden in messages."""

from __future__ import annotations

import re
from typing import Any

from ppo_cli.errors import SECRET

# Ends of the names of secrets, in lower case with underscores: `token`, but not `pad_token`.
SECRET_KEY = re.compile(
    r"(^|_)(pass(word|wd|phrase|code)s?|pwd|secrets?|credentials?|bearer|o?auth|authorization|cookies?"
    r"|api_?keys?|(access|secret|private|account|encryption|signing|ssh)_?keys?(_id)?"
    r"|(access|api|auth|secret)_?tokens"
    # but no token of a tokenizer
    r"|(?<!(?:pad|eos|bos|unk|sep|cls|end|per|new)_)(?<!(?:mask|stop|last|next)_)"
    r"(?<!(?:image|audio|video|start|begin|first)_)(?<!special_)token)(_?\d+)?$"
)
HIDDEN = "***"
KEY_OF = re.compile(r"[\w-]+(?=[\"']?\s*[:=])")  # in text that is not parsed
HEX_KEY = re.compile(r"\b[0-9a-f]{40}\b")  # of wandb, for example; a commit's hash looks the same


def find_secret(value: Any, keys: tuple[str, ...] = (), named: bool = False) -> tuple[str, ...]:
    """The keys, outermost first, of the first secret in `value`; () if there is none.

    Args:
        value: nested dictionaries and lists.
        keys: the keys that lead to `value`.
        named: whether one of `keys` is a secret's name, so that every value here is a secret.
    """
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            inner = (*keys, str(key))
            if SECRET.search(str(key)):
                return inner
            if found := find_secret(item, inner, named or _is_secret_name(str(key))):
                return found
        return ()
    if value in (None, "") or isinstance(value, bool):
        return ()
    hexadecimal = HEX_KEY.search(str(value)) and "key" in "".join(keys).lower()
    return keys if named or hexadecimal or SECRET.search(str(value)) else ()


def is_secret(value: Any, keys: tuple[str, ...]) -> bool:
    """Whether `value`, found under `keys`, looks like a secret or holds one."""
    return bool(find_secret(value, keys, any(map(_is_secret_name, keys))))


def without_secret_values(value: Any, keys: tuple[str, ...] = ()) -> Any:
    """`value`, nested dictionaries and lists, with `***` for each value that may be a secret."""
    if isinstance(value, dict):
        return {k: without_secret_values(v, (*keys, str(k))) for k, v in value.items()}
    if isinstance(value, list):
        return [without_secret_values(item, (*keys, str(i))) for i, item in enumerate(value)]
    return HIDDEN if is_secret(value, keys) else value


def shown_assignment(name: str, value: str) -> str:
    """`--set name=value` for a message, its value hidden where it may be a secret."""
    text = f"{name}={value}"
    secret = find_secret(value, (name,)) or any(map(_is_secret_name, KEY_OF.findall(text)))
    return f"--set {name}={HIDDEN if secret else value}"


def _is_secret_name(name: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", "_", name)  # apiKey, api-key: api_key
    return SECRET_KEY.search(words.lower()) is not None
