"""Builds a run from its configuration: everything is loaded and checked, nothing is written."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch

from ppo_cli.config.ppo import PPOSettings
from ppo_cli.config.schema import RunConfig
from ppo_cli.data.consent import check_consent
from ppo_cli.data.fingerprint import Inputs, inputs_of, trusted_too
from ppo_cli.data.prompts import LengthSampler, Prompt, PromptSet, load_prompts
from ppo_cli.errors import DataError, UsageError
from ppo_cli.evaluation.held_out import HeldOutEvaluation
from ppo_cli.kernels.kernel_caches import limit_kernel_caches
from ppo_cli.models.capabilities import rope_switch
from ppo_cli.models.context import context_length, context_used
from ppo_cli.models.loading import (
    check_trusted,
    load_policy,
    load_tokenizer,
    reads_whole_texts,
    refuse_quantized_weights,
    refuse_untrainable,
)
from ppo_cli.models.sampling import check_sampling
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.models.stop_tokens import end_tokens
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.ppo.engines import check_engine, make_engine, try_engine
from ppo_cli.ppo.forward import check_reading
from ppo_cli.ppo.sharding import check_sharding, load_whole_models
from ppo_cli.ppo.trackers import check_trackers
from ppo_cli.ppo.trainer import PPOTrainer
from ppo_cli.rewards.loading import load_reward, try_reward
from ppo_cli.rewards.penalties import check_penalties
from ppo_cli.training.checkpoint import state_faults
from ppo_cli.training.diagnostics import Diagnostics, sampling_warning
from ppo_cli.training.fast_paths import fast_paths
from ppo_cli.training.provenance import code
from ppo_cli.training.resume import locate_inputs, reproducibility_warnings
from ppo_cli.training.run import Training
from ppo_cli.training.run_directory import RunDirectory
from ppo_cli.training.state import TrainingState
from ppo_cli.training.step import PPOStep
from ppo_cli.training.tracking import RunTrackers
from ppo_cli.utils import processes
from ppo_cli.utils.device import accelerator_settings, machine, resolve_device, take_threads
from ppo_cli.utils.random_state import RandomStream, set_seed


def build_training(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    trusted: Collection[str] = (),
    tell: Callable[[str], None] = lambda _: None,
    allow_changed_inputs: bool = False,
    consented: Collection[str] = (),
) -> Training:
    """Build a run that is ready to start.

    It limits the kernels that oneDNN keeps, for the whole process. A resumed run also
    takes the number of threads that it was started with.

    Args:
        config: what to do.
        resume: go on from the newest checkpoint of the run directory.
        overwrite: replace a run directory that exists.
        trusted: models, as `config` names them, whose own code may run.
        tell: receives messages about progress while many prompts are read.
        allow_changed_inputs: resume although a model or the prompts have changed since.
        consented: functions and endpoints of the reward, as `config` names them, that may be used.

    Raises:
        PPOCliError: the request cannot be met.
    """
    directory = RunDirectory(config.output)
    located, inputs = config, None  # `located` names the places where the inputs are
    with processes.agreed():
        check_trackers(config.ppo)
        precision = {"mixed_precision": config.policy.precision}
        ram_warning = load_whole_models()
        check_sharding({**precision, **config.ppo.accelerator_kwargs})
        check_engine(config.rollout)
        check_trusted(trusted, (config.policy.model, *config.reward.models))
        recorded = Inputs(directory.recorded().get("inputs")) if resume else None
        check_consent(config.reward, consented, str(config.output), recorded)
        if resume:
            directory.check_resumable()
            located, inputs = locate_inputs(directory, config, allow_changed_inputs)
            models = zip(config.reward.models, located.reward.models, strict=True)
            names = {config.policy.model: located.policy.model, **dict(models)}
            trusted = trusted_too(trusted, names)
        else:
            directory.check_writable(overwrite, inputs_of(config))
    if resume:
        processes.on_main(directory.lock.acquire)
        _warn([take_threads(_recorded_threads(directory))])

    _warn([ram_warning])
    limit_kernel_caches()
    set_seed(config.run.seed)
    with processes.agreed():
        device = resolve_device(config.run.device)
        tokenizer = load_tokenizer(located.policy.model, located.policy.revision, trusted)
        if config.prompts.chat_template is not None:  # it is saved with the model, too
            tokenizer.chat_template = config.prompts.chat_template
        policy = located.policy
        complete = reads_whole_texts(policy.model, policy.revision, trusted)
        seed = config.run.seed
        prompts = load_prompts(located.prompts, tokenizer, seed, tell, complete=complete)
        _check_prompt_count(config, prompts)
        reward = load_reward(located.reward, device, trusted=trusted)
        if config.reward.probe:
            reward.probe()
    length_sampler = LengthSampler(
        config.rollout.output_min_length,
        config.rollout.output_max_length,
        seed=(config.run.seed + 1) % 2**32,  # not the seed of the queries' lengths
    )
    trainer = make_trainer(located, device, tokenizer, trusted)
    model = trainer.accelerator.unwrap_model(trainer.model)
    with processes.agreed():
        end_token_ids = end_tokens(
            tokenizer, config.rollout.stop, model, chat=config.prompts.has_chat
        )
        check_penalties(config.reward, end_token_ids)
        try_reward(reward, prompts.train, end_token_ids, continues=not complete)
        check_context(config, model, prompts.train)
        try_models(trainer)
    _warn([sampling_warning(config)])

    sampling = SamplingParams(
        temperature=config.rollout.temperature,
        top_k=config.rollout.top_k,
        top_p=config.rollout.top_p,
        stop_token_ids=tuple(end_token_ids),
        pad_token_id=tokenizer.pad_token_id,
    )
    queries = [prompt.input_ids for prompt in prompts.train]
    is_trusted = located.policy.model in trusted
    with trainer.gathered(), processes.agreed():
        engine = make_engine(config.rollout, trainer, queries, is_trusted=is_trusted)
        try_engine(engine, trainer, queries, sampling, config.rollout.output_max_length - 1)
    facts: dict[str, Any] = {
        "machine": machine(device, trainer.accelerator.mixed_precision),
        "kernels": fast_paths(trainer),
    }
    state = TrainingState(directory, trainer, length_sampler, config)
    if resume:
        _restore(state, directory, config, trainer)
        now = {**code(), **facts}
        _warn(reproducibility_warnings(directory, config, trainer.current_step, now))
    facts["inputs"] = (inputs or Inputs.of(located)).records
    return Training(
        config=config,
        directory=directory,
        overwrite=overwrite,
        facts=facts,
        tokenizer=tokenizer,
        prompts=prompts,
        reward=reward,
        trainer=trainer,
        ppo_step=PPOStep(
            config=config,
            trainer=trainer,
            tokenizer=tokenizer,
            prompts=prompts.train,
            length_sampler=length_sampler,
            reward=reward,
            end_token_ids=end_token_ids,
            sampling=sampling,
            engine=engine,
        ),
        held_out=HeldOutEvaluation(
            trainer,
            tokenizer,
            reward,
            prompts.held_out,
            config.run.seed,
            sampling,
            max_new_tokens=config.rollout.output_max_length - 1,
        ),
        state=state,
        diagnostics=Diagnostics(config),
        trackers=RunTrackers(config, directory),
    )


def make_trainer(
    config: RunConfig, device: torch.device, tokenizer: Any, trusted: Collection[str]
) -> PPOTrainer:
    """Load the policy and make its trainer."""
    with processes.agreed():
        refuse_quantized_weights(config.policy, trusted)
        policy = load_policy(config.policy, tokenizer, trusted, device)
        refuse_untrainable(policy)
    with processes.agreed():
        settings = dataclasses.asdict(own_sizes(config.ppo))
    settings["log_with"] = None  # `RunTrackers` starts them, once there is a run directory
    settings["accelerator_kwargs"] = {
        **accelerator_settings(device),
        "mixed_precision": config.policy.precision,
        **config.ppo.accelerator_kwargs,
    }
    trainer = PPOTrainer(
        PPOConfig(
            **settings,
            seed=config.run.seed,
            temperature=config.rollout.temperature,
            model_name=config.policy.model,
            query_dataset=config.prompts.name,
            reward_model=" + ".join(config.reward.models) or None,
            steps=config.run.steps * settings["batch_size"],
            kl_budget=config.run.kl_budget,
            kl_ceiling=config.run.kl_ceiling,
        ),
        policy,
        None,
        tokenizer,
        num_shared_layers=config.policy.num_shared_layers,
    )
    # A run draws the random numbers of all rows everywhere: its samples are those of one process.
    trainer.sampling = RandomStream(config.run.seed, trainer.accelerator.device)
    trainer.advises = False  # `Diagnostics` warns of the same faults, and of more
    return trainer


def own_sizes(settings: PPOSettings) -> PPOSettings:
    """The settings with one process's part of the batches.

    Raises:
        UsageError: a batch cannot be divided by the number of processes.
    """
    count = processes.count()
    sizes = {}
    for key in ("batch_size", "mini_batch_size"):
        sizes[key], left = divmod(getattr(settings, key), count)
        if left or sizes[key] % (settings.responses_per_query if key == "batch_size" else 1):
            each = "" if not left else f": {count} processes cannot share it"
            raise UsageError(
                f"ppo.{key} is {getattr(settings, key)}{each or ', too few for its groups'}; make "
                f"it a multiple of {count * settings.responses_per_query}"
            )
    return settings if count == 1 else dataclasses.replace(settings, **sizes)


def try_models(trainer: PPOTrainer) -> None:
    """Check on a few tokens that the fast ways to sample from the models give the right numbers.

    Raises:
        UsageError: the policy is not causal.
        ModelError: no way to sample from it, or to compute its log-probabilities, is right.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model)
    check_sampling(policy, trainer.tokenizer.pad_token_id)
    for model in filter(None, (trainer.model, trainer.ref_model)):
        check_reading(model)


