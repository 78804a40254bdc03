"""Loading the weights of a policy from folders of transformers, this project, TRL and peft."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from ppo_cli.errors import ModelError, PPOCliError, UsageError, did_you_mean
from ppo_cli.models.encoder_decoder import TASKS, auto_class, refuse_if_not_seq2seq
from ppo_cli.models.processor import find_processor
from ppo_cli.utils.hub import first_line, loading_errors
from ppo_cli.utils.model_checks import (
    implementations,
    is_elsewhere,
    refuse_misshaped,
    refuse_missing,
)
from ppo_cli.utils.text import shortened

VALUE_HEAD_FILE = "value_head.safetensors"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# transformers would refuse such weights with a report in its log; our own error says more.
SHAPES_LATER = {"ignore_mismatched_sizes": True}
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def refuse_if_not_causal(config: Any, model_class: type | None = None) -> None:
    """Raise `UsageError`, naming the architecture, unless a model is a causal language model.

    A model that also reads pictures (`...ForConditionalGeneration`) is accepted where
    AutoModelForCausalLM takes its configuration; it may load the language model alone.

    Args:
        config: the model's; its `architectures` are used where there is no class.
        model_class: the model's class.
    """
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    known = {name for names in causal for name in ((names,) if isinstance(names, str) else names)}
    named = (
        list(config.architectures or [])
        if model_class is None
        else [c.__name__ for c in model_class.__mro__ if issubclass(c, nn.Module)]
    )
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    is_causal = any(name in known or name.endswith("ForCausalLM") for name in named)
    if model_class is None and _has_language_model(config):
        is_causal |= any(name.endswith("ForConditionalGeneration") for name in named)
    if encoder_decoder or (named and not is_causal):
        known_as = named[0] if named else config.model_type
        if auto_class(config) is AutoModelForSeq2SeqLM:
            raise UsageError(
                f"{known_as} is not a causal language model but an encoder-decoder: load it with "
                "AutoModelForSeq2SeqLMWithValueHead"
            )
        raise UsageError(
            f"{known_as} is not a causal language model: choose "
            "one whose architecture ends in ForCausalLM or LMHeadModel, such as gpt2"
        )


def refuse_other_kinds(kind: Any, config: Any) -> None:
    """Raise `UsageError` unless `kind`, a class of transformers, is for a configuration's model."""
    check = refuse_if_not_seq2seq if kind is AutoModelForSeq2SeqLM else refuse_if_not_causal
    check(config)


def check_attention(name: str, source: str, **place: Any) -> None:
    """Raise `UsageError` unless a model has an attention of transformers.

    Args:
        name: of the attention.
        source: folder or hub id of the model; of an adapter its base's.
        place: keywords of `from_pretrained`.
    """
    key = "policy.attn_implementation"
    known = ("eager", *sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()))
    if name not in known:
        raise UsageError(
            f"{key}: transformers has no '{shortened(name, 40)}'.{did_you_mean(name, known)} There "
            f"are {', '.join(known)}"
        )
    if is_elsewhere(name):
        raise UsageError(f"{key}: {name} needs a package that is not installed here: leave it null")
    config, place = find_config(source, **place)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trust = place.get("trust_remote_code", False)
            auto_class(config).from_config(
                config, attn_implementation=name, trust_remote_code=trust
            )
    except (ImportError, ValueError) as error:
        raise UsageError(f"{key}: {source} has no {name}: {first_line(error)}") from error


def find_config(name: str, **place: Any) -> tuple[Any, dict[str, Any]]:
    """Configuration of a model, of an adapter's base, and the keywords that load that.

    Args:
        name: folder or hub id.
        place: keywords of `from_pretrained`.

    Raises:
        ModelError: it cannot be read.
    """
    hub = {k: place[k] for k in HUB_KEYWORDS if k in place}
    with loading_errors(name):
        if (adapter := find_adapter(name, **hub)) is not None:
            name, place = adapter.base, base_keywords(adapter, place)
        return AutoConfig.from_pretrained(name, **place), place


