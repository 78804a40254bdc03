"""One PPO step of a run: responses to a batch of prompts, their scores, the update."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo_cli.config.reward import SCALING
from ppo_cli.config.schema import RunConfig
from ppo_cli.data.prompts import LengthSampler, Prompt, collate
from ppo_cli.evaluation.draw_samples import samples_of
from ppo_cli.evaluation.samples import Sample
from ppo_cli.models.decode_loop import draw_uniforms
from ppo_cli.models.encoder_decoder import decoder_start
from ppo_cli.models.engine import EngineSamples, SamplingEngine
from ppo_cli.models.sampling import to_texts
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.ppo.engines import sampling_statistics
from ppo_cli.ppo.generation import with_start
from ppo_cli.ppo.scores import scale_scores
from ppo_cli.ppo.statistics import scalars
from ppo_cli.ppo.trainer import PPOTrainer
from ppo_cli.rewards.batch import RewardBatch
from ppo_cli.rewards.partial_scores import potentials as partial_potentials
from ppo_cli.rewards.penalties import penalised, penalty_statistics, score_penalties
from ppo_cli.rewards.reward_sum import RewardSum, Scores
from ppo_cli.training.divergence import check_numbers, check_texts, check_weights, classifier_faults
from ppo_cli.utils import processes


@dataclass(frozen=True)
class StepResult:
    """Statistics of a step, under the keys of the metrics, and its samples.

    Attributes:
        arrays: the statistics that are one number a sample or token, for histograms.
    """

    statistics: dict[str, float]
    samples: list[Sample]
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Scored:
    """Responses of one process and what they are worth.

    Attributes:
        answered: the b responses.
        scores: of the reward.
        potentials: b tensors for `PPOTrainer.step`; None without scores of unfinished texts.
        penalties: name -> (b,), what is taken off.
        shaped: (b,), the scores less the penalties.
    """

    answered: RewardBatch
    scores: Scores
    potentials: list[Tensor] | None
    penalties: dict[str, Tensor]
    shaped: Tensor


class PPOStep:
    """Makes PPO steps.

    Args:
        config: the run's.
        trainer: updates the policy.
        tokenizer: the policy's.
        prompts: to train on.
        length_sampler: draws the limit of each response's length.
        reward: scores the responses.
        end_token_ids: tokens that end a response.
        sampling: how responses are drawn.
        engine: draws them.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        trainer: PPOTrainer,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        length_sampler: LengthSampler,
        reward: RewardSum,
        end_token_ids: list[int],
        sampling: SamplingParams,
        engine: SamplingEngine,
    ) -> None:
        self.end_token_ids = end_token_ids
        self._config = config
        self._trainer = trainer
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._length_sampler: Callable[[], int] = length_sampler
        self._reward = reward
        self._sampling = sampling
        self._engine = engine

    def resized(self, config: RunConfig, length_sampler: Callable[[], int]) -> PPOStep:
        """The same step with other sizes of batches, to measure it."""
        other = copy.copy(self)
        other._config, other._length_sampler = config, length_sampler
        return other

    def run(self, step: int) -> StepResult:
        """Sample, score and update once, with the prompts of `step`, counted from 0.

        Each process samples and scores its rows of the batch; statistics and samples are of all.

        Raises:
            DivergenceError: the responses, their scores or the update make no sense.
        """
        config, trainer = self._config, self._trainer
        started = time.perf_counter()
        batch = self.batch(step)
        queries = batch["input_ids"]
        with trainer.gathered(reference=False), processes.agreed():
            drawn = self._drawn(queries)
        sampled = time.perf_counter()
        start = decoder_start(trainer.accelerator.unwrap_model(trainer.model))
        scored = self._scored(batch, drawn.responses, step, continues=start is None)
        updating = time.perf_counter()
        potentials = scored.potentials
        stats = trainer.step(
            queries,
            with_start(drawn.responses, start),
            list(scored.shaped),
            potentials=potentials and with_start(potentials, None if start is None else 0.0),
        )
        seconds = time.perf_counter() - started
        own = processes.rows(config.ppo.batch_size)
        of_policy = torch.as_tensor(stats["objective/logprobs"][own])
        tokens = stats["tokens/queries_dist"].sum() + stats["tokens/responses_dist"].sum()
        scores, of_scores = self._score_statistics(scored)
        statistics = {
            **scalars(stats),
            **of_scores,
            **sampling_statistics(drawn, queries, of_policy),
            "time/sampling": sampled - started,
            "time/scoring": updating - sampled,
            "time/optimising": stats["time/ppo/total"],
            "time/step": seconds,
            "perf/tokens_per_second": float(tokens) / seconds,
        }
        with processes.agreed():  # the weights of one may have been damaged
            check_weights(trainer.accelerator.unwrap_model(trainer.model), config)
            check_numbers(statistics, config)
        # Arrays of two dimensions are padded.
        arrays = {k: v for k, v in stats.items() if isinstance(v, np.ndarray) and v.ndim == 1}
        arrays["env/reward_dist"] = scores.numpy()
        return StepResult(statistics, processes.gather_list(self._samples(scored)), arrays)

    def _scored(
        self, batch: Mapping[str, Any], responses: Sequence[Tensor], step: int, *, continues: bool
    ) -> _Scored:
        """This process's responses with their scores.

        Args:
            batch: its prompts.
            responses: one to each.
            step: counted from 0.
            continues: whether a response continues its query's text.
        """
        config = self._config
        rollout = to_texts(
            self._tokenizer, batch["input_ids"], responses, batch["messages"], continues=continues
        )
        check_texts(processes.gather_list(rollout.response_texts), config)
        answered = RewardBatch.of(rollout, batch["query"], batch["columns"], self.end_token_ids)
        every, potentials = config.reward.score_every, None
        with processes.agreed(), classifier_faults(self._reward.name):
            found = self._reward.score(answered, step)
            if every is not None:
                unfinished = self._reward.unfinished(answered, every, step)
                potentials = partial_potentials(rollout, self._tokenizer, unfinished, every)
        penalties = score_penalties(
            responses, rollout.response_texts, self.end_token_ids, config.reward
        )
        return _Scored(answered, found, potentials, penalties, penalised(found.total, penalties))

    def _score_statistics(self, scored: _Scored) -> tuple[Tensor, dict[str, float]]:
        """The scores of all processes, and their statistics."""
        everyone = processes.gather((scored.scores, scored.penalties))
        found = Scores.joined([scores for scores, _ in everyone])
        names = scored.penalties
        penalties = {name: torch.cat([theirs[name] for _, theirs in everyone]) for name in names}
        scores = found.total
        return scores, {
            "env/reward_mean": scores.mean().item(),
            "env/reward_std": scores.std().item() if len(scores) > 1 else 0.0,
            **_probability(found),
            **(found.statistics() if self._reward.is_composed else {}),
            **penalty_statistics(scores, penalties),
            **self._scale(),
        }

    def _samples(self, scored: _Scored) -> list[Sample]:
        """This process's samples, with what PPO learns from each and the parts of that."""
        shaped, trainer = scored.shaped, self._trainer
        learned = scale_scores(shaped, trainer.running, trainer.config)
        others = {name: -value for name, value in scored.penalties.items()}
        if processes.any_of(not torch.equal(learned, shaped)):
            others[SCALING] = learned - shaped
        has_terms = self._reward.is_composed or bool(others)
        samples = samples_of(scored.answered, scored.scores, has_terms=has_terms)
        if has_terms:
            samples = _with_parts(samples, others)
        rewards = zip(samples, learned.tolist(), strict=True)
        return [replace(one, reward=reward) for one, reward in rewards]

    def _drawn(self, queries: Sequence[Tensor]) -> EngineSamples:
        """A response to each of this process's queries, with the limits of one process alone."""
        size, own = self._config.ppo.batch_size, processes.rows(self._config.ppo.batch_size)
        limits, uniforms = [self._length_sampler() for _ in range(size)], None
        if processes.count() > 1:
            sampling, device = self._trainer.sampling, self._trainer.accelerator.device
            with sampling.active():
                uniforms = draw_uniforms(limits, device, self._config.rollout.batch_size)[own]
        self._engine.refresh()
        return self._engine.sample(queries, limits[own], self._sampling, uniforms)

    def _scale(self) -> dict[str, float]:
        """The scale of the scores, where they have one."""
        if not self._config.ppo.use_score_scaling:
            return {}
        return {"env/score_scale": self._trainer.running.std}

    def batch(self, step: int) -> dict[str, list[Any]]:
        """This process's prompts of a step. Seed and epoch decide the order within each epoch."""
        per_query = self._config.ppo.responses_per_query
        size = self._config.ppo.batch_size // per_query
        epoch, position = divmod(step, len(self._prompts) // size)
        generator = np.random.RandomState([self._config.run.seed, epoch])
        order = generator.permutation(len(self._prompts))
        chosen = order[position * size : (position + 1) * size]
        rows = [i for i in chosen for _ in range(per_query)]
        return collate([vars(self._prompts[i]) for i in rows[processes.rows(len(rows))]])


def _probability(scores: Scores) -> dict[str, float]:
    """The mean probability of the label, as a statistic; nothing without a classifier."""
    if scores.probability is None:
        return {}
    return {"env/probability_mean": float(np.mean(scores.probability.tolist()))}


def _with_parts(samples: Sequence[Sample], parts: Mapping[str, Tensor]) -> list[Sample]:
    """Samples with further parts of their reward: minus the penalties, the change by scaling."""
    return [
        replace(one, rewards={**one.rewards, **{name: p[i].item() for name, p in parts.items()}})
        for i, one in enumerate(samples)
    ]
