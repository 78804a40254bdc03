"""One training run: from a configuration to a run directory."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from ppo_cli.advice import Adviser
from ppo_cli.config import RunConfig
from ppo_cli.divergence import check_numbers, check_texts, check_weights, classifier_faults
from ppo_cli.errors import DataError, DivergenceError, UsageError
from ppo_cli.evaluation import Sample, mean_probability
from ppo_cli.files import write_text
from ppo_cli.loading import check_trusted, load_policy, load_reward, load_tokenizer
from ppo_cli.model_card import run_card
from ppo_cli.plots import plot_training
from ppo_cli.policy_files import save_folder
from ppo_cli.potentials import potentials
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.ppo.statistics import scalars
from ppo_cli.ppo.trainer import PPOTrainer
from ppo_cli.progress import Progress
from ppo_cli.prompts import LengthSampler, Prompt, collate, load_prompts
from ppo_cli.rollout import Rollout, context_length, decode
from ppo_cli.run_directory import CARD_FILE, METRICS_FILE, SAMPLES_FILE, RunDirectory
from ppo_cli.runtime import accelerator_settings, resolve_device, set_seed
from ppo_cli.sampling import draw_samples, judge
from ppo_cli.shaping import check_terms, penalties, shaped, shaping_statistics
from ppo_cli.stopping import end_tokens
from ppo_cli.summary import Judgement, Pace, StepReport, TrainingSummary
from ppo_cli.symptoms import sampling_advice

MAX_ROLLBACKS = 3


class Training:
    """A run that is ready to go: everything is loaded and checked, nothing is written yet.

    Args:
        config: what to do.
        resume: go on from the newest checkpoint of the run directory.
        overwrite: replace a run directory that exists.
        trusted: models, as `config` names them, whose own code may run.

    Raises:
        PPOCliError: whatever of the request cannot be met, before anything is created.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        resume: bool = False,
        overwrite: bool = False,
        trusted: Collection[str] = (),
    ) -> None:
        check_trusted(trusted, (config.policy.model, config.reward.model))
        self.config = config
        self.trusted = trusted
        self.directory = RunDirectory(config.output)
        self.overwrite = overwrite
        self.stopping = False
        if resume:
            self.directory.check_resumable()
            self.directory.lock()
        else:
            self.directory.check_writable(overwrite)
        set_seed(config.run.seed)
        self.device = resolve_device(config.run.device)
        self.tokenizer = load_tokenizer(config.policy.model, config.policy.revision, trusted)
        self.ends = end_tokens(self.tokenizer, config.rollout.stop)
        check_terms(config.reward, self.ends)
        self.prompts = load_prompts(config.prompts, self.tokenizer, config.run.seed)
        queries = config.ppo.batch_size // config.ppo.responses_per_query
        if len(self.prompts.train) < queries:
            raise DataError(
                f"{config.prompts.source} yields {len(self.prompts.train)} prompts to train on, "
                f"fewer than a batch has queries ({queries}): lower ppo.batch_size and "
                "ppo.mini_batch_size, or give more texts"
            )
        self.reward = load_reward(config.reward, self.device, trusted=trusted)
        if config.reward.probe:
            self.reward.probe()
        self.lengths = LengthSampler(
            config.rollout.output_min_length,
            config.rollout.output_max_length,
            seed=(config.run.seed + 1) % 2**32,  # not the seed of the queries' lengths
        )
        self.trainer = self._trainer()
        self._check_context()
        self._say(filter(None, [sampling_advice(config)]))
        self.adviser = Adviser(config)
        self.trainer.advises = False  # the adviser does, and knows more
        self.progress = Progress(self.directory, self.trainer, self.lengths, config.run)
        if resume:
            self.progress.go_back()
            if self.step > config.run.steps:
                raise UsageError(
                    f"{config.output} has made {self.step} steps already, more than "
                    f"run.steps ({config.run.steps}): give a larger number with --steps"
                )

    @property
    def step(self) -> int:
        """Steps done so far, those of earlier sessions of this run included."""
        return self.trainer.current_step

    def steps(self) -> Iterator[StepReport]:
        """Create the run directory, then make the PPO steps that remain, one at a time.

        Ends early, after a whole step, once `stopping` is set.

        Raises:
            DivergenceError: a step went wrong, and `run.on_divergence` or the number of rollbacks
                says to stop; the run directory holds the last good checkpoint and its model.
        """
        if self.progress.checkpoint is None:
            self.directory.create(self.config, self.overwrite)
            self.progress.save()  # there is always one to go back to
        else:
            self.progress.drop_what_followed()
            self.directory.record(self.config)
            self.adviser.recall(self.directory.metrics() if self.step else [])
        self._before = self._judge(reference=True)
        settings = self.config.run
        while self.step < settings.steps and not self.stopping:
            number = self.step + 1
            try:
                report = self._one_step()
            except DivergenceError as error:
                self._diverged(f"step {number}: {error}")
                continue
            if settings.checkpoint_every and self.step % settings.checkpoint_every == 0:
                self.progress.save()
            yield report

    def finish(self) -> TrainingSummary:
        """Judge the policy, then write model, plot and card. Works after any number of steps."""
        self.progress.save()
        before, after = self._before, self._judge(reference=False)
        summary = TrainingSummary(
            run=str(self.directory.path),
            label=self.reward.label,
            steps=self.step,
            planned_steps=self.config.run.steps,
            seconds=self.progress.seconds,
            before=Judgement.of(before),
            after=Judgement.of(after),
            kl=self.progress.kl,
            pace=Pace.of(self.directory.metrics()) if self.step else Pace.of([]),
            before_samples=before,
            after_samples=after,
        )
        self._save_model()
        write_text(self.directory.path / CARD_FILE, run_card(summary, self.config))
        if self.step == self.config.run.steps:
            self._say(self.adviser.closing())
        return summary

    def _diverged(self, what: str) -> None:
        """Go back to the last good checkpoint; raise unless training may try again from there."""
        rollbacks = self.progress.rollbacks + 1
        if self.config.run.on_divergence == "rollback" and rollbacks <= MAX_ROLLBACKS:
            self.progress.go_back(rollbacks)
            self.progress.drop_what_followed()
            self.adviser.recall(self.directory.metrics() if self.step else [])
            rate = self.trainer.optimizer.param_groups[0]["lr"]
            warnings.warn(
                f"{what}. Back to step {self.step}, with a learning rate of {rate:g} and other "
                f"random numbers (rollback {rollbacks} of at most {MAX_ROLLBACKS})",
                stacklevel=2,
            )
            return
        self.progress.go_back()
        self._save_model()
        tried = f" after {rollbacks - 1} rollbacks" if rollbacks > 1 else ""
        raise DivergenceError(
            f"{what}. Stopped{tried}; {self.directory.path} holds the checkpoint and the model of "
            f"step {self.step}"
        )

    def _one_step(self) -> StepReport:
        started = time.perf_counter()
        batch = self._batch(self.step)
        responses = self.trainer.generate(
            batch["input_ids"],
            length_sampler=self.lengths,
            batch_size=self.config.rollout.batch_size or len(batch["input_ids"]),
            return_prompt=False,
            **self._sampling,
        )
        sampled = time.perf_counter()
        rollout = decode(self.tokenizer, batch["input_ids"], responses)
        check_texts(rollout.response_texts, self.config.run.collapse_limit)
        with classifier_faults(self.reward.name):
            samples = judge(rollout, batch["query"], self.reward)
            promised = self._potentials(rollout)
        scores = torch.tensor([sample.score for sample in samples])
        taken = penalties(responses, rollout.response_texts, self.ends, self.config.reward)
        scored = time.perf_counter()
        stats = self.trainer.step(
            batch["input_ids"], responses, list(shaped(scores, taken)), potentials=promised
        )
        texts = {"query": batch["query"], "response": rollout.response_texts}
        self.trainer.log_stats(stats, texts, scores)
        seconds = time.perf_counter() - started
        self.progress.seconds += seconds
        tokens = sum(len(q) + len(r) for q, r in zip(batch["input_ids"], responses, strict=True))
        numbers = scalars(stats) | {
            "env/reward_mean": scores.mean().item(),
            "env/reward_std": scores.std().item() if len(scores) > 1 else 0.0,
            "env/probability_mean": mean_probability(samples),
            **shaping_statistics(scores, taken),
            "time/sampling": sampled - started,
            "time/scoring": scored - sampled,
            "time/optimising": stats["time/ppo/total"],
            "time/step": seconds,
            "perf/tokens_per_second": tokens / seconds,
            "run/rollbacks": self.progress.rollbacks,
        }
        check_weights(self._policy)
        check_numbers(numbers, self.config.run.kl_limit)
        shown = samples[: max(self.config.run.samples_per_step, 1)]
        self._record(numbers, shown)
        self._say(self.adviser.take(numbers))
        return StepReport(self.step, self.config.run.steps, numbers, shown)

    def _potentials(self, rollout: Rollout) -> list[torch.Tensor] | None:
        every = self.config.reward.score_every
        return None if every is None else potentials(rollout, self.tokenizer, self.reward, every)

    def _record(self, numbers: dict[str, float], samples: list[Sample]) -> None:
        self.progress.kl = numbers["objective/kl"]
        self.progress.score = numbers["env/reward_mean"]
        self.directory.append(METRICS_FILE, [{"step": self.step, **numbers}])
        self.directory.append(
            SAMPLES_FILE,
            (
                {"step": self.step, **sample.as_dict()}
                for sample in samples[: self.config.run.samples_per_step]
            ),
        )

    def _batch(self, step: int) -> dict[str, list[Any]]:
        """The prompts of a step: each pass over them in an order that seed and pass decide."""
        each = self.config.ppo.responses_per_query
        size, prompts = self.config.ppo.batch_size // each, self.prompts.train
        epoch, position = divmod(step, len(prompts) // size)
        order = np.random.RandomState([self.config.run.seed, epoch]).permutation(len(prompts))
        chosen = order[position * size : (position + 1) * size]
        return collate([vars(prompts[i]) for i in chosen for _ in range(each)])

    def _judge(self, *, reference: bool) -> list[Sample]:
        """Samples of the reference or the policy to the held-out prompts, with equal seeds."""
        held_out: list[Prompt] = self.prompts.held_out
        trainer = self.trainer
        model: Any = self._policy
        if reference and trainer.ref_model is not None:
            model = trainer.accelerator.unwrap_model(trainer.ref_model)
        adapter = trainer.adapter_off() if reference else nullcontext()
        with adapter, trainer.accelerator.autocast():
            return draw_samples(
                model,
                self.tokenizer,
                [prompt.input_ids for prompt in held_out],
                [prompt.query for prompt in held_out],
                max_new_tokens=self.config.rollout.output_max_length - 1,
                seed=self.config.run.seed,
                reward=self.reward,
                **self._sampling,
            )

    @property
    def _sampling(self) -> dict[str, Any]:
        rollout = self.config.rollout
        return {
            "temperature": rollout.temperature,
            "top_k": rollout.top_k,
            "top_p": rollout.top_p,
            "eos_token_id": self.ends or None,
        }

    @property
    def _policy(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def _trainer(self) -> PPOTrainer:
        config = self.config
        settings = dataclasses.asdict(config.ppo)
        settings["accelerator_kwargs"] = {
            **accelerator_settings(self.device),
            "mixed_precision": config.policy.precision,
            **config.ppo.accelerator_kwargs,
        }
        return PPOTrainer(
            PPOConfig(
                **settings,
                seed=config.run.seed,
                temperature=config.rollout.temperature,
                model_name=config.policy.model,
                query_dataset=config.prompts.source,
                reward_model=config.reward.model,
                steps=config.run.steps * config.ppo.batch_size,
            ),
            load_policy(config.policy, self.tokenizer, self.trusted),
            None,
            self.tokenizer,
            num_shared_layers=config.policy.num_shared_layers,
        )

    def _check_context(self) -> None:
        """Refuse, before anything is written, lengths that the model cannot read."""
        context = context_length(self._policy.config)
        longest = max(len(prompt.input_ids) for prompt in self.prompts.train)
        new = self.config.rollout.output_max_length - 1
        if context is not None and longest + new > context:
            raise DataError(
                f"queries of up to {longest} tokens and responses of up to {new} exceed the "
                f"model's context of {context}: lower prompts.input_max_text_length or "
                "rollout.output_max_length"
            )

    def _say(self, advice: Iterable[str]) -> None:
        for text in advice:
            warnings.warn(text, stacklevel=2)

    def _save_model(self) -> None:
        """Write the policy as a plain folder, and the plot."""
        save_folder(self._policy, self.tokenizer, self.directory.path)
        if self.step:
            plot_training({self.directory.path.name: self.directory.metrics()}, self.directory.plot)