def _has_language_model(config: Any) -> bool:
    """Whether AutoModelForCausalLM loads a model of several parts, and later what was saved of it.

    Of some models it loads and saves the language model alone, with another configuration.
    """
    text = config.get_text_config()
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or text is config:
        return False
    is_whole = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].config_class is type(config)
    return is_whole or type(text) in MODEL_FOR_CAUSAL_LM_MAPPING


@dataclass(frozen=True)
class Adapter:
    """A peft adapter on this disk.

    Attributes:
        folder: has its files; in the hub's cache if they were downloaded.
        config: its `peft.PeftConfig`.
    """

    folder: str
    config: Any

    @property
    def base(self) -> str:
        """Folder or hub id of its base model."""
        return str(self.config.base_model_name_or_path)


def find_adapter(name: str, **hub: Any) -> Adapter | None:
    """The adapter in a folder or on the hub; None for a whole model.

    Args:
        name: folder or hub id.
        hub: keywords of the hub, see `HUB_KEYWORDS`.

    Raises:
        ModelError: it is an adapter, and peft is missing, or its configuration names code.
    """
    found = find_adapter_config_file(name, **hub)
    if found is None:
        return None
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ModelError(
            f"{name} is an adapter, which needs peft: pip install 'ppo-cli[peft]' ({error})"
        ) from error
    for weights in ADAPTER_WEIGHTS:  # fetched as other models' are, not by peft's own client
        if cached_file(name, weights, _raise_exceptions_for_missing_entries=False, **hub):
            break
    folder = str(Path(found).parent)
    config = PeftConfig.from_pretrained(folder)
    if getattr(config, "megatron_config", None):
        raise ModelError(
            f"{name}: its adapter_config.json names code (megatron_core), which is not run: leave "
            "megatron_config out of it"
        )
    return Adapter(folder, config)


