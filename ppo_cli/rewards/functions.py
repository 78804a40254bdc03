"""Python functions as rewards: loaded from a file or a module, called with keywords by name.

The names are `texts`, `queries`, `responses`, `messages` and the columns of the data. `prompts`,
`completions` and `completion_ids` are those of TRL's reward functions, in their forms: texts, or
lists of messages where the data has conversations.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ppo_cli.config.functions import function_file, function_parts, is_file
from ppo_cli.errors import ModelError, UsageError, did_you_mean, is_out_of_memory
from ppo_cli.rewards.batch import MESSAGES, RewardBatch
from ppo_cli.utils.text import shortened

Value = float | None
OWN_NAMES = ("texts", "queries", "responses", "prompts", "completions", "completion_ids")


class FunctionReward:
    """A function's numbers for a batch of texts.

    Args:
        function: takes keywords by name and returns B numbers, each None where it does not apply;
            it may be `async`.
        name: its name in messages.
        file: the file whose line an error's message names; None for that of the function.
    """

    def __init__(self, function: Callable[..., Any], name: str, file: str | None = None) -> None:
        self._function = function
        self._file = file or _source_of(function)
        self.name = name
        self._arguments = _parameters(function, name)

    def __call__(self, batch: RewardBatch) -> list[Value]:
        """Its values, a None where it does not apply.

        Raises:
            UsageError: it needs a column that the data has not.
            ModelError: it raises, or does not return a finite number or None for each text.
        """
        arguments = self._keywords(batch)
        with _faults(self.name, self._file), redirect_stdout(sys.stderr), torch.no_grad():
            values = self._function(**arguments)
            if inspect.isawaitable(values):
                values = self._loop.run(_awaited(values))
        return numbers(values, len(batch.texts), f"the reward function {self.name}", self._file)

    def _keywords(self, batch: RewardBatch) -> dict[str, Any]:
        names, required, takes_all = self._arguments
        known = [*dict.fromkeys([*OWN_NAMES, *batch.columns])]
        if missing := [name for name in required if name not in known]:
            raise UsageError(
                f"the reward function {self.name} ({self._file}) needs '{missing[0]}', which the "
                f"data has not.{did_you_mean(missing[0], known)} There are {', '.join(known)}"
            )
        return {name: _argument(batch, name) for name in known if takes_all or name in names}

    @cached_property
    def _loop(self) -> asyncio.Runner:
        """One event loop for all calls, to which a client that the function keeps may belong."""
        return asyncio.Runner()


def load_function(spec: str) -> FunctionReward:
    """Run the code of a file or module and take a function of it.

    Args:
        spec: `FILE.py:FUNCTION` or `package.module:FUNCTION`.

    Raises:
        UsageError: there is no such file, module or function.
        ModelError: its code raises.
    """
    place, name = function_parts(spec)
    file = function_file(spec)
    if file is None:
        raise UsageError(
            f"{place}: no such {'file' if is_file(spec) else 'module'} for the reward function "
            f"{name}: give FILE.py:FUNCTION or package.module:FUNCTION"
        )
    with _faults(name, str(file)), redirect_stdout(sys.stderr):
        module = _run_file(file) if is_file(spec) else _import(place)
    function = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        found = f"{file} has no function '{name}'.{did_you_mean(name, functions)}"
        raise UsageError(
            f"{found} It has {', '.join(functions)}" if functions else f"{found} It has none"
        )
    return FunctionReward(function, name, str(file))


def _run_file(file: Path) -> Any:
    """Run a file as a module of its own; its folder is importable meanwhile, as for a script."""
    name = f"ppo_cli_reward_{file.stem}_{abs(hash(str(file.absolute())))}"
    found = importlib.util.spec_from_file_location(name, file)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickle look there
    with _importable(str(file.absolute().parent)):
        found.loader.exec_module(module)
    return module


def _import(module: str) -> Any:
    with _importable(os.getcwd()):
        return importlib.import_module(module)


@contextmanager
def _importable(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _parameters(function: Callable[..., Any], name: str) -> tuple[set[str], list[str], bool]:
    """Names that a function takes, those that it needs, and whether it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise UsageError(f"the reward function {name} has no signature: wrap it in one") from error
    names, required = set(), []
    for parameter in parameters:
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise UsageError(
                f"the reward function {name} takes '{parameter.name}' by position: it is called "
                "with keywords, so take it by name"
            )
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            names.add(parameter.name)
            if parameter.default is parameter.empty:
                required.append(parameter.name)
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return names, required, takes_all


def _argument(batch: RewardBatch, name: str) -> Any:
    """What a function gets under a name, in lists of its own that it may change."""
    is_chat = bool(batch.columns.get(MESSAGES))
    if name == "prompts":
        return batch.conversations if is_chat else list(batch.queries)
    if name == "completions":
        answers = [[{"role": "assistant", "content": text}] for text in batch.responses]
        return answers if is_chat else list(batch.responses)
    if name == "completion_ids":
        return [ids.tolist() for ids in batch.response_ids or ()]
    return list(getattr(batch, name) if name in OWN_NAMES else batch.columns[name])


async def _awaited(value: Any) -> Any:
    return await value


def numbers(values: Any, count: int, what: str, place: str) -> list[Value]:
    """`count` finite numbers or None.

    Raises:
        ModelError: `values` are others.
    """
    if not isinstance(values, (list, tuple)):
        values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, (list, tuple)):
        raise ModelError(
            f"{what} ({place}) returned {shortened(repr(values), 60)}: return a list with a number "
            "or None for each text"
        )
    if len(values) != count:
        raise ModelError(
            f"{what} ({place}) returned {len(values)} values for {count} texts: return one for each"
        )
    found: list[Value] = []
    for i, value in enumerate(values):
        try:
            number = None if value is None else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, (str, bytes)) or (number is not None and not math.isfinite(number)):
            raise ModelError(
                f"{what} ({place}) returned {shortened(repr(value), 60)} for text {i + 1} of "
                f"{count}: return a finite number, or None where it does not apply"
            )
        found.append(number)
    return found


@contextmanager
def _faults(name: str, file: str) -> Iterator[None]:
    """Turn what a user's code raises into one message with its file and line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own = [
            frame for frame in frames if os.path.abspath(frame.filename) == os.path.abspath(file)
        ]
        line = f", line {own[-1].lineno}" if own else ""
        if isinstance(error, SyntaxError) and error.lineno and not own:
            line = f", line {error.lineno}"
        message = shortened(" ".join(str(error).split()), 200) or "no message"
        raise ModelError(
            f"{file}{line}: the reward function {name} raised {type(error).__name__} ({message})"
        ) from error


def _source_of(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsourcefile(function) or "no file"
    except TypeError:
        return "no file"
