"""`SweepConfig`, the settings of a sweep: which keys of a configuration vary, and how.

It knows nothing of the keys themselves: `sweep_loading.py` tries them on a configuration.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from ppo_cli.config.section import MAX_COUNT, Name, Section

SCORE = "eval/score"
MAX_TRIALS = 10_000
MAX_SEEDS = 100
Scalar = bool | int | float | str | None


def _check_number(value: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise ValueError(f"is {json.dumps(value)}: a number is needed")
    return value


def _check_scalars(values: Any) -> Any:
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError("is no list of two values or more: with one value, put the key into set")
    for value in values:
        if not isinstance(value, (str, int, float)) and value is not None:
            raise ValueError(
                f"holds {json.dumps(value)}: the values are numbers, texts, true, false or null"
            )
    if len({json.dumps(value) for value in values}) < len(values):
        raise ValueError("holds a value twice")
    return values


def _choices_of_list(value: Any) -> Any:
    return {"choices": value} if isinstance(value, list) else value


def _check_seeds(value: Any) -> Any:
    numbers = value if isinstance(value, list) else [value]
    if not numbers or any(type(n) is not int or not 0 <= n < 2**32 for n in numbers):
        raise ValueError("is a number of seeds, or a list of seeds from 0 on")
    if not isinstance(value, list) and not 1 <= value <= MAX_SEEDS:
        raise ValueError(f"is {value}: 1 to {MAX_SEEDS} seeds are possible")
    if len(set(numbers)) < len(numbers) or len(numbers) > MAX_SEEDS:
        raise ValueError(f"holds a seed twice, or more than {MAX_SEEDS}")
    return value


def _check_key(key: str) -> str:
    if len(key.split(".")) < 2 or not all(key.split(".")):
        raise ValueError(f"'{key}' is no key: section.key is needed, such as ppo.learning_rate")
    return key


def _check_step(low: float, high: float, step: float) -> None:
    if not 0 < step <= high - low:
        raise ValueError(f"step ({step}) must be above 0 and at most high - low")
    count = (high - low) / step
    if not math.isclose(count, round(count), rel_tol=0, abs_tol=1e-6):
        raise ValueError(
            f"high ({high}) is not reached from low ({low}) in steps of {step}: change one of them"
        )


Number = Annotated[Any, BeforeValidator(_check_number), WithJsonSchema({"type": "number"})]
Key = Annotated[str, AfterValidator(_check_key)]


class Parameter(Section):
    """The values that a key may take: a range of numbers, or a list of values."""

    low: Number | None = None
    """Lowest value."""
    high: Number | None = None
    """Highest value."""
    step: Number | None = None
    """Distance of the values from low on; null for all values (of a whole number: 1)."""
    log: bool = False
    """Draw the logarithm evenly, as suits learning rates and coefficients."""
    choices: Annotated[list[Any], BeforeValidator(_check_scalars)] | None = None
    """The values themselves; a list in place of the range is short for this."""

    @model_validator(mode="after")
    def _whole(self) -> Parameter:
        ends = {"low": self.low, "high": self.high}
        if self.choices is not None:
            if given := [
                k for k in (*ends, "step", "log") if getattr(self, k) not in (None, False)
            ]:
                raise ValueError(f"choices and {given[0]} exclude each other: leave one out")
            return self
        if missing := [key for key, value in ends.items() if value is None]:
            raise ValueError(f"{missing[0]} is missing: give low and high, or a list of values")
        low, high = self.ends
        if low >= high:
            raise ValueError(f"high ({high}) must exceed low ({low})")
        if self.log and low <= 0:
            raise ValueError(f"low ({low}) must be above 0 where log is true")
        if self.log and self.step is not None:
            raise ValueError("step and log exclude each other: leave one out")
        if self.step is not None:
            _check_step(low, high, self.step)
        return self

    @property
    def values(self) -> list[Any] | None:
        """All values where they are given one by one, by choices or a step; else None."""
        if self.choices is not None:
            return self.choices
        if self.step is None:
            return None
        low, high = self.ends
        return [low + number * self.step for number in range(round((high - low) / self.step) + 1)]

    @property
    def ends(self) -> list[Any]:
        """The values that are tried on the configuration before anything starts."""
        return self.choices if self.choices is not None else [self.low, self.high]


class SweepConfig(Section):
    """All settings of a sweep."""

    config: Name = "tiny"
    """The configuration that all trials share: one that ships, or a file, looked for beside this
    one."""
    set: dict[Key, Any] = {}
    """Keys of that configuration with other values, as `--set` changes them: section.key: value."""
    parameters: Annotated[
        dict[Key, Annotated[Parameter, BeforeValidator(_choices_of_list)]], Field(min_length=1)
    ]
    """Keys that vary: section.key: {low: ..., high: ...}, with log: true or step: ..., or a list of
    values."""
    trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] = 20
    """Number of trials, each with values of its own (--trials)."""
    seeds: Annotated[Any, BeforeValidator(_check_seeds), WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1, "maximum": MAX_SEEDS},
                   {"type": "array", "items": {"type": "integer"}}]}
    )] = 1  # fmt: skip
    """How often each trial is run, with seeds from run.seed on, or a list of seeds. A trial counts
    with the mean of its runs."""
    objective: Name = SCORE
    """The metric that is made best, taken at the step whose weights the run keeps."""
    direction: Literal["maximize", "minimize"] | None = None
    """Whether the objective shall be high or low; needed for another one than eval/score."""
    max_kl: Annotated[float, Field(gt=0)] | None = None
    """Highest eval/kl (nats per response) of a trial that may be the best; null for no limit."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """How values are chosen: from those that did well (Tree-structured Parzen Estimator), at
    random, or all combinations of values that are given one by one."""
    sampler_seed: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    """Seed of that choice."""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """Which trials end early, by their evaluations so far: those below the median of the others at
    the same step, those that Hyperband stops, or none. With several seeds the first one decides."""
    startup_trials: Annotated[int, Field(ge=0, le=MAX_TRIALS)] = 5
    """Trials at the start whose values tpe draws at random, and after which median prunes."""
    keep: Literal["all", "models", "best"] = "models"
    """What stays of a trial that has ended: all, all but its checkpoints, or only its records,
    which are a few kilobytes a step. The best trial keeps all."""
    output: Name | None = None
    """Directory of the sweep (--output); null for sweep-NAME, after this file."""

    @model_validator(mode="after")
    def _consistent(self) -> SweepConfig:
        if self.direction is None and self.objective != SCORE:
            raise ValueError(
                f"direction is missing: say whether {self.objective} (objective) is better high "
                "(maximize) or low (minimize)"
            )
        for key in self.parameters:
            if key in self.set:
                raise ValueError(f"{key} is in set and in parameters: leave one out")
            if self.sampler == "grid" and self.parameters[key].values is None:
                raise ValueError(
                    f"sampler grid needs values one by one, and {key} has a range without a step: "
                    "give step or a list of values"
                )
        for key in ("run.output", "run.seed"):
            if key in self.parameters or key in self.set:
                instead = "output" if key == "run.output" else "seeds"
                raise ValueError(f"{key} is not for a sweep to set: use {instead}")
        return self

    @property
    def maximises(self) -> bool:
        """Whether a higher objective is better."""
        return self.direction != "minimize"


def sweep_schema() -> str:
    """The JSON Schema of a sweep's file."""
    schema = SweepConfig.model_json_schema()
    parameters = schema["properties"]["parameters"]
    choices = {"type": "array", "minItems": 2}  # short for {choices: ...}
    parameters["additionalProperties"] = {"anyOf": [{"$ref": "#/$defs/Parameter"}, choices]}
    return json.dumps(schema, indent=2)