def check_context(config: RunConfig, model: Any, prompts: Sequence[Prompt]) -> None:
    """Raise `DataError` where queries with their responses have lengths that do not suit the model.

    They exceed its context, or they cross the length from which on it rotates all positions by
    other angles (longrope): then the probabilities of sampling token by token are not those of a
    forward over the whole sequence.
    """
    context = context_length(model)
    longest = max(len(prompt.input_ids) for prompt in prompts)
    new = config.rollout.output_max_length - 1
    if context is not None and context_used(model, longest, new) > context:
        raise DataError(
            f"queries of up to {longest} tokens and responses of up to {new} exceed the "
            f"model's context of {context}: lower {_length_key(config)} or "
            "rollout.output_max_length"
        )
    switch = rope_switch(model.config)
    if switch is not None and any(
        len(prompt.input_ids) <= switch < len(prompt.input_ids) + new for prompt in prompts
    ):
        raise DataError(
            f"some queries (of up to {longest} tokens) with their responses (of up to {new}) cross "
            f"{switch} tokens, from which on the model's positions turn otherwise (longrope), so "
            "their samples would not be the policy's: keep both below that with a lower "
            f"{_length_key(config)}, or all queries above it"
        )


def _length_key(config: RunConfig) -> str:
    """The key that limits the length of queries."""
    is_cut = config.prompts.cut and not config.prompts.has_chat
    return "prompts.input_max_text_length" if is_cut else "prompts.max_tokens"


