"""`RunConfig`, the settings of a training run, and its sections: validated and frozen.

torch is not imported here, so that a wrong configuration is refused without delay.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from ppo_cli.config.ppo import PPOSettings
from ppo_cli.utils.yaml_io import dump_yaml

MAX_NAME_LENGTH = 1000
MAX_COUNT = 10**9


def check_name(text: str) -> str:
    """`text`, if it can be the name of a model, file or label; else raises `ValueError`."""
    if not text.strip():
        raise ValueError("is empty: give a name")
    if any(ord(character) < 32 for character in text):
        raise ValueError("holds a control character: give a name without one")
    if len(text) > MAX_NAME_LENGTH:
        raise ValueError(f"has {len(text)} characters: give a name of {MAX_NAME_LENGTH} at most")
    return text


Name = Annotated[str, AfterValidator(check_name)]
# YAML reads a bare `off` as false.
Kernels = Annotated[
    Literal["auto", "off"], BeforeValidator(lambda value: "off" if value is False else value)
]
BestOf = Annotated[int, Field(ge=1, le=65_536)]
Length = Annotated[int, Field(ge=1, le=1_000_000)]


def _check_order(section: BaseModel, low: str, high: str) -> None:
    """Raise `ValueError` unless key `low` is less than key `high`."""
    lowest, highest = getattr(section, low), getattr(section, high)
    if lowest >= highest:
        raise ValueError(f"{high} ({highest}) must exceed {low} ({lowest})")


class Section(BaseModel):
    """A part of the configuration. Unknown keys are refused; values cannot be changed."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class AdapterConfig(Section):
    """A low-rank adapter instead of training all weights (needs the `peft` extra)."""

    r: Annotated[int, Field(ge=1, le=65536)] = 16
    """Rank."""
    alpha: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 32
    """Scale: updates are multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout inside the adapter."""
    target_modules: list[Name] | None = None
    """Names of the modules to adapt, such as [q_proj, v_proj]; null for peft's choice for the
    architecture, or [all-linear] if peft has none: every linear layer of the language model except
    the output layer. A single regular expression is matched against full module names."""


class PolicyConfig(Section):
    """The model to tune."""

    model: Name = "embedded"
    """`embedded`, a folder, or a hub id of a causal language model, or of a peft adapter of one."""
    revision: Name | None = None
    """Branch, tag or commit of a hub model."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the large matrix products; auto: bfloat16 if the device computes it natively."""
    kernels: Kernels = "auto"
    """Fast paths in training: auto for all that suit model and machine, off for plain torch and
    transformers. The environment variable PPO_CLI_KERNELS overrides it, and can name single
    paths."""
    summary_dropout_prob: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout before the value head; null for the model's own setting."""
    v_head_init_strategy: Literal["normal"] | None = None
    """`normal` draws the value head's weights from a normal distribution; null for torch's
    default."""
    v_head_initializer_range: Annotated[float, Field(ge=0)] = 0.2
    """Standard deviation of that normal distribution."""
    num_shared_layers: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None
    """Number of lower layers that are frozen and shared with the reference; null for none."""
    adapter: AdapterConfig | None = None
    """Train a low-rank adapter; the run directory holds the merged model. null trains all
    weights."""


class PromptsConfig(Section):
    """The texts; their first tokens are the queries."""

    source: Name = "embedded"
    """`embedded`; a .csv, .tsv, .json, .jsonl, .parquet, .arrow or .txt file, also as .gz or .zip;
    the https address of one; a pattern such as data/*.jsonl; a folder; or the hub id of a
    dataset."""
    subset: Name | None = None
    """Configuration of a hub dataset or a folder."""
    split: Name = "train"
    """Split of a hub dataset or a folder."""
    text_column: Name = "text"
    """Column of the texts. Rows without text are left out."""
    min_characters: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    """Use only texts longer than this."""
    limit: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Use at most this many texts."""
    input_min_text_length: Length = 2
    """Shortest query, tokens."""
    input_max_text_length: Length = 8
    """Queries are shorter than this (tokens), as with TRL's LengthSampler."""
    held_out: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Number of texts kept for evaluation, not used for training."""

    @model_validator(mode="after")
    def _ordered(self) -> PromptsConfig:
        _check_order(self, "input_min_text_length", "input_max_text_length")
        return self


class RolloutConfig(Section):
    """How responses are sampled."""

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
    stop: list[Annotated[str, Field(min_length=1, max_length=100)]] = []
    """Texts that end a response, such as "." or "\\n": a token whose text contains one of them is
    the last of its response. So is every end-of-text token of tokenizer and model (chat models have
    several). This holds for the run's models in `generate` and `compare` too."""

    @model_validator(mode="after")
    def _ordered(self) -> RolloutConfig:
        _check_order(self, "output_min_length", "output_max_length")
        return self


