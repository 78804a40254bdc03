"""Evaluation on the held-out prompts: responses of policy and reference, and their quality."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppo_cli.data.prompts import Prompt
from ppo_cli.evaluation.best_of_n import BestOfN, best_of_n
from ppo_cli.evaluation.draw_samples import draw_rollout, draw_scores, score_rollout
from ppo_cli.evaluation.history import Evaluation
from ppo_cli.evaluation.likelihoods import likelihoods
from ppo_cli.evaluation.quality import Likelihoods, Quality, evaluation_statistics
from ppo_cli.evaluation.samples import Sample
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.ppo.trainer import PPOTrainer
from ppo_cli.rewards.reward_sum import RewardSum
from ppo_cli.utils import processes


@dataclass(frozen=True)
class MeasuredSamples:
    """A model's samples to the held-out prompts, and their quality."""

    samples: list[Sample]
    quality: Quality


class HeldOutEvaluation:
    """Samples from the reference and from the present policy, on the same prompts.

    Each process samples and scores its share of the prompts. All evaluations of a run draw from
    the same random numbers. The random numbers of training and the models' modes stay as they are.

    Args:
        trainer: has both models.
        tokenizer: the models'.
        reward: scores the responses.
        prompts: the held-out prompts.
        seed: the run's.
        params: settings of sampling.
        max_new_tokens: limit on a response.
    """

    def __init__(
        self,
        trainer: PPOTrainer,
        tokenizer: Any,
        reward: RewardSum,
        prompts: Sequence[Prompt],
        seed: int,
        params: SamplingParams,
        max_new_tokens: int,
    ) -> None:
        self._trainer = trainer
        self._tokenizer = tokenizer
        self._reward = reward
        self._queries = [prompt.input_ids for prompt in prompts]
        self._texts = [prompt.query for prompt in prompts]
        self._columns = [prompt.columns for prompt in prompts]
        self._messages = [prompt.messages for prompt in prompts]
        self._seed = seed
        self._params = params
        self._max_new_tokens = max_new_tokens
        self._reference_quality: Quality | None = None

    def begin(self) -> None:
        """Measure the reference, with which every evaluation is compared."""
        self._reference_quality = self.of_reference(self._seed).quality

    def evaluate(self, step: int) -> tuple[Evaluation, dict[str, float]]:
        """Evaluate the policy after `step`. `begin` has to be called first.

        Returns:
            The evaluation, and its statistics for the step's metrics.
        """
        assert self._reference_quality is not None
        started = time.perf_counter()
        quality = self.of_policy(self._seed).quality
        statistics = evaluation_statistics(quality, self._reference_quality)
        statistics["time/evaluating"] = time.perf_counter() - started
        return Evaluation(step, quality["score"], quality["kl"]), statistics

    def close(self) -> tuple[MeasuredSamples, MeasuredSamples]:
        """Reference and policy, with random numbers that no evaluation draws from.

        The best of several evaluations is partly the best by chance: measured with the random
        numbers by which it was chosen it would look better than it is.
        """
        seed = int(np.random.SeedSequence(self._seed, spawn_key=(1,)).generate_state(1)[0])
        return self.of_reference(seed), self.of_policy(seed)

    def of_policy(self, seed: int, count: int | None = None) -> MeasuredSamples:
        """The policy, sampled with random numbers that `seed` decides.

        Args:
            seed: decides the random numbers.
            count: how many of the prompts, the first; None for all.
        """
        return self._of(self._policy, seed, self._trainer.adapter_off, count)

    def of_reference(self, seed: int) -> MeasuredSamples:
        """The reference, likewise; its KL from itself is zero."""
        with self._trainer.adapter_off():  # peft would switch it on at the end of an inner block
            return self._of(self._reference, seed, nullcontext)

    def best_of_n(self, counts: Sequence[int]) -> BestOfN:
        """Best-of-n from the reference, for each n of `counts`."""
        trainer = self._trainer
        with trainer.gathered(), trainer.adapter_off(), trainer.accelerator.autocast():
            scores = draw_scores(
                self._reference,
                self._tokenizer,
                self._queries,
                self._params,
                count=max(counts),
                max_new_tokens=self._max_new_tokens,
                seed=self._seed,
                reward=self._reward,
                texts=self._texts,
                columns=self._columns,
                messages=self._messages,
            )
        return best_of_n(scores, counts, label=self._reward.label, seed=self._seed)

    def _of(
        self,
        model: Any,
        seed: int,
        as_reference: Callable[[], AbstractContextManager[None]],
        count: int | None = None,
    ) -> MeasuredSamples:
        own = processes.rows(len(self._queries[:count]))
        trainer = self._trainer
        with trainer.gathered(), processes.agreed(), trainer.accelerator.autocast():
            rollout = draw_rollout(
                model,
                self._tokenizer,
                self._queries[:count],
                self._params,
                max_new_tokens=self._max_new_tokens,
                seed=seed,
                messages=self._messages[:count],
            )
            samples = score_rollout(
                rollout,
                self._texts[own],
                self._reward,
                self._columns[own],
                self._params.stop_token_ids,
            )
            found = likelihoods(
                model,
                self._reference,
                rollout.queries,
                rollout.responses,
                as_reference=as_reference,
                temperature=trainer.config.temperature,
            )
        samples = processes.gather_list(samples)
        found = Likelihoods.joined(processes.gather(found))
        return MeasuredSamples(samples, Quality.of(samples, found))

    @property
    def _policy(self) -> Any:
        return self._trainer.accelerator.unwrap_model(self._trainer.model)

    @property
    def _reference(self) -> Any:
        if self._trainer.ref_model is None:  # the policy, its adapter off
            return self._policy
        return self._trainer.accelerator.unwrap_model(self._trainer.ref_model)
