"""One training run: steps, checkpoints, evaluations, rollbacks, and the end."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ppo_cli.config.schema import RunConfig
from ppo_cli.data.prompts import PromptSet
from ppo_cli.errors import DivergenceError, PPOCliError, UsageError
from ppo_cli.evaluation.held_out import HeldOutEvaluation
from ppo_cli.evaluation.history import EvaluationHistory
from ppo_cli.evaluation.samples import Sample
from ppo_cli.ppo.trainer import PPOTrainer
from ppo_cli.reporting.frontier import write_curve
from ppo_cli.reporting.summary import Pace, StepReport, TrainingSummary
from ppo_cli.rewards.reward_sum import RewardSum
from ppo_cli.training.diagnostics import Diagnostics, budget_warning
from ppo_cli.training.divergence import classifier_faults
from ppo_cli.training.records import METRICS_FILE, SAMPLES_FILE
from ppo_cli.training.results import save_model, write_card
from ppo_cli.training.run_directory import RunDirectory
from ppo_cli.training.state import TrainingState
from ppo_cli.training.step import PPOStep
from ppo_cli.training.tracking import RunTrackers
from ppo_cli.utils import processes

MAX_ROLLBACKS = 3


class Training:
    """A run that is ready to start; `build_training` makes one from a configuration.

    Args:
        config: the run's.
        directory: where the run is written.
        overwrite: whether a run that is there already may be replaced.
        facts: machine, fast paths and inputs, for `run.yaml`.
        tokenizer: the policy's.
        prompts: to train and to evaluate on.
        reward: scores responses.
        trainer: holds policy and reference.
        ppo_step: makes the steps.
        held_out: evaluates policy and reference on the held-out prompts.
        state: what changes from step to step.
        diagnostics: warns about faults in the statistics.
        trackers: get what the records get.

    Attributes:
        stop_requested: whether `request_stop` was called.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        directory: RunDirectory,
        overwrite: bool,
        facts: Mapping[str, Any],
        tokenizer: Any,
        prompts: PromptSet,
        reward: RewardSum,
        trainer: PPOTrainer,
        ppo_step: PPOStep,
        held_out: HeldOutEvaluation,
        state: TrainingState,
        diagnostics: Diagnostics,
        trackers: RunTrackers,
    ) -> None:
        self.config = config
        self.directory = directory
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.reward = reward
        self.trainer = trainer
        self.ppo_step = ppo_step
        self.held_out = held_out
        self.state = state
        self.trackers = trackers
        self.stop_requested = False
        self._overwrite = overwrite
        self._facts = facts
        self._diagnostics = diagnostics

    @property
    def step(self) -> int:
        """Number of steps done, those before a resume included."""
        return self.trainer.current_step

    @property
    def fast_paths(self) -> Mapping[str, str]:
        """Name of each fast path: `used`, or the reason why it is not."""
        paths: Mapping[str, str] = self._facts["kernels"]
        return paths

    @property
    def stopped_early(self) -> str | None:
        """Why the newest evaluation ends the run before its last step; None to go on.

        The reason follows from the evaluations and the settings alone: a run that is resumed with
        the same settings has ended, with others it may go on.
        """
        if self.step >= self.config.run.steps or not self.state.is_evaluated:
            return None
        return self.state.evaluations.reason_to_stop(self.config.run)

    def request_stop(self) -> None:
        """Ask the run to end after the step that it is making."""
        self.stop_requested = True

    def steps(self) -> Iterator[StepReport]:
        """Create the run directory, then make the remaining PPO steps, one at a time.

        Ends early, after a whole step, on `request_stop` or for the reason in `stopped_early`.

        Raises:
            DivergenceError: a step failed, and `run.on_divergence` or the number of rollbacks
                says to stop; the run directory holds the last good checkpoint and its model.
        """
        if self.state.checkpoint is None:
            processes.on_main(self._begin)
            self._check_shared()
            self.state.save()  # a rollback always finds a checkpoint
        else:
            processes.on_main(self._go_on)
        self.held_out.begin()
        while self.step < self.config.run.steps and not (self._stops() or self.stopped_early):
            number = self.step + 1
            try:
                report = self._one_step()
            except DivergenceError as error:
                self._roll_back(number, str(error))
                continue
            if self._is_checkpoint_due():
                self.state.save()
            yield report

    def _begin(self) -> None:
        """Create the run directory, and start the trackers."""
        self.directory.create(self.config, self._overwrite, self._facts)
        try:
            self.trackers.start()
        except PPOCliError:
            self.directory.clear()
            raise

    def _go_on(self) -> None:
        """Make the run directory one of the run up to its checkpoint; let the trackers continue."""
        sent = self._rows_so_far()
        self.state.discard_later()
        self.directory.record(self.config, self._facts)
        self.trackers.start(sent or self.directory.records.rows(), self.step)
        self._diagnostics.replay(self.directory.records.rows())

    def _check_shared(self) -> None:
        """Raise `UsageError` where a process does not see the run directory."""
        with processes.agreed():
            if not self.directory.is_run():
                raise UsageError(
                    f"process {processes.index()} does not see {self.directory.path}: choose a "
                    "folder that all machines share with --output"
                )

    def _stops(self) -> bool:
        """Whether a stop was requested of any process, which all agree on."""
        stops = processes.any_of(self.stop_requested)
        if stops:  # a signal may have come meanwhile: then all learn of it after the next step
            self.stop_requested = True
        return stops

    def finish(self) -> TrainingSummary:
        """Choose the weights, measure them, write model, picture and card.

        Works after any number of steps. The policy then has the chosen weights, which may be those
        of an earlier step. The summary measures them with random numbers that no evaluation used,
        so that the choice does not bias it.
        """
        is_interrupted = processes.any_of(self.stop_requested)
        self.state.save()
        stopped_early = self.stopped_early
        weights = self.state.load_chosen_weights(self._closing_evaluation())
        before, after = self.held_out.close()
        summary = TrainingSummary(
            run=str(self.directory.path),
            label=self.reward.label,
            steps=self.step,
            planned_steps=self.config.run.steps,
            seconds=self.state.seconds,
            before=before.quality,
            after=after.quality,
            kl=self.state.kl,
            pace=Pace.of(self.directory.records.rows()),
            weights=weights,
            stopped_early=stopped_early,
            before_samples=before.samples,
            after_samples=after.samples,
        )
        self._save_model()
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model)
        processes.on_main(write_card, self.directory, summary, self.config, policy)
        counts = self.config.run.best_of_n
        if counts and not is_interrupted:  # it takes a while, and the user wants to stop
            processes.on_main(write_curve, self.directory.path, self.held_out.best_of_n(counts))
        is_whole = self.step == self.config.run.steps
        if is_whole:
            _warn(self._diagnostics.check_end())
            _warn(filter(None, [budget_warning(after.quality["kl"], self.config)]))
        self.trackers.finish()
        how = "finished" if is_whole else "ended early" if stopped_early else "interrupted"
        processes.on_main(self._record_end, how, stopped_early)
        return summary

    def _one_step(self) -> StepReport:
        settings = self.config.run
        made = self.ppo_step.run(self.step)
        self.state.add_step(made.statistics["time/step"], made.statistics["objective/kl"])
        statistics = made.statistics | {"run/rollbacks": self.state.rollbacks}
        if settings.eval_every and self.step % settings.eval_every == 0:
            statistics |= self._evaluate()
        shown = made.samples[: settings.samples_per_step]
        processes.on_main(self._record, statistics, shown, made.arrays)
        _warn(self._diagnostics.check_step({"step": self.step, **statistics}))
        best = self.state.evaluations.best
        return StepReport(
            step=self.step,
            steps=settings.steps,
            stats=statistics,
            samples=made.samples[: max(settings.samples_per_step, 1)],
            best=best.step if best else None,
            stops=self.stopped_early is not None,
        )

    def _evaluate(self) -> dict[str, float]:
        """Evaluate the policy after the newest step; return the statistics."""
        with classifier_faults(self.reward.name):
            evaluation, statistics = self.held_out.evaluate(self.step)
        self.state.add_evaluation(evaluation)
        self.trainer.kl_ctl.calibrate(evaluation.kl)
        return statistics

    def _closing_evaluation(self) -> EvaluationHistory:
        """All evaluations at the end of the run. The newest step is evaluated if it was not yet.

        That evaluation is not part of the state: a run that is resumed from here must be the same
        as one that never paused.
        """
        if self.state.is_evaluated or not self.step:
            return self.state.evaluations
        evaluation, statistics = self.held_out.evaluate(self.step)
        self.trackers.log({"step": self.step, **statistics}, {}, [])
        processes.on_main(self.directory.records.put_evaluation, self.step, statistics)
        return self.state.evaluations.after(evaluation, self.config.run)

    def _record(
        self,
        statistics: Mapping[str, float],
        samples: Sequence[Sample],
        arrays: Mapping[str, np.ndarray],
    ) -> None:
        records, row = self.directory.records, {"step": self.step, **statistics}
        self.trackers.log(row, arrays, samples)  # first: a step in the records has been sent
        records.append(METRICS_FILE, [row])
        records.append(SAMPLES_FILE, [{"step": self.step, **s.as_dict()} for s in samples])

    def _rows_so_far(self) -> list[dict[str, float]]:
        """The metrics of all steps, those after the checkpoint too; none where they are damaged."""
        try:
            return self.directory.records.rows()
        except UsageError:
            return []

    def _is_checkpoint_due(self) -> bool:
        every, best = self.config.run.checkpoint_every, self.state.evaluations.best
        is_best = best is not None and best.step == self.step
        return is_best or (every > 0 and self.step % every == 0)

    def _roll_back(self, number: int, error: str) -> None:
        """Return to the last good checkpoint; raise unless the run may try again from there.

        Args:
            number: of the step that failed.
            error: why.
        """
        fault = f"step {number}: {error}"
        rollbacks = self.state.rollbacks + 1
        if self.config.run.on_divergence == "rollback" and rollbacks <= MAX_ROLLBACKS:
            self.state.restore(rollbacks)
            processes.on_main(self._discard_later)
            rate = self.trainer.optimizer.param_groups[0]["lr"]
            warnings.warn(
                f"{fault}. Back to step {self.step}, with a learning rate of {rate:g} and other "
                f"random numbers (rollback {rollbacks} of at most {MAX_ROLLBACKS})",
                stacklevel=2,
            )
            return
        self.state.restore()
        weights = self.state.load_chosen_weights(self.state.evaluations)
        self._save_model()
        processes.on_main(self._record_end, "diverged", fault, number - 1)
        tried = f" after {rollbacks - 1} rollbacks" if rollbacks > 1 else ""
        held = f"the checkpoint and the model of step {self.step}"
        if weights.step != self.step:
            held = f"the checkpoint of step {self.step} and the model of {weights}"
        with processes.agreed():
            raise DivergenceError(f"{fault}. Stopped{tried}; {self.directory.path} holds {held}")

    def _discard_later(self) -> None:
        """Forget what followed the checkpoint that was restored."""
        self.state.discard_later()
        self.trackers.roll_back(self.step)
        self._diagnostics.replay(self.directory.records.rows())

    def _save_model(self) -> None:
        policy = self.trainer.whole_policy()
        processes.on_main(save_model, self.directory, policy, self.tokenizer, self.config)

    def _record_end(self, how: str, why: str | None, recorded: int | None = None) -> None:
        """Record in `run.yaml` how the run ended; a resumed run removes that again.

        Args:
            how, why: it ended.
            recorded: the newest step in the records, where that is not the run's newest.
        """
        end = {"step": self.step, "as": how, "why": why}
        if recorded not in (None, self.step):
            end["recorded"] = recorded
        self.directory.record(self.config, {**self._facts, "ended": end})


def _warn(messages: Iterable[str]) -> None:
    for message in messages:
        warnings.warn(message, stacklevel=2)
