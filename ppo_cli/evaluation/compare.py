"""Models side by side: the same prompts and random numbers, one model after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ppo_cli.data.chat import Message
from ppo_cli.data.fingerprint import POLICY, located_prompts, prompt_inputs, trusted_too
from ppo_cli.data.prompts import Prompt, load_held_out
from ppo_cli.data.rows import Row
from ppo_cli.data.sources import EMBEDDED
from ppo_cli.errors import PPOCliError, UsageError
from ppo_cli.evaluation.best_of_n import best_of_n, share
from ppo_cli.evaluation.comparison_result import (
    Comparison,
    ModelResult,
    ScoredSamples,
    most_changed,
    paired_difference,
    rows_of,
)
from ppo_cli.evaluation.draw_samples import draw_rollout, draw_scores, score_rollout
from ppo_cli.evaluation.generate import (
    Loaded,
    Request,
    Source,
    chat_of,
    check_room,
    encode,
    find_input,
    load_classifier,
    load_model,
    sampling_errors,
)
from ppo_cli.evaluation.likelihoods import likelihoods
from ppo_cli.models.context import context_length, context_used
from ppo_cli.models.loading import load_tokenizer, reads_whole_texts
from ppo_cli.rewards.reward_sum import RewardSum

Report = Callable[[str], None]


@dataclass(frozen=True)
class _Task:
    """Prompts and settings that all models share.

    `ids`, `tokenizer` and `complete` (whether an encoder reads the ids) are those of held-out
    prompts, None for others.
    """

    request: Request
    rows: list[Row]
    ids: list[Tensor] | None
    tokenizer: Any
    complete: bool | None
    max_new_tokens: int
    seed: int
    reward: RewardSum
    report: Report

    @property
    def texts(self) -> list[str]:
        """The prompts as they are shown."""
        return [row.text for row in self.rows]

    @property
    def columns(self) -> list[dict[str, Any]]:
        """The data columns of each prompt, for rewards."""
        return [row.columns for row in self.rows]

    @property
    def messages(self) -> list[list[Message] | None]:
        """The conversations to answer; None for a text."""
        return [row.messages for row in self.rows]

    def load(self, source: Source) -> Loaded:
        """Load a model."""
        chat = chat_of(self.rows, self.request.prompts)
        return load_model(source, self.request.device, self.request.trusted, chat)


def compare(
    request: Request,
    prompts: Sequence[Row],
    *,
    count: int,
    max_new_tokens: int | None,
    seed: int,
    examples: int = 3,
    best_of: Sequence[int] = (),
    progress: Report = lambda _: None,
) -> Comparison:
    """Sample every model of `request` on the same prompts, and measure the samples.

    KL and perplexity are measured from the reference of the first run directory, which is loaded
    once. Of the other models only one is in memory at a time.

    Args:
        request: two models or more, the reference among them, and a classifier.
        prompts: texts or conversations; empty for the held-out prompts of the first run.
        count: number of prompts; with fewer of them each is used several times.
        max_new_tokens: limit on a response; None for the run's own.
        seed: of the random numbers that all models share.
        examples: number of prompts to list whose score rose most, and fell most.
        best_of: the n of best-of-n from the reference; empty leaves that out.
        progress: called with each step of the work, and with what is left out.

    Raises:
        UsageError: fewer than two models, no prompts and no run that has some, or `best_of` without
            a reference.
    """
    if len(request.sources) < 2:
        raise UsageError("compare needs two models, or a run directory and its reference")
    if best_of and request.reference is None:
        raise UsageError(
            "--best-of-n draws from a run's reference, and none of the models is a run directory: "
            "give one that 'ppo-cli train' wrote, or leave --best-of-n out"
        )
    rows, ids, tokenizer, complete = list(prompts), None, None, None
    if not rows:
        held_out, tokenizer, complete = _held_out(request, count)
        rows, ids = [p.row for p in held_out], [p.input_ids for p in held_out]
        ids = [ids[i % len(ids)] for i in range(count)]
    rows = [rows[i % len(rows)] for i in range(count)]
    if max_new_tokens is None:
        max_new_tokens = request.run.rollout.output_max_length - 1 if request.run else 30
    loaded = load_classifier(request)
    assert loaded is not None and request.reward is not None
    reward = RewardSum.of(loaded)
    task = _Task(request, rows, ids, tokenizer, complete, max_new_tokens, seed, reward, progress)
    reference = _reference(task, needed=bool(best_of) or request.reference in request.sources)
    models = []
    for source in request.sources:
        with sampling_errors(source.name):
            models.append(_scored_samples(task, source, reference))
    curve, shares = None, []
    if best_of and reference is not None:
        with sampling_errors(reference.name):
            drawn = _best_of_n_scores(task, reference, max(best_of))
        curve = best_of_n(drawn, best_of, label=reward.label, seed=seed)
        shares = [
            share(model.model, model.scores, model.kl, drawn, best_of)
            for source, model in zip(request.sources, models, strict=True)
            if source != request.reference
        ]
    return Comparison(
        label=reward.label,
        output=reward.output,
        classifier=next(iter(request.reward.models), None),
        terms=[term.name for term in reward.terms] if reward.is_composed else [],
        seed=seed,
        reference=request.reference.model if reference and request.reference else None,
        max_new_tokens=max_new_tokens,
        models=[ModelResult.of(model) for model in models],
        differences=[
            paired_difference(models[0], other, is_reference=source == request.reference)
            for source, other in zip(request.sources[1:], models[1:], strict=True)
        ],
        changes=most_changed(models[0], models[-1], examples),
        best_of_n=curve,
        shares=shares,
        rows=rows_of(models),
    )


def _reference(task: _Task, *, needed: bool) -> Loaded | None:
    """The model that KL is measured from; None, which is reported, where there is none.

    Args:
        task: its request names the reference.
        needed: whether the reference is also sampled from; then an error in loading it is raised.
    """
    source = task.request.reference
    if source is None:
        task.report("none of the models is a run directory, which names a reference: no KL from it")
        return None
    try:
        return task.load(source)
    except PPOCliError as error:
        if needed:
            raise
        task.report(f"no KL from the reference: {error}")
        return None


def _scored_samples(task: _Task, source: Source, reference: Loaded | None) -> ScoredSamples:
    """One model's samples and likelihoods. A model that is loaded here is freed afterwards."""
    task.report(f"sampling from {source.name}")
    if reference is not None and source == task.request.reference:
        loaded = reference
    else:
        loaded = task.load(source)
    queries = _queries(task, loaded)
    rollout = draw_rollout(
        loaded.model,
        loaded.tokenizer,
        queries,
        loaded.params(),
        max_new_tokens=task.max_new_tokens,
        seed=task.seed,
        messages=task.messages,
    )
    pairs = zip(queries, rollout.responses, strict=True)
    longest = max(context_used(loaded.model, len(q), len(r)) for q, r in pairs)
    against, obstacle = loaded, None
    if reference is not None:
        obstacle = _why_unreadable(loaded, reference, longest)
        against = loaded if obstacle else reference
    if obstacle:
        task.report(f"no KL and no perplexity of {source.name}: {obstacle}")
    read = likelihoods(loaded.model, against.model, queries, rollout.responses)
    samples = score_rollout(rollout, task.texts, task.reward, task.columns, loaded.stop_token_ids)
    return ScoredSamples(source.name, samples, read, reference is not None and obstacle is None)


