"""`PPOTrainer`: sample with it, score the samples as you like, then let it take a PPO step.

The interface is that of TRL 0.11.4's classic trainer; the mathematics stands in `advantages.py` and
`losses.py`. Source: Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), with the KL penalty
of Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593). Left out: encoder-decoder models.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_cli.kernels.patches import fast_matmul
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.models.reference import (
    create_adapter_reference,
    create_reference_model,
    refuse_shared_weights,
)
from ppo_cli.models.sampling import new_token_limits, sample_responses
from ppo_cli.models.self_check import starts_as_its_base
from ppo_cli.models.stop_tokens import end_tokens
from ppo_cli.ppo import advantages as adv
from ppo_cli.ppo.accelerator import (
    make_accelerator,
    prepare_reference,
    record_surroundings,
    require,
)
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.ppo.experience import (
    Probabilities,
    TokenOutputs,
    check_noise,
    check_reading,
    known_probabilities,
    make_experience,
    read_probabilities,
    read_reference,
    token_forward,
    token_rewards,
)
from ppo_cli.ppo.kl_controller import AdaptiveKLController, FixedKLController
from ppo_cli.ppo.learning_rate import AdaptiveLearningRate, follow, make_scheduler
from ppo_cli.ppo.packing import TokenBatch, checked_batch
from ppo_cli.ppo.scores import PotentialCalibration
from ppo_cli.ppo.step_statistics import Stopwatch, length_statistics, step_statistics, to_numbers
from ppo_cli.ppo.update import Update, dropout_off, head_alone
from ppo_cli.utils.random_state import RandomStream, numpy_state, set_numpy_state


class PPOTrainer:
    """Proximal Policy Optimization of a causal language model.

    Args:
        config: the settings; `world_size` and the like are filled in.
        model: the policy.
        ref_model: what KL is measured from: a model with or without a value head. None makes a
            frozen copy of `model`. A peft model whose adapter is new needs no copy: its reference
            is the same model with the adapter off.
        tokenizer: its pad and end-of-text tokens are used.
        dataset: rows with the queries; makes `dataloader`.
        optimizer: None for Adam over the trainable parameters.
        data_collator: collates rows of `dataset` into a batch.
        num_shared_layers: with `ref_model=None`: freeze this many lower layers and let policy and
            reference hold them in common.
        lr_scheduler: stepped once a `step()`; None for what `config` says.

    Attributes:
        accelerator: the `accelerate.Accelerator` that places and wraps everything.
        model, ref_model, optimizer, lr_scheduler, dataloader: prepared by it.
        kl_ctl: the KL controller; `kl_ctl.value` is the coefficient.
        current_step: `step()` calls so far.
        advises: whether `step()` warns, once each, of negative KL and of skipped mini-batches.

    Raises:
        ValueError: an argument is not what it should be.
    """

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: AutoModelForCausalLMWithValueHead | None = None,
        ref_model: AutoModelForCausalLMWithValueHead | PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> None:
        require("config", config, PPOConfig)
        require("model", model, AutoModelForCausalLMWithValueHead)
        require("tokenizer", tokenizer, PreTrainedTokenizerBase)
        if lr_scheduler is not None:
            require("lr_scheduler", lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
        assert config is not None
        assert model is not None
        assert tokenizer is not None
        config.check_batch_arithmetic()
        self.config = config
        self.tokenizer = tokenizer
        self.accelerator = make_accelerator(config)
        self.is_peft_model = model.is_peft_model
        self.is_distributed = self.accelerator.num_processes > 1
        record_surroundings(config, self.accelerator, self.is_peft_model)

        reference = self._reference(model, ref_model, num_shared_layers)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        if optimizer is None:
            trainable = [p for p in model.parameters() if p.requires_grad]
            fused = {p.device.type for p in trainable} <= {"cpu", "cuda"}
            optimizer = torch.optim.Adam(trainable, lr=config.learning_rate, fused=fused)
        self._schedule = None  # our own
        if lr_scheduler is None:
            self._schedule = make_scheduler(config, optimizer, self.accelerator.num_processes)
            lr_scheduler = self._schedule
        self._adaptation: AdaptiveLearningRate | None = None
        if lr_scheduler is None and config.lr_scheduler_type == "adaptive":
            self._adaptation = AdaptiveLearningRate(optimizer, config)
        self.dataset = dataset
        dataloader = None
        if dataset is not None:
            dataloader = self.prepare_dataloader(dataset, data_collator, model)
        self.model, self.optimizer, self.dataloader, self.lr_scheduler = self.accelerator.prepare(
            model, optimizer, dataloader, lr_scheduler
        )
        self.ref_model = prepare_reference(reference, self.accelerator)

        self.kl_ctl: AdaptiveKLController | FixedKLController = (
            AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
            if config.adap_kl_ctrl
            else FixedKLController(config.init_kl_coef)
        )
        self.running = adv.RunningMoments()
        self._calibration = PotentialCalibration()
        self.current_step = 0
        self._best_mean_score = -float("inf")
        self.advises = True
        self._warned: set[str] = set()
        # Random numbers of its own: the caller's random state stays as it is.
        self._shuffle = np.random.RandomState(config.seed)
        self._sampling = RandomStream(
            config.seed + self.accelerator.process_index, self.accelerator.device
        )

    # ------------------------------------------------------------------ sampling

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Sample a response to each query, with dropout off.

        Args:
            query_tensor: (query_length,) token ids, or a list of such tensors.
            length_sampler: called once a query for the number of new tokens.
            batch_size: queries a forward pass, for a list.
            return_prompt: whether what is returned begins with the query.
            generate_ref_response: also sample from the reference.
            generation_kwargs: of `transformers`' `generate`. Where they are silent sampling is
                pure: the configuration's `temperature`, no top-k, no top-p, whatever the model's
                own `generation_config` says; pass a `generation_config` to have one used. Without
                an `eos_token_id` in either every end token of tokenizer and model ends a response.

        Returns:
            For one query a (1, length) tensor, for a list a list of 1-D tensors, each ending with
            its end-of-text token where one was drawn. With `generate_ref_response` a pair of such.

        Raises:
            ValueError: a query is empty, not 1-D, or too long for the model.
        """
        single = isinstance(query_tensor, Tensor)
        queries: list[Tensor] = [query_tensor] if single else list(query_tensor)  # type: ignore[list-item]
        if any(query.dim() != 1 for query in queries):
            raise ValueError(
                "query_tensor must be a tensor of shape (query_length,) or a list of them"
            )
        limits = new_token_limits(queries, length_sampler, generation_kwargs)
        settings = {
            "pad_token_id": self.tokenizer.pad_token_id,
            **generation_kwargs,
            "eos_token_id": self._end_tokens(generation_kwargs),
        }
        if "generation_config" not in settings:
            settings.setdefault("temperature", self.config.temperature)

        def sample(model: Any) -> Any:
            autocast = self.accelerator.autocast()
            with self._unwrapped(model) as unwrapped, self._sampling.active(), autocast:
                responses = sample_responses(
                    unwrapped, queries, limits, batch_size=batch_size, **settings
                )
            if return_prompt:
                responses = [
                    torch.cat([query.to(response.device), response])
                    for query, response in zip(queries, responses, strict=True)
                ]
            return responses[0].unsqueeze(0) if single else responses

        response = sample(self.model)
        if not generate_ref_response:
            return response
        with self.adapter_off():
            return response, sample(self.model if self.ref_model is None else self.ref_model)

    def _end_tokens(self, generation_kwargs: Mapping[str, Any]) -> int | list[int] | None:
        """What ends a response: the caller's own word on it, else what tokenizer and model say."""
        own = getattr(generation_kwargs.get("generation_config"), "eos_token_id", None)
        if "eos_token_id" in generation_kwargs:
            own = generation_kwargs["eos_token_id"]
        elif own is None:
            policy = self.accelerator.unwrap_model(self.model)
            return end_tokens(self.tokenizer, model=policy) or None
        return own.tolist() if isinstance(own, Tensor) else own

    # ------------------------------------------------------------------ learning

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
        potentials: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        """One PPO step on a batch: `ppo_epochs` passes over it.

        Args:
            queries: B tensors of token ids, (query_length,).
            responses: B tensors of token ids, (response_length,).
            scores: B scalars.
            response_masks: B tensors, (response_length,), 0 for response tokens that are read but
                not learnt from, such as a tool's output. A response with no token that counts
                takes part in nothing.
            potentials: B tensors, (response_length,): what the score promised to become before
                each response token was drawn, such as the score of the unfinished text. Each token
                is then credited with the change that follows it (`advantages.shaping_rewards`),
                which is far less noisy than the final score, most of all with a `lam` below 1.

        Returns:
            The statistics that `ppo_cli.ppo.statistics.STATISTICS` lists: floats and NumPy arrays.

        Raises:
            ValueError: lengths or shapes that do not fit, a score that is not finite, a query
                without tokens, or no response token that counts in the whole batch.
        """
        clock = Stopwatch()
        tokens, score_tensor = self._checked(queries, responses, scores, response_masks)
        promised = tokens.grid_of("potentials", potentials, responses, response_masks)
        score_tensor, promised = self._scaled(score_tensor, promised)
        promised = self._calibrated(promised, score_tensor, tokens.mask)
        self._push_if_best(score_tensor)
        kl_coef, config = self.kl_ctl.value, self.config

        update = Update(
            self.model, self.optimizer, self.accelerator, self._shuffle, config, kl_coef
        )
        check_reading(self.model)  # while all that is to learn does
        dropout = dropout_off(self.model, keep_training_mode=config.gradient_checkpointing)
        warming_up = self.current_step < config.value_warmup_steps
        with dropout, head_alone(self.model) if warming_up else nullcontext(), fast_matmul():
            if config.gradient_checkpointing:
                check_noise(self.model)
            update.optimizer_step.make_state()
            probabilities, first = self._read(tokens, update)
            clock.lap("forward_pass")
            rewards, non_score = token_rewards(
                tokens, probabilities, score_tensor, promised, kl_coef, config
            )
            clock.lap("compute_rewards")
            experience = make_experience(tokens, probabilities, rewards, non_score, config)
            clock.lap("compute_advantages")
            updates = update.run(experience, first)
            clock.lap("optimize_step")

        stats = self._numbers(step_statistics(experience, score_tensor, kl_coef, updates))
        stats |= length_statistics("queries", [len(query) for query in queries])
        stats |= length_statistics("responses", [len(response) for response in responses])
        clock.lap("calc_stats")
        self._after_step(stats)
        return {**stats, **clock.times, "time/ppo/total": clock.total}

    def _read(
        self, tokens: TokenBatch, update: Update
    ) -> tuple[Probabilities, TokenOutputs | None]:
        """What the models say of the batch, and the first epoch's forward where it is made already.

        Where one forward covers the batch, the first epoch's gives the old probabilities too, but
        not the whole distributions that the exact KL needs. The reference comes before it, whose
        logits are let go before the policy's are kept.
        """
        reference = self.model if self.ref_model is None else self.ref_model
        if update.is_one_pass and self.config.kl_penalty != "full":
            temperature = self.config.temperature
            ref_logprobs = read_reference(tokens, reference, self.adapter_off, temperature)
            first = token_forward(self.model, tokens, temperature)
            return known_probabilities(tokens, first, ref_logprobs, self.config), first
        probabilities = read_probabilities(
            tokens,
            policy=self.model,
            reference=reference,
            as_reference=self.adapter_off,
            config=self.config,
        )
        return probabilities, None

    def _checked(
        self, queries: Any, responses: Any, scores: Any, response_masks: Any
    ) -> tuple[TokenBatch, Tensor]:
        score_tensor = checked_batch(
            queries, responses, scores, response_masks, self.config.batch_size
        )
        tokens = TokenBatch.from_lists(
            queries,
            responses,
            response_masks,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            device=self.accelerator.device,
        )
        if not tokens.counts.any():
            raise ValueError("no response token counts: responses are empty or masked throughout")
        return tokens, score_tensor.to(self.accelerator.device)

    def _after_step(self, stats: Mapping[str, Any]) -> None:
        """Everything that changes once a step, but the weights."""
        seen = self.config.batch_size * self.accelerator.num_processes
        self.kl_ctl.update(stats["objective/kl"], seen)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        if self._adaptation is not None:
            self._adaptation.update(stats["ppo/policy/approxkl"], self.current_step)
        if self.config.optimize_device_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.current_step += 1

    def _scaled(self, scores: Tensor, potentials: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scores, and potentials alike, as `use_score_scaling` and `score_clip` say."""
        shift, scale, clip = 0.0, 1.0, self.config.score_clip
        if self.config.use_score_scaling:
            self.running.update(self.accelerator.gather(scores))
            if self.config.use_score_norm:
                shift = self.running.mean
            eps = torch.finfo(scores.dtype).eps
            if self.running.std > eps:  # equal scores have no scale
                scale = self.running.std + eps

        def scaled(values: Tensor) -> Tensor:
            values = (values - shift) / scale
            return values if clip is None else values.clamp(-clip, clip)

        return scaled(scores), None if potentials is None else scaled(potentials)

    def _calibrated(self, potentials: Tensor | None, scores: Tensor, mask: Tensor) -> Tensor | None:
        """Potentials as the scores to be expected from them, if that is configured."""
        if potentials is None or not self.config.calibrate_potentials:
            return potentials

        def total(sums: Tensor) -> Tensor:
            if not self.is_distributed:
                return sums
            padded = self.accelerator.pad_across_processes(sums.to(self.accelerator.device))
            return self.accelerator.reduce(padded, "sum")

        self._calibration.update(potentials, scores, mask, total)
        return self._calibration(potentials, mask)

    def _numbers(self, stats: dict[str, Any]) -> dict[str, Any]:
        """Statistics as floats and arrays; in a distributed run scalars are the processes' mean."""
        if self.is_distributed:
            for key, value in stats.items():
                if isinstance(value, Tensor) and value.dim() == 0:
                    stats[key] = self.accelerator.reduce(value.to(self.accelerator.device), "mean")
        numbers = to_numbers(stats)
        numbers["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        if numbers["objective/kl"] < -1.0:
            self._warn_once(
                "KL",
                f"KL is negative ({numbers['objective/kl']:.2f} per sequence): the responses are "
                "not samples of this policy. Sample with temperature 1, without top-k or top-p",
            )
        if numbers["ppo/policy/skipped"] > 0:
            self._warn_once(
                "skipped",
                "the mean ratio of a mini-batch exceeds ratio_threshold "
                f"({self.config.ratio_threshold:g}): its optimizer step is skipped. A lower "
                f"{self.config.step_size_key} or fewer ppo_epochs keep the policy closer",
            )
        return numbers

    def _warn_once(self, about: str, message: str) -> None:
        if self.advises and about not in self._warned:
            self._warned.add(about)
            warnings.warn(message, stacklevel=4)

    def log_stats(
        self,
        stats: Mapping[str, Any],
        batch: Mapping[str, Any],
        rewards: Sequence[Tensor] | Tensor,
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> None:
        """Send a step's statistics to the tracker that `log_with` names; without one, nothing.

        Args:
            stats: what `step()` returned.
            batch: the batch's columns; those of `columns_to_log` go into wandb's table.
            rewards: the batch's scores, logged as `env/reward_mean`, `_std` and `_dist`.
            columns_to_log: names of columns of `batch`.

        Raises:
            ValueError: with wandb, a column is not in the batch.
        """
        scores = torch.as_tensor([float(reward) for reward in rewards])
        scores = self.accelerator.gather(scores.to(self.accelerator.device)).cpu()
        columns = tuple(columns_to_log)
        if self.config.log_with is None or not self.accelerator.is_main_process:
            return
        logs: dict[str, Any] = dict(stats)
        logs["env/reward_mean"] = scores.mean().item()
        logs["env/reward_std"] = scores.std().item() if len(scores) > 1 else 0.0
        logs["env/reward_dist"] = scores.numpy()
        if self.config.log_with == "wandb":
            import wandb

            if missing := [column for column in columns if column not in batch]:
                raise ValueError(f"columns {missing} to log are not in the batch: {list(batch)}")
            rows = [
                list(r) for r in zip(*(batch[c] for c in columns), scores.tolist(), strict=True)
            ]
            logs["game_log"] = wandb.Table(columns=[*columns, "reward"], rows=rows)
        else:
            logs = {key: value for key, value in logs.items() if np.size(value) == 1}
        self.accelerator.log(logs, step=self.current_step)

    # ------------------------------------------------------------------ data and saving

    def prepare_dataloader(
        self,
        dataset: Any,
        data_collator: Callable | None = None,
        model: AutoModelForCausalLMWithValueHead | None = None,
    ) -> torch.utils.data.DataLoader:
        """Shuffled batches of `batch_size` rows; a last batch that would be shorter is dropped.

        With `remove_unused_columns` a Hugging Face dataset loses the columns that neither the
        model's forward takes nor are named label, query or response.
        """
        if self.config.remove_unused_columns and hasattr(dataset, "remove_columns"):
            model = model or self.accelerator.unwrap_model(self.model)
            kept = {*inspect.signature(model.forward).parameters, "label", "query", "response"}
            dataset = dataset.remove_columns([c for c in dataset.column_names if c not in kept])
        if len(dataset) < self.config.batch_size:
            warnings.warn(
                f"the dataset has {len(dataset)} rows, fewer than batch_size "
                f"({self.config.batch_size}): the dataloader is empty",
                stacklevel=3,
            )
        return torch.utils.data.DataLoader(
            dataset,
            batch_size=self.config.batch_size,
            collate_fn=data_collator,
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(self.config.seed),
        )

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write policy, value head, tokenizer and a model card to a folder."""
        self.accelerator.unwrap_model(self.model).save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory)
        self.create_model_card(save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Upload policy, value head and tokenizer."""
        self.accelerator.unwrap_model(self.model).push_to_hub(repo_id, **kwargs)
        self.tokenizer.push_to_hub(repo_id, **kwargs)

    def create_model_card(self, path: str | Path, model_name: str = "PPO model") -> None:
        """Write a short `README.md` that says what the model is and how to load it."""
        from ppo_cli.models.model_card import trainer_card

        card = trainer_card(model_name, str(path), self.config)
        (Path(path) / "README.md").write_text(card, encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        """All that a continuation needs beside the model's weights: tensors and plain values."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler and self.lr_scheduler.state_dict(),
            "kl_coef": self.kl_ctl.value,
            "running": self.running.state_dict(),
            "calibration": self._calibration.state_dict(),
            "shuffle": numpy_state(self._shuffle),
            "sampling": self._sampling.state_dict(),
            "current_step": self.current_step,
            "adaptation": self._adaptation and self._adaptation.state_dict(),
            "best_mean_score": self._best_mean_score,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self._schedule is not None:
            follow(self._schedule)
        self.kl_ctl.value = state["kl_coef"]
        self.running.load_state_dict(state["running"])
        self._calibration.load_state_dict(state["calibration"])
        set_numpy_state(self._shuffle, state["shuffle"])
        self._sampling.load_state_dict(state["sampling"])
        self.current_step = state["current_step"]
        if self._adaptation is not None:
            self._adaptation.load_state_dict(state["adaptation"], state["current_step"])
        self._best_mean_score = state["best_mean_score"]

    def _push_if_best(self, scores: Tensor) -> None:
        """Upload the model whenever the mean score reaches a new height, if that is configured."""
        target = self.config.push_to_hub_if_best_kwargs
        if not target or self.current_step % self.config.compare_steps:
            return
        mean_score = scores.mean().item()
        if mean_score > self._best_mean_score:
            self._best_mean_score = mean_score
            self.push_to_hub(**target)

    # ------------------------------------------------------------------ models and modes

    def _reference(
        self, model: AutoModelForCausalLMWithValueHead, given: Any, num_shared_layers: int | None
    ) -> Any:
        if given is not None:
            require("ref_model", given, (AutoModelForCausalLMWithValueHead, PreTrainedModel))
            if num_shared_layers is not None:
                warnings.warn("num_shared_layers is ignored: ref_model was passed", stacklevel=3)
            if isinstance(given, PreTrainedModel):  # the head is not used, the forward is
                given = AutoModelForCausalLMWithValueHead(given)
            refuse_shared_weights(model, given)
            return given
        if not self.is_peft_model:
            return create_reference_model(model, num_shared_layers)
        # The policy as it starts, which an adapter that was trained before is a part of.
        return None if starts_as_its_base(model) else create_adapter_reference(model)

    def adapter_off(self) -> AbstractContextManager[None]:
        """Where the policy without its adapter is the reference: switch the adapter off."""
        if self.ref_model is not None:
            return nullcontext()
        return self.accelerator.unwrap_model(self.model).pretrained_model.disable_adapter()

    @contextmanager
    def _unwrapped(self, model: Any) -> Iterator[Any]:
        """The model itself, ready to generate, whatever accelerate wrapped around it."""
        if self.accelerator.distributed_type == DistributedType.NO:
            yield self.accelerator.unwrap_model(model)
            return
        from trl.models import unwrap_model_for_generation

        with unwrap_model_for_generation(model, self.accelerator) as unwrapped:
            yield unwrapped