class RewardConfig(Section):
    """The sentiment classifier."""

    model: Name = "embedded"
    """`embedded`, a folder, or a hub id of a sequence classifier, or of a peft adapter of one. If a
    text is longer than the classifier can read, its end is scored."""
    revision: Name | None = None
    """Branch, tag or commit of a hub model."""
    sentiment: Name = "positive"
    """Label to train towards: its name, its index, or a synonym. The single output of a reward
    model is chosen by its name, by 0, or by positive."""
    output: Literal["logit", "probability"] = "logit"
    """The score: the label's raw logit or its probability."""
    batch_size: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 64
    """Texts per forward pass."""
    score_every: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    """Also score the unfinished text, each time this many response tokens are added. Each token is
    credited with the change that follows it (potential-based shaping), which learns from far fewer
    samples, above all with ppo.lam well below 1. null scores only the finished text."""
    probe: bool = True
    """Check the classifier on clearly positive and negative sentences before training."""
    missing_eos_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Subtracted from the score of a response that reaches its length limit without an end-of-text
    token or a text of `rollout.stop`; 0 for off."""
    length_cost: Annotated[float, Field(ge=0)] = 0.0
    """Subtracted from the score for each token by which the response's length differs from
    `target_length`; 0 for off."""
    target_length: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    """Length (tokens) without a cost; with 0, `length_cost` is a cost per token."""
    repetition_cost: Annotated[float, Field(ge=0)] = 0.0
    """This times the share of the response's word pairs that occur earlier in it is subtracted from
    the score; 0 for off."""


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
    ppo.init_kl_coef, and more while KL is over this. Evaluations more than 10 % over it are only
    the best if none is below. null for no ceiling."""
    collapse_limit: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    """Share of equal responses in a batch from which the text counts as collapsed; 1 for all of
    them, null for no limit. Batches of fewer than 8 are not checked."""
    best_of_n: Annotated[list[BestOf], Field(min_length=1, max_length=64)] | None = None
    """At the end, score the best of n responses of the reference to each held-out prompt, for each
    n in this list, and write frontier.json, the curve of `plot --frontier`. This samples as many
    responses per prompt as the largest n. null for no such curve."""
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
    prompts: PromptsConfig = PromptsConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    ppo: PPOSettings = Field(default_factory=PPOSettings)
    """The algorithm; fields of TRL 0.11's PPOConfig."""
    run: RunSettings = RunSettings()

    @property
    def output(self) -> Path:
        """The run directory."""
        if self.run.output is not None:
            return Path(self.run.output)
        short = {"positive": "good", "negative": "bad"}
        sentiment = self.reward.sentiment.lower()
        label = re.sub(r"[^\w.-]+", "-", sentiment).strip("-.") or "label"
        return Path(f"ppo-{short.get(sentiment, label)}")

    @property
    def step_size(self) -> str:
        """The setting that decides how far a step moves the policy, with its value, for advice."""
        key = self.ppo.step_size_key
        return f"ppo.{key} ({getattr(self.ppo, key):g})"

    def to_yaml(self) -> str:
        """The whole configuration as YAML, every key with its value."""
        return dump_yaml(self.model_dump(mode="json"))


def json_schema() -> str:
    """The JSON Schema of a configuration file."""
    return json.dumps(RunConfig.model_json_schema(), indent=2)
