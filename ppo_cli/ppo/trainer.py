"""`PPOTrainer`: sample responses, score them, and take a PPO step.

The interface is that of TRL 0.11.4's classic trainer; the maths is in `advantages.py` and
`losses.py`. Source: Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), with the KL penalty
of Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593). In an encoder-decoder
the encoder reads the query, and the decoder writes the response after a start token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ppo_cli.errors import UsageError
from ppo_cli.kernels.patches import fast_layers
from ppo_cli.models.encoder_decoder import decoder_start
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.models.reference import adapter_off
from ppo_cli.models.sampling import check_sampling, sample_responses
from ppo_cli.models.sharding import free, gathered, whole_copy, without_weights
from ppo_cli.models.transformers_generate import new_token_limits
from ppo_cli.ppo.accelerator import make_accelerator, record_surroundings, require
from ppo_cli.ppo.classic_methods import ClassicMethods, pad_right, replaced_methods
from ppo_cli.ppo.classic_step import classic_step, refuse_beside_methods
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.ppo.dataloader import make_dataloader
from ppo_cli.ppo.device_cache import PPODecorators
from ppo_cli.ppo.experience import compute_rewards, make_experience, read_probabilities
from ppo_cli.ppo.forward import check_noise, check_reading
from ppo_cli.ppo.generation import generation_settings, with_start
from ppo_cli.ppo.kl_controller import make_kl_controller
from ppo_cli.ppo.learning_rate import AdaptiveLearningRate, follow, make_scheduler
from ppo_cli.ppo.modes import dropout_off, dropout_off_in_all_modes, head_alone
from ppo_cli.ppo.optimizer_step import make_optimizer, stepped_parameters
from ppo_cli.ppo.reference import make_reference, prepare_reference
from ppo_cli.ppo.scores import PotentialCalibration, RunningMoments, scale_scores
from ppo_cli.ppo.sharding import begin_sharded, refuse_unshardable, sharding_errors
from ppo_cli.ppo.statistics import scalars
from ppo_cli.ppo.step_inputs import StepInputs, as_rows, check_ids, step_inputs
from ppo_cli.ppo.step_statistics import (
    Stopwatch,
    length_statistics,
    step_statistics,
    to_numbers,
)
from ppo_cli.ppo.step_warnings import step_warnings, training_warning
from ppo_cli.ppo.trackers import send_statistics
from ppo_cli.ppo.trainer_html import description, trainer_html
from ppo_cli.ppo.update import Update
from ppo_cli.utils import processes
from ppo_cli.utils.random_state import RandomStream, numpy_state, set_numpy_state


class PPOTrainer(ClassicMethods):
    """Proximal Policy Optimization of a causal language model.

    Args:
        config: the settings; `world_size` and the like are filled in.
        model: the policy.
        ref_model: the model from which KL is measured, with or without a value head. None makes a
            frozen copy of `model`. A peft model whose adapter is new needs no copy: its reference
            is the same model with the adapter off.
        tokenizer: its pad and end-of-text tokens are used.
        dataset: rows with the queries; makes `dataloader`.
        optimizer: None for Adam over the trainable parameters.
        data_collator: collates rows of `dataset` into a batch.
        num_shared_layers: with `ref_model=None`: freeze this many lower layers and share them
            between policy and reference.
        lr_scheduler: stepped once per `step()`; None for the one that `config` asks for.
        training_data_collator: makes the rows that a replaced `batched_forward_pass` reads, of
            dictionaries with `input_ids` and `attention_mask`; `step` itself lays out its own.

    Attributes:
        accelerator: the `accelerate.Accelerator` that places and wraps everything.
        model, ref_model, optimizer, lr_scheduler, dataloader: prepared by it.
        kl_ctl: the KL controller; `kl_ctl.value` is the coefficient.
        running: the moments of all scores so far, for `use_score_scaling`.
        current_step: number of `step()` calls so far.
        sampling: the random numbers of `generate`; each process has its own.
        data_collator: `training_data_collator`, or one that pads on the right.
        model_params: the parameters that the optimizer steps.
        advises: whether `step()` warns, once each, of negative KL and of skipped mini-batches.

    Raises:
        ValueError: an argument has the wrong type, or `config` contradicts itself.
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
        training_data_collator: Callable | None = None,
    ) -> None:
        require("config", config, PPOConfig)
        wrap = ": pass AutoModelForCausalLMWithValueHead.from_pretrained(model)"
        require("model", model, AutoModelForCausalLMWithValueHead, wrap)
        require("tokenizer", tokenizer, PreTrainedTokenizerBase)
        if lr_scheduler is not None:
            require("lr_scheduler", lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
        assert config is not None
        assert model is not None
        assert tokenizer is not None
        config.check_batch_arithmetic()
        self.config = config
        self.tokenizer = tokenizer
        self.model = model
        self.accelerator = make_accelerator(config)
        self.data_collator = self._training_collator(training_data_collator)
        PPODecorators.optimize_device_cache = config.optimize_device_cache
        self.is_peft_model = model.is_peft_model
        self.is_distributed = self.accelerator.num_processes > 1
        self.is_encoder_decoder = model.is_encoder_decoder
        record_surroundings(config, self.accelerator, model)

        reference = make_reference(model, ref_model, num_shared_layers)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        if optimizer is None:
            optimizer = make_optimizer(model, config)
        if message := training_warning(model, optimizer):
            warnings.warn(message, stacklevel=2)
        self._schedule = self._adaptation = None  # of the learning rate, as `config` says
        if lr_scheduler is None:
            self._schedule = make_scheduler(config, optimizer)
            if config.lr_scheduler_type == "adaptive":
                self._adaptation = AdaptiveLearningRate(optimizer, config)
        self.current_step = 0
        self._skeleton: Any = None  # of a sharded policy
        if self.accelerator.is_fsdp2:
            self._settle_before_sharding(model, reference)
        self.dataset = dataset
        dataloader = None
        if dataset is not None:
            dataloader = self.prepare_dataloader(dataset, data_collator)
            if self.accelerator.dataloader_config.dispatch_batches is None:
                # The main process would hand out the batches of a stream, which takes tensors.
                self.accelerator.dataloader_config.dispatch_batches = False
        with sharding_errors(model):
            prepared = self.accelerator.prepare(model, optimizer, dataloader, lr_scheduler)
        self.model, self.optimizer, self.dataloader, self.lr_scheduler = prepared
        if isinstance(self.model, DistributedDataParallel):
            # A broadcast in each forward; processes may need different numbers of forwards.
            self.model.broadcast_buffers = False
        self.model_params = stepped_parameters(self.optimizer)
        if lr_scheduler is None:
            self.lr_scheduler = self._schedule  # accelerate would step it once per process
        self.ref_model = prepare_reference(reference, self.accelerator)
        if self.accelerator.is_fsdp2:
            begin_sharded(self.accelerator, self.model, self.ref_model)

        self.kl_ctl = make_kl_controller(config)
        self.running = RunningMoments()
        self._calibration = PotentialCalibration()
        self._best_mean_score = -float("inf")
        self.advises = True
        self._warned: set[str] = set()
        self._last_statistics: dict[str, float] = {}
        # Separate generators, so that the caller's random state stays as it is.
        self._shuffle = np.random.RandomState(config.seed)
        self.sampling = RandomStream(
            config.seed + self.accelerator.process_index, self.accelerator.device
        )

    def __repr__(self) -> str:
        if not hasattr(self, "sampling"):  # the constructor has raised
            return super().__repr__()
        return f"PPOTrainer({', '.join(f'{k}: {v}' for k, v in description(self).items())})"

    def _repr_html_(self) -> str:
        """Models, device, batch and the newest step's statistics, for a notebook."""
        return trainer_html(self, self._last_statistics)

    def _training_collator(self, given: Callable | None) -> Callable:
        """The collator of `prepare_model_inputs`.

        Raises:
            UsageError: one was given that nothing would use.
        """
        if given is None:
            return partial(pad_right, pad_token_id=self._pad_token_id)
        plain = (DataCollatorForLanguageModeling, DataCollatorWithPadding)
        if type(given) not in plain and "batched_forward_pass" not in replaced_methods(self):
            raise UsageError(
                "training_data_collator makes rows for a batched_forward_pass that a class of "
                "yours replaces: leave it out, step lays out its own rows"
            )
        return given

    @property
    def current_device(self) -> torch.device:
        """The device of the models, and of what `step` is best given."""
        return self.accelerator.device

    @property
    def optional_peft_ctx(self) -> Callable[[], AbstractContextManager[None]]:
        """Makes a context in which the policy's adapter is off, if it is its own reference."""
        return self.adapter_off

    # ------------------------------------------------------------------ sampling

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        uniforms: Tensor | None = None,
        **generation_kwargs: Any,
    ) -> Any:
        """Sample a response to each query, with dropout off.

        Args:
            query_tensor: (query_length,) token ids, or a list of such tensors.
            length_sampler: called once per query for the number of new tokens.
            batch_size: queries per forward pass, for a list.
            return_prompt: whether the returned tensors begin with the query. Those of an
                encoder-decoder always begin with its decoder's start token instead.
            generate_ref_response: also sample from the reference.
            uniforms: (B, R) random numbers in [0, 1) that decide the tokens, R the largest number
                of new tokens; None for those of `sampling`.
            generation_kwargs: settings of `transformers`' `generate`, a `generation_config` among
                them; keywords win over what that sets. What neither sets does not shape the
                distribution, whatever the model's own `generation_config` says: sampling has the
                trainer's `temperature`, no top-k and no top-p. Without an `eos_token_id` every end
                token of tokenizer and model ends a response, and without a length the model's own
                `max_new_tokens` or `max_length` does, or 20 new tokens.

        Returns:
            For one query a (1, length) tensor, for a list a list of 1-D tensors, each with its end
            token if one was drawn. With `generate_ref_response` a pair: policy's, reference's.

        Raises:
            ValueError: a query is empty, not 1-D, or too long for the model, or a setting has no
                effect here.
        """
        single = isinstance(query_tensor, Tensor)
        queries: list[Tensor] = [query_tensor] if single else list(query_tensor)  # type: ignore[list-item]
        if any(query.dim() != 1 for query in queries):
            raise ValueError(
                "query_tensor must be a tensor of shape (query_length,) or a list of them"
            )
        policy = self.accelerator.unwrap_model(self.model)
        if queries:
            rows = torch.nn.utils.rnn.pad_sequence(queries, batch_first=True)
            check_ids(rows, self._vocabulary_size, "query")
        start, own = decoder_start(policy), policy.generation_config
        # What counts in max_length beside new tokens: of an encoder-decoder the start token.
        before = queries if start is None else [query[:1] for query in queries]
        limits = new_token_limits(before, length_sampler, generation_kwargs, own)
        settings = generation_settings(
            generation_kwargs,
            tokenizer=self.tokenizer,
            policy=policy,
            temperature=self.config.temperature,
        )

        def sample(model: Any) -> Any:
            with self.sampling_from(model) as inner:
                responses = sample_responses(
                    inner, queries, limits, settings, batch_size=batch_size, uniforms=uniforms
                )
            if start is not None:
                responses = with_start(responses, start)
            elif return_prompt:
                responses = [
                    torch.cat([query.to(response.device), response])
                    for query, response in zip(queries, responses, strict=True)
                ]
            return responses[0].unsqueeze(0) if single else responses

        response = sample(self.model)
        if not generate_ref_response:
            return response
        with self.reference_active() as reference:
            return response, sample(reference)

    def gathered(self, *, reference: bool = True) -> AbstractContextManager[None]:
        """Hold the whole weights of sharded models inside the block, to sample and to evaluate.

        All processes come to it. Inside they may make different forward passes, without gradients.

        Args:
            reference: whether those of the reference, too.
        """
        return gathered(self.model, self.ref_model if reference else None)

    @contextmanager
    def sampling_from(self, model: Any = None) -> Iterator[Any]:
        """The model to sample from inside the block, where random numbers are the trainer's.

        Args:
            model: policy or reference; None for the policy.
        """
        inner = self.accelerator.unwrap_model(model or self.model)
        with gathered(inner), self.sampling.active(), self.accelerator.autocast():
            yield inner

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Switch the adapter off inside the block, if the reference is the policy without it."""
        if self.ref_model is not None:
            yield
            return
        free(self.model)
        with adapter_off(self.accelerator.unwrap_model(self.model)):
            try:
                yield
            finally:
                free(self.model)

    @contextmanager
    def reference_active(self) -> Iterator[Any]:
        """The reference, usable inside the block: `ref_model`, or the policy, its adapter off."""
        with self.adapter_off():
            yield self.model if self.ref_model is None else self.ref_model

    # ------------------------------------------------------------------ learning

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
        potentials: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        """One PPO step on a batch.

        As pseudocode, with the function of each line::

            old, ref = policy and reference over the batch      experience.read_probabilities
            kl = old.logprobs - ref.logprobs                    losses.kl_penalty
            rewards = score at the last token - kl_coef * kl    experience.compute_rewards
            advantages, returns = GAE(rewards, old.values)      advantages.generalized_advantages
            for each of ppo_epochs:                             Update.run
                for each mini-batch of the shuffled batch:
                    loss = policy loss + vf_coef * value loss   losses.minibatch_loss
                    loss.backward()
                    after gradient_accumulation_steps of them:  OptimizerStep
                        move the weights
            move kl_coef, if kl is off target                   make_kl_controller

        Where a class replaces one of the methods of `ClassicMethods`, the step is made of them.

        KL from the reference is taken once, before the update, for each sampled token (for `full`:
        over the whole vocabulary). It lowers the rewards; with `kl_in_loss` it does not, and is a
        term of each mini-batch's loss instead, from the policy as it is then.

        Args:
            queries: B tensors of token ids, (query_length,).
            responses: B tensors of token ids, (response_length,). Those of an encoder-decoder
                begin with its decoder's start token, as `generate` returns them.
            scores: B scalars.
            response_masks: B tensors, (response_length,), 0 for response tokens that are context
                but not learnt from, such as a tool's output. A response without tokens that count
                has no effect.
            potentials: B tensors, (response_length,): an estimate of the score before each response
                token, such as the score of the unfinished text. Each token is then credited with
                the change that follows it (`advantages.shaping_rewards`), which is far less noisy
                than the final score, above all with a `lam` below 1.

        Returns:
            The statistics in `ppo_cli.ppo.statistics.STATISTICS`: floats and NumPy arrays.

        Raises:
            ValueError: lengths or shapes do not fit, a score is not finite, a query is empty, no
                response token of the whole batch counts, or a start token is missing.
        """
        clock = Stopwatch()
        config = self.config
        queries, responses, response_masks, potentials = (
            as_rows(part) for part in (queries, responses, response_masks, potentials)
        )
        if replaced := replaced_methods(self):
            refuse_beside_methods(self, replaced, potentials)
        start = decoder_start(self.accelerator.unwrap_model(self.model))
        batch = step_inputs(
            queries,
            responses,
            scores,
            response_masks,
            potentials,
            batch_size=config.batch_size,
            pad_token_id=self._pad_token_id,
            device=self.accelerator.device,
            decoder_start=start,
        )
        check_ids(batch.tokens.input_ids, self._vocabulary_size, "queries and responses")
        if batch.tokens.encoder is not None:
            check_ids(batch.tokens.encoder.ids, self._vocabulary_size, "queries")
        batch = self._scaled(batch)
        self._push_if_best(batch.scores)
        if replaced:
            with self._modes_of_a_step(), dropout_off_in_all_modes(self.model):
                found = classic_step(self, queries, responses, response_masks, batch.scores, clock)
        else:
            found = self._learn(batch, clock)
        stats = self._numbers(found)
        self._warn(stats)
        pairs = zip(queries, responses, strict=True)
        begin = 0 if start is None else 1
        lengths = [(len(query), len(response) - begin) for query, response in pairs]
        lengths = processes.gather_list(lengths)
        for name, those in zip(("queries", "responses"), zip(*lengths, strict=True), strict=True):
            stats = stats | length_statistics(name, list(those)) | stats  # a class may have its own
        clock.lap("calc_stats")
        self._after_step(stats)
        stats = {**stats, **clock.times, "time/ppo/total": clock.total}
        self._last_statistics = scalars(stats)
        return stats

    def _learn(self, batch: StepInputs, clock: Stopwatch) -> dict[str, Any]:
        """The update of `step`: statistics as tensors and floats."""
        config, kl_coef = self.config, self.kl_ctl.value
        update = Update(
            policy=self.model,
            optimizer=self.optimizer,
            accelerator=self.accelerator,
            shuffle=self._shuffle,
            config=config,
            kl_coef=kl_coef,
            head_alone=self._is_warming_up,
        )
        with self._modes_of_a_step():
            update.optimizer_step.make_state()
            before = read_probabilities(
                batch.tokens,
                policy=self.model,
                reference=self.reference_active,
                forward=update.forward_before,
                config=config,
            )
            clock.lap("forward_pass")
            rewards, kl_rewards = compute_rewards(batch, before.kl_penalties, kl_coef, config)
            clock.lap("compute_rewards")
            experience = make_experience(batch.tokens, before, rewards, config)
            clock.lap("compute_advantages")
            updates = update.run(experience)
            clock.lap("optimize_step")

        return step_statistics(
            experience, before.kl_penalties, kl_rewards, batch.scores, kl_coef, updates
        )

    def _settle_before_sharding(self, model: AutoModelForCausalLMWithValueHead, ref: Any) -> None:
        """Ask what will be asked of policy and reference while each process has them whole."""
        with processes.agreed():
            with self._modes_of_a_step():
                refuse_unshardable(model)
            for one in filter(None, (model, ref)):
                check_reading(one)
                check_sampling(one, self.tokenizer.pad_token_id)
                one.keep_check_results()
            self._skeleton = without_weights(model)

    @contextmanager
    def _modes_of_a_step(self) -> Iterator[None]:
        """No dropout, in the warm-up only the value head learns, fast products of matrices."""
        check_reading(self.model)  # before the warm-up freezes parameters
        checkpointing = self.recomputes_activations
        dropout = dropout_off(self.model, keep_training_mode=checkpointing)
        warm_up = head_alone(self.model) if self._is_warming_up else nullcontext()
        free(self.model)
        with dropout, warm_up, fast_layers():
            if checkpointing:
                check_noise(self.model)
            try:
                yield
            finally:
                free(self.model)

    @property
    def _vocabulary_size(self) -> int | None:
        size: int | None = self.accelerator.unwrap_model(self.model).vocabulary_size
        return size

    @property
    def _pad_token_id(self) -> int:
        """Tokenizer's pad token; 0 where there is none, or the model has no embedding for it."""
        pad, size = self.tokenizer.pad_token_id, self._vocabulary_size
        return 0 if pad is None or (size is not None and pad >= size) else pad

    @property
    def _is_warming_up(self) -> bool:
        return self.current_step < self.config.value_warmup_steps

    def _scaled(self, batch: StepInputs) -> StepInputs:
        """The batch with its scores and potentials scaled, clipped and calibrated as configured."""
        tokens, scores, potentials = batch
        if self.config.use_score_scaling and not self.running.is_settled(self.config):
            self.running.update(scores)
        scores = scale_scores(scores, self.running, self.config)
        if potentials is not None:
            potentials = scale_scores(potentials, self.running, self.config)
            if self.config.calibrate_potentials:
                self._calibration.update(potentials, scores, tokens.mask)
                potentials = self._calibration(potentials, tokens.mask)
        return StepInputs(tokens, scores, potentials)

    def _numbers(self, stats: Mapping[str, Any]) -> dict[str, Any]:
        """Statistics as floats and arrays, with the learning rate."""
        numbers = to_numbers(stats)
        return numbers | {"ppo/learning_rate": self.optimizer.param_groups[0]["lr"]}

    def _warn(self, stats: Mapping[str, Any]) -> None:
        """Warn of negative KL and skipped mini-batches, once each."""
        for kind, message in step_warnings(stats, self.config).items():
            if self.advises and kind not in self._warned:
                self._warned.add(kind)
                warnings.warn(message, stacklevel=3)

    def _after_step(self, stats: Mapping[str, Any]) -> None:
        """Update all that changes once per step, apart from the weights."""
        samples = self.config.batch_size * self.accelerator.num_processes
        self.kl_ctl.update(stats["objective/kl"], samples)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        if self._adaptation is not None:
            self._adaptation.update(stats["ppo/policy/approxkl"], self.current_step)
        if self.config.optimize_device_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.current_step += 1

    def log_stats(
        self,
        stats: Mapping[str, Any],
        batch: Mapping[str, Any],
        rewards: Sequence[Tensor] | Tensor,
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> None:
        """Send a step's statistics to the trackers of `log_with`; do nothing without one.

        Args:
            stats: the statistics that `step()` returned.
            batch: the batch's columns; those of `columns_to_log` go into wandb's table.
            rewards: the batch's scores, logged as `env/reward_mean`, `_std` and `_dist`.
            columns_to_log: names of columns of `batch`.

        Raises:
            ValueError: with wandb, a column is not in the batch.
        """
        scores = torch.tensor(processes.gather_list([float(reward) for reward in rewards]))
        columns = tuple(columns_to_log)
        if self.is_distributed:
            shown = {key: list(batch[key]) for key in columns if key in batch}
            batch = {key: processes.gather_list(values) for key, values in shown.items()}
        trackers = self.accelerator.trackers if self.accelerator.is_main_process else []
        send_statistics(trackers, self.current_step, stats, batch, scores, columns)

    # ------------------------------------------------------------------ data and saving

    def prepare_dataloader(
        self,
        dataset: Any,
        data_collator: Callable | None = None,
        model: AutoModelForCausalLMWithValueHead | None = None,
    ) -> torch.utils.data.DataLoader:
        """Batches of `batch_size` rows, without a shorter last one.

        They are shuffled, but for an `IterableDataset`, whose order is its own.

        With `remove_unused_columns` a Hugging Face dataset loses its columns, apart from the
        arguments of the model's forward and label, query and response.
        """
        model = model or self.accelerator.unwrap_model(self.model)
        return make_dataloader(dataset, self.config, model, data_collator)

    def whole_policy(self) -> Any:
        """The policy without accelerate's wrapper, its weights whole.

        Of a sharded policy this is a copy in the main process's memory, on the CPU, and None in the
        others; all processes call it.
        """
        if self._skeleton is None:
            return self.accelerator.unwrap_model(self.model)
        return whole_copy(self.model, self._skeleton)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write policy, value head, tokenizer and a model card to a folder.

        All processes of a sharded policy call it; the main one writes.
        """
        policy = self.whole_policy()
        if policy is not None:
            policy.save_pretrained(save_directory, **kwargs)
            self.tokenizer.save_pretrained(save_directory)
            self.create_model_card(save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Upload policy, value head and tokenizer. All processes of a sharded policy call it."""
        policy = self.whole_policy()
        if policy is not None:
            policy.push_to_hub(repo_id, **kwargs)
            self.tokenizer.push_to_hub(repo_id, **kwargs)

    def create_model_card(self, path: str | Path, model_name: str = "PPO model") -> None:
        """Write a short `README.md`: what the model is and how to load it."""
        from ppo_cli.models.model_card import trainer_card

        card = trainer_card(model_name, str(path), self.config)
        (Path(path) / "README.md").write_text(card, encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        """The trainer's state apart from the model's weights: tensors and plain values."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler and self.lr_scheduler.state_dict(),
            "kl_coef": self.kl_ctl.value,
            "kl_controller": self.kl_ctl.state_dict(),
            "running": self.running.state_dict(),
            "calibration": self._calibration.state_dict(),
            "shuffle": numpy_state(self._shuffle),
            "sampling": self.sampling.state_dict(),
            "current_step": self.current_step,
            "adaptation": self._adaptation and self._adaptation.state_dict(),
            "best_mean_score": self._best_mean_score,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self._schedule is not None:
            follow(self._schedule)
        self.kl_ctl.value = state["kl_coef"]
        self.kl_ctl.load_state_dict(state.get("kl_controller", {}))  # earlier releases had none
        self.running.load_state_dict(state["running"])
        self._calibration.load_state_dict(state["calibration"])
        set_numpy_state(self._shuffle, state["shuffle"])
        self.sampling.load_state_dict(state["sampling"])
        self.current_step = state["current_step"]
        if self._adaptation is not None:
            self._adaptation.load_state_dict(state["adaptation"], state["current_step"])
        self._best_mean_score = state["best_mean_score"]

    def _push_if_best(self, scores: Tensor) -> None:
        """Upload the model when the mean score is a new maximum, if that is configured."""
        target = self.config.push_to_hub_if_best_kwargs
        if not target or self.current_step % self.config.compare_steps:
            return
        mean_score = scores.mean().item()
        if mean_score > self._best_mean_score:
            self._best_mean_score = mean_score
            if self._skeleton is None:
                processes.on_main(self.push_to_hub, **target)
            else:
                with processes.agreed():
                    self.push_to_hub(**target)
