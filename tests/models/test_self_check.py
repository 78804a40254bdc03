"""The self-check: fast paths against a plain forward pass of each sequence alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ppo_cli.config.loading import load_config
from ppo_cli.data.prompts import Prompt
from ppo_cli.errors import DataError, ModelError, UsageError
from ppo_cli.models import capabilities, self_check
from ppo_cli.models.policy import AutoModelForCausalLMWithValueHead as Policy
from ppo_cli.models.sampling import sample_responses
from ppo_cli.models.sampling_params import SamplingParams
from ppo_cli.ppo.forward import check_reading, token_forward, token_logits
from ppo_cli.ppo.packing import TokenBatch
from ppo_cli.training.build import check_context
from tests.conftest import SMALL, VOCABULARY, make_batch, make_gpt2, make_policy, make_trainer

QUERIES = [torch.tensor(ids) for ids in ([5], [7, 8, 9, 10, 11, 12], [1, 2], [3, 30, 40], [60])]
LIMITS = [7, 12, 1, 9, 4]
GREEDY = SamplingParams(top_k=1)

TINY = {**SMALL, "bos_token_id": 1, "eos_token_id": 1}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16}
BART = {
    **HEADS,
    "vocab_size": VOCABULARY,
    "decoder_layers": 2,
    "encoder_layers": 1,
    "decoder_ffn_dim": 24,
    "encoder_ffn_dim": 24,
    "max_position_embeddings": 48,
    "init_std": 0.3,
    "is_decoder": True,
    "is_encoder_decoder": False,
}
MOE = {**TINY, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
# Class, settings. Each needs a way of its own: no positions, absolute positions that padding moves,
# recurrent states, hidden states and output layers of two widths, windows, experts.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "llama": ("LlamaForCausalLM", TINY),
    "mixtral": ("MixtralForCausalLM", MOE),
    "bloom": ("BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2}),
    "mamba": ("MambaForCausalLM", {**TINY, "state_size": 4}),
    "rwkv": ("RwkvForCausalLM", {**TINY, "attention_hidden_size": 16, "rescale_every": 1}),
    "bart": ("BartForCausalLM", BART),
    "roberta": ("RobertaForCausalLM", {**TINY, "is_decoder": True, "pad_token_id": 1}),
    "electra": ("ElectraForCausalLM", {**TINY, "is_decoder": True, "embedding_size": 8}),
    "rembert": (
        "RemBertForCausalLM",
        {**TINY, "is_decoder": True, "input_embedding_size": 8, "output_embedding_size": 12},
    ),
    "roformer": ("RoFormerForCausalLM", {**TINY, "is_decoder": True, "embedding_size": 8}),
    "opt": ("OPTForCausalLM", {**TINY, "ffn_dim": 24, "word_embed_proj_dim": 8}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {**TINY, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4},
    ),
}


def make_model(name: str, **changes: Any) -> Any:
    cls, settings = FAMILIES[name]
    if name == "gpt2":
        return make_gpt2(**changes)
    torch.manual_seed(0)
    model_class = getattr(transformers, cls)
    model = model_class(model_class.config_class(**{**settings, **changes}))
    with torch.no_grad():  # so that nothing is zero, and no two tokens are alike
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def alone(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities (T, V) of a plain forward of one sequence."""
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0, -len(ids) :]
    return logits.float().log_softmax(-1)


