"""`RunConfig`, the settings of a training run, and its sections: validated and frozen.

torch is not imported here, so that a wrong configuration is refused without delay.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, JsonValue, model_validator

from ppo_cli.config.policy import AdapterConfig, PolicyConfig, QuantizationConfig
from ppo_cli.config.ppo import PPOSettings
from ppo_cli.config.prompts import PromptsConfig
from ppo_cli.config.reward import RewardConfig
from ppo_cli.config.section import MAX_COUNT, Length, Name, Section, check_name, check_order
from ppo_cli.config.settings_html import settings_html
from ppo_cli.utils.yaml_io import dump_yaml

__all__ = [
    "AdapterConfig",
    "PolicyConfig",
    "PromptsConfig",
    "QuantizationConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "RunSettings",
    "Section",
    "check_name",
    "json_schema",
]

BestOf = Annotated[int, Field(ge=1, le=65_536)]


class RolloutConfig(Section):
    """How responses are sampled."""

    engine: Literal["transformers", "paged", "vllm"] = "transformers"
    """What samples the responses that are trained on: the loop of this tool over transformers'
    model, transformers' continuous batching, or vLLM (needs the `vllm` extra). Evaluations always
    use the first."""
    engine_kwargs: dict[Name, JsonValue] = {}
    """Further settings of the engine: of transformers' ContinuousBatchingConfig for paged, of trl's
    VLLMGeneration for vllm."""
    output_min_length: Length = 4
    """Lowest length limit of a response, tokens."""
    output_max_length: Length = 16
    """Length limits are lower than this (tokens), as with TRL's LengthSampler."""
    batch_size: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    """Sequences per forward pass while sampling; null for the whole batch."""
    temperature: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    """Divides the logits, in sampling and wherever probabilities are computed."""
    top_k: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    """Leave at 0 (off): otherwise the samples are not the policy's own and KL is biased."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Top-p sampling. Leave at 1 (off), for the same reason."""
    stop: list[Annotated[str, Field(min_length=1, max_length=100)]] = Field(default=[])
    """Texts that end a response, such as "." or "\\n": a token whose text contains one of them is
    the last of its response. So is every end-of-text token of tokenizer and model (chat models have
    several). This holds for the run's models in `generate` and `compare` too."""

    @model_validator(mode="after")
    def _ordered(self) -> RolloutConfig:
        check_order(self, "output_min_length", "output_max_length")
        return self

    @model_validator(mode="after")
    def _followed_by_engine(self) -> RolloutConfig:
        if self.engine == "transformers":
            if self.engine_kwargs:
                raise ValueError(
                    f"engine_kwargs ({', '.join(self.engine_kwargs)}) are for another engine: set "
                    "rollout.engine to paged or vllm, or leave them out"
                )
            return self
        for key in ("top_k", "top_p"):
            if (value := getattr(self, key)) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} ({value:g}) is for engine transformers alone: the probability of a "
                    f"token that {self.engine} draws just outside the policy's own top-k or top-p "
                    f"would be 0. Leave {key} out, or set rollout.engine=transformers"
                )
        return self


EARLY_STOPS = ("target_score", "stop_kl", "patience")


