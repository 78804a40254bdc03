"""Conversations through the commands: the recipe trains, and its run is compared and talked to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ppo_cli.cli.requests import read_prompts, resolve
from ppo_cli.config.loading import load_config
from ppo_cli.training.build import build_training
from tests.conftest import CHATML, save_chat_model
from tests.forked import ppo_cli

SYSTEM = "You are a friendly assistant. Answer in one or two sentences."
SMALL = {
    "policy.model": "model",
    "prompts.source": "chats.jsonl",
    "prompts.held_out": 3,
    "rollout.output_min_length": 8,
    "rollout.output_max_length": 9,
    "reward.model": "embedded",
    "reward.score_every": 4,
    "ppo.batch_size": 4,
    "ppo.mini_batch_size": 4,
    "run.eval_every": 0,
}


def chat(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"Hi {number}"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": f"And {number}?"},
        {"role": "assistant", "content": "Well."},
    ]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model without a template, conversations, and a run of the recipe on them."""
    home = tmp_path_factory.mktemp("chat")
    save_chat_model(home / "model", None)
    (home / "template.jinja").write_text(CHATML)
    rows = [{"messages": chat(i), "topic": i % 2} for i in range(16)]
    (home / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {**SMALL, "prompts.chat_template": "template.jinja", "prompts.where": "{topic: 1}"}
    changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    recipe = ["--config", "chat-lora", "--steps", 1, "--output", "run"]
    done = ppo_cli("train", *recipe, *changes, "--quiet", cwd=home)
    assert done.code == 0, done.err
    (home / "template.jinja").unlink()  # the run holds it
    return home


def test_the_recipe_trains_on_conversations(home: Path) -> None:
    rows = [json.loads(line) for line in (home / "run/samples.jsonl").read_text().splitlines()]
    for row in rows:
        number = row["messages"][1]["content"].removeprefix("Hi ")
        assert int(number) % 2 == 1  # prompts.where
        system = {"role": "system", "content": SYSTEM}
        assert row["messages"] == [system, *chat(int(number))[:3]]
        assert row["query"] == f"And {number}?" and "assistant" not in row["response"]
    assert (home / "run/chat_template.jinja").read_text() == CHATML
    metrics = json.loads((home / "run/metrics.jsonl").read_text())
    assert metrics["tokens/queries_len_mean"] > 100  # whole conversations, in bytes


def test_the_classifier_reads_answers_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    changes = [f"{key}={value}" for key, value in {**SMALL, "run.output": "other"}.items()]
    changes += [f"prompts.chat_template={json.dumps(CHATML)}", "policy.adapter=null"]
    training = build_training(load_config("chat-lora", assignments=changes))
    read: list[str] = []
    (classifier,) = training.reward.classifiers
    of_labels = classifier.of_labels
    monkeypatch.setattr(
        classifier, "of_labels", lambda texts: read.extend(texts) or of_labels(texts)
    )
    samples = training.ppo_step.run(0).samples
    responses = [sample.response for sample in samples]
    assert read[:4] == responses
    # The others are the beginnings of the same answers, for reward.score_every.
    assert read[4] == "" and not any("Hi" in text or "user" in text for text in read)
    held_out = training.held_out.of_policy(0).samples
    assert read[-3:] == [sample.response for sample in held_out]
    assert training.ppo_step.end_token_ids == [256, 258]


def test_compare_takes_the_run_s_conversations_and_template(home: Path) -> None:
    options = ["--samples", 3, "--max-new-tokens", 2, "--format", "json"]
    done = ppo_cli("compare", "run", *options, cwd=home)
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    assert {row["messages"][0]["content"] for row in rows} == {SYSTEM}
    assert all(row["messages"][3]["content"] == row["query"] for row in rows)
    assert [r["model"] for r in rows[0]["responses"]] == ["run", "reference"]


@pytest.mark.parametrize(
    ("chat", "system", "expected"),
    [
        (None, None, [("system", SYSTEM), ("user", "Hi")]),
        (True, "Be brief.", [("system", "Be brief."), ("user", "Hi")]),
        (False, None, None),
    ],
)
def test_prompts_of_generate_and_compare_are_those_of_the_run_or_of_the_options(
    home: Path,
    chat: bool | None,
    system: str | None,
    expected: list[tuple[str, str]] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(home)
    (home / "asked.jsonl").write_text('{"text": "Hi"}')
    defaults = {"score": False, "sentiment": None, "classifier": None, "device": "cpu"}
    request = resolve(["run"], reference=True, chat=chat, system=system, **defaults)
    for given in ((["Hi"], None), ([], "asked.jsonl")):
        (row,) = read_prompts(*given, "text", request.prompts)
        found = row.messages and [(m["role"], m["content"]) for m in row.messages]
        assert (row.text, found) == ("Hi", expected)
    # The reference has no template of its own.
    assert request.prompts.chat_template == (CHATML if expected else None)


def test_generate_applies_the_template(home: Path) -> None:
    options = ["--reference", "--max-new-tokens", 3, "--no-score", "--format", "jsonl"]
    (home / "asked.jsonl").write_text(json.dumps({"messages": chat(7)}))
    done = ppo_cli("generate", "run", "--prompts", "asked.jsonl", *options, cwd=home)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["model"] for row in rows] == ["run", "reference"]
    assert rows[0]["messages"] == [{"role": "system", "content": SYSTEM}, *chat(7)[:3]]


def test_lines_of_standard_input_are_one_conversation(home: Path) -> None:
    options = ["--interactive", "--score", "--max-new-tokens", 5, "--seed", 3]
    done = ppo_cli("generate", "run", *options, cwd=home, stdin="Hi\n\nAgain\n")
    assert done.code == 0, done.err
    assert done.err.count("P(POSITIVE)") == 2 and done.out.count("\n") >= 2
    assert done.out.isprintable() or "\x1b" not in done.out
    first = ppo_cli("generate", "run", *options, cwd=home, stdin="Hi\n")
    assert done.out.startswith(first.out) and len(done.out) > len(first.out)
