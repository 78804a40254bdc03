"""One training run: from a configuration to a run directory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from ppo_cli.config.schema import RunConfig
from ppo_cli.data.fingerprint import Inputs, inputs_of, trusted_too, what_differs
from ppo_cli.data.prompts import LengthSampler, collate, load_prompts
from ppo_cli.errors import DataError, DivergenceError, UsageError
from ppo_cli.evaluation.draw_samples import judge
from ppo_cli.evaluation.early_stopping import Standing
from ppo_cli.evaluation.held_out import Examination
from ppo_cli.evaluation.samples import Sample, mean_probability
from ppo_cli.kernels.allocator import keep_few_kernels, keep_freed_memory
from ppo_cli.models.loading import check_trusted, load_tokenizer
from ppo_cli.models.sampling import Rollout, decode
from ppo_cli.models.saving import save_folder
from ppo_cli.models.stop_tokens import end_tokens
from ppo_cli.ppo.statistics import scalars
from ppo_cli.reporting.frontier import write_curve
from ppo_cli.reporting.model_card import run_card
from ppo_cli.reporting.plots import DEFAULT_METRICS, plot_training
from ppo_cli.reporting.summary import Pace, StepReport, TrainingSummary
from ppo_cli.rewards.loading import load_reward
from ppo_cli.rewards.partial_scores import potentials
from ppo_cli.rewards.penalties import check_terms, penalties, shaped, shaping_statistics
from ppo_cli.training.advice import Adviser
from ppo_cli.training.build import check_context, make_trainer, try_models
from ppo_cli.training.checkpoint import state_faults
from ppo_cli.training.divergence import check_numbers, check_texts, check_weights, classifier_faults
from ppo_cli.training.fast_paths import fast_paths
from ppo_cli.training.run_directory import CARD_FILE, METRICS_FILE, SAMPLES_FILE, RunDirectory, code
from ppo_cli.training.state import Progress
from ppo_cli.training.symptoms import sampling_advice
from ppo_cli.utils.device import machine, resolve_device, take_threads
from ppo_cli.utils.files import write_text
from ppo_cli.utils.random_state import set_seed

MAX_ROLLBACKS = 3
DRAWN = set(DEFAULT_METRICS)


class Training:
    """A run that is ready to go: everything is loaded and checked, nothing is written yet.

    Args:
        config: what to do.
        resume: go on from the newest checkpoint of the run directory.
        overwrite: replace a run directory that exists.
        trusted: models, as `config` names them, whose own code may run.
        tell: told how far the prompts are, where reading them takes a while.
        allow_changed_inputs: resume although a model or the prompts are not those that the run was
            started with.

    It sets up the allocator (`ppo_cli.kernels.allocator`) for the whole process. Resumed, a run
    takes the number of threads that it was started with, for the whole process too.

    Attributes:
        fast_paths: name of each -> `used`, or why it is not taken.

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
        tell: Callable[[str], None] = lambda _: None,
        allow_changed_inputs: bool = False,
    ) -> None:
        check_trusted(trusted, (config.policy.model, config.reward.model))
        self.config = config
        self.directory = RunDirectory(config.output)
        self.overwrite = overwrite
        self.stopping = False
        given, inputs = config, None  # from here on `config` says where the inputs are
        if resume:
            self.directory.check_resumable()
            config, inputs = self._located(allow_changed_inputs)
            names = {
                given.policy.model: config.policy.model, given.reward.model: config.reward.model
            }  # fmt: skip
            trusted = trusted_too(trusted, names)
            self.directory.lock()
            self._say(filter(None, [take_threads(self._recorded_machine.get("threads"))]))
        else:
            self.directory.check_writable(overwrite, inputs_of(config))
        keep_few_kernels()
        keeps_memory = keep_freed_memory()
        set_seed(config.run.seed)
        self.device = resolve_device(config.run.device)
        self.tokenizer = load_tokenizer(config.policy.model, config.policy.revision, trusted)
        self.prompts = load_prompts(config.prompts, self.tokenizer, config.run.seed, tell)
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
        self.trainer = make_trainer(config, self.device, self.tokenizer, trusted)
        self.ends = end_tokens(self.tokenizer, config.rollout.stop, self._policy)
        check_terms(config.reward, self.ends)
        check_context(config, self._policy, self.prompts.train)
        try_models(self.trainer)
        self._say(filter(None, [sampling_advice(config)]))
        self.adviser = Adviser(config)
        self.trainer.advises = False  # the adviser does, and knows more
        self.examination = Examination(
            self.trainer,
            self.tokenizer,
            self.reward,
            self.prompts.held_out,
            config.run.seed,
            max_new_tokens=config.rollout.output_max_length - 1,
            **self._sampling,
        )
        self.progress = Progress(self.directory, self.trainer, self.lengths, given)
        self.fast_paths = fast_paths(self.trainer, keeps_memory=keeps_memory)
        facts = {
            "machine": machine(self.device, self.trainer.accelerator.mixed_precision),
            "kernels": self.fast_paths,
        }
        if resume:
            with state_faults(self.directory.checkpoints):
                self.progress.go_back()
            if self.step > config.run.steps:
                raise UsageError(
                    f"{config.output} has made {self.step} steps already, more than "
                    f"run.steps ({config.run.steps}): give a larger number with --steps"
                )
            self._say(self._unlike_before({**code(), **facts}))
        recorded = inputs or Inputs.of(config)
        self.directory.facts = {**facts, "inputs": recorded.records}

    @property
    def step(self) -> int:
        """Steps done so far, those of earlier sessions of this run included."""
        return self.trainer.current_step

    @property
    def stopped_early(self) -> str | None:
        """Why the run ends here, before its last step, by its newest evaluation; None to go on.

        It follows from the evaluations and the settings alone: resumed with the same settings the
        run has ended as before, with others it may go on.
        """
        if self.step >= self.config.run.steps or not self.progress.is_evaluated:
            return None
        return self.progress.standing.reason_to_stop(self.config.run)

    def steps(self) -> Iterator[StepReport]:
        """Create the run directory, then make the PPO steps that remain, one at a time.

        Ends early, after a whole step, once `stopping` is set or `stopped_early` has a reason.

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
            self.adviser.recall(self.directory.rows())
        self.examination.begin()
        while self.step < self.config.run.steps and not (self.stopping or self.stopped_early):
            number = self.step + 1
            try:
                report = self._one_step()
            except DivergenceError as error:
                self._diverged(f"step {number}: {error}")
                continue
            if self._is_checkpoint_due():
                self.progress.save()
            yield report

    def finish(self) -> TrainingSummary:
        """Choose the weights, examine them, write model, plot and card.

        Works after any number of steps. The policy then has the weights of the run directory,
        which may be those of an earlier step. What the summary says of them comes from random
        numbers that no evaluation drew from, so that the choice does not flatter them.
        """
        self.progress.save()
        stopped_early = self.stopped_early
        weights = self.progress.take_weights(self._closing_evaluation())
        before, after = self.examination.close()
        summary = TrainingSummary(
            run=str(self.directory.path),
            label=self.reward.label,
            steps=self.step,
            planned_steps=self.config.run.steps,
            seconds=self.progress.seconds,
            before=before.quality,
            after=after.quality,
            kl=self.progress.kl,
            pace=Pace.of(self.directory.rows()),
            weights=weights,
            stopped_early=stopped_early,
            before_samples=before.samples,
            after_samples=after.samples,
        )
        self._save_model()
        self.directory.inventory.add([CARD_FILE])
        write_text(self.directory.path / CARD_FILE, run_card(summary, self.config))
        if self.config.run.best_of_n and not self.stopping:  # who stops a run does not want to wait
            write_curve(self.directory.path, self.examination.best_of_n(self.config.run.best_of_n))
        if self.step == self.config.run.steps:
            self._say(self.adviser.closing())
        return summary

    def _located(self, allow_changed: bool) -> tuple[RunConfig, Inputs | None]:
        """Where the inputs of a run that goes on are, and their records; None of an old run.

        Raises:
            UsageError: they are not those that it was started with.
        """
        was = Inputs(self.directory.recorded().get("inputs"))
        if not was.records:
            self._say(
                [
                    f"{self.directory.path} has no record of its inputs, as runs of earlier "
                    "releases: whether models and prompts are still the same is not checked"
                ]
            )
            return self.config, None
        config, changes, inputs = was.locate(self.config)
        if changes and not allow_changed:
            raise UsageError(
                f"{self.directory.path} was started with other inputs. {'; '.join(changes)}. Put "
                "back what it was, or give --allow-changed-inputs to go on with what is there now, "
                "as another run"
            )
        self._say(f"going on with changed inputs: {change}" for change in changes)
        return config, inputs

    def _unlike_before(self, now: Mapping[str, Any]) -> Iterator[str]:
        """In what a run that goes on cannot be the one that never paused.

        Args:
            now: code and machine, as `run.yaml` has them.
        """
        was = self.directory.recorded()
        if differences := what_differs(was, now):
            yield (
                f"this run was made with {', '.join(differences)}: its numbers may go on with "
                "other digits than there"
            )
        steps, before = self.config.run.steps, self.directory.made_with().run.steps
        if steps != before and self.config.ppo.rate_depends_on_steps and self.step < steps:
            yield (
                "the learning rate's course depends on run.steps (ppo.lr_scheduler_type: "
                f"{self.config.ppo.lr_scheduler_type}): up to step {self.step} it was that of "
                f"{before} steps, from here on it is that of {steps}, so the result is not that of "
                f"one run of {steps} steps"
            )

    def _diverged(self, what: str) -> None:
        """Go back to the last good checkpoint; raise unless training may try again from there."""
        rollbacks = self.progress.rollbacks + 1
        if self.config.run.on_divergence == "rollback" and rollbacks <= MAX_ROLLBACKS:
            self.progress.go_back(rollbacks)
            self.progress.drop_what_followed()
            self.adviser.recall(self.directory.rows())
            rate = self.trainer.optimizer.param_groups[0]["lr"]
            warnings.warn(
                f"{what}. Back to step {self.step}, with a learning rate of {rate:g} and other "
                f"random numbers (rollback {rollbacks} of at most {MAX_ROLLBACKS})",
                stacklevel=2,
            )
            return
        self.progress.go_back()
        weights = self.progress.take_weights(self.progress.standing)
        self._save_model()
        tried = f" after {rollbacks - 1} rollbacks" if rollbacks > 1 else ""
        held = f"the checkpoint and the model of step {self.step}"
        if weights.step != self.step:
            held = f"the checkpoint of step {self.step} and the model of {weights}"
        raise DivergenceError(f"{what}. Stopped{tried}; {self.directory.path} holds {held}")

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
        check_texts(rollout.response_texts, self.config)
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
        check_weights(self._policy, self.config)
        check_numbers(numbers, self.config)
        numbers |= self._evaluation_if_due()
        shown = samples[: max(self.config.run.samples_per_step, 1)]
        self._record(numbers, shown)
        self._say(self.adviser.take({"step": self.step, **numbers}))
        best, stops = self.progress.standing.best, self.stopped_early is not None
        return StepReport(
            self.step, self.config.run.steps, numbers, shown, best.step if best else None, stops
        )

    def _evaluation_if_due(self) -> dict[str, float]:
        """The evaluation of a step for its metrics; nothing where none is due."""
        settings = self.config.run
        if not settings.eval_every or self.step % settings.eval_every:
            return {}
        with classifier_faults(self.reward.name):
            evaluation, numbers = self.examination.evaluate(self.step)
        self.progress.standing = self.progress.standing.after(evaluation, settings)
        self.trainer.accelerator.log(numbers, step=self.step)
        return numbers

    def _closing_evaluation(self) -> Standing:
        """The standing at the end of the run, whose newest step is evaluated if it was not yet.

        That evaluation does not belong to the run's state: a run that goes on from here later is
        to be the one that never paused.
        """
        if self.progress.is_evaluated or not self.step:
            return self.progress.standing
        evaluation, numbers = self.examination.evaluate(self.step)
        self.directory.put_evaluation(self.step, numbers)
        return self.progress.standing.after(evaluation, self.config.run)

    def _is_checkpoint_due(self) -> bool:
        every, best = self.config.run.checkpoint_every, self.progress.standing.best
        is_best = best is not None and best.step == self.step
        return is_best or (every > 0 and self.step % every == 0)

    def _potentials(self, rollout: Rollout) -> list[torch.Tensor] | None:
        every = self.config.reward.score_every
        return None if every is None else potentials(rollout, self.tokenizer, self.reward, every)

    def _record(self, numbers: dict[str, float], samples: list[Sample]) -> None:
        self.progress.kl = numbers["objective/kl"]
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

    @property
    def _recorded_machine(self) -> Mapping[str, Any]:
        machine = self.directory.recorded().get("machine")
        return machine if isinstance(machine, dict) else {}

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

    def _say(self, advice: Iterable[str]) -> None:
        for text in advice:
            warnings.warn(text, stacklevel=2)

    def _save_model(self) -> None:
        """Write the policy as a plain folder, and the plot."""
        save_folder(self._policy, self.tokenizer, self.directory.inventory)
        rows = [row for row in self.directory.rows() if row.keys() >= DRAWN]
        if rows:
            plot_training({self.directory.path.name: rows}, self.directory.plot)