def assert_right(policy: Policy) -> None:
    """Greedy samples, log-probabilities and gradients of a ragged batch are the plain model's."""
    model = policy.pretrained_model
    policy.eval()
    queries = [query.to(policy.device) for query in QUERIES]
    responses = sample_responses(policy, queries, LIMITS, GREEDY)
    expected = []
    for query, response in zip(queries, responses, strict=True):
        log_p = alone(model, torch.cat([query, response]))[len(query) - 1 : -1]
        chosen = log_p.gather(1, response[:, None]).squeeze(1)
        assert (log_p.amax(1) - chosen).max() < 1e-3, "not the best token of the plain forward"
        expected.append(chosen)
    wanted = torch.cat(expected)
    tokens = TokenBatch.from_lists(queries, responses, None, 0, policy.device)
    found = token_forward(policy, tokens)
    torch.testing.assert_close(found.logprobs, wanted, rtol=1e-3, atol=1e-3)
    whole = token_logits(policy, tokens).log_softmax(-1)
    chosen = whole.gather(1, tokens.flat_targets[:, None]).squeeze(1)
    torch.testing.assert_close(chosen, wanted, rtol=1e-3, atol=1e-3)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    weights = torch.linspace(-1, 1, len(wanted), device=wanted.device)
    both = [
        torch.autograd.grad((x * weights).sum(), list(trained.values()), allow_unused=True)
        for x in (found.logprobs, wanted)
    ]
    largest = max(float(g.norm()) for g in both[1] if g is not None)
    for name, mine, plain in zip(trained, *both, strict=True):
        if plain is None:
            assert mine is None or not mine.any(), name
            continue
        assert mine is not None, f"{name} never learns"
        assert (mine - plain).norm() <= 1e-2 * plain.norm() + 1e-4 * largest, name


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_is_sampled_and_read_as_each_sequence_is_alone(name: str) -> None:
    assert_right(Policy(make_model(name), summary_dropout_prob=0.0))


# ---------------------------------------------------------------- what sits on the output layer


