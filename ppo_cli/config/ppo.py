"""`PPOSettings`: the keys of the YAML section `ppo`, with the names and defaults of TRL 0.11.4."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from ppo_cli.config.trackers import check_names

MAX_COUNT = 10**15  # float64 holds it exactly


NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

UnitInterval = Annotated[float, Field(ge=0, le=1)]

Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]

Trackers = Annotated[str | list[str] | None, AfterValidator(check_names)]

KLPenalty = Literal["kl", "k1", "k2", "k3", "abs", "mse", "full"]


@dataclass(
    config=ConfigDict(extra="forbid", arbitrary_types_allowed=True, use_attribute_docstrings=True)
)
class PPOSettings:
    """Settings of a PPO step. Raises `ValueError` where they contradict each other."""

    learning_rate: NotNegative = 1.41e-5
    """Adam's learning rate, unless an optimizer is passed."""
    adap_kl_ctrl: bool = True
    """Adapt the KL coefficient so that KL reaches `target`; false keeps it at `init_kl_coef`."""
    init_kl_coef: NotNegative = 0.2
    """KL coefficient at the start."""
    kl_penalty: KLPenalty = "kl"
    """Per-token penalty: log-ratio (`kl` or `k1`), half its square (`mse` or `k2`), `k3`, the
    absolute value (`abs`), or exact KL of the whole distributions (`full`)."""
    kl_in_loss: bool = False
    """Add the KL coefficient times the penalty (`k2` or `k3`) to the loss instead of subtracting it
    from the rewards."""
    target: Positive = 6.0
    """Target of the adaptive coefficient: KL per sequence, nats."""
    horizon: Positive = 10000.0
    """Number of samples over which the adaptive coefficient reacts; more is slower."""
    gamma: UnitInterval = 1.0
    """Discount per token."""
    lam: UnitInterval = 0.95
    """Lambda of generalised advantage estimation."""
    cliprange: Positive = 0.2
    """Clip range of the policy ratio."""
    cliprange_value: Positive = 0.2
    """Clip range of the value prediction, around the prediction before the update."""
    vf_coef: NotNegative = 0.1
    """Weight of the value loss."""
    batch_size: Count = 128
    """Samples per `step()`."""
    mini_batch_size: Count = 128
    """Samples per forward and backward pass."""
    gradient_accumulation_steps: Count = 1
    """Mini-batches per optimizer step."""
    ppo_epochs: Count = 4
    """Passes over the batch per `step()`."""
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Gradients are clipped to this L2 norm at every optimizer step; null for no clipping."""
    early_stopping: bool = False
    """End a step's epochs once KL from the policy before the update exceeds 1.5 x `target_kl`."""
    target_kl: Positive = 1.0
    """KL per token (nats) for `early_stopping`."""
    ratio_threshold: Positive = 10.0
    """A mini-batch whose mean probability ratio exceeds this is skipped."""
    use_score_scaling: bool = False
    """Divide scores by their running standard deviation."""
    use_score_norm: bool = False
    """With `use_score_scaling`: subtract their running mean first."""
    score_scaling_samples: Count | None = None
    """With `use_score_scaling`: take the standard deviation of this many first scores, rounded up
    to whole steps, and keep it, so that the KL coefficient goes on meaning the same; null for that
    of all scores so far."""
    score_clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Clip scores to plus or minus this; null for no clipping."""
    calibrate_potentials: bool = True
    """With potentials (`reward.score_every`): replace each by the expected final score, from
    running least-squares fits; false uses them as they are."""
    responses_per_query: Count = 1
    """Consecutive samples that answer the same query; with more than one, the mean score of the
    others is subtracted from each score (leave-one-out baseline)."""
    value_warmup_steps: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    """Steps at the start in which only the value head learns."""
    advantage_norm: Literal["batch", "mini_batch", "none"] = "batch"
    """Over what advantages are scaled to mean 0 and variance 1: the batch, each mini-batch, or
    nothing."""
    ent_coef: NotNegative = 0.0
    """Weight of the entropy bonus: this times the mean entropy per token is subtracted from the
    loss."""
    max_approx_kl: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """End a step's updates before the first mini-batch in which KL from the policy before the
    update exceeds this (`k3`, nats per token); null for no limit."""
    lr_scheduler_type: Literal["constant", "linear", "cosine", "adaptive"] = "constant"
    """Course of the learning rate, unless a scheduler is passed: constant, falling, or `adaptive`:
    raised or lowered after each step so that steps move the policy by `desired_kl`, whatever the
    model's size, and also falling like `linear`."""
    desired_kl: Positive = 0.015
    """Target of the adaptive learning rate in the first step: `ppo/policy/approxkl`, nats per
    token. Later it is lower, by the square of the factor by which the rate has fallen."""
    warmup_steps: Annotated[int, Field(ge=0, le=MAX_COUNT)] = 0
    """Steps at the start over which the learning rate rises from 0."""
    min_lr_ratio: UnitInterval = 0.0
    """Final learning rate of `linear`, `cosine` and `adaptive`, as a share of the first."""
    whiten_rewards: bool = False
    """Scale rewards to unit variance over the response tokens, before advantages are estimated."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    optimize_device_cache: bool = False
    """Release cached accelerator memory after each step: less memory, more time."""
    log_with: Trackers = None
    """Tracker, or list of trackers, of `train` (option --track) and of `log_stats`: `tensorboard`,
    `wandb`, `trackio`, `mlflow`, `comet_ml`, `aim`, `clearml`, `dvclive`, `swanlab`."""
    tracker_project_name: str = "trl"
    """Name of the project in trackers that have projects; in mlflow of the experiment."""
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the trackers, under each tracker's name."""
    accelerator_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `accelerate.Accelerator`; `mixed_precision` may also be auto or fp32."""
    project_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `accelerate.utils.ProjectConfiguration`. Its `logging_dir` is where
    trackers write; for `train` it is `logs` in the run directory unless set."""

    def __post_init__(self) -> None:
        self.check_batch_arithmetic()
        if self.kl_in_loss and self.kl_penalty not in ("k2", "k3", "mse"):
            raise ValueError(
                f"kl_in_loss needs a kl_penalty of k2 or k3, not {self.kl_penalty}: as a loss the "
                "others have no gradient, a wrong one, or need whole distributions"
            )
        if self.batch_size % self.responses_per_query:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of responses_per_query "
                f"({self.responses_per_query})"
            )

    @property
    def backward_batch_size(self) -> int:
        """Samples per optimizer step, computed from the present fields."""
        return self.mini_batch_size * self.gradient_accumulation_steps

    @property
    def step_size_key(self) -> str:
        """The field that decides how far a step moves the policy, for advice."""
        return "desired_kl" if self.lr_scheduler_type == "adaptive" else "learning_rate"

    @property
    def rate_depends_on_steps(self) -> bool:
        """Whether the learning rate depends on the run's number of steps."""
        return self.lr_scheduler_type != "constant" and self.min_lr_ratio < 1

    def check_batch_arithmetic(self) -> None:
        """Raise `ValueError` unless a batch consists of whole optimizer steps."""
        if self.batch_size % self.backward_batch_size:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of mini_batch_size x "
                f"gradient_accumulation_steps ({self.mini_batch_size} x "
                f"{self.gradient_accumulation_steps} = {self.backward_batch_size}): "
                "change one of them"
            )
