"""Names in the state of a policy: those of its parameters, and those of TRL and of files."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

BODY, HEAD = "pretrained_model.", "v_head."
"""How the names of a policy's parameters begin."""


class PolicyState(OrderedDict[str, Any]):
    """A policy's state, which is also read by the names that TRL 0.11.4 gave its weights.

    Those are the language model's own, `transformer.wte.weight` for example. It holds, counts and
    saves the names of the parameters alone.
    """

    def __missing__(self, key: str) -> Any:
        if BODY + key not in self:
            raise KeyError(key)
        return self[BODY + key]

    def __reduce__(self) -> Any:
        return OrderedDict(self).__reduce__()  # a file needs no class of this program


def plain_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """A policy's state with the language model's own names for its weights, as in files."""
    return {key.removeprefix(BODY): value for key, value in state.items()}


def take_plain_names(policy: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Rename, in a state that is being loaded, weights with the language model's own names.

    That is how TRL and earlier releases named them.
    """
    own = {*cast(nn.Module, policy.pretrained_model).state_dict(keep_vars=True)}
    for key in [key for key in state if key.startswith(prefix)]:
        if (name := key.removeprefix(prefix)) in own:
            state[prefix + BODY + name] = state.pop(key)