def base_keywords(adapter: Adapter, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords that load an adapter's base model, from those for the adapter.

    The adapter's files name the base model, so trust in the adapter is not trust in the base model.
    """
    place = {"revision": adapter.config.revision} if adapter.config.revision else {}
    kept = {key: v for key, v in kwargs.items() if key not in ("revision", "subfolder")}
    return {**kept, **place, "trust_remote_code": False}


@contextmanager
def base_errors(name: str, adapter: Adapter) -> Iterator[None]:
    """Around a call that loads an adapter's base model.

    Raises:
        ModelError: it cannot be loaded; the message names both.
    """
    try:
        with loading_errors(adapter.base):
            yield
    except PPOCliError as error:
        if "--trust-remote-code" in str(error):
            raise ModelError(
                f"{name} is an adapter of {adapter.base}, which needs code that it brings along: "
                "that is not run for an adapter. Merge the two with peft's merge_and_unload, save "
                "them as one folder, read its code, and give that folder, with "
                "--trust-remote-code for it"
            ) from error
        raise ModelError(
            f"{name} is an adapter, and its base model cannot be loaded: {error}"
        ) from error


def tokenizer_of(name: str, **kwargs: Any) -> Any:
    """The tokenizer of a model; for an adapter without one, its base model's."""
    hub = {key: kwargs[key] for key in HUB_KEYWORDS if key in kwargs}
    adapter = find_adapter(name, **hub)
    if adapter is None or _located(name, "tokenizer_config.json", hub):
        return AutoTokenizer.from_pretrained(name, **kwargs)
    with base_errors(name, adapter):
        return AutoTokenizer.from_pretrained(adapter.base, **base_keywords(adapter, kwargs))


def _load_adapted(kind: Any, name: str, adapter: Adapter, is_trainable: bool, **kwargs: Any) -> Any:
    from peft import PeftModel, PeftModelForCausalLM, PeftModelForSeq2SeqLM

    wanted = TASKS[kind]
    if (task := adapter.config.task_type) not in (None, wanted):
        is_causal = wanted == "CAUSAL_LM"
        raise UsageError(
            f"{name} is an adapter of another kind of model (task_type {task}), not of "
            f"{'a causal language model' if is_causal else 'an encoder-decoder'}: choose one that "
            f"was saved with task_type {wanted}"
        )
    hub = {key: kwargs[key] for key in HUB_KEYWORDS if key in kwargs}
    with base_errors(name, adapter):
        keywords = base_keywords(adapter, kwargs)
        base = load_pretrained(kind, adapter.base, is_trainable, **keywords)
    if _located(name, "tokenizer_config.json", hub):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **hub)
        if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(len(tokenizer))  # tokens that came with the adapter
    by_task = {"CAUSAL_LM": PeftModelForCausalLM, "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM}
    return by_task.get(task, PeftModel).from_pretrained(
        base, adapter.folder, is_trainable=is_trainable, config=adapter.config
    )


def load_pretrained(
    kind: Any, name: str, is_trainable: bool, *args: Any, **kwargs: Any
) -> PreTrainedModel:
    """A language model, or one with an adapter, from a folder or the hub.

    Warns of weights in the files that the model does not have, but for TRL's value heads. The
    model's attribute `stored_dtype` is the dtype of its weights by its configuration, or None.

    Args:
        kind: `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM`.
        name: folder or hub id.
        is_trainable: whether a loaded adapter can be trained further.
        args, kwargs: passed to `from_pretrained`.

    Raises:
        ModelError: weights are missing.
    """
    kwargs.setdefault("trust_remote_code", False)  # None would ask on the terminal
    hub = {key: kwargs[key] for key in HUB_KEYWORDS if key in kwargs}
    if (adapter := find_adapter(name, **hub)) is not None:
        return _load_adapted(kind, name, adapter, is_trainable, **kwargs)
    config, stored = kwargs.get("config"), None
    if config is None:
        trust = kwargs["trust_remote_code"]
        config = AutoConfig.from_pretrained(name, **hub, trust_remote_code=trust)
        stored = getattr(config, "dtype", None)
        if not trust:
            refuse_other_kinds(kind, config)
        if kwargs.get("quantization_config") and getattr(config, "quantization_config", None):
            raise UsageError(
                f"{name} is quantised already: leave policy.quantization out, or give the model "
                "before quantisation"
            )
        chosen = implementations(name, config, kwargs["trust_remote_code"])
        kwargs = chosen | kwargs
    # transformers' own report would name the value heads, too.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, info = kind.from_pretrained(
            name, *args, **{**SHAPES_LATER, **kwargs}, output_loading_info=True
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith("v_head.")]
    refuse_misshaped(name, () if "ignore_mismatched_sizes" in kwargs else info["mismatched_keys"])
    refuse_missing(name, info["missing_keys"])
    if type(model.config) is type(getattr(config, "text_config", None)):
        warnings.warn(
            f"{name}: its language model is taken alone, without what reads pictures or sounds",
            stacklevel=4,
        )
    elif unexpected:
        names = ", ".join(sorted(unexpected)[:5]) + (" ..." if len(unexpected) > 5 else "")
        warnings.warn(f"{name}: the weights file has the unknown {names}", stacklevel=4)
    model.stored_dtype = stored if isinstance(stored, torch.dtype) else None
    find_processor(model, name, hub)
    return model


def find_value_head(name: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    """The value head's tensors, from our file or from TRL's place among the weights; or none."""

    def locate(file: str) -> str | None:
        return _located(name, file, hub)

    for file in (VALUE_HEAD_FILE, "value_head.bin"):  # LLaMA-Factory writes either
        if (alone := locate(file)) is not None:
            return _read_value_head(alone)
    for weights in WEIGHT_FILES:
        if (index := locate(f"{weights}.index.json")) is not None:
            placed = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            shards = {file for key, file in placed.items() if key.startswith("v_head.")}
            found = [_read_value_head(path) for file in shards if (path := locate(file))]
            return {key: value for head in found for key, value in head.items()}
        if (single := locate(weights)) is not None:
            return _read_value_head(single)
    return {}


def _located(name: str, file: str, hub: dict[str, Any]) -> str | None:
    """Path of a model's file on the disk, None where the model has no such file."""
    return cached_file(
        name,
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )


def _read_value_head(path: str) -> dict[str, Tensor]:
    prefix = "v_head."
    if path.endswith(".safetensors"):
        with safe_open(path, "pt") as file:
            names = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            return {key.removeprefix(prefix): file.get_tensor(key).float() for key in names}
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}