def _queries(task: _Task, loaded: Loaded) -> list[Tensor]:
    """The prompts as a model's tokens.

    Held-out ones are unchanged where the model has the run's tokenizer and an encoder like the
    run's, or none. Another tokenizer encodes their texts, which can differ from what the run's
    tokens stand for where a query ends within a word or a character.
    """
    alike = loaded.is_encoder_decoder == task.complete
    if task.ids is None or not alike or loaded.tokenizer.get_vocab() != task.tokenizer.get_vocab():
        return encode(loaded, task.rows, task.max_new_tokens, task.request.prompts)
    check_room(loaded, task.texts, task.ids, task.max_new_tokens)
    return task.ids


def _why_unreadable(loaded: Loaded, reference: Loaded, longest: int) -> str | None:
    """Why the reference cannot read a model's responses, token by token; None where it can."""
    if loaded.is_encoder_decoder != reference.is_encoder_decoder:
        return "one of it and the reference is an encoder-decoder"
    ours, theirs = loaded.tokenizer.get_vocab(), reference.tokenizer.get_vocab()
    sizes = {one.model.config.get_text_config().vocab_size for one in (loaded, reference)}
    if ours != theirs or len(sizes) > 1:
        return "its vocabulary is not that of the reference"
    context = context_length(reference.model)
    if context is not None and longest > context:
        return f"its longest text has {longest} tokens, and the reference reads {context}"
    return None


def _best_of_n_scores(task: _Task, reference: Loaded, count: int) -> np.ndarray:
    """Scores (P, count) of the reference's responses; each quarter of long work is reported."""
    total = len(task.texts) * count
    task.report(
        f"sampling {count} responses to each of {len(task.texts)} prompts from the reference"
    )
    reported = 0

    def progress(done: int) -> None:
        nonlocal reported
        quarter = 4 * done // total
        if reported < quarter < 4 and total >= 4096:
            reported = quarter
            task.report(f"{done} of {total} responses")

    return draw_scores(
        reference.model,
        reference.tokenizer,
        _queries(task, reference),
        reference.params(),
        count=count,
        max_new_tokens=task.max_new_tokens,
        seed=task.seed,
        reward=task.reward,
        texts=task.texts,
        columns=task.columns,
        messages=task.messages,
        progress=progress,
    )


def _held_out(request: Request, count: int) -> tuple[list[Prompt], Any, bool]:
    """The held-out prompts of the first run, the tokenizer of their ids, and `_Task.complete`."""
    if request.run is None:
        raise UsageError("none of the models is a run directory with prompts: give --prompts FILE")
    settings = request.run.prompts
    if (
        settings.sources is None and settings.source == EMBEDDED
    ):  # the grammar writes any number of them
        settings = settings.model_copy(update={"held_out": count})
    named = prompt_inputs(settings)
    places = {key: find_input(request.inputs, key, *one) for key, one in named.items()}
    settings = located_prompts(settings, places)
    policy = request.run.policy
    name, revision = find_input(request.inputs, POLICY, policy.model, policy.revision)
    trusted = trusted_too(request.trusted, {policy.model: name})
    tokenizer = load_tokenizer(name, revision, trusted)
    if settings.chat_template is not None:
        tokenizer.chat_template = settings.chat_template
    complete = reads_whole_texts(name, revision, trusted)
    seed = request.run.run.seed
    prompts = load_held_out(settings, tokenizer, seed, complete=complete)
    return prompts, tokenizer, complete
