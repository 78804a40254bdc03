"""The policy: a causal language model with a value head, its frozen reference, their folders."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import PushToHubMixin, cached_file

from ppo_cli.errors import ModelError, UsageError
from ppo_cli.hub import first_line, loading_errors

VALUE_HEAD_FILE = "value_head.safetensors"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class ValueHead(nn.Module):
    """One number per hidden state: dropout, then a linear layer kept in float32.

    Args:
        hidden_size: width H of the hidden states.
        dropout: dropout probability on the hidden states.
        init_strategy: None for torch's own initialisation of a linear layer, `"normal"` for a
            normal distribution of standard deviation `initializer_range` and a zero bias.
        initializer_range: that standard deviation.
    """

    def __init__(
        self,
        hidden_size: int,
        dropout: float = 0.1,
        init_strategy: str | None = None,
        initializer_range: float = 0.2,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.summary = nn.Linear(hidden_size, 1)
        if init_strategy == "normal":
            nn.init.normal_(self.summary.weight, std=initializer_range)
            nn.init.zeros_(self.summary.bias)
        elif init_strategy is not None:
            raise UsageError(f"v_head_init_strategy is None or 'normal', not {init_strategy!r}")

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., H) -> (..., 1)."""
        return self.summary(self.dropout(hidden_states).to(self.summary.weight.dtype))


