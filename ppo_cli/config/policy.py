"""The section `policy`: the model to tune, how it is loaded, and its adapter."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from ppo_cli.config.section import MAX_COUNT, Name, Section, check_name
from ppo_cli.errors import did_you_mean
from ppo_cli.utils.text import shortened


def _check_layer(value: Any) -> int | str:
    """The number of a layer, or a module's name; raises `ValueError` for anything else."""
    if isinstance(value, str):
        return check_name(value)
    if type(value) is not int or value < 0:
        raise ValueError(
            f"{shortened(repr(value), 40)} is neither the number of a layer, from 0, nor the name "
            "of a module"
        )
    return value


Layer = Annotated[int | str, BeforeValidator(_check_layer)]
# YAML reads a bare `off` as false.
Kernels = Annotated[
    Literal["auto", "off"], BeforeValidator(lambda value: "off" if value is False else value)
]
ADAPTERS = (
    "LORA", "IA3", "LOHA", "LOKR", "VERA", "OFT", "HRA", "MISS", "FOURIERFT", "VBLORA", "RANDLORA",
    "LN_TUNING",
)  # fmt: skip
"""Methods, by peft's names. Others cannot be merged, or need more than a forward and a backward
pass, or are not tested here."""
LORA_DEFAULTS = {"r": 16, "alpha": 32, "dropout": 0.0}


def _check_adapter(name: str) -> str:
    """peft's name of a kind of adapter; raises `ValueError` for others."""
    upper = name.upper()
    if upper == "DORA":
        raise ValueError("DoRA is LORA with use_dora: true: set policy.adapter.use_dora=true")
    if upper not in ADAPTERS:
        near = did_you_mean(name, ADAPTERS) or f" There are {', '.join(ADAPTERS)}"
        raise ValueError(f"'{shortened(name, 40)}' is no adapter that can be trained here.{near}")
    return upper


class AdapterConfig(Section):
    """An adapter instead of training all weights (needs the `peft` extra)."""

    # peft's own keys; `models/adapter.py` checks them against its configuration class.
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    peft_type: Annotated[str, AfterValidator(_check_adapter)] = "LORA"
    """peft's name of the method: LORA (also DoRA, with `use_dora: true`), IA3, LOHA, LOKR, VERA,
    OFT, HRA, MISS, FOURIERFT, VBLORA, RANDLORA or LN_TUNING. The keys of its configuration class in
    peft may stand beside these."""
    r: Annotated[int, Field(ge=1, le=65536)] | None = None
    """Rank; null for 16 with LORA, for peft's default with other methods."""
    alpha: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    """Scale: updates are multiplied by alpha / r. peft calls it lora_alpha. null for 32 with
    LORA."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout inside a LORA adapter. peft calls it lora_dropout. null for 0."""
    target_modules: list[Name] | None = None
    """Names of the modules to adapt, such as [q_proj, v_proj]; null for peft's choice for the
    architecture, or [all-linear] if peft has none: every linear layer of the language model except
    the output layer. A single regular expression is matched against full module names."""
    save: Literal["both", "merged", "adapter"] | None = None
    """What the run directory holds: the merged model with the adapter in `adapter/`, the merged
    model alone, or the adapter alone. null for both, or for the adapter alone if the base is
    quantised."""

    @model_validator(mode="before")
    @classmethod
    def _named_by_peft(cls, data: Any) -> Any:
        """Take peft's names for `alpha` and `dropout`; fill in what LoRA has by default."""
        if not isinstance(data, dict) or str(data.get("peft_type", "LORA")).upper() != "LORA":
            return data
        data = dict(data)
        for name in ("alpha", "dropout"):
            if (own := data.pop(f"lora_{name}", None)) is not None:
                if data.get(name) not in (None, own):
                    raise ValueError(f"lora_{name} and {name} are one setting: give one of them")
                data[name] = own
        absent = {key: value for key, value in LORA_DEFAULTS.items() if data.get(key) is None}
        return data | absent


