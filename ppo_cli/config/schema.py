"""What a training run is made from: `RunConfig` and its sections, validated and frozen.

torch is not imported here, so that a wrong configuration is refused at once.
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

LONGEST_NAME = 1000
MOST = 10**9  # of anything that is counted


def check_name(text: str) -> str:
    """`text`, if it can name a model, a file, a label. Raises `ValueError` saying why not."""
    if not text.strip():
        raise ValueError("is empty: give a name")
    if any(ord(character) < 32 for character in text):
        raise ValueError("holds a control character: give a name without one")
    if len(text) > LONGEST_NAME:
        raise ValueError(f"has {len(text)} characters: give a name of {LONGEST_NAME} at most")
    return text


Name = Annotated[str, AfterValidator(check_name)]
# YAML reads a bare `off` as false.
Kernels = Annotated[
    Literal["auto", "off"], BeforeValidator(lambda value: "off" if value is False else value)
]
BestOf = Annotated[int, Field(ge=1, le=65_536)]
Length = Annotated[int, Field(ge=1, le=1_000_000)]


def _check_order(section: BaseModel, low: str, high: str) -> None:
    lowest, highest = getattr(section, low), getattr(section, high)
    if lowest >= highest:
        raise ValueError(f"{high} ({highest}) must exceed {low} ({lowest})")


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values do not change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class AdapterConfig(Section):
    """A low-rank adapter instead of training all weights (needs the `peft` extra)."""

    r: Annotated[int, Field(ge=1, le=65536)] = 16
    """Rank."""
    alpha: Annotated[int, Field(ge=1, le=MOST)] = 32
    """Scale: updates are multiplied by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout inside the adapter."""
    target_modules: list[Name] | None = None
    """Names of the modules to adapt, such as [q_proj, v_proj]; null for peft's choice for the
    architecture, and where peft has none for [all-linear]: every linear layer of the language model
    but the output layer. A single regular expression is matched with modules' whole names."""


class PolicyConfig(Section):
    """The model to tune."""

    model: Name = "embedded"
    """`embedded`, a folder, or a hub id of a causal language model, or of a peft adapter of one."""
    revision: Name | None = None
    """Branch, tag or commit of a hub model."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the large matrix products; auto: bfloat16 where the device computes it natively."""
    kernels: Kernels = "auto"
    """Fast paths in training: auto for all that suit model and machine, off for plain torch and
    transformers. The environment variable PPO_CLI_KERNELS, which can also name single ones, goes
    before it."""
    summary_dropout_prob: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout before the value head; null for the model's own setting."""
    v_head_init_strategy: Literal["normal"] | None = None
    """`normal` draws the value head's weights from a normal distribution; null leaves torch's."""
    v_head_initializer_range: Annotated[float, Field(ge=0)] = 0.2
    """Standard deviation for `normal`."""
    num_shared_layers: Annotated[int, Field(ge=0, le=MOST)] | None = None
    """Lower layers that are frozen and shared with the reference."""
    adapter: AdapterConfig | None = None
    """Train a low-rank adapter; the run directory holds the merged model."""


class PromptsConfig(Section):
    """The texts whose first tokens are the queries."""

    source: Name = "embedded"
    """`embedded`; a .csv, .tsv, .json, .jsonl, .parquet, .arrow or .txt file, .gz and .zip too; the
    https address of one; a pattern such as data/*.jsonl; a folder; or the hub id of a dataset."""
    subset: Name | None = None
    """Configuration of a hub dataset or a folder."""
    split: Name = "train"
    """Split of a hub dataset or a folder."""
    text_column: Name = "text"
    """Column that holds the text. Rows without text are left out."""
    min_characters: Annotated[int, Field(ge=0, le=MOST)] = 0
    """Only texts longer than this are used."""
    limit: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Use at most this many texts."""
    input_min_text_length: Length = 2
    """Shortest query, tokens."""
    input_max_text_length: Length = 8
    """Queries are shorter than this, as with TRL's LengthSampler."""
    held_out: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Texts kept apart, for the comparison before and after."""

    @model_validator(mode="after")
    def _ordered(self) -> PromptsConfig:
        _check_order(self, "input_min_text_length", "input_max_text_length")
        return self


class RolloutConfig(Section):
    """How responses are sampled."""

    output_min_length: Length = 4
    """Shortest limit on a response, tokens."""
    output_max_length: Length = 16
    """Limits are lower than this, as with TRL's LengthSampler."""
    batch_size: Annotated[int, Field(ge=1, le=MOST)] | None = None
    """Sequences a forward pass while sampling; null for a whole batch."""
    temperature: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    """Divides the logits, in sampling and wherever probabilities are taken."""
    top_k: Annotated[int, Field(ge=0, le=MOST)] = 0
    """Leave at 0 (off): otherwise samples are not the policy's and KL is biased."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Leave at 1 (off), for the same reason."""
    stop: list[Annotated[str, Field(min_length=1, max_length=100)]] = []
    """Texts that end a response, such as "." or "\\n": every token whose text holds one of them
    does, as every end-of-text token of tokenizer and model always does (chat models have several),
    and is the response's last. Holds for the run's models in `generate` and `compare` too."""

    @model_validator(mode="after")
    def _ordered(self) -> RolloutConfig:
        _check_order(self, "output_min_length", "output_max_length")
        return self


