"""Loading the tokenizer and the policy that a configuration names.

`trusted` are the models, by their names in the configuration, whose own code may run.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from ppo_cli.config.schema import PolicyConfig
from ppo_cli.data.embedded import policy_folder
from ppo_cli.data.sources import EMBEDDED
from ppo_cli.errors import ModelError, UsageError
from ppo_cli.models.adapter import new_adapter
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead
from ppo_cli.models.pretrained import tokenizer_of
from ppo_cli.utils.device import modes_kept
from ppo_cli.utils.hub import loading_errors, trial_errors
from ppo_cli.utils.model_checks import refuse_empty, refuse_nan, refuse_unusable


def check_trusted(trusted: Collection[str], names: Collection[str]) -> None:
    """Raise `UsageError` where `trusted` names none of the models that are to be loaded."""
    for name in trusted:
        if name not in names:
            raise UsageError(
                f"--trust-remote-code {name}: no such model is loaded here. Name one as it is "
                f"given: {', '.join(dict.fromkeys(names))}"
            )


def load_tokenizer(name: str, revision: str | None = None, trusted: Collection[str] = ()) -> Any:
    """The tokenizer of a model; its pad token is the end-of-text token where it has none."""
    source = str(policy_folder()) if name == EMBEDDED else name
    with loading_errors(source):
        tokenizer = tokenizer_of(source, **source_keywords(name, revision, trusted))
        refuse_empty(name, tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        refuse_unusable(name, tokenizer)
    return tokenizer


def load_policy(
    config: PolicyConfig, tokenizer: Any = None, trusted: Collection[str] = ()
) -> AutoModelForCausalLMWithValueHead:
    """The model to tune, with its value head and, where configured, a new adapter.

    Raises:
        ModelError: the model cannot be run, `tokenizer` has ids without an embedding in the
            model, or peft is missing.
        UsageError: the model is not causal, or an adapter does not fit it.
    """
    source = str(policy_folder()) if config.model == EMBEDDED else config.model
    head: dict[str, Any] = {
        "v_head_init_strategy": config.v_head_init_strategy,
        "v_head_initializer_range": config.v_head_initializer_range,
        "summary_dropout_prob": config.summary_dropout_prob,
    }
    place = source_keywords(config.model, config.revision, trusted)
    adapter = None if config.adapter is None else new_adapter(config.adapter, source, **place)
    with trial_errors(config.model):
        policy = AutoModelForCausalLMWithValueHead.from_pretrained(
            source, peft_config=adapter, **head, **place
        )
        refuse_nan(config.model, policy)
        with modes_kept(policy), torch.no_grad():
            ids = torch.zeros(1, 1, dtype=torch.long, device=policy.device)
            policy.eval().pretrained_model(input_ids=ids, use_cache=False)
    rows = policy.pretrained_model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None and len(tokenizer) > rows:
        raise ModelError(
            f"{config.model}: the tokenizer has {len(tokenizer)} tokens, the model embeddings for "
            f"{rows}: they do not belong together"
        )
    return policy


def source_keywords(name: str, revision: str | None, trusted: Collection[str]) -> dict[str, Any]:
    """Keywords of `from_pretrained`. Without `trust_remote_code` it would ask on the terminal."""
    settings: dict[str, Any] = {"trust_remote_code": name in trusted}
    return settings if revision is None else settings | {"revision": revision}