class QuantizationConfig(Section):
    """A base of 8- or 4-bit weights below an adapter (QLoRA), with transformers' names."""

    load_in_4bit: bool = False
    """Weights of 4 bits."""
    load_in_8bit: bool = False
    """Weights of 8 bits."""
    quant_method: Literal["bitsandbytes", "torchao"] = "bitsandbytes"
    """Library that quantises; each is an extra of its name. torchao is for 8 bits."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Type of the 4-bit weights."""
    bnb_4bit_use_double_quant: bool = False
    """Quantise the scales of the 4-bit weights, too."""
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of products with 4-bit weights; null for that of `policy.dtype` or, if that is
    float32, of `policy.precision`."""
    llm_int8_threshold: Annotated[float, Field(ge=0)] = 6.0
    """Columns of inputs with larger numbers are computed without quantising them (bitsandbytes, 8
    bits)."""

    @model_validator(mode="after")
    def _one_width(self) -> QuantizationConfig:
        if self.load_in_4bit == self.load_in_8bit:
            raise ValueError("set one of load_in_4bit and load_in_8bit to true")
        if self.quant_method == "torchao" and self.load_in_4bit:
            raise ValueError(
                "quant_method torchao is for load_in_8bit: use bitsandbytes for 4 bits"
            )
        unread = {
            "llm_int8_threshold": self.load_in_4bit or self.quant_method == "torchao",
            "bnb_4bit_quant_type": self.load_in_8bit,
            "bnb_4bit_use_double_quant": self.load_in_8bit,
            "bnb_4bit_compute_dtype": self.load_in_8bit,
        }
        for key, is_unread in unread.items():
            if is_unread and getattr(self, key) != type(self).model_fields[key].default:
                width = "4" if self.load_in_4bit else "8"
                raise ValueError(
                    f"{key} has no effect on {width} bits with {self.quant_method}: leave it out"
                )
        return self


class PolicyConfig(Section):
    """The model to tune."""

    model: Name = "embedded"
    """`embedded`, a folder, or a hub id of a causal language model or an encoder-decoder, or of a
    peft adapter of one."""
    revision: Name | None = None
    """Branch, tag or commit of a hub model."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the large matrix products; auto: bfloat16 if the device computes it natively."""
    kernels: Kernels = "auto"
    """Fast paths in training: auto for all that suit model and machine, off for plain torch and
    transformers. The environment variable PPO_CLI_KERNELS overrides it, and can name single
    paths."""
    summary_dropout_prob: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout before the value head; null for the model's own setting."""
    v_head_init_strategy: Literal["normal"] | None = None
    """`normal` draws the value head's weights from a normal distribution; null for torch's
    default."""
    v_head_initializer_range: Annotated[float, Field(ge=0)] = 0.2
    """Standard deviation of that normal distribution."""
    num_shared_layers: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None
    """Number of lower layers that are frozen and shared with the reference, in an encoder-decoder
    beside the whole encoder; null for none."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Type of the weights in memory; auto for that of the files. Weights that are trained should be
    float32."""
    attn_implementation: Name | None = None
    """Attention of transformers: eager, sdpa, flash_attention_2, ...; null for its choice."""
    freeze_layers: Annotated[list[Layer], Field(min_length=1)] | None = None
    """Numbers of layers (of an encoder-decoder the decoder's), from 0, and names of modules that
    are not trained, such as [0, 1, wte]; null for none. Not with an adapter, which trains nothing
    else."""
    quantization: QuantizationConfig | None = None
    """Quantise the model while it is loaded, to train an adapter on it; null for whole weights."""
    adapter: AdapterConfig | None = None
    """Train an adapter; null trains all weights."""

    @model_validator(mode="after")
    def _frozen_by_one(self) -> PolicyConfig:
        if self.freeze_layers is not None and self.adapter is not None:
            raise ValueError(
                "freeze_layers and adapter exclude each other: an adapter trains its own weights "
                "alone; choose them with adapter.target_modules or adapter.layers_to_transform"
            )
        return self
