"""Where a run stands: all that a checkpoint holds, saving it and going back to it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ppo_cli.config.schema import RunConfig
from ppo_cli.data.prompts import LengthSampler
from ppo_cli.errors import PPOCliError
from ppo_cli.evaluation.history import EvaluationHistory, over_limit
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
from ppo_cli.utils.random_state import RandomStream, random_state, set_random_state


class Progress:
    """What changes from step to step of a run.

    Which prompts a step takes follows from its number and the seed.

    Args:
        directory: where checkpoints and records lie.
        trainer: policy, optimizer, KL coefficient, reward moments, random numbers of its own.
        lengths: the sampler of the responses' limits.
        config: the run's; a checkpoint holds it, so that it can be told what made it.

    Attributes:
        seconds: time spent in steps.
        kl: of the last step.
        standing: the run's evaluations so far.
        rollbacks: how often the run went back because a step went wrong.
        checkpoint: the newest, None before the first.
        saved_step: its step.
    """

    def __init__(
        self,
        directory: RunDirectory,
        trainer: PPOTrainer,
        lengths: LengthSampler,
        config: RunConfig,
    ) -> None:
        self._directory = directory
        self._trainer = trainer
        self._lengths = lengths
        self._config = config
        self._settings = config.run
        self.seconds = 0.0
        self.kl = 0.0
        self.standing = EvaluationHistory()
        self.rollbacks = 0
        self.checkpoint: Path | None = None
        self.saved_step = -1
        self._record_lengths: dict[str, int] = {}

    def save(self) -> None:
        """Write a checkpoint, unless the newest is of this very step."""
        step = self._trainer.current_step
        if step == self.saved_step:
            return
        state = {
            "trainer": self._trainer.state_dict(),
            "lengths": self._lengths.state_dict(),
            "random": random_state(),
            "records": self._directory.record_lengths(),
            "seconds": self.seconds,
            "kl": self.kl,
            "standing": self.standing.as_dict(),
            "rollbacks": self.rollbacks,
            "settings": self._config.model_dump(mode="json"),
        }
        folder, keep = self._directory.checkpoints, self._settings.keep
        self.checkpoint = save_checkpoint(folder, step, self._policy, state, keep, self._best_step)
        self.saved_step = step

    def go_back(self, rollbacks: int | None = None) -> None:
        """Take up the state of the newest whole checkpoint; changes nothing on the disk.

        Args:
            rollbacks: given, the run shall fare better from there than before: its learning rate
                is halved once a rollback, and its responses are sampled with random numbers that
                the number of rollbacks decides.

        Raises:
            PPOCliError: there is no whole checkpoint.
        """
        checkpoint = whole_checkpoint(self._directory.checkpoints)
        state = load_checkpoint(checkpoint, self._policy)
        self._directory.check_records(state["records"])
        if rollbacks is not None:
            _slow_down(state["trainer"], 0.5 ** (rollbacks - state["rollbacks"]))
            seed = np.random.SeedSequence([self._settings.seed, rollbacks]).generate_state(1)[0]
            stream = RandomStream(int(seed), self._trainer.accelerator.device)
            state["trainer"]["sampling"] = stream.state_dict()
            state["rollbacks"] = rollbacks
        self._trainer.load_state_dict(state["trainer"])
        self._trainer.optimizer.zero_grad()  # a step that broke off may have left some
        self._lengths.load_state_dict(state["lengths"])
        set_random_state(state["random"])
        self.seconds, self.kl = state["seconds"], state["kl"]
        self.standing = EvaluationHistory.from_dict(state["standing"]).within(self._settings)
        self.rollbacks, self._record_lengths = state["rollbacks"], state["records"]
        self.checkpoint, self.saved_step = checkpoint, self._trainer.current_step

    def drop_what_followed(self) -> None:
        """Make the records end where the checkpoint has it; damaged newer checkpoints go.

        So does an evaluation that was made only because the run ended there.
        """
        assert self.checkpoint is not None
        discard_newer(self._directory.checkpoints, self.checkpoint)
        prune(self._directory.checkpoints, self._settings.keep, self._best_step)
        if not self.is_evaluated:
            self._directory.put_evaluation(self.saved_step, {})
        self._directory.restore_records(self._record_lengths, self.saved_step)

    def take_weights(self, standing: EvaluationHistory) -> Weights:
        """Give the policy the weights that the run directory shall have, by `run.weights`.

        The rest of the run's state stays that of its newest step; train no further.

        Args:
            standing: the run's evaluations, the closing one included.
        """
        last = self._trainer.current_step
        best = standing.best
        if self._settings.weights == "last":
            return Weights(last, "the last, by run.weights")
        if best is None:
            if standing.newest is None:
                return Weights(last, "the last: there was no evaluation")
            limit = over_limit(standing.newest, self._settings) or "the limits of KL"
            return Weights(last, f"the last: no evaluation was within {limit}")
        if best.step != last:
            try:
                load_weights(checkpoint_of(self._directory.checkpoints, best.step), self._policy)
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
        """Whether the newest step was evaluated, the closing evaluation apart."""
        newest = self.standing.newest
        return newest is not None and newest.step == self._trainer.current_step

    @property
    def _best_step(self) -> int | None:
        return self.standing.best.step if self.standing.best else None

    @property
    def _policy(self) -> Any:
        return self._trainer.accelerator.unwrap_model(self._trainer.model)


def _slow_down(trainer_state: dict[str, Any], factor: float) -> None:
    """Scale the learning rate, and what a schedule or the adaptation makes later ones from.

    The KL of a step, which the adaptation goes by, grows with the square of the learning rate.
    """
    for group in trainer_state["optimizer"]["param_groups"]:
        group["lr"] *= factor
    if (schedule := trainer_state["lr_scheduler"]) is not None:
        schedule["base_lrs"] = [rate * factor for rate in schedule["base_lrs"]]
    if (adaptation := trainer_state["adaptation"]) is not None:
        adaptation["rates"] = [rate * factor for rate in adaptation["rates"]]
        adaptation["desired_kl"] *= factor**2
