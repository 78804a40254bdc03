"""`PPOTrainer`: sample with it, score the samples as you like, then let it take a PPO step.

The interface is that of TRL 0.11.4's classic trainer; the mathematics stands in `advantages.py` and
`losses.py`. Source: Schulman et al. 2017 (https://arxiv.org/abs/1707.06347), with the KL penalty
of Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593). Left out: encoder-decoder models.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_cli.policy import AutoModelForCausalLMWithValueHead, create_reference_model
from ppo_cli.ppo import advantages as adv
from ppo_cli.ppo import losses
from ppo_cli.ppo.config import PPOConfig
from ppo_cli.ppo.kl_controller import AdaptiveKLController, FixedKLController
from ppo_cli.ppo.packing import TokenBatch
from ppo_cli.ppo.statistics import length_statistics, minibatch_statistics, to_numbers
from ppo_cli.rollout import sample_responses
from ppo_cli.runtime import RandomStream

DEFAULT_NEW_TOKENS = 20  # what `generate` of transformers adds where no length is given


@dataclass(frozen=True)
class Experience:
    """What a step knows of its batch before the first update. Grids are (B, R), see `TokenBatch`.

    Attributes:
        tokens: the sequences.
        logprobs: of the response tokens under the policy that sampled them.
        ref_logprobs: the same under the reference.
        values: the value head's before each token.
        penalties: KL penalty of each token before the coefficient.
        advantages: whitened.
        returns: targets of the value head.
        non_score_reward: minus the coefficient times the penalty.
    """

    tokens: TokenBatch
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    penalties: Tensor
    advantages: Tensor
    returns: Tensor
    non_score_reward: Tensor


class PPOTrainer:
    """Proximal Policy Optimization of a causal language model.

    Args:
        config: the settings; `world_size` and the like are filled in.
        model: the policy.
        ref_model: what KL is measured from: a model with or without a value head. None makes a
            frozen copy of `model`; a peft model needs no copy, its reference is the same model
            with the adapter off.
        tokenizer: its pad and end-of-text tokens are used.
        dataset: rows with the queries; makes `dataloader`.
        optimizer: None for Adam over the trainable parameters.
        data_collator: collates rows of `dataset` into a batch.
        num_shared_layers: with `ref_model=None`: freeze this many lower layers and let policy and
            reference hold them in common.
        lr_scheduler: stepped once a `step()`.

    Attributes:
        accelerator: the `accelerate.Accelerator` that places and wraps everything.
        model, ref_model, optimizer, lr_scheduler, dataloader: prepared by it.
        kl_ctl: the KL controller; `kl_ctl.value` is the coefficient.
        current_step: `step()` calls so far.

    Raises:
        ValueError: an argument is not what it should be.
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
    ) -> None:
        _require("config", config, PPOConfig)
        _require("model", model, AutoModelForCausalLMWithValueHead)
        _require("tokenizer", tokenizer, PreTrainedTokenizerBase)
        if lr_scheduler is not None:
            _require("lr_scheduler", lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
        assert config is not None
        assert model is not None
        assert tokenizer is not None
        config.check_batch_arithmetic()
        self.config = config
        self.tokenizer = tokenizer
        self.accelerator = _accelerator(config)
        self.is_peft_model = model.is_peft_model
        self.is_distributed = self.accelerator.num_processes > 1
        _record_surroundings(config, self.accelerator, self.is_peft_model)

        reference = self._reference(model, ref_model, num_shared_layers)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        if optimizer is None:
            trainable = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam(trainable, lr=config.learning_rate)
        self.dataset = dataset
        dataloader = None
        if dataset is not None:
            dataloader = self.prepare_dataloader(dataset, data_collator, model)
        self.model, self.optimizer, self.dataloader, self.lr_scheduler = self.accelerator.prepare(
            model, optimizer, dataloader, lr_scheduler
        )
        self.ref_model = self._prepare_reference(reference)

        self.kl_ctl: AdaptiveKLController | FixedKLController = (
            AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
            if config.adap_kl_ctrl
            else FixedKLController(config.init_kl_coef)
        )
        self.running = adv.RunningMoments()
        self.current_step = 0
        self._best_mean_score = -float("inf")
        # Random numbers of its own: the caller's random state stays as it is.
        self._shuffle = np.random.RandomState(config.seed)
        self._sampling = RandomStream(
            config.seed + self.accelerator.process_index, self.accelerator.device
        )

    # ------------------------------------------------------------------ sampling

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,
        generate_ref_response: bool = False,
        **generation_kwargs: Any,
    ) -> Any:
        """Sample a response to each query, with dropout off.

        Args:
            query_tensor: (query_length,) token ids, or a list of such tensors.
            length_sampler: called once a query for the number of new tokens.
            batch_size: queries a forward pass, for a list.
            return_prompt: whether what is returned begins with the query.
            generate_ref_response: also sample from the reference.
            generation_kwargs: of `transformers`' `generate`. Where they are silent sampling is
                pure: temperature 1, no top-k, no top-p, whatever the model's own
                `generation_config` says; pass a `generation_config` to have one used.

        Returns:
            For one query a (1, length) tensor, for a list a list of 1-D tensors, each ending with
            its end-of-text token where one was drawn. With `generate_ref_response` a pair of such.

        Raises:
            ValueError: a query is empty, not 1-D, or too long for the model.
        """
        single = isinstance(query_tensor, Tensor)
        queries: list[Tensor] = [query_tensor] if single else list(query_tensor)  # type: ignore[list-item]
        if any(query.dim() != 1 for query in queries):
            raise ValueError("query_tensor must be a tensor of shape (query_length,) or a list of them")
        limits = _new_token_limits(queries, length_sampler, generation_kwargs)
        settings = {
            "pad_token_id": self.tokenizer.pad_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            **generation_kwargs,
        }

        def sample(model: Any) -> Any:
            with self._unwrapped(model) as unwrapped, self._sampling.active():
                responses = sample_responses(
                    unwrapped, queries, limits, batch_size=batch_size, **settings
                )
            if return_prompt:
                responses = [
                    torch.cat([query.to(response.device), response])
                    for query, response in zip(queries, responses, strict=True)
                ]
            return responses[0].unsqueeze(0) if single else responses

        response = sample(self.model)
        if not generate_ref_response:
            return response
        with self.adapter_off():
            return response, sample(self.model if self.is_peft_model else self.ref_model)

    # ------------------------------------------------------------------ learning

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        """One PPO step on a batch: `ppo_epochs` passes over it.

        Args:
            queries: B tensors of token ids, (query_length,).
            responses: B tensors of token ids, (response_length,).
            scores: B scalars.
            response_masks: B tensors, (response_length,), 0 for response tokens that are read but
                not learnt from, such as a tool's output. A response with no token that counts
                takes part in nothing.

        Returns:
            The statistics that `ppo_cli.ppo.statistics.STATISTICS` lists: floats and NumPy arrays.

        Raises:
            ValueError: lengths or shapes that do not fit, a score that is not finite, a query
                without tokens, or no response token that counts in the whole batch.
        """
        started = time.perf_counter()
        clock = _Stopwatch()
        score_tensor = self._checked_scores(queries, responses, scores, response_masks)
        tokens = TokenBatch.from_lists(
            queries,
            responses,
            response_masks,
            pad_token_id=self.tokenizer.pad_token_id or 0,
            device=self.accelerator.device,
        )
        if not tokens.mask.any():
            raise ValueError("no response token counts: responses are empty or masked throughout")
        score_tensor = self._scaled(score_tensor)
        self._push_if_best(score_tensor)

        clock.start()
        logprobs, values, ref_logprobs, penalties = self._before_update(tokens)
        clock.stop("forward_pass")
        rewards, non_score_reward = adv.token_rewards(
            score_tensor, penalties, tokens.mask, self.kl_ctl.value
        )
        if self.config.whiten_rewards:
            rewards = adv.masked_whiten(rewards, tokens.mask, shift_mean=False)
        clock.stop("compute_rewards")
        estimates, returns = adv.generalized_advantages(
            values, rewards, tokens.mask, self.config.gamma, self.config.lam
        )
        advantages = adv.masked_whiten(estimates, tokens.mask)
        clock.stop("compute_advantages")

        experience = Experience(
            tokens,
            logprobs,
            ref_logprobs,
            values,
            penalties,
            advantages,
            returns,
            non_score_reward,
        )
        updates = self._optimise(experience)
        clock.stop("optimize_step")

        stats = self._statistics(experience, score_tensor, updates)
        stats |= length_statistics("queries", [len(query) for query in queries])
        stats |= length_statistics("responses", [len(response) for response in responses])
        clock.stop("calc_stats")
        self.kl_ctl.update(
            stats["objective/kl"], self.config.batch_size * self.accelerator.num_processes
        )
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        if self.config.optimize_device_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.current_step += 1
        return {**stats, **clock.times, "time/ppo/total": time.perf_counter() - started}

    @torch.no_grad()
    def _before_update(self, tokens: TokenBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities, values, reference log-probabilities and KL penalties, (B, R) each."""
        parts: list[tuple[Tensor, ...]] = []
        for indices in torch.arange(len(tokens)).split(self.config.mini_batch_size):
            chunk = tokens.select(indices)
            targets = chunk.flat_targets
            logits, values = self._forward(self.model, chunk)
            with self.adapter_off():
                reference = self.model if self.is_peft_model else self.ref_model
                ref_logits, _ = self._forward(reference, chunk)
            logprobs = losses.token_logprobs(logits, targets)
            ref_logprobs = losses.token_logprobs(ref_logits, targets)
            if self.config.kl_penalty == "full":
                penalties = losses.full_kl(logits, ref_logits)
            else:
                penalties = losses.kl_penalty(logprobs, ref_logprobs, self.config.kl_penalty)
            parts.append((logprobs, values, ref_logprobs, penalties))
        flat = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        logprobs, values, ref_logprobs, penalties = (tokens.to_grid(tensor) for tensor in flat)
        return logprobs, values, ref_logprobs, penalties

    def _optimise(self, experience: Experience) -> dict[str, Tensor]:
        """All epochs; the mini-batches' statistics, stacked."""
        collected: list[dict[str, Tensor]] = []
        with self._dropout_off():
            for _ in range(self.config.ppo_epochs):
                order = torch.from_numpy(self._shuffle.permutation(len(experience.tokens)))
                for indices in order.split(self.config.backward_batch_size):
                    collected += self._optimizer_step(experience, indices)
                if self.config.early_stopping and self._moved_too_far(collected[-1]):
                    break
        keys = collected[0].keys()
        join: dict[str, Callable] = {"policy/ratio": torch.cat, "policy/advantages": torch.cat}
        return {key: join.get(key, torch.stack)([s[key] for s in collected]) for key in keys}

    def _optimizer_step(self, experience: Experience, indices: Tensor) -> list[dict[str, Tensor]]:
        """Accumulate over the mini-batches of `indices`, then move the weights once.

        A mini-batch whose mean ratio exceeds `ratio_threshold` cancels the step.
        """
        collected: list[dict[str, Tensor]] = []
        parts = indices.split(self.config.mini_batch_size)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            # accelerate's own accumulation would step early at the end of the dataloader.
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, stats, mean_ratio = self._minibatch_loss(experience, part)
                collected.append(stats)
                if self._skips(mean_ratio):
                    for key in ("loss/policy", "loss/value", "loss/total"):
                        stats[key] = torch.zeros_like(stats[key])
                    self.optimizer.zero_grad()
                    return collected
                self.accelerator.backward(loss / len(parts))
        if self.config.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return collected

    def _minibatch_loss(
        self, experience: Experience, indices: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Total loss, statistics and mean ratio of the samples at `indices`."""
        tokens = experience.tokens.select(indices)
        mask, width = tokens.mask, tokens.mask.shape[1]
        old_logprobs, old_values, advantages, returns = (
            grid[indices, :width]
            for grid in (
                experience.logprobs,
                experience.values,
                experience.advantages,
                experience.returns,
            )
        )
        logits, flat_values = self._forward(self.model, tokens)
        logprobs = tokens.to_grid(losses.token_logprobs(logits, tokens.flat_targets))
        values = tokens.to_grid(flat_values)
        log_ratio = logprobs - old_logprobs
        ratio = log_ratio.exp()

        policy = losses.policy_loss(ratio, advantages, mask, self.config.cliprange)
        value = losses.value_loss(values, old_values, returns, mask, self.config.cliprange_value)
        loss = policy.loss + self.config.vf_coef * value.loss
        with torch.no_grad():
            stats = {
                "loss/policy": policy.loss.detach(),
                "loss/value": value.loss.detach(),
                "loss/total": loss.detach(),
                "policy/clipfrac": policy.clipfrac,
                "val/clipfrac": value.clipfrac,
                "policy/advantages": advantages[mask],
                "policy/ratio": ratio.detach()[mask],
                **minibatch_statistics(
                    ratio=ratio.detach(),
                    log_ratio=log_ratio.detach(),
                    advantages=advantages,
                    returns=returns,
                    old_values=old_values,
                    values=values.detach(),
                    mask=mask,
                    token_entropy=losses.entropy(logits.detach()),
                ),
            }
        return loss, stats, adv.masked_mean(ratio.detach(), mask)

    def _forward(self, model: Any, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
        """Logits (N, V) and values (N,) where response tokens are predicted, float32."""
        positions = tokens.flat_sources
        if isinstance(self.accelerator.unwrap_model(model), AutoModelForCausalLMWithValueHead):
            logits, _, values = model(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                positions=positions,
            )
            return logits, values.float()
        logits = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).logits
        logits = logits.flatten(0, 1)[positions].float()
        return logits, logits.new_zeros(len(positions))

    def _moved_too_far(self, stats: Mapping[str, Tensor]) -> bool:
        policykl = self.accelerator.reduce(stats["policy/policykl"], "mean")
        return bool(policykl > 1.5 * self.config.target_kl)

    def _skips(self, mean_ratio: Tensor) -> bool:
        ratio = float(self.accelerator.reduce(mean_ratio, "mean"))
        if ratio <= self.config.ratio_threshold:
            return False
        warnings.warn(
            f"the mean ratio of a mini-batch ({ratio:.2f}) exceeds ratio_threshold "
            f"({self.config.ratio_threshold:g}): its optimizer step is skipped. A lower "
            "learning_rate or fewer ppo_epochs keep the policy closer",
            stacklevel=2,
        )
        return True

    # ------------------------------------------------------------------ scores and statistics

    def _checked_scores(
        self, queries: Any, responses: Any, scores: Any, response_masks: Any
    ) -> Tensor:
        """Scores as a (B,) tensor, once everything has the right form."""
        lists = {"queries": queries, "responses": responses, "scores": scores}
        if response_masks is not None:
            lists["response_masks"] = response_masks
        for name, items in lists.items():
            if not isinstance(items, list):
                raise ValueError(f"{name} must be a list of tensors - got {type(items)}")
            if len(items) != self.config.batch_size:
                raise ValueError(
                    f"Batch size ({self.config.batch_size}) does not match number of examples - "
                    f"but got {len(items)} for: {name}"
                )
            for item in items:
                if not isinstance(item, Tensor):
                    raise ValueError(f"Elements in {name} must be tensors - got {type(item)}")
                if item.dim() > 1:
                    raise ValueError(f"{name} must be 1-dimensional - got shape {tuple(item.shape)}")
        for i, score in enumerate(scores):
            if score.numel() != 1 or not bool(score.isfinite().all()):
                raise ValueError(f"scores[{i}] must be one finite number - got {score.tolist()}")
        return torch.stack([s.detach().reshape(()).float() for s in scores]).to(
            self.accelerator.device
        )

    def _scaled(self, scores: Tensor) -> Tensor:
        if self.config.use_score_scaling:
            self.running.update(self.accelerator.gather(scores))
            if self.config.use_score_norm:
                scores = scores - self.running.mean
            if self.running.std > 0:
                scores = scores / (self.running.std + torch.finfo(scores.dtype).eps)
        if self.config.score_clip is not None:
            scores = scores.clamp(-self.config.score_clip, self.config.score_clip)
        return scores

    def _statistics(
        self, experience: Experience, scores: Tensor, updates: dict[str, Tensor]
    ) -> dict[str, Any]:
        tokens, mask = experience.tokens, experience.tokens.mask
        kl = experience.penalties.sum(dim=1)
        stats: dict[str, Any] = {
            "objective/kl": kl.mean(),
            "objective/kl_dist": kl,
            "objective/logprobs": tokens.to_rows(experience.logprobs),
            "objective/ref_logprobs": tokens.to_rows(experience.ref_logprobs),
            "objective/kl_coef": self.kl_ctl.value,
            "objective/entropy": -experience.logprobs.sum(dim=1).mean(),
            "ppo/mean_non_score_reward": adv.masked_mean(experience.non_score_reward, mask),
            "ppo/mean_scores": scores.mean(),
            "ppo/std_scores": scores.std() if len(scores) > 1 else torch.zeros(()),
        }
        for key, value in updates.items():
            is_array = key in ("policy/ratio", "policy/advantages")
            stats[f"ppo/{key}"] = value if is_array else value.mean()
        error, variance = stats["ppo/val/error"], stats["ppo/returns/var"]
        stats["ppo/val/var_explained"] = torch.where(variance > 0, 1 - error / variance, 0.0)
        if self.is_distributed:
            stats = {
                key: self.accelerator.reduce(value.to(self.accelerator.device), "mean")
                if isinstance(value, Tensor) and value.dim() == 0
                else value
                for key, value in stats.items()
            }
        stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        numbers = to_numbers(stats)
        if numbers["objective/kl"] < -1.0:
            warnings.warn(
                f"KL is negative ({numbers['objective/kl']:.2f} per sequence): the responses are "
                "not samples of this policy. Sample with temperature 1, without top-k or top-p",
                stacklevel=3,
            )
        return numbers

    def log_stats(
        self,
        stats: Mapping[str, Any],
        batch: Mapping[str, Any],
        rewards: Sequence[Tensor] | Tensor,
        columns_to_log: Iterable[str] = ("query", "response"),
    ) -> None:
        """Send a step's statistics to the tracker that `log_with` names; without one, nothing.

        Args:
            stats: what `step()` returned.
            batch: the batch's columns; those of `columns_to_log` go into wandb's table.
            rewards: the batch's scores, logged as `env/reward_mean`, `_std` and `_dist`.
            columns_to_log: names of columns of `batch`.

        Raises:
            ValueError: with wandb, a column is not in the batch.
        """
        scores = torch.as_tensor([float(reward) for reward in rewards])
        scores = self.accelerator.gather(scores.to(self.accelerator.device)).cpu()
        columns = tuple(columns_to_log)
        if self.config.log_with is None or not self.accelerator.is_main_process:
            return
        logs: dict[str, Any] = dict(stats)
        logs["env/reward_mean"] = scores.mean().item()
        logs["env/reward_std"] = scores.std().item() if len(scores) > 1 else 0.0
        logs["env/reward_dist"] = scores.numpy()
        if self.config.log_with == "wandb":
            import wandb

            if missing := [column for column in columns if column not in batch]:
                raise ValueError(f"columns {missing} to log are not in the batch: {list(batch)}")
            rows = [list(r) for r in zip(*(batch[c] for c in columns), scores.tolist(), strict=True)]
            logs["game_log"] = wandb.Table(columns=[*columns, "reward"], rows=rows)
        else:
            logs = {key: value for key, value in logs.items() if np.size(value) == 1}
        self.accelerator.log(logs, step=self.current_step)

    # ------------------------------------------------------------------ data and saving

    def prepare_dataloader(
        self,
        dataset: Any,
        data_collator: Callable | None = None,
        model: AutoModelForCausalLMWithValueHead | None = None,
    ) -> torch.utils.data.DataLoader:
        """Shuffled batches of `batch_size` rows; a last batch that would be shorter is dropped.

        With `remove_unused_columns` a Hugging Face dataset loses the columns that neither the
        model's forward takes nor are named label, query or response.
        """
        if self.config.remove_unused_columns and hasattr(dataset, "remove_columns"):
            model = model or self.accelerator.unwrap_model(self.model)
            kept = {*inspect.signature(model.forward).parameters, "label", "query", "response"}
            dataset = dataset.remove_columns([c for c in dataset.column_names if c not in kept])
        if len(dataset) < self.config.batch_size:
            warnings.warn(
                f"the dataset has {len(dataset)} rows, fewer than batch_size "
                f"({self.config.batch_size}): the dataloader is empty",
                stacklevel=3,
            )
        return torch.utils.data.DataLoader(
            dataset,
            batch_size=self.config.batch_size,
            collate_fn=data_collator,
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(self.config.seed),
        )

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write policy, value head, tokenizer and a model card to a folder."""
        self.accelerator.unwrap_model(self.model).save_pretrained(save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory)
        self.create_model_card(save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Upload policy, value head and tokenizer."""
        self.accelerator.unwrap_model(self.model).push_to_hub(repo_id, **kwargs)
        self.tokenizer.push_to_hub(repo_id, **kwargs)

    def create_model_card(self, path: str | Path, model_name: str = "PPO model") -> None:
        """Write a short `README.md` that says what the model is and how to load it."""
        from ppo_cli.model_card import trainer_card

        card = trainer_card(model_name, str(path), self.config)
        (Path(path) / "README.md").write_text(card, encoding="utf-8")

    def state_dict(self) -> dict[str, Any]:
        """All that a continuation needs beside the model's weights: tensors and plain values."""
        shuffle = self._shuffle.get_state(legacy=False)
        shuffle["state"]["key"] = [int(word) for word in shuffle["state"]["key"]]
        return {
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler and self.lr_scheduler.state_dict(),
            "kl_coef": self.kl_ctl.value,
            "running": self.running.state_dict(),
            "shuffle": shuffle,
            "sampling": self._sampling.state_dict(),
            "current_step": self.current_step,
            "best_mean_score": self._best_mean_score,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.kl_ctl.value = state["kl_coef"]
        self.running.load_state_dict(state["running"])
        shuffle = {**state["shuffle"], "state": dict(state["shuffle"]["state"])}
        shuffle["state"]["key"] = np.asarray(shuffle["state"]["key"], dtype=np.uint32)
        self._shuffle.set_state(shuffle)
        self._sampling.load_state_dict(state["sampling"])
        self.current_step = state["current_step"]
        self._best_mean_score = state["best_mean_score"]

    def _push_if_best(self, scores: Tensor) -> None:
        """Upload the model whenever the mean score reaches a new height, if that is configured."""
        target = self.config.push_to_hub_if_best_kwargs
        if not target or self.current_step % self.config.compare_steps:
            return
        mean_score = scores.mean().item()
        if mean_score > self._best_mean_score:
            self._best_mean_score = mean_score
            self.push_to_hub(**target)

    # ------------------------------------------------------------------ models and modes

    def _reference(
        self, model: AutoModelForCausalLMWithValueHead, given: Any, num_shared_layers: int | None
    ) -> Any:
        if given is not None:
            _require("ref_model", given, (AutoModelForCausalLMWithValueHead, PreTrainedModel))
            if num_shared_layers is not None:
                warnings.warn("num_shared_layers is ignored: ref_model was passed", stacklevel=3)
            return given
        return None if self.is_peft_model else create_reference_model(model, num_shared_layers)

    def _prepare_reference(self, reference: Any) -> Any:
        if reference is None:
            return None
        kind = self.accelerator.distributed_type
        if kind == DistributedType.DEEPSPEED:
            from trl.models import prepare_deepspeed

            return prepare_deepspeed(reference, self.accelerator)
        if kind == DistributedType.FSDP:
            from trl.models import prepare_fsdp

            return prepare_fsdp(reference, self.accelerator)
        return self.accelerator.prepare_model(reference, evaluation_mode=True).eval()

    def adapter_off(self) -> AbstractContextManager[None]:
        """For a peft policy: be the reference inside the block."""
        if not self.is_peft_model:
            return nullcontext()
        return self.accelerator.unwrap_model(self.model).pretrained_model.disable_adapter()

    @contextmanager
    def _unwrapped(self, model: Any) -> Iterator[Any]:
        """The model itself, ready to generate, whatever accelerate wrapped around it."""
        if self.accelerator.distributed_type == DistributedType.NO:
            yield self.accelerator.unwrap_model(model)
            return
        from trl.models import unwrap_model_for_generation

        with unwrap_model_for_generation(model, self.accelerator) as unwrapped:
            yield unwrapped

    @contextmanager
    def _dropout_off(self) -> Iterator[None]:
        """No dropout during updates, as the ratio compares with probabilities taken without it.

        Eval mode does that. Gradient checkpointing only works in training mode, so there the
        dropout probabilities are set to zero instead.
        """
        modes = [(module, module.training) for module in self.model.modules()]
        dropouts: list[tuple[Any, str, float]] = []
        if self.config.gradient_checkpointing:
            self.model.train()
            for module in self.model.modules():
                names = ["p"] if isinstance(module, torch.nn.Dropout) else [
                    name
                    for name, value in vars(module).items()
                    if "drop" in name and isinstance(value, float)
                ]
                for name in names:
                    dropouts.append((module, name, getattr(module, name)))
                    setattr(module, name, 0.0)
        else:
            self.model.eval()
        try:
            yield
        finally:
            for module, name, value in dropouts:
                setattr(module, name, value)
            for module, mode in modes:
                module.training = mode


class _Stopwatch:
    """Seconds since the last mark, under `time/ppo/NAME`."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        self._mark = time.perf_counter()

    def stop(self, name: str) -> None:
        now = time.perf_counter()
        self.times[f"time/ppo/{name}"] = now - self._mark
        self._mark = now


def _require(name: str, value: Any, types: Any) -> None:
    if not isinstance(value, types):
        wanted = " or ".join(t.__name__ for t in (types if isinstance(types, tuple) else (types,)))
        raise ValueError(f"{name} must be a {wanted}, got {type(value).__name__}")


def _accelerator(config: PPOConfig) -> Accelerator:
    if config.log_with is not None and find_spec(config.log_with) is None:
        raise ImportError(f"log_with='{config.log_with}' needs: pip install {config.log_with}")
    accelerator = Accelerator(
        log_with=config.log_with,
        project_config=ProjectConfiguration(**config.project_kwargs),
        **config.accelerator_kwargs,
    )
    if config.log_with is not None:
        settings: dict[str, Any] = {k: v for k, v in config.to_dict().items() if v is not None}
        if config.log_with == "wandb":
            settings = {"trl_ppo_trainer_config": settings}
        accelerator.init_trackers(
            config.tracker_project_name, config=settings, init_kwargs=config.tracker_kwargs
        )
    return accelerator


def _record_surroundings(config: PPOConfig, accelerator: Accelerator, is_peft: bool) -> None:
    config.world_size = accelerator.num_processes
    config.global_batch_size = config.batch_size * config.world_size
    config.global_backward_batch_size = config.backward_batch_size * config.world_size
    config.is_encoder_decoder = False
    config.is_peft_model = is_peft


def _new_token_limits(
    queries: Sequence[Tensor],
    length_sampler: Callable[[], int] | None,
    generation_kwargs: dict[str, Any],
) -> list[int]:
    """New tokens of each query; takes what says so out of `generation_kwargs`."""
    new = generation_kwargs.pop("max_new_tokens", None)
    total = generation_kwargs.pop("max_length", None)
    asked = generation_kwargs.get("generation_config")
    if length_sampler is not None:
        return [int(length_sampler()) for _ in queries]
    if new is None and total is None:
        new = getattr(asked, "max_new_tokens", None)
    if new is None and total is not None:
        return [max(total - query.numel(), 1) for query in queries]
    return [int(new if new is not None else DEFAULT_NEW_TOKENS)] * len(queries)
