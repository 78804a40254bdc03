"""The policy: a causal language model with a value head."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import PushToHubMixin

from ppo_cli.errors import ModelError, UnsuitableModel, UsageError
from ppo_cli.kernels.gelu import fuse_activations
from ppo_cli.kernels.kv_cache import cache_argument
from ppo_cli.kernels.lm_head import (
    entropy,
    ready_projection,
    token_logprobs,
    token_logprobs_and_entropies,
)
from ppo_cli.kernels.tied_embeddings import tied_gradient
from ppo_cli.models.architectures import (
    activation_checkpointing,
    hidden_size,
    keep_weights_as_stored,
    untie_embeddings,
)
from ppo_cli.models.capabilities import (
    PADDED_READING,
    Reading,
    check_results,
    fastest_reading,
    keep_results,
)
from ppo_cli.models.frozen_layers import layer_stack
from ppo_cli.models.keywords import (
    UPLOADING,
    check_adapter_config,
    check_saving,
    check_source,
    refuse_beside_model,
    refuse_own_adapter,
    unknown_keywords,
    without_old,
)
from ppo_cli.models.pretrained import (
    HUB_KEYWORDS,
    VALUE_HEAD_FILE,
    find_value_head,
    load_pretrained,
    refuse_if_not_causal,
)
from ppo_cli.models.quantization import dequantized, is_quantized
from ppo_cli.models.reward_adapter import adapter_active, load_reward_adapter
from ppo_cli.models.sharding import gathered
from ppo_cli.models.state_names import HEAD, PolicyState, plain_names, take_plain_names
from ppo_cli.models.value_head import ValueHead
from ppo_cli.utils.device import modes_kept
from ppo_cli.utils.hub import adapter_errors, first_line, loading_errors


class AutoModelForCausalLMWithValueHead(nn.Module, PushToHubMixin):
    """A causal language model (`pretrained_model`) with a `ValueHead` (`v_head`) beside it.

    Make one with `from_pretrained`. The weights of the language model are those of `transformers`,
    so everything that works on them works here.

    Args:
        pretrained_model: a causal `transformers.PreTrainedModel` or a `peft.PeftModel` of one.
        summary_dropout_prob: dropout before the value head.
        v_head_init_strategy: None or `"normal"`, see `ValueHead`.
        v_head_initializer_range: standard deviation of the `"normal"` strategy.

    Attributes:
        supports_rm_adapter: whether a reward adapter was loaded, for `compute_reward_score`.
        rm_adapter_name: its name in `pretrained_model`.
        score: its layer from hidden states to scores.

    Raises:
        UsageError: the model is not causal, or transformers loaded it with an adapter.
    """

    supported_args = ("summary_dropout_prob", "v_head_init_strategy", "v_head_initializer_range")
    supports_rm_adapter = False
    rm_adapter_name: str | None = None
    score: nn.Linear
    transformers_parent_class: Any = AutoModelForCausalLM
    is_encoder_decoder = False

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
        refuse_own_adapter(pretrained_model)
        self.pretrained_model = pretrained_model
        fuse_activations(pretrained_model)
        keep_weights_as_stored(self._base_model)
        self._check_kind(self._base_model.config, type(self._base_model))
        if summary_dropout_prob is None:
            summary_dropout_prob = getattr(self.config, "summary_dropout_prob", 0.1)
        self.v_head = ValueHead(
            hidden_size(self._base_model),
            dropout=summary_dropout_prob,
            init_strategy=v_head_init_strategy,
            initializer_range=v_head_initializer_range,
        ).to(self._base_model.device)
        self.register_load_state_dict_pre_hook(take_plain_names)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | PreTrainedModel,
        *model_args: Any,
        peft_config: Any = None,
        is_trainable: bool = True,
        reward_adapter: str | Path | None = None,
        reward_adapter_name: str = "reward_adapter",
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
            reward_adapter: folder or hub id of an adapter of a sequence classifier with the same
                base, for `compute_reward_score`. It is frozen; the policy needs an adapter, too.
            reward_adapter_name: what the reward adapter is called in `pretrained_model`.
            kwargs: `summary_dropout_prob`, `v_head_init_strategy`, `v_head_initializer_range` for
                the value head; all others go to `from_pretrained` of `transformers_parent_class`.
                `dtype` is float32 unless given.

        Raises:
            ModelNotFoundError: there is no such folder or hub model.
            UsageError: the model is not causal, a keyword would have no effect, or the reward
                adapter does not go with the model.
            ModelError: the hub does not answer, or the files are damaged.
        """
        if not isinstance(reward_adapter, (str, Path, type(None))):
            raise UsageError(
                "reward_adapter must be a folder or hub id of an adapter, not a "
                f"{type(reward_adapter).__name__}"
            )
        if reward_adapter is not None and cls.is_encoder_decoder:
            raise UsageError("reward_adapter is for causal models: score other texts")
        kwargs = without_old(kwargs)
        head_kwargs = {key: kwargs.pop(key) for key in cls.supported_args if key in kwargs}
        source = pretrained_model_name_or_path
        check_source(source)
        check_adapter_config(peft_config)
        saved_head: Mapping[str, Tensor] = {}
        if isinstance(source, (str, Path)):
            name = str(source)
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype", torch.float32))
            hub = {key: kwargs[key] for key in HUB_KEYWORDS if key in kwargs}
            with loading_errors(name), unknown_keywords(kwargs, cls.supported_args):
                model = load_pretrained(
                    cls.transformers_parent_class, name, is_trainable, *model_args, **kwargs
                )
                saved_head = find_value_head(name, hub)
        else:
            used = HUB_KEYWORDS if reward_adapter is not None else ()
            rest = {key: value for key, value in kwargs.items() if key not in used}
            refuse_beside_model({"model_args": model_args or None, **rest}, cls.supported_args)
            model = source
        if peft_config is not None:
            from peft import get_peft_model

            if hasattr(model, "peft_config"):
                warnings.warn("peft_config is ignored: the model has an adapter", stacklevel=2)
            else:
                cls._check_kind(model.config, type(model))
                with adapter_errors(model):
                    model = get_peft_model(model, peft_config)
        policy = cls(model, **head_kwargs)
        if reward_adapter is not None:
            elsewhere = ("revision", "subfolder")  # where the policy is, not this adapter
            place = {k: kwargs[k] for k in HUB_KEYWORDS if k in kwargs and k not in elsewhere}
            policy._add_reward_adapter(str(reward_adapter), reward_adapter_name, **place)
        if saved_head:
            try:
                policy.v_head.load_state_dict(saved_head)
            except RuntimeError as error:
                raise ModelError(
                    f"{source}: its value head does not fit the model: {first_line(error)}"
                ) from error
        return policy

    @staticmethod
    def _check_kind(config: Any, model_class: type) -> None:
        """Raise `UsageError` for a model that this class is not for."""
        refuse_if_not_causal(config, model_class)

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
        """The device of the value head, and so of the model's output."""
        return next(self.v_head.parameters()).device

    @property
    def is_sequential_parallel(self) -> bool:
        """Whether a `device_map` put its layers on several devices, as TRL's scripts ask."""
        return len({*getattr(self._base_model, "hf_device_map", {}).values()}) > 1

    @property
    def vocabulary_size(self) -> int | None:
        """Number of token ids that the model reads; None where its embeddings do not say."""
        return getattr(self._base_model.get_input_embeddings(), "num_embeddings", None)

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of the classes of layers, which are sharded one by one."""
        found = {type(module).__name__ for module in self._base_model.modules()}
        named = found.intersection(self._base_model._no_split_modules or ())
        stack = None if named else layer_stack(self._base_model)
        if stack is not None:
            named = {type(m).__name__ for m in self._base_model.get_submodule(stack).children()}
        return sorted(named)

    def keep_check_results(self) -> None:
        """Keep the answers to what was asked of the model so far; its weights are sharded next."""
        keep_results(self.pretrained_model)
        keep_results(self._base_model)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return bool(activation_checkpointing(self._base_model, "is_{}_checkpointing"))

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        activation_checkpointing(self._base_model, "{}_checkpointing_enable")(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        activation_checkpointing(self._base_model, "{}_checkpointing_disable")()

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
        targets: Tensor | None = None,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Logits and values of B sequences of T tokens.

        Args:
            input_ids: (B, T).
            past_key_values: cache of an earlier forward.
            attention_mask: (B, T), 1 for tokens and 0 for padding.
            return_past_key_values: also return the cache.
            positions: (N,) indices, each once, into the B * T positions laid out flat. With them
                only these positions are projected on the vocabulary, which is most of a small
                model's work.
            targets: (N,) token ids, one a position: what comes after it.
            temperature: what logits at `positions` are divided by.
            kwargs: go to the language model, `labels` among them; the result's form is always this.

        Returns:
            `(logits, loss, values)`, with the cache as a fourth where asked. Logits are float32,
            (B, T, V), values (B, T); with `positions` (N, V) and (N,). `loss` is None without
            `labels`. With `targets` `(logprobs, entropies, values)`, (N,) each, and the logits are
            never there whole.
        """
        for name in ("output_hidden_states", "return_dict"):  # of the language model's own result
            kwargs.pop(name, None)
        reading = None if positions is None else self.reading()
        if positions is not None and reading is not None and reading.logits != "model":
            fused = reading.logits == "weights" and targets is not None
            with tied_gradient(self._base_model) if fused else nullcontext() as tied:
                hidden = self._base_model.base_model(
                    input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs
                ).last_hidden_state
            hidden = hidden.flatten(0, 1)[positions]
            values = self._values(hidden)
            head = self._base_model.get_output_embeddings()
            if targets is None:
                return head(hidden).float() / temperature, None, values
            if not fused:
                logits = head(hidden).float() / temperature
                return token_logprobs(logits, targets), entropy(logits), values
            bias = getattr(head, "bias", None)
            if temperature != 1:  # cheaper here than on the logits
                hidden, bias = hidden / temperature, None if bias is None else bias / temperature
            outputs = token_logprobs_and_entropies(hidden, head.weight, bias, targets, tied)
            return (*outputs, values)

        if positions is not None:
            kwargs.setdefault("use_cache", False)  # with a cache no model keeps packed rows apart
        output = self.pretrained_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=True,
            **cache_argument(self._base_model, past_key_values),
            **kwargs,
        )
        # Prompt tuning answers for its virtual tokens too, in front.
        length = self._read_length(input_ids, output.logits)
        logits, hidden = output.logits[:, -length:], self.last_hidden_states(output)[:, -length:]
        if positions is not None:
            logits = logits.flatten(0, 1)[positions] / temperature
            hidden = hidden.flatten(0, 1)[positions]
        if targets is not None:
            logits = logits.float()
            return token_logprobs(logits, targets), entropy(logits), self._values(hidden)
        results = (logits.float(), output.loss, self._values(hidden))
        if not return_past_key_values:
            return results
        return (*results, getattr(output, "cache", None) or output.past_key_values)

    def compute_reward_score(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Scores of the reward adapter after each token, without gradients or dropout.

        The policy's adapter is off meanwhile. A sequence's score is that of its last token, so pad
        on the right and leave out the padding: `scores[i, attention_mask[i].sum() - 1, 0]`.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 1 for tokens and 0 for padding.
            kwargs: go to the language model.

        Returns:
            (B, T, L) float32, L the number of the reward model's labels.

        Raises:
            UsageError: the policy was loaded without `reward_adapter`.
        """
        if self.rm_adapter_name is None:
            raise UsageError(
                "the policy has no reward adapter: load it with from_pretrained(..., "
                "peft_config=..., reward_adapter=...)"
            )
        model, inputs = self.pretrained_model, {"input_ids": input_ids, **kwargs}
        with (
            torch.no_grad(),
            gathered(self),
            modes_kept(model),
            adapter_active(model, self.rm_adapter_name),
        ):
            model.eval()
            output = model(attention_mask=attention_mask, output_hidden_states=True, **inputs)
            hidden = self.last_hidden_states(output)
            return self.score(hidden.to(self.score.weight.device, torch.float32))

    def _add_reward_adapter(self, source: str, name: str, **hub: Any) -> None:
        if not self.is_peft_model:
            raise UsageError(
                "reward_adapter needs a policy with an adapter of its own, or the policy would be "
                "trained under the reward model: pass peft_config, too"
            )
        self.score = load_reward_adapter(self.pretrained_model, source, name, **hub)
        self.supports_rm_adapter, self.rm_adapter_name = True, name

    def ready_projection(self, rows: int, times: int) -> Callable[[Tensor], Tensor] | None:
        """For `next_logits`: last hidden states (B, H) to logits, while the weights do not change.

        None for an architecture that does more than multiply by the output layer's weight.
        """
        how, head = self.reading().logits, self._base_model.get_output_embeddings()
        if how == "model":
            return None
        if how == "layer":
            return lambda hidden: head(hidden).float()
        return ready_projection(head.weight, getattr(head, "bias", None), rows=rows, times=times)

    def next_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        projection: Callable[[Tensor], Tensor] | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Logits (B, V), float32, of the token that follows `input_ids` (B, T).

        `projection` is what `ready_projection` returned, if it was called before; `cache` holds
        what was read before.
        """
        model = self._base_model
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= {"position_ids": position_ids, "use_cache": True}
        inputs |= cache_argument(model, cache)
        projection = projection or self.ready_projection(rows=len(input_ids), times=1)
        if projection is None:
            return model(**inputs).logits[:, -1].float()
        return projection(model.base_model(**inputs).last_hidden_state[:, -1])

    def allows(self, capability: Callable[[Any], bool]) -> bool:
        """Whether the language model has one of the capabilities of `ppo_cli.models.capabilities`.

        False where an adapter puts virtual tokens in front, outside the language model.
        """
        return not self.adds_tokens and capability(self._base_model)

    def reading(self) -> Reading:
        """How the policy reads sequences: as its capabilities allow, or as `read_as` said."""
        answers = check_results(self.pretrained_model)
        if "reading" not in answers:
            answers["reading"] = self._fastest_reading()
        return cast(Reading, answers["reading"])

    def _fastest_reading(self) -> Reading:
        # Virtual tokens are put in front outside of the language model.
        return PADDED_READING if self.adds_tokens else fastest_reading(self._base_model)

    def read_as(self, reading: Reading) -> None:
        """Read sequences in this way until the model changes."""
        check_results(self.pretrained_model)["reading"] = reading

    def last_hidden_states(self, output: Any) -> Tensor:
        """(B, T, H), the value head's input, of an output with hidden states.

        Raises:
            UnsuitableModel: it has none of that form.
        """
        hidden = self._last_states(output)
        if hidden.dim() == 4:  # Gemma 3n has several a position, the first is active
            hidden = hidden[0]
        if hidden.shape[:-1] != output.logits.shape[:-1]:
            raise UnsuitableModel(f"its hidden states have the shape {tuple(hidden.shape)}")
        return hidden

    def _read_length(self, input_ids: Tensor | None, logits: Tensor) -> int:
        """Number of tokens that logits (B, T, V) belong to, without those that an adapter adds."""
        return logits.shape[1] if input_ids is None else input_ids.shape[1]

    def _last_states(self, output: Any) -> Tensor:
        states: Tensor = output.hidden_states[-1]
        return states

    def _values(self, hidden: Tensor) -> Tensor:
        # Not a view: torch warns where a sharded model returns one.
        return torch.squeeze_copy(self.v_head(hidden.to(self.device)), -1)

    @property
    def adds_tokens(self) -> bool:
        """Whether an adapter puts virtual tokens in front, outside the language model."""
        return self.is_peft_model and bool(
            self.pretrained_model.active_peft_config.is_prompt_learning
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The language model's own `generate`, with its arguments and results."""
        return self.pretrained_model.generate(*args, **kwargs)

    def merged(self, *, untied: bool = False) -> AutoModelForCausalLMWithValueHead:
        """A copy without an adapter: the adapter's weights are added to those that it adapts.

        A quantised base becomes whole weights with the same numbers first.

        Args:
            untied: give the copy separate input and output embeddings. That is needed where they
                share a weight and the adapter changes them in different ways.
        """
        twin = copy.deepcopy(self)
        if is_quantized(twin._base_model):
            twin.pretrained_model = dequantized(twin.pretrained_model)
        adapted = cast(Any, twin.pretrained_model)
        if untied:
            untie_embeddings(twin._base_model)
        plain = type(self)(adapted.merge_and_unload())
        plain.v_head = twin.v_head
        return plain

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The state by the names of the parameters, as of any module; old names read it, too."""
        state = super().state_dict(*args, **kwargs)
        if args or kwargs.get("destination") is not None or kwargs.get("prefix"):
            return state  # a part of another module's
        own = PolicyState(state)
        own._metadata = getattr(state, "_metadata", None)  # type: ignore[attr-defined]
        return own

    def save_pretrained(
        self,
        save_directory: str | Path,
        state_dict: Mapping[str, Any] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write a plain `transformers` folder, and the value head in a separate file in it.

        Args:
            save_directory: created if absent.
            state_dict: weights to write instead of the model's own, named as in `state_dict`
                (those that a distributed run has gathered, for example). Of a policy with an
                adapter those of the value head alone will do.
            push_to_hub: upload the folder as well; `repo_id` and the like as keywords.
            kwargs: go to `save_pretrained` of the model, `max_shard_size` for example.

        Raises:
            UsageError: there is no such keyword.
        """
        hub_kwargs = {key: kwargs.pop(key) for key in UPLOADING if push_to_hub and key in kwargs}
        kwargs = check_saving(self.pretrained_model, kwargs)
        state = plain_names(self.state_dict() if state_dict is None else state_dict)
        head = {key: state.pop(key) for key in list(state) if key.startswith(HEAD)}
        weights = state if state_dict is not None and state else None
        if self.is_peft_model:
            own = [
                name for name in self.pretrained_model.peft_config if name != self.rm_adapter_name
            ]
            kwargs.setdefault("selected_adapters", own)  # without its score, a reward's is useless
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
