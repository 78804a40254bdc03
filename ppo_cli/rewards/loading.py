"""Loads the reward that a configuration names: a classifier, or a sum of terms."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from ppo_cli.config.reward import CHAT, RewardConfig, RewardTerm
from ppo_cli.data.embedded import classifier_folder
from ppo_cli.data.prompts import Prompt
from ppo_cli.data.sources import EMBEDDED
from ppo_cli.models.loading import source_keywords
from ppo_cli.rewards.batch import RewardBatch
from ppo_cli.rewards.endpoint import EndpointReward
from ppo_cli.rewards.functions import load_function
from ppo_cli.rewards.lexicon import VaderReward
from ppo_cli.rewards.penalties import CostReward
from ppo_cli.rewards.reward_sum import ClassifierReward, RewardSum, Term
from ppo_cli.rewards.sentiment import SentimentReward
from ppo_cli.utils.hub import trial_errors


def load_reward(
    config: RewardConfig,
    device: torch.device,
    sentiment: str | None = None,
    trusted: Collection[str] = (),
) -> RewardSum:
    """The reward of a configuration, whose functions are run: ask for consent before.

    Args:
        config: the section `reward`.
        device: the classifiers' device.
        sentiment: the label, instead of the configured one.
        trusted: models, as `config` names them, whose own code may run.

    Raises:
        PPOCliError: it cannot be loaded, or a classifier does not score a text.
    """
    label = sentiment or config.sentiment
    if config.terms is None:
        term = RewardTerm(model=config.model, revision=config.revision, output=config.output)
        return RewardSum.of(_classifier(term, label, config.batch_size, device, trusted))
    terms = []
    for name, term in zip(config.names, config.terms, strict=True):
        reward: Any
        if term.model is not None:
            reward = _classifier(term, label, config.batch_size, device, trusted)
            reward = ClassifierReward(reward, term.template)
        elif term.function is not None:
            reward = load_function(term.function)
        elif term.url is not None:
            reward = EndpointReward(
                term.url, timeout=term.timeout, retries=term.retries, batch_size=term.batch_size
            )
        elif term.lexicon is not None:
            reward = VaderReward(term.template)
        else:
            reward = CostReward(str(term.cost), term.target_length)
        terms.append(Term(name, reward, term.weight, term.is_partial))
    return RewardSum.of_terms(terms)


def _classifier(
    term: RewardTerm,
    sentiment: str,
    batch_size: int,
    device: torch.device,
    trusted: Collection[str],
) -> SentimentReward:
    name = str(term.model)
    source = str(classifier_folder()) if name == EMBEDDED else name
    with trial_errors(name, "classifier"):
        reward = SentimentReward(
            source,
            term.sentiment or sentiment,
            output=term.output,
            batch_size=term.batch_size or batch_size,
            device=device,
            tokenizer=str(classifier_folder()) if term.tokenizer == EMBEDDED else term.tokenizer,
            reads_special_tokens=term.template == CHAT,
            **source_keywords(name, term.revision, trusted),
        )
        reward.scores(["a"])
    return reward


def try_reward(
    reward: RewardSum,
    prompts: Sequence[Prompt],
    end_ids: Collection[int],
    *,
    continues: bool = True,
) -> None:
    """Score a response of one word to the first prompts, before anything is written.

    Args:
        reward: to try.
        prompts: at least one.
        end_ids: tokens that end a response.
        continues: whether responses continue the texts of the prompts.

    Raises:
        PPOCliError: a function or an endpoint does not score them.
    """
    if not reward.is_composed:
        return
    some = prompts[:2]
    names: Mapping[str, None] = dict.fromkeys(name for prompt in some for name in prompt.columns)
    reward.score(
        RewardBatch(
            texts=[f"{prompt.query if continues else ''} a" for prompt in some],
            queries=[prompt.query for prompt in some],
            responses=[" a"] * len(some),
            columns={name: [prompt.columns.get(name) for prompt in some] for name in names},
            response_ids=[torch.tensor([0])] * len(some),
            end_ids=end_ids,
            continues=continues,
        )
    )
