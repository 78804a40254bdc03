"""`PPOConfig`: the fields, names and defaults of TRL 0.11.4's classic PPO.

To the keys of the YAML section `ppo` it adds the fields that only a notebook sets (names, seed,
bookkeeping of trackers). It is validated when it is made.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import warnings
from dataclasses import field
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ppo_cli.config.ppo import Count, Positive, PPOSettings
from ppo_cli.config.secrets import without_secret_values
from ppo_cli.config.settings_html import settings_html


@dataclass(config=ConfigDict(extra="forbid", arbitrary_types_allowed=True))
class PPOConfig(PPOSettings):
    """Configuration of `PPOTrainer`, as TRL 0.11.4 had it.

    The inherited fields are PPO's settings, the following ones serve trackers and bookkeeping. The
    trainer fills in `world_size`, `is_*` and `global_*`.
    """

    temperature: Positive = 1.0
    """Temperature of the policy: the default of `generate`. Logits are divided by it wherever
    probabilities are computed, those of the reference too."""
    kl_budget: Positive | None = None
    """Keep KL per response at this many nats: `BudgetKLController` moves the KL coefficient,
    whatever `adap_kl_ctrl` says. None for no budget."""
    kl_ceiling: Positive | None = None
    """Without a budget: keep KL per response below this many nats with a coefficient of
    `init_kl_coef` or more. None for no ceiling."""
    exp_name: str = os.path.basename(sys.argv[0]).removesuffix(".py")
    """Name of the experiment, for trackers; the program's unless set."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the trainer's random numbers: sampling, order of rows and mini-batches."""
    task_name: str | None = None
    """For trackers alone."""
    model_name: str | None = "gpt2"
    """For trackers and the model card; the trainer does not load it."""
    query_dataset: str | None = "stanfordnlp/imdb"
    """For trackers alone."""
    reward_model: str | None = "sentiment-analysis:lvwerra/distilbert-imdb"
    """For trackers alone."""
    remove_unused_columns: bool = True
    """Leave out the dataset's columns but label, query, response and what the model takes."""
    push_to_hub_if_best_kwargs: dict[str, Any] = field(default_factory=dict)
    """Push the policy to the hub when the mean score is the best so far, with these arguments of
    `push_to_hub`; `repo_id` is one of them. Empty for no pushing."""
    steps: Count = 20000
    """Number of samples in all: falling learning rates and warm-up count on it. It ends no loop."""
    compare_steps: Count = 1
    """Number of steps between the comparisons for `push_to_hub_if_best_kwargs`."""
    dataset_num_proc: Count | None = None
    """For trackers alone."""
    forward_batch_size: Count | None = None
    """Old name of `mini_batch_size`."""
    optimize_cuda_cache: bool | None = None
    """Old name of `optimize_device_cache`."""
    world_size: int | None = None
    """Number of processes; filled in by the trainer, like those below."""
    is_encoder_decoder: bool | None = None
    is_peft_model: bool | None = None
    global_backward_batch_size: int | None = None
    global_batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.forward_batch_size is not None:
            warnings.warn(
                "forward_batch_size is an old name of mini_batch_size and overrides it",
                FutureWarning,
                stacklevel=3,
            )
            self.mini_batch_size = self.forward_batch_size
        if self.optimize_cuda_cache is not None:
            warnings.warn(
                "optimize_cuda_cache is an old name of optimize_device_cache",
                FutureWarning,
                stacklevel=3,
            )
            if self.optimize_device_cache and not self.optimize_cuda_cache:
                raise ValueError("optimize_cuda_cache and optimize_device_cache contradict")
            self.optimize_device_cache = self.optimize_cuda_cache
        if self.push_to_hub_if_best_kwargs and "repo_id" not in self.push_to_hub_if_best_kwargs:
            raise ValueError("push_to_hub_if_best_kwargs needs a repo_id to push the model to")
        super().__post_init__()

    @property
    def total_ppo_epochs(self) -> int:
        """Number of batches in `steps` samples."""
        return math.ceil(self.steps / self.batch_size)

    def __repr__(self) -> str:
        shown = without_secret_values(self._values()).items()
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in shown)})"

    def _values(self) -> dict[str, Any]:
        """Every field by name, not copied."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def _repr_html_(self) -> str:
        """All fields, for a notebook: those of a step, and those of the run around it."""
        own = {f.name for f in dataclasses.fields(PPOSettings)}

        def grouped(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
            groups = {"step": own, "run": found.keys() - own}
            return {
                name: {k: v for k, v in found.items() if k in keys} for name, keys in groups.items()
            }

        return settings_html("PPOConfig", grouped(self._values()), grouped(PPOConfig()._values()))

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, for trackers; nested dictionaries are flattened with `/`."""
        flat: dict[str, Any] = {}

        def flatten(prefix: str, mapping: dict[str, Any]) -> None:
            for key, value in mapping.items():
                if isinstance(value, dict):
                    flatten(f"{prefix}{key}/", value)
                else:
                    flat[prefix + key] = value

        flatten("", dataclasses.asdict(self))
        flat["backward_batch_size"] = self.backward_batch_size
        flat["total_ppo_epochs"] = self.total_ppo_epochs
        return flat