class RewardConfig(Section):
    """The sentiment classifier."""

    model: Name = "embedded"
    """`embedded`, a folder, or a hub id of a sequence classifier, or of a peft adapter of one. Of a
    text that is longer than it reads the end is scored."""
    revision: Name | None = None
    """Branch, tag or commit of a hub model."""
    sentiment: Name = "positive"
    """Label to steer towards: its name, its index, or a synonym; of a reward model's single output
    its name, 0, or positive."""
    output: Literal["logit", "probability"] = "logit"
    """The score: the label's raw logit or its probability."""
    batch_size: Annotated[int, Field(ge=1, le=MOST)] = 64
    """Texts a forward pass."""
    score_every: Annotated[int, Field(ge=1, le=MOST)] | None = None
    """Also score the unfinished text, before every so many response tokens: each token is credited
    with the change that follows it, which learns from far fewer samples (potential-based shaping);
    most with ppo.lam well below 1. null: the finished text alone."""
    probe: bool = True
    """Check the classifier on clearly positive and negative sentences before training."""
    missing_eos_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Taken from the score of a response that reaches its limit without ending by an end-of-text
    token or `rollout.stop`; 0 for off."""
    length_cost: Annotated[float, Field(ge=0)] = 0.0
    """Taken from the score for each token by which the response's length differs from
    `target_length`; 0 for off."""
    target_length: Annotated[int, Field(ge=0, le=MOST)] = 0
    """Length, tokens, that costs nothing; 0 makes `length_cost` a plain price per token."""
    repetition_cost: Annotated[float, Field(ge=0)] = 0.0
    """Times the share of the response's word pairs that it contained already: taken from the
    score; 0 for off."""


EARLY_STOPS = ("target_score", "stop_kl", "patience")


class RunSettings(Section):
    """The run itself."""

    output: Name | None = None
    """Run directory; null for ppo-good, ppo-bad or ppo-LABEL."""
    steps: Annotated[int, Field(ge=1, le=MOST)] = 100
    """PPO steps, a batch each."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of everything random."""
    device: Name = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    checkpoint_every: Annotated[int, Field(ge=0, le=MOST)] = 50
    """Steps between checkpoints for --resume; 0 for one at the start and one at the end alone."""
    keep: Annotated[int, Field(ge=1, le=MOST)] = 2
    """Newest checkpoints kept, beside the one whose evaluation scored best. With 2, one is left
    should the newest turn out to be damaged."""
    eval_every: Annotated[int, Field(ge=0, le=MOST)] = 10
    """Steps between evaluations on the held-out prompts; 0 for one at the end alone."""
    weights: Literal["best", "last"] = "best"
    """What the run directory's own weights are at the end: those of the evaluation that scored best
    with a KL within kl_limit and stop_kl, or those of the last step."""
    target_score: float | None = None
    """End the run once an evaluation scores this much with a KL within kl_limit and stop_kl; null
    for never."""
    stop_kl: Annotated[float, Field(gt=0)] | None = None
    """End the run once an evaluation's KL per response (nats) is over this; null for never."""
    patience: Annotated[int, Field(ge=1, le=MOST)] | None = None
    """End the run after this many evaluations in a row without a new best; null for never."""
    on_divergence: Literal["stop", "rollback"] = "stop"
    """What to do when a step goes wrong: end with the last good checkpoint, or go on from it with
    half the learning rate (where it is adaptive, a quarter of the KL that it aims at, too) and
    other random numbers (three times at most)."""
    kl_limit: Annotated[float, Field(gt=0)] | None = 1000.0
    """KL per response (nats) at which a step counts as gone wrong, and over which an evaluation
    cannot be the best; null for no limit."""
    collapse_limit: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    """Share of a batch's responses that are alike at which the text counts as collapsed; 1 for all
    of them, null for no limit. Batches of fewer than 8 do not count."""
    best_of_n: Annotated[list[BestOf], Field(min_length=1, max_length=64)] | None = None
    """At the end, score the best of n responses from the reference to each held-out prompt, for
    each n of this list, into frontier.json: the curve that `plot --frontier` draws. It costs as
    many responses a prompt as the largest n. Null for no such curve."""
    samples_per_step: Annotated[int, Field(ge=0, le=MOST)] = 4
    """Samples of each step that go into samples.jsonl."""

    @model_validator(mode="after")
    def _evaluated(self) -> RunSettings:
        asked = [key for key in EARLY_STOPS if getattr(self, key) is not None]
        if asked and not self.eval_every:
            raise ValueError(
                f"{asked[0]} ({getattr(self, asked[0]):g}) is looked at after each evaluation, and "
                f"eval_every is 0: set run.eval_every to 1 or more, or run.{asked[0]} to null"
            )
        return self


class RunConfig(Section):
    """All that a training run is made from."""

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
        """The setting that decides how far a step moves the policy, and its value, for advice."""
        key = self.ppo.step_size_key
        return f"ppo.{key} ({getattr(self.ppo, key):g})"

    def to_yaml(self) -> str:
        """The whole configuration as YAML, every key with its value."""
        return dump_yaml(self.model_dump(mode="json"))


def json_schema() -> str:
    """The JSON Schema of a configuration file."""
    return json.dumps(RunConfig.model_json_schema(), indent=2)