class RunSettings(Section):
    """Length, output, checkpoints and end of the run."""

    output: Name | None = None
    """Run directory; null for ppo-good, ppo-bad or ppo-LABEL."""
    steps: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 100
    """Number of PPO steps; each takes one batch."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of all random numbers."""
    device: Name = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    checkpoint_every: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 50
    """Steps between checkpoints for --resume; 0 for only one at the start and one at the end."""
    keep: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 2
    """Number of newest checkpoints kept, besides the one with the best evaluation. With 2, one is
    left if the newest is damaged."""
    eval_every: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 10
    """Steps between evaluations on the held-out prompts; 0 for only one at the end."""
    weights: Literal["best", "last"] = "best"
    """Weights in the run directory at the end: those with the best evaluation among those with a KL
    within kl_limit and stop_kl, or those of the last step."""
    target_score: float | None = None
    """End the run once an evaluation reaches this score with a KL within kl_limit and stop_kl; null
    for never."""
    stop_kl: Annotated[float, Field(gt=0)] | None = None
    """End the run once an evaluation's KL per response (nats) exceeds this; null for never."""
    patience: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    """End the run after this many evaluations in a row without a new best; null for never."""
    on_divergence: Literal["stop", "rollback"] = "stop"
    """What to do when training diverges: end with the last good checkpoint, or continue from it
    with half the learning rate (if it is adaptive, also a quarter of its target KL) and other
    random numbers (at most three times)."""
    kl_limit: Annotated[float, Field(gt=0)] | None = 1000.0
    """KL per response (nats) from which a step counts as diverged, and above which an evaluation
    cannot be the best; null for no limit."""
    kl_budget: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """KL per response (nats) that the run aims at (--kl): the KL coefficient follows the KL of
    steps and evaluations, from ppo.init_kl_coef on. The best weights are those with the highest
    score among the evaluations within 10 % of the budget, or else those nearest to it. null for no
    budget."""
    kl_ceiling: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """KL per response (nats) that the run keeps below, without a kl_budget: the KL coefficient is
    ppo.init_kl_coef, and more while KL is over this. Evaluations more than 20 % over it are only
    the best if none is below. null for no ceiling."""
    collapse_limit: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    """Share of equal responses in a batch from which the text counts as collapsed; 1 for all of
    them, null for no limit. Batches of fewer than 8 are not checked."""
    best_of_n: Annotated[list[BestOf], Field(min_length=1, max_length=64)] | None = None
    """At the end, score the best of n responses of the reference to each held-out prompt, for each
    n in this list, and write frontier.json, the curve of `plot --frontier`. This samples as many
    responses per prompt as the largest n. null for no such curve."""
    timeout: Annotated[float, Field(gt=0, le=10**6)] = 600.0
    """Seconds that the processes of a run wait for each other before they give up."""
    samples_per_step: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 4
    """Number of samples of each step that are written to samples.jsonl."""

    @model_validator(mode="after")
    def _evaluated(self) -> RunSettings:
        asked = [key for key in EARLY_STOPS if getattr(self, key) is not None]
        if asked and not self.eval_every:
            raise ValueError(
                f"{asked[0]} ({getattr(self, asked[0]):g}) is checked after each evaluation, and "
                f"eval_every is 0: set run.eval_every to 1 or more, or run.{asked[0]} to null"
            )
        if (budget := self.kl_budget) is not None:
            for key in ("kl_limit", "stop_kl"):
                limit = getattr(self, key)
                if limit is not None and budget >= limit:
                    raise ValueError(
                        f"a KL budget of {budget:g} (run.kl_budget, --kl) is not below run.{key} "
                        f"({limit:g}): lower the budget, or raise run.{key}"
                    )
        return self


class RunConfig(Section):
    """All settings of a training run."""

    policy: PolicyConfig = PolicyConfig()
    """The model to tune: how it is loaded, what of it is trained, and its adapter."""
    prompts: PromptsConfig = PromptsConfig()
    """Where the prompts come from, and which texts are used and how much of each."""
    rollout: RolloutConfig = RolloutConfig()
    """How responses are sampled, and how long they may be."""
    reward: RewardConfig = RewardConfig()
    """What responses are scored with: a classifier, or terms with weights; and penalties."""
    ppo: PPOSettings = Field(default_factory=PPOSettings)
    """The algorithm; fields of TRL 0.11's PPOConfig."""
    run: RunSettings = RunSettings()
    """Length of the run, output, checkpoints, evaluations, and what ends it."""

    @property
    def output(self) -> Path:
        """The run directory."""
        if self.run.output is not None:
            return Path(self.run.output)
        short = {"positive": "good", "negative": "bad"}
        sentiment = self.reward.goal.lower()
        label = re.sub(r"[^\w.-]+", "-", sentiment).strip("-.") or "label"
        return Path(f"ppo-{short.get(sentiment, label)}")

    @property
    def step_size(self) -> str:
        """The setting that decides how far a step moves the policy, with its value, for advice."""
        key = self.ppo.step_size_key
        return f"ppo.{key} ({getattr(self.ppo, key):g})"

    def _repr_html_(self) -> str:
        """All keys by section, for a notebook."""
        defaults = RunConfig().model_dump(mode="json")
        return settings_html("RunConfig", self.model_dump(mode="json"), defaults)

    def to_yaml(self) -> str:
        """The whole configuration as YAML, every key with its value."""
        return dump_yaml(self.model_dump(mode="json"))


def json_schema() -> str:
    """The JSON Schema of a configuration file."""
    schema = RunConfig.model_json_schema()
    reward = schema["properties"]["reward"]
    terms = {"type": "array", "items": {"$ref": "#/$defs/RewardTerm"}}  # short for a section
    reward["anyOf"] = [{"$ref": reward.pop("$ref")}, terms]
    return json.dumps(schema, indent=2)