class AutoModelForCausalLMWithValueHead(nn.Module, PushToHubMixin):
    """A causal language model (`pretrained_model`) with a `ValueHead` (`v_head`) beside it.

    Make one with `from_pretrained`. The weights of the language model are those of `transformers`,
    so everything that works on them works here.

    Args:
        pretrained_model: a causal `transformers.PreTrainedModel` or a `peft.PeftModel` of one.
        summary_dropout_prob: dropout before the value head.
        v_head_init_strategy: None or `"normal"`, see `ValueHead`.
        v_head_initializer_range: standard deviation of the `"normal"` strategy.

    Raises:
        UsageError: the model is not causal.
    """

    supported_args = ("summary_dropout_prob", "v_head_init_strategy", "v_head_initializer_range")

    def __init__(
        self,
        pretrained_model: PreTrainedModel,
        *,
        summary_dropout_prob: float | None = None,
        v_head_init_strategy: str | None = None,
        v_head_initializer_range: float = 0.2,
    ) -> None:
        super().__init__()
        self.is_peft_model = hasattr(pretrained_model, "peft_config") and hasattr(
            pretrained_model, "disable_adapter"
        )
        self.pretrained_model = pretrained_model
        _refuse_if_not_causal(self._base_model.config, type(self._base_model))
        if summary_dropout_prob is None:
            summary_dropout_prob = getattr(self.config, "summary_dropout_prob", 0.1)
        self.v_head = ValueHead(
            self._base_model.get_output_embeddings().weight.shape[-1],
            dropout=summary_dropout_prob,
            init_strategy=v_head_init_strategy,
            initializer_range=v_head_initializer_range,
        ).to(self._base_model.device)
        self._head_is_plain: bool | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | PreTrainedModel,
        *model_args: Any,
        peft_config: Any = None,
        is_trainable: bool = True,
        **kwargs: Any,
    ) -> AutoModelForCausalLMWithValueHead:
        """Load a policy, and its value head where one was saved with it.

        Args:
            pretrained_model_name_or_path: a hub id; a folder as `transformers` writes it (one
                file or sharded, safetensors or `.bin`), as `save_pretrained` here does, or as TRL
                up to 0.11 did (value head among the weights); a folder of a peft adapter; or a
                model object.
            peft_config: a `peft.PeftConfig`: adds a new adapter; only it and the value head train.
            is_trainable: whether an adapter loaded from a folder can be trained further.
            kwargs: `summary_dropout_prob`, `v_head_init_strategy`, `v_head_initializer_range` for
                the value head; all others go to `AutoModelForCausalLM.from_pretrained`. `dtype` is
                float32 unless given.

        Raises:
            ModelNotFoundError: there is no such folder or hub model.
            UsageError: the model is not causal.
            ModelError: the hub does not answer, or the files are damaged.
        """
        head_kwargs = {key: kwargs.pop(key) for key in cls.supported_args if key in kwargs}
        source = pretrained_model_name_or_path
        saved_head: Mapping[str, Tensor] = {}
        if isinstance(source, (str, Path)):
            name = str(source)
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype", torch.float32))
            hub = {key: kwargs[key] for key in HUB_KEYWORDS if key in kwargs}
            with loading_errors(name):
                model = _load_causal(name, is_trainable, *model_args, **kwargs)
                saved_head = _find_value_head(name, hub)
        else:
            model = source
        if peft_config is not None:
            from peft import get_peft_model

            if hasattr(model, "peft_config"):
                warnings.warn("peft_config is ignored: the model has an adapter", stacklevel=2)
            else:
                _refuse_if_not_causal(model.config, type(model))
                model = get_peft_model(model, peft_config)
        policy = cls(model, **head_kwargs)
        if saved_head:
            try:
                policy.v_head.load_state_dict(saved_head)
            except RuntimeError as error:
                raise ModelError(
                    f"{source}: its value head does not fit the model: {first_line(error)}"
                ) from error
        return policy

    @property
    def _base_model(self) -> PreTrainedModel:
        """The language model below an adapter, if there is one."""
        return (
            self.pretrained_model.get_base_model() if self.is_peft_model else self.pretrained_model
        )

    @property
    def config(self) -> Any:
        """The language model's configuration."""
        return self.pretrained_model.config

    @property
    def generation_config(self) -> Any:
        """The language model's generation configuration."""
        return self.pretrained_model.generation_config

    @property
    def device(self) -> torch.device:
        """Where the value head, and with it the model's output, lives."""
        return self.v_head.summary.weight.device

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return bool(_renamed(self._base_model, "is_{}_checkpointing"))

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        _renamed(self._base_model, "{}_checkpointing_enable")(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        _renamed(self._base_model, "{}_checkpointing_disable")()

    def enable_input_require_grads(self) -> None:
        """Let gradients reach an adapter through frozen embeddings, for checkpointing."""
        self._base_model.enable_input_require_grads()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The language model's own method."""
        return self.pretrained_model.prepare_inputs_for_generation(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        positions: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Logits and values of B sequences of T tokens.

        Args:
            input_ids: (B, T).
            past_key_values: cache of an earlier forward.
            attention_mask: (B, T), 1 for tokens and 0 for padding.
            return_past_key_values: also return the cache.
            positions: (N,) indices into the B * T positions laid out flat. With them only these
                positions are projected on the vocabulary, which is most of a small model's work.
            kwargs: go to the language model, `labels` among them.

        Returns:
            `(logits, loss, values)`, with the cache as a fourth where asked. Logits are float32,
            (B, T, V), values (B, T); with `positions` (N, V) and (N,). `loss` is None without
            `labels`.
        """
        if positions is not None and self._projects_plainly():
            hidden = self._base_model.base_model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs
            ).last_hidden_state
            hidden = hidden.flatten(0, 1)[positions]
            logits = self._base_model.get_output_embeddings()(hidden)
            return logits.float(), None, self._values(hidden)

        output = self.pretrained_model(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            output_hidden_states=True,
            **kwargs,
        )
        # Prompt tuning answers for its virtual tokens too, in front.
        length = output.logits.shape[1] if input_ids is None else input_ids.shape[1]
        logits, hidden = output.logits[:, -length:], output.hidden_states[-1][:, -length:]
        if positions is not None:
            logits, hidden = logits.flatten(0, 1)[positions], hidden.flatten(0, 1)[positions]
        results = (logits.float(), output.loss, self._values(hidden))
        return (*results, output.past_key_values) if return_past_key_values else results

    def _values(self, hidden: Tensor) -> Tensor:
        return self.v_head(hidden.to(self.device)).squeeze(-1)

    @torch.no_grad()
    def _projects_plainly(self) -> bool:
        """Whether the logits are the output embeddings times the last hidden state, no more.

        Some architectures scale or cap them; for these the whole model has to run.
        """
        if self.is_peft_model and self.pretrained_model.active_peft_config.is_prompt_learning:
            return False  # virtual tokens are added outside the language model
        if self._head_is_plain is None:
            model = self._base_model
            modes = [(module, module.training) for module in model.modules()]
            model.eval()
            ids = torch.arange(2, device=model.device).unsqueeze(0)
            try:
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
                plain = model.get_output_embeddings()(hidden)
                whole = model(input_ids=ids, use_cache=False).logits
                self._head_is_plain = torch.equal(plain, whole.to(plain.dtype))
            except (TypeError, AttributeError):
                self._head_is_plain = False
            for module, mode in modes:
                module.training = mode
        return self._head_is_plain

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The language model's own `generate`, with its arguments and results."""
        return self.pretrained_model.generate(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The language model's weights under their own names, and the value head's as `v_head.*`.

        With an adapter only the value head's: the adapter is saved by peft.
        """
        state = {} if self.is_peft_model else self.pretrained_model.state_dict(*args, **kwargs)
        for key, value in self.v_head.state_dict(*args, **kwargs).items():
            state[f"v_head.{key}"] = value
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take what `state_dict` returned."""
        head = {k.removeprefix("v_head."): v for k, v in state_dict.items() if k[:7] == "v_head."}
        body = {k: v for k, v in state_dict.items() if k[:7] != "v_head."}
        self.v_head.load_state_dict(head, strict=strict, assign=assign)
        if self.is_peft_model:
            strict = False
        return self.pretrained_model.load_state_dict(body, strict=strict, assign=assign)

    def merged(self) -> AutoModelForCausalLMWithValueHead:
        """A copy without an adapter: its weights are added to those it adapts."""
        twin = copy.deepcopy(self)
        adapted = cast(Any, twin.pretrained_model)
        plain = AutoModelForCausalLMWithValueHead(adapted.merge_and_unload())
        plain.v_head = twin.v_head
        return plain

    def save_pretrained(
        self,
        save_directory: str | Path,
        state_dict: Mapping[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write a plain `transformers` folder, and the value head in a file of its own beside it.

        Args:
            save_directory: made if absent.
            state_dict: weights to write instead of the model's own, named as `state_dict` names
                them (what a distributed run has gathered, for example).
            push_to_hub: upload the folder as well; `repo_id` and the like as keywords.
            kwargs: go to `PreTrainedModel.save_pretrained`, `max_shard_size` for example.
        """
        hub_kwargs = {
            key: kwargs.pop(key)
            for key in ("repo_id", "commit_message", "private", "token", "revision", "create_pr")
            if push_to_hub and key in kwargs
        }
        state = dict(self.state_dict() if state_dict is None else state_dict)
        head = {key: state.pop(key) for key in list(state) if key.startswith("v_head.")}
        if self.is_peft_model:
            self.pretrained_model.save_pretrained(save_directory, **kwargs)
        else:
            weights = state if state_dict is not None else None
            self.pretrained_model.save_pretrained(save_directory, state_dict=weights, **kwargs)
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in head.items()},
            Path(save_directory) / VALUE_HEAD_FILE,
            metadata={"format": "pt"},
        )
        if push_to_hub:
            PushToHubMixin.push_to_hub(
                self, hub_kwargs.pop("repo_id", Path(save_directory).name), **hub_kwargs
            )


def create_reference_model(
    model: AutoModelForCausalLMWithValueHead,
    num_shared_layers: int | None = None,
    pattern: str | None = None,
) -> AutoModelForCausalLMWithValueHead:
    """A frozen copy of `model`, in eval mode.

    Args:
        model: the policy; any `torch.nn.Module` will do.
        num_shared_layers: this many layers from the bottom, and the embeddings below them, are
            frozen in the policy too and shared: policy and reference hold the same tensors.
        pattern: prefix of a layer's parameter names with `{layer}` in it, such as
            `transformer.h.{layer}`, where it cannot be found by itself.

    Raises:
        UsageError: `num_shared_layers` is not in 0..number of layers, or the layers are not found.
    """
    memo: dict[int, Any] = {}
    if num_shared_layers is not None:
        for parameter in _lower_parameters(model, num_shared_layers, pattern):
            parameter.requires_grad_(False)
            memo[id(parameter)] = parameter  # deepcopy takes what is in its memo as it is
    reference = copy.deepcopy(model, memo)
    return reference.requires_grad_(False).eval()


def _lower_parameters(model: nn.Module, num_layers: int, pattern: str | None) -> list[nn.Parameter]:
    """Parameters of the embeddings and the first `num_layers` layers."""
    if pattern is not None:
        prefix, _, _ = pattern.partition("{layer}")
        layers = [
            name for name, _ in model.named_modules() if _layer_index(name, prefix) is not None
        ]
        prefix = layers[0].rpartition(".")[0] if layers else ""
    else:
        stacks = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        # The decoder's stack is the outermost list of modules; experts and the like lie inside.
        prefix = min(stacks, key=lambda name: (name.count("."), name), default="")
    if not prefix:
        raise UsageError(
            f"cannot find the layers of {type(model).__name__}: pass their pattern, "
            "such as 'transformer.h.{layer}'"
        )
    stack = model.get_submodule(prefix)
    total = len(list(stack.children()))
    if not 0 <= num_layers <= total:
        raise UsageError(f"num_shared_layers is {num_layers}, but the model has {total} layers")
    shared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if name.startswith(prefix + "."):
            if int(name[len(prefix) + 1 :].partition(".")[0]) < num_layers:
                shared.append(parameter)
        elif _is_embedding(model, name):
            shared.append(parameter)
    return shared


def _layer_index(name: str, prefix: str) -> int | None:
    _, found, rest = name.partition(prefix)
    return int(rest) if found and rest.isdigit() else None


def _is_embedding(model: nn.Module, parameter_name: str) -> bool:
    owner = model.get_submodule(parameter_name.rpartition(".")[0])
    return isinstance(owner, nn.Embedding)


def _refuse_if_not_causal(config: Any, model_class: type | None = None) -> None:
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    known = {name for names in causal for name in ((names,) if isinstance(names, str) else names)}
    named = (
        list(config.architectures or [])
        if model_class is None
        else [c.__name__ for c in model_class.__mro__ if issubclass(c, nn.Module)]
    )
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    is_causal = any(name in known or name.endswith("ForCausalLM") for name in named)
    if encoder_decoder or (named and not is_causal):
        raise UsageError(
            f"{named[0] if named else config.model_type} is not a causal language model: choose "
            "one whose architecture ends in ForCausalLM or LMHeadModel, such as gpt2"
        )


def _load_causal(name: str, is_trainable: bool, *args: Any, **kwargs: Any) -> PreTrainedModel:
    if (Path(name) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=is_trainable, **kwargs)
    if "config" not in kwargs:
        hub = {key: kwargs[key] for key in (*HUB_KEYWORDS, "trust_remote_code") if key in kwargs}
        config = AutoConfig.from_pretrained(name, **hub)
        if not kwargs.get("trust_remote_code"):
            _refuse_if_not_causal(config)
    # TRL's old folders hold `v_head.*` among the weights: expected here, and not to be reported.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, *args, **kwargs, output_loading_info=True
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith("v_head.")]
    for problem, keys in (("lacks", info["missing_keys"]), ("has the unknown", unexpected)):
        if keys:
            names = ", ".join(sorted(keys)[:5]) + (" ..." if len(keys) > 5 else "")
            warnings.warn(f"{name}: the weights file {problem} {names}", stacklevel=4)
    return model


def _renamed(model: Any, name: str) -> Any:
    """An attribute that later releases of transformers 5 call by another name."""
    new = name.format("activation")
    return getattr(model, new) if hasattr(model, new) else getattr(model, name.format("gradient"))


def _find_value_head(name: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    """The value head's tensors, from our file or among the weights as TRL put them; or none."""

    def locate(file: str) -> str | None:
        return cached_file(
            name,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )

    if (ours := locate(VALUE_HEAD_FILE)) is not None:
        return _read_value_head(ours)
    for weights in WEIGHT_FILES:
        if (index := locate(f"{weights}.index.json")) is not None:
            placed = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            shards = {file for key, file in placed.items() if key.startswith("v_head.")}
            found = [_read_value_head(path) for file in shards if (path := locate(file))]
            return {key: value for head in found for key, value in head.items()}
        if (single := locate(weights)) is not None:
            return _read_value_head(single)
    return {}


def _read_value_head(path: str) -> dict[str, Tensor]:
    prefix = "v_head."
    if path.endswith(".safetensors"):
        with safe_open(path, "pt") as file:
            names = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            return {key.removeprefix(prefix): file.get_tensor(key).float() for key in names}
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}
