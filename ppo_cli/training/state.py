"""The state of a run that changes from step to step: saved in checkpoints, restored from them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ppo_cli.config.schema import RunConfig
from ppo_cli.data.prompts import LengthSampler
from ppo_cli.errors import PPOCliError
from ppo_cli.evaluation.history import Evaluation, EvaluationHistory, over_limit
from ppo_cli.models.sharding import is_sharded
from ppo_cli.ppo.optimizer_step import stepped_parameters
from ppo_cli.ppo.trainer import PPOTrainer
from ppo_cli.reporting.summary import Weights
from ppo_cli.training.checkpoint import (
    checkpoint_of,
    discard_newer,
    load_checkpoint,
    load_weights,
    prune,
    save_checkpoint,
    whole_checkpoint,
)
from ppo_cli.training.run_directory import RunDirectory
from ppo_cli.utils import processes
from ppo_cli.utils.random_state import RandomStream, random_state, set_random_state


class TrainingState:
    """What a run needs to go on: the trainer's state, random numbers, evaluations, time spent.

    The prompts of a step follow from its number and the seed.

    Args:
        directory: holds the checkpoints and the records.
        trainer: policy, optimizer, KL coefficient, reward moments, its own random numbers.
        length_sampler: draws the limits of the responses' lengths.
        config: the run's; checkpoints record it as the settings that they were made with.

    Attributes:
        seconds: time spent in steps.
        kl: of the last step, nats per response.
        evaluations: the run's evaluations so far.
        rollbacks: number of times that the run went back because a step failed.
        checkpoint: the newest checkpoint, None before the first.
        saved_step: its step.
    """

    def __init__(
        self,
        directory: RunDirectory,
        trainer: PPOTrainer,
        length_sampler: LengthSampler,
        config: RunConfig,
    ) -> None:
        self._directory = directory
        self._trainer = trainer
        self._length_sampler = length_sampler
        self._config = config
        self._settings = config.run
        self.seconds = 0.0
        self.kl = 0.0
        self.evaluations = EvaluationHistory()
        self.rollbacks = 0
        self.checkpoint: Path | None = None
        self.saved_step = -1
        self._record_lengths: dict[str, int] = {}

    def add_step(self, seconds: float, kl: float) -> None:
        """Count a step that was made: its time, and its KL in nats per response."""
        self.seconds += seconds
        self.kl = kl

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Count an evaluation that belongs to the run."""
        self.evaluations = self.evaluations.after(evaluation, self._settings)

    def save(self) -> None:
        """Write a checkpoint, unless the newest is of this step."""
        step = self._trainer.current_step
        if step != self.saved_step:
            with processes.agreed():
                state = self._state() if processes.is_main() or is_sharded(self._policy) else {}
            folder, keep = self._directory.checkpoints, self._settings.keep
            self.checkpoint = save_checkpoint(
                folder, step, self._policy, state, keep, self._best_step
            )
            self.saved_step = step

    def _state(self) -> dict[str, Any]:
        return {
            "trainer": self._trainer.state_dict(),
            "lengths": self._length_sampler.state_dict(),
            "random": random_state(),
            "records": self._directory.records.lengths(),
            "seconds": self.seconds,
            "kl": self.kl,
            "standing": self.evaluations.as_dict(),
            "rollbacks": self.rollbacks,
            "settings": self._config.model_dump(mode="json"),
        }

    def restore(self, rollbacks: int | None = None) -> None:
        """Restore the state of the newest whole checkpoint; change nothing on the disk.

        Args:
            rollbacks: number of rollbacks including this one, None for a resumed run. A rollback
                halves the learning rate and samples with other random numbers, which this number
                decides, so that the failed step is not repeated.

        Raises:
            PPOCliError: there is no whole checkpoint.
        """
        checkpoint = processes.on_main(whole_checkpoint, self._directory.checkpoints)
        trained = stepped_parameters(self._trainer.optimizer)
        state = load_checkpoint(checkpoint, self._policy, trained)
        self._directory.records.check_names(state["records"])
        if rollbacks is not None:
            _scale_learning_rate(state["trainer"], 0.5 ** (rollbacks - state["rollbacks"]))
            seed = np.random.SeedSequence([self._settings.seed, rollbacks]).generate_state(1)[0]
            stream = RandomStream(int(seed), self._trainer.accelerator.device)
            state["trainer"]["sampling"] = stream.state_dict()
            state["rollbacks"] = rollbacks
        self._trainer.load_state_dict(state["trainer"])
        self._trainer.optimizer.zero_grad()  # gradients that a failed step left
        self._length_sampler.load_state_dict(state["lengths"])
        set_random_state(state["random"])
        self.seconds, self.kl = state["seconds"], state["kl"]
        self.evaluations = EvaluationHistory.from_dict(state["standing"]).within(self._settings)
        self.rollbacks, self._record_lengths = state["rollbacks"], state["records"]
        self.checkpoint, self.saved_step = checkpoint, self._trainer.current_step

    def discard_later(self) -> None:
        """Delete what followed the checkpoint: records, and newer checkpoints, which are damaged.

        An evaluation that was made only because the run ended there is deleted, too.
        """
        assert self.checkpoint is not None
        discard_newer(self._directory.checkpoints, self.checkpoint)
        prune(self._directory.checkpoints, self._settings.keep, self._best_step)
        if not self.is_evaluated:
            self._directory.records.put_evaluation(self.saved_step, {})
        self._directory.records.restore(self._record_lengths, self.saved_step)

    def load_chosen_weights(self, evaluations: EvaluationHistory) -> Weights:
        """Load the weights that `run.weights` chooses into the policy.

        The rest of the state stays that of the newest step, so training cannot go on afterwards.

        Args:
            evaluations: the run's evaluations, the closing one included.
        """
        last = self._trainer.current_step
        best = evaluations.best
        if self._settings.weights == "last":
            return Weights(last, "the last, by run.weights")
        if best is None:
            if evaluations.newest is None:
                return Weights(last, "the last: there was no evaluation")
            limit = over_limit(evaluations.newest, self._settings) or "the limits of KL"
            return Weights(last, f"the last: no evaluation was within {limit}")
        if best.step != last:
            try:
                folder = self._directory.checkpoints
                load_weights(processes.on_main(checkpoint_of, folder, best.step), self._policy)
            except PPOCliError as error:
                warnings.warn(
                    f"step {best.step} scored best in the evaluations, but {error}: taking the "
                    f"weights of step {last}, the newest, instead",
                    stacklevel=3,
                )
                return Weights(last, f"the last: the best, step {best.step}, cannot be read")
        return Weights(best.step, "best evaluation")

    @property
    def is_evaluated(self) -> bool:
        """Whether the newest step has an evaluation that belongs to the run."""
        newest = self.evaluations.newest
        return newest is not None and newest.step == self._trainer.current_step

    @property
    def _best_step(self) -> int | None:
        return self.evaluations.best.step if self.evaluations.best else None

    @property
    def _policy(self) -> Any:
        return self._trainer.accelerator.unwrap_model(self._trainer.model)


def _scale_learning_rate(trainer_state: dict[str, Any], factor: float) -> None:
    """Scale the learning rate in a trainer's state, and what later rates are computed from.

    The KL of a step, which the adaptation aims at, grows with the square of the learning rate.
    """
    for group in trainer_state["optimizer"]["param_groups"]:
        group["lr"] *= factor
    if (schedule := trainer_state["lr_scheduler"]) is not None:
        schedule["base_lrs"] = [rate * factor for rate in schedule["base_lrs"]]
    if (adaptation := trainer_state["adaptation"]) is not None:
        adaptation["rates"] = [rate * factor for rate in adaptation["rates"]]
        adaptation["desired_kl"] *= factor**2
