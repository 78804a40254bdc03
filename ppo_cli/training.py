"""One training run: from a configuration to a run directory."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppo_cli.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from ppo_cli.config import RunConfig
from ppo_cli.errors import DataError, NumericalError, UsageError
from ppo_cli.evaluation import Sample, mean_probability, mean_score
from ppo_cli.files import settle, write_text
from ppo_cli.loading import check_trusted, load_policy, load_reward, load_tokenizer
from ppo_cli.model_card import run_card
from ppo_cli.plots import plot_training
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.ppo.statistics import scalars
from ppo_cli.ppo.trainer import PPOTrainer
from ppo_cli.prompts import LengthSampler, Prompt, collate, load_prompts
from ppo_cli.rollout import PURE_SAMPLING, context_length, decode
from ppo_cli.run_directory import CARD_FILE, METRICS_FILE, SAMPLES_FILE, RunDirectory
from ppo_cli.runtime import accelerator_settings, resolve_device, set_seed
from ppo_cli.sampling import draw_samples, judge


@dataclass(frozen=True)
class StepReport:
    """What one PPO step did, for a display."""

    step: int
    steps: int
    stats: dict[str, float]
    samples: list[Sample]

    @property
    def is_last(self) -> bool:
        """Whether the run is over after this step."""
        return self.step == self.steps


@dataclass(frozen=True)
class Judgement:
    """Mean score and mean probability of the label, on held-out prompts."""

    score: float
    probability: float

    @classmethod
    def of(cls, samples: list[Sample]) -> Judgement:
        """Of samples that were judged."""
        return cls(mean_score(samples), mean_probability(samples))


@dataclass(frozen=True)
class TrainingSummary:
    """How a run ended: the reference and the policy on the same held-out prompts."""

    run: str
    label: str
    steps: int
    planned_steps: int
    seconds: float
    before: Judgement
    after: Judgement
    kl: float
    before_samples: list[Sample]
    after_samples: list[Sample]

    def as_dict(self) -> dict[str, Any]:
        """Plain values without the samples, for JSON."""
        values = dataclasses.asdict(self)
        del values["before_samples"], values["after_samples"]
        return values


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
        if resume:
            checkpoint = latest_checkpoint(RunDirectory.existing(config.output).checkpoints)
        else:
            self.directory.check_writable(overwrite)
        set_seed(config.run.seed)
        self.device = resolve_device(config.run.device)
        self.tokenizer = load_tokenizer(config.policy.model, config.policy.revision, trusted)
        self.prompts = load_prompts(config.prompts, self.tokenizer, config.run.seed)
        if len(self.prompts.train) < config.ppo.batch_size:
            raise DataError(
                f"{config.prompts.source} yields {len(self.prompts.train)} prompts to train on, "
                f"fewer than ppo.batch_size ({config.ppo.batch_size}): lower it and "
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
        self._warn_if_not_pure()
        self.seconds = 0.0
        self.resumed = resume
        self._kl = 0.0
        if resume:
            state = load_checkpoint(checkpoint, self._policy)
            self.trainer.load_state_dict(state["trainer"])
            self.lengths.load_state_dict(state["lengths"])
            self.seconds, self._kl = state["seconds"], state["kl"]
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

        Raises:
            NumericalError: the loss stopped being finite.
        """
        if self.resumed:
            self.directory.cut_records(self.step)
            self.directory.record(self.config)
        else:
            self.directory.create(self.config, self.overwrite)
        self._before = self._judge(reference=True)
        settings = self.config.run
        while self.step < settings.steps:
            report = self._one_step()
            if settings.checkpoint_every and self.step % settings.checkpoint_every == 0:
                self.save_checkpoint()
            yield report

    def finish(self) -> TrainingSummary:
        """Judge the policy, then write model, plot and card. Works after any number of steps."""
        before, after = self._before, self._judge(reference=False)
        summary = TrainingSummary(
            run=str(self.directory.path),
            label=self.reward.label,
            steps=self.step,
            planned_steps=self.config.run.steps,
            seconds=self.seconds,
            before=Judgement.of(before),
            after=Judgement.of(after),
            kl=self._kl,
            before_samples=before,
            after_samples=after,
        )
        self.save_checkpoint()
        self._save_model()
        if self.step:
            plot_training({self.directory.path.name: self.directory.metrics()}, self.directory.plot)
        write_text(self.directory.path / CARD_FILE, run_card(summary, self.config))
        return summary

    def save_checkpoint(self) -> Path:
        """Write what `--resume` needs."""
        state = {
            "trainer": self.trainer.state_dict(),
            "lengths": self.lengths.state_dict(),
            "seconds": self.seconds,
            "kl": self._kl,
        }
        return save_checkpoint(
            self.directory.checkpoints, self.step, self._policy, state, self.config.run.keep
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
        samples = judge(rollout, batch["query"], self.reward)
        scores = torch.tensor([sample.score for sample in samples])
        scored = time.perf_counter()
        stats = self.trainer.step(batch["input_ids"], responses, list(scores))
        texts = {"query": batch["query"], "response": rollout.response_texts}
        self.trainer.log_stats(stats, texts, scores)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        tokens = sum(len(q) + len(r) for q, r in zip(batch["input_ids"], responses, strict=True))
        numbers = scalars(stats) | {
            "env/reward_mean": scores.mean().item(),
            "env/reward_std": scores.std().item() if len(scores) > 1 else 0.0,
            "env/probability_mean": mean_probability(samples),
            "time/sampling": sampled - started,
            "time/scoring": scored - sampled,
            "time/step": seconds,
            "perf/tokens_per_second": tokens / seconds,
        }
        shown = samples[: max(self.config.run.samples_per_step, 1)]
        self._record(numbers, shown)
        return StepReport(self.step, self.config.run.steps, numbers, shown)

    def _record(self, numbers: dict[str, float], samples: list[Sample]) -> None:
        broken = [
            key for key in ("ppo/loss/total", "objective/kl") if not np.isfinite(numbers[key])
        ]
        if broken:
            raise NumericalError(
                f"step {self.step}: {broken[0]} is {numbers[broken[0]]}: training cannot go on. "
                "Lower ppo.learning_rate or set ppo.max_grad_norm; the last checkpoint is in "
                f"{self.directory.checkpoints}"
            )
        self._kl = numbers["objective/kl"]
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
        size, prompts = self.config.ppo.batch_size, self.prompts.train
        epoch, position = divmod(step, len(prompts) // size)
        order = np.random.RandomState([self.config.run.seed, epoch]).permutation(len(prompts))
        chosen = order[position * size : (position + 1) * size]
        return collate([vars(prompts[i]) for i in chosen])

    def _judge(self, *, reference: bool) -> list[Sample]:
        """Samples of the reference or the policy to the held-out prompts, with equal seeds."""
        held_out: list[Prompt] = self.prompts.held_out
        trainer = self.trainer
        model: Any = self._policy
        if reference and trainer.ref_model is not None:
            model = trainer.accelerator.unwrap_model(trainer.ref_model)
        with trainer.adapter_off() if reference else nullcontext():
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
        }

    @property
    def _policy(self) -> Any:
        return self.trainer.accelerator.unwrap_model(self.trainer.model)

    def _trainer(self) -> PPOTrainer:
        config = self.config
        settings = dataclasses.asdict(config.ppo)
        settings["accelerator_kwargs"] = {
            **accelerator_settings(self.device),
            **config.ppo.accelerator_kwargs,
        }
        return PPOTrainer(
            PPOConfig(
                **settings,
                seed=config.run.seed,
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

    def _warn_if_not_pure(self) -> None:
        changed = [f"rollout.{k}={v}" for k, v in self._sampling.items() if v != PURE_SAMPLING[k]]
        if changed:
            warnings.warn(
                f"with {', '.join(changed)} responses are not samples of the policy itself: KL is "
                "biased and may become negative",
                stacklevel=2,
            )

    def _save_model(self) -> None:
        """Write the policy as a plain folder; files appear whole, each replacing its forerunner."""
        unfinished = self.directory.path / ".model.tmp"
        policy = self._policy
        if policy.is_peft_model:
            policy = policy.merged()
        policy.save_pretrained(unfinished)
        self.tokenizer.save_pretrained(unfinished)
        settle(unfinished)
        for file in unfinished.iterdir():
            file.replace(self.directory.path / file.name)
        unfinished.rmdir()