def _restore(
    state: TrainingState, directory: RunDirectory, config: RunConfig, trainer: PPOTrainer
) -> None:
    """Restore the newest checkpoint; raise `UsageError` where it is past the last step."""
    with state_faults(directory.checkpoints):
        state.restore()
    with processes.agreed():
        if trainer.current_step > config.run.steps:
            raise UsageError(
                f"{config.output} has made {trainer.current_step} steps already, more than "
                f"run.steps ({config.run.steps}): give a larger number with --steps"
            )


def _check_prompt_count(config: RunConfig, prompts: PromptSet) -> None:
    """Raise `DataError` where there are fewer prompts than a batch has queries.

    And where there are fewer held-out prompts than processes, which share them.
    """
    queries = config.ppo.batch_size // config.ppo.responses_per_query
    if len(prompts.train) < queries:
        raise DataError(
            f"{config.prompts.name} yields {len(prompts.train)} prompts to train on, "
            f"fewer than a batch has queries ({queries}): lower ppo.batch_size and "
            "ppo.mini_batch_size, or give more texts"
        )
    if len(prompts.held_out) < processes.count():
        raise DataError(
            f"{config.prompts.name} yields {len(prompts.held_out)} held-out prompts for "
            f"{processes.count()} processes: raise prompts.held_out"
        )


def _recorded_threads(directory: RunDirectory) -> Any:
    """Threads of each process of the run; None where there were more or fewer processes."""
    recorded = directory.recorded().get("machine")
    if not isinstance(recorded, dict) or recorded.get("processes", 1) != processes.count():
        return None
    return recorded.get("threads")


def _warn(messages: Iterable[str | None]) -> None:
    for message in messages:
        if message is not None:
            warnings.warn(message, stacklevel=2)