class Casted(nn.Sequential):
    """What guides to 8-bit training put in the output layer's place."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).to(torch.float32)


class Scaled(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return 3 * super().forward(hidden)


def scaled(model: Any) -> None:
    head = Scaled(16, VOCABULARY, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head


def with_adapter(model: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, **settings)
    )


def hooked(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)


def hooked_before(model: Any) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def embeddings_hooked(model: Any) -> None:
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out * 1.5)


def replaced(model: Any) -> None:
    plain = model.lm_head.forward
    model.lm_head.forward = lambda hidden: plain(hidden).flip(-1)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "cast to float": lambda m: setattr(m, "lm_head", Casted(m.lm_head)),
    "subclass": scaled,
    "hook": hooked,
    "hook before": hooked_before,
    "hook of the embeddings": embeddings_hooked,
    "forward replaced": replaced,
    "parametrized": lambda m: nn.utils.parametrizations.weight_norm(m.lm_head),
    "float64": lambda m: m.double(),
}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_user_puts_on_the_output_layer_counts(name: str, change: str) -> None:
    model = make_model(name, tie_word_embeddings=change == "hook of the embeddings")
    CHANGES[change](model)
    assert_right(Policy(model, summary_dropout_prob=0.0))


@pytest.mark.usefixtures("fast_paths")
@pytest.mark.parametrize("change", ["hook", "cast to float", "forward replaced"])
def test_a_change_of_the_output_layer_after_the_self_check_counts(change: str) -> None:
    policy = Policy(make_model("llama"), summary_dropout_prob=0.0)
    assert_right(policy)
    assert policy.reading().logits == "weights"
    CHANGES[change](policy.pretrained_model)
    assert policy.reading().logits != "weights"
    assert_right(policy)


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "output layer": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "tied output layer": ("gpt2", {"target_modules": ["c_attn", "lm_head"]}),
    "saved output layer": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "both ends": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "some tokens": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [1, 2, 3]}),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_on_either_end_is_sampled_read_and_learns(name: str) -> None:
    family, settings = ADAPTERS[name]
    policy = Policy(with_adapter(make_model(family), **settings), summary_dropout_prob=0.0)
    assert_right(policy)
    trainer = make_trainer(policy)
    before = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
    trainer.step(*make_batch())
    still = [n for n, p in policy.named_parameters() if p.requires_grad and p.equal(before[n])]
    assert not still


def test_an_adapter_injected_after_the_self_check_counts() -> None:
    policy = Policy(make_model("llama"), summary_dropout_prob=0.0)
    assert_right(policy)
    with_adapter(policy.pretrained_model, target_modules=["lm_head"])
    assert_right(policy)


# ---------------------------------------------------------------- models that are refused


def test_a_model_that_looks_ahead_is_refused_by_name() -> None:
    config = transformers.BertConfig(**{**TINY, "is_decoder": False})
    model = transformers.BertLMHeadModel(config).eval()
    for ask in (
        lambda p: check_reading(p),
        lambda p: sample_responses(p, QUERIES, LIMITS, SamplingParams()),
    ):
        with pytest.raises(UsageError, match=r"looks ahead.*BertLMHeadModel.*is_decoder"):
            ask(Policy(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["llama", "bloom", "gpt2"])
def test_a_quantised_model_is_right_to_its_own_rounding_or_refused(name: str) -> None:
    """The range of a whole input decides how its numbers are rounded here."""
    model = make_model(name, tie_word_embeddings=False)
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    policy = Policy(model)
    tokens = TokenBatch.from_lists(QUERIES, QUERIES, None, 0, torch.device("cpu"))
    refused = ""
    try:
        found = token_forward(policy, tokens).logprobs
    except ModelError as error:
        refused = str(error)
    if refused:
        assert "quantised by the range of each whole input" in refused
        return
    assert policy.reading().logits != "weights"
    wanted = [
        alone(model, torch.cat([row, row]))[len(row) - 1 : -1].gather(1, row[:, None]).squeeze(1)
        for row in QUERIES
    ]
    assert (found - torch.cat(wanted)).abs().mean() < 0.05


def test_a_model_for_which_no_method_is_right_is_refused() -> None:
    """Its output for a row depends on the number of calls."""
    model = make_gpt2()
    asked: list[int] = []

    def drift(module: Any, args: Any, output: Any) -> Any:
        asked.append(1)
        output.logits = output.logits + 0.1 * len(asked) * torch.arange(VOCABULARY)
        return output

    policy = Policy(model)
    assert not capabilities.looks_ahead(model)
    model.register_forward_hook(drift)
    with pytest.raises((ModelError, UsageError), match=r"twice|looks ahead"):
        check_reading(policy)


def test_numbers_that_are_not_finite_are_the_models_and_not_an_answer() -> None:
    policy = make_policy()
    with torch.no_grad():
        policy.pretrained_model.transformer.ln_f.weight[0] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        check_reading(policy)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("[enforce fail] can't allocate memory: 8 GB"), "can't allocate"),
        (MemoryError("no room"), "no room"),
    ],
)
def test_lack_of_memory_in_a_self_check_is_raised_and_no_result(
    error: Exception, message: str
) -> None:
    model = make_gpt2()
    policy = Policy(model)

    def fail(*_: Any) -> None:
        raise error

    hook = model.transformer.register_forward_pre_hook(fail)
    for question in (capabilities.reads_packed, capabilities.ends_in_output_layer):
        with pytest.raises(type(error), match=message):
            question(model)
    with pytest.raises(type(error), match=message):
        check_reading(policy)
    hook.remove()
    assert capabilities.reads_packed(model)  # nothing wrong was remembered
    assert_right(policy)


def test_an_error_of_our_own_code_in_a_self_check_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise TypeError("a bug")

    monkeypatch.setitem(broken.__globals__, "__name__", "ppo_cli.kernels.kv_cache")
    monkeypatch.setattr(capabilities, "preallocated_cache", broken)
    with pytest.raises(TypeError, match="a bug"):
        capabilities.reads_static_cache(make_gpt2())


def test_a_model_whose_own_shapes_do_not_fit_is_refused_and_not_called_a_bug() -> None:
    model = make_model("llama")
    model.lm_head = nn.Linear(15, VOCABULARY)
    with pytest.raises(ModelError, match="cannot read a sequence of tokens"):
        check_reading(Policy(model))


# ---------------------------------------------------------------- no side effects


def test_a_self_check_changes_no_modes_gradients_or_random_numbers() -> None:
    policy = make_policy(resid_pdrop=0.5).train()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    check_reading(policy)
    sample_responses(policy, [], [], SamplingParams())
    assert torch.equal(torch.rand(3), expected)
    assert all(module.training for module in policy.modules())
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_a_model_is_checked_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[int] = []
    plain = self_check.PlainReading
    monkeypatch.setattr(
        self_check, "PlainReading", lambda *args: (checks.append(1), plain(*args))[1]
    )
    policy = make_policy()
    for _ in range(2):
        check_reading(policy)
    assert len(checks) == 1
    policy.pretrained_model.transformer.h[0].register_forward_hook(lambda *_: None)
    check_reading(policy)
    assert len(checks) == 2


# ---------------------------------------------------------------- positions of long rows


LONG = {
    **TINY,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "original_max_position_embeddings": 12,
    "pad_token_id": 0,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 12,
        "long_factor": [4.0, 8.0, 16.0, 32.0],
        "short_factor": [1.0, 1.0, 1.0, 1.0],
        "factor": 4.0,
    },
}


def test_a_short_row_beside_one_whose_positions_turn_otherwise_is_read_as_alone() -> None:
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**LONG)).eval()
    policy = Policy(model, summary_dropout_prob=0.0)
    assert capabilities.rope_switch(model.config) == 12
    g = torch.Generator().manual_seed(0)
    lengths = [(3, 4), (20, 6), (2, 5), (15, 8)]
    rows = [torch.randint(2, VOCABULARY, (a + b,), generator=g) for a, b in lengths]
    queries = [row[:a] for row, (a, _) in zip(rows, lengths, strict=True)]
    responses = [row[a:] for row, (a, _) in zip(rows, lengths, strict=True)]
    tokens = TokenBatch.from_lists(queries, responses, None, 0, torch.device("cpu"))
    with torch.no_grad():
        found = token_forward(policy, tokens).logprobs
        wanted = [
            alone(model, row)[len(q) - 1 : -1].gather(1, r[:, None]).squeeze(1)
            for row, q, r in zip(rows, queries, responses, strict=True)
        ]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-4)
    limits = [4, 3, 5, 3]
    together = sample_responses(policy, queries, limits, GREEDY)
    for query, response, limit in zip(queries, together, limits, strict=True):
        ids = query
        for _ in range(limit):
            ids = torch.cat([ids, alone(model, ids)[-1].argmax()[None]])
        assert response.tolist() == ids[len(query) :].tolist()


@pytest.mark.parametrize(("length", "is_refused"), [(4, False), (8, True), (12, True), (13, False)])
def test_queries_whose_responses_cross_that_length_are_refused(
    length: int, is_refused: bool
) -> None:
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**LONG))
    config = load_config(
        "tiny", assignments=["rollout.output_min_length=2", "rollout.output_max_length=9"]
    )
    prompts = [Prompt("a film", torch.arange(2)), Prompt("films", torch.arange(length))]
    expected = pytest.raises(DataError, match=r"cross 12 tokens.*prompts\.input_max_text_length")
    with expected if is_refused else nullcontext():
        check_context(config, model, prompts)


# ---------------------------------------------------------------- the reference


def test_a_policy_or_its_weights_are_no_reference_of_their_own() -> None:
    policy = make_policy()
    for reference in (policy, policy.pretrained_model, Policy(policy.pretrained_model)):
        with pytest.raises(UsageError, match="very weights that are trained"):
            make_trainer(policy, reference)


@pytest.mark.parametrize(
    ("settings", "is_new", "copies"),
    [
        ({}, True, False),
        ({}, False, True),
        ({"use_dora": True}, True, False),
        ({"bias": "all", "target_modules": ["c_attn"]}, True, True),  # trains the base's, too
    ],
    ids=str,
)
def test_the_reference_of_an_adapter_is_the_policy_as_it_starts(
    settings: dict[str, Any], is_new: bool, copies: bool
) -> None:
    torch.manual_seed(0)
    settings = {"target_modules": ["q_proj"], "init_lora_weights": is_new, **settings}
    model = make_model("gpt2" if "c_attn" in settings["target_modules"] else "llama")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **settings))
    policy = Policy(adapted, summary_dropout_prob=0.0)
    values = [p.detach().clone() for p in policy.parameters()]
    trainer = make_trainer(policy, learning_rate=1e-2)
    assert all(map(torch.equal, values, policy.parameters()))
    assert (trainer.ref_model is not None) is copies
    if trainer.ref_model is not None:  # what does not train is there once
        own, other = policy.pretrained_model, trainer.ref_model.pretrained_model
        assert own.get_input_embeddings().weight is other.get_input_embeddings().weight
    batch = make_batch()
    first = trainer.step(*batch)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    later = trainer.step(*batch)
    assert abs(later["objective/kl"]) > 1e-3
    assert (later["objective/ref_logprobs"] == first["objective/ref_logprobs"]).all()


NOISY = {
    "gpt2": {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5},
    "mixtral": {"router_jitter_noise": 0.5, "attention_dropout": 0.5},
    "bloom": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
}


@pytest.mark.parametrize("name", [*NOISY, "falcon"])
def test_checkpointing_leaves_no_noise_on(name: str) -> None:
    """Wherever a model reads its probabilities from: modules, attributes, the configuration."""
    if name == "falcon":
        torch.manual_seed(0)
        model: Any = transformers.FalconForCausalLM(
            transformers.FalconConfig(**TINY, hidden_dropout=0.5, attention_dropout=0.5)
        )
    else:
        model = make_model(name, **NOISY[name])
    trainer = make_trainer(Policy(model), gradient_checkpointing=True, ppo_epochs=1)
    block = next(m for m in model.modules() if getattr(m, "gradient_checkpointing", False))
    stats = trainer.step(*make_batch())
    assert stats["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert stats["ppo/policy/ratio"] == pytest.approx(1, abs=1e-4)
    assert block.gradient_checkpointing


class Noise(nn.Module):
    """Noise that no attribute or setting shows."""

    gradient_checkpointing = True

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.randn_like(hidden) if self.training else hidden


def test_noise_that_cannot_be_switched_off_is_refused_with_checkpointing() -> None:
    policy = make_policy()
    noise = policy.pretrained_model.transformer.h[0].mlp.dropout = Noise()
    noise.gradient_checkpointing = False
    make_trainer(policy).step(*make_batch())
    noise.gradient_checkpointing = True
    trainer = make_trainer(policy, gradient_checkpointing=True)
    with pytest.raises(ModelError, match=r"noise in training mode.*gradient_checkpointing"):
        trainer.step(*make_batch())


def test_the_frozen_layers_are_those_of_the_decoder() -> None:
    """A list of other modules beside them, as Gemma 3n's projections, is no stack of layers."""
    from ppo_cli.models.reference import create_reference_model

    policy = make_policy()
    policy.pretrained_model.transformer.altogether = nn.ModuleList(
        nn.Linear(2, 2) for _ in range(3)
    )
    create_reference_model(policy, 1)
    frozen = [name for name, p in policy.named_parameters() if not p.requires_grad]
    assert any(".h.0." in name for name in frozen)
    assert not any("altogether" in name or ".h.1." in name for name in frozen)


def test_the_causal_model_that_transformers_makes_is_a_policy_too() -> None:
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**TINY)).eval()
    responses = sample_responses(model, QUERIES, LIMITS, GREEDY)
    for query, response in zip(QUERIES, responses, strict=True):
        log_p = alone(model, torch.cat([query, response]))[len(query) - 1 : -1]
        assert torch.equal(log_p.argmax(1), response)
