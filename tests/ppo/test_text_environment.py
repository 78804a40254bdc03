"""Text environments: episodes with tools, what ends them, and what `step` learns from them."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from ppo_cli import AutoModelForCausalLMWithValueHead, TextEnvironment, TextHistory
from tests.conftest import make_chat_tokenizer, make_gpt2, make_trainer

TOKENIZER = make_chat_tokenizer()  # a token a byte
CALL = "<request><Echo>hi<call>"


class Echo:
    def __call__(self, text: str) -> str:
        return text


def make_policy() -> AutoModelForCausalLMWithValueHead:
    ends = {"bos_token_id": 256, "eos_token_id": 256}
    model = make_gpt2(vocab_size=len(TOKENIZER), n_positions=192, **ends)
    return AutoModelForCausalLMWithValueHead(model, summary_dropout_prob=0.0)


POLICY = make_policy()


def make(**settings: Any) -> TextEnvironment:
    reward = {"reward_fn": lambda texts: [float(i) for i, _ in enumerate(texts)]}
    settings = {"tools": [Echo()], "prompt": "Do:\n", **reward, **settings}
    return TextEnvironment(settings.pop("model", POLICY), TOKENIZER, **settings)


def ids(text: str) -> Tensor:
    return TOKENIZER(text, return_tensors="pt").input_ids[0]


def writing(*turns: str) -> Any:
    """Lets the policy write these turns, the same in each episode."""
    left = iter(turns)

    def turn(self: Any, queries: list[Tensor], batch_size: int = 16) -> list[Tensor]:
        text = next(left)
        return [ids(text)] * len(queries)

    return patch.object(TextEnvironment, "_generate_batched", turn)


def test_a_history_keeps_texts_tokens_and_masks() -> None:
    history = TextHistory("Hello there!", torch.tensor([1, 2, 3]))
    assert history.text == "Hello there!" and history.token_masks.tolist() == [0, 0, 0]
    assert TextHistory("a", torch.tensor([1]), system=False).token_masks.tolist() == [1]
    history.append_segment("General Kenobi!", torch.tensor([4, 5]), system=False)
    history.append_segment("You are bold!", torch.tensor([6]))
    assert history.text == "Hello there!General Kenobi!You are bold!"
    assert history.last_text_segment == "You are bold!"
    assert history.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    parts = [part.tolist() for part in history.split_query_response_tokens()]
    assert parts == [[1, 2, 3], [4, 5, 6], [1, 1, 0]]
    history.complete()
    assert history.completed and not history.truncated
    history.complete(truncated=True)
    assert history.truncated
    with pytest.raises(ValueError, match="a segment needs tokens"):
        history.append_segment("", torch.tensor([]))


def test_a_history_is_shown_without_control_codes(capsys: pytest.CaptureFixture[str]) -> None:
    history = TextHistory("[b]Q\n", ids("[b]Q\n"))
    history.append_segment("A\x1b[2J", ids("A\x1b[2J"), system=False)
    history.reward = 2.5
    history.show_text()
    assert capsys.readouterr().out == "[b]Q\nA\\x1b[2J\n\nReward: 2.5\n"
    history.show_tokens(TOKENIZER, show_legend=True)
    out = capsys.readouterr().out
    assert out.startswith("[ b ] Q Ċ A") and "(Colour Legend: Prompt|System|Model|Reward)" in out


def test_tools_are_called_and_their_answers_masked() -> None:
    with writing(CALL, CALL, "It is hi<submit>"):
        queries, responses, masks, rewards, histories = make().run(["a", "bcd"])
    answered = f"{CALL}hi<response>"
    assert histories[1].text == f"Do:\nbcd{answered}{answered}It is hi<submit>"
    assert [TOKENIZER.decode(query) for query in queries] == ["Do:\na", "Do:\nbcd"]
    assert TOKENIZER.decode(responses[0]) == histories[0].text.removeprefix("Do:\na")
    learnt = [TOKENIZER.decode(r[m.bool()]) for r, m in zip(responses, masks, strict=True)]
    assert learnt == [f"{CALL}{CALL}It is hi<submit>"] * 2
    assert [reward.item() for reward in rewards] == [0, 1]
    assert all(history.completed and not history.truncated for history in histories)


@pytest.mark.parametrize("turns", [1, 2, 4])
def test_an_episode_has_at_most_max_turns(turns: int) -> None:
    with writing(*[CALL] * 9):
        *_, histories = make(max_turns=turns).run(["a"])
    assert histories[0].text == "Do:\na" + f"{CALL}hi<response>" * turns


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So <request><Tool1>Hello there!<call>", ("Tool1", "Hello there!")),
        ("So <request><Tool1>2 > 1\n<call>", ("Tool1", "2 > 1\n")),
        ("So <Tool1>Hello there!<call>", (None, None)),
        ("So <request><Tool1>Hello there!", (None, None)),
        ("So <request>|Tool2|Hello there!<call>", (None, None)),
        ("<>abcdefghijklm<>nopqrstuvwxyz<>", (None, None)),
    ],
)
def test_a_call_has_a_tool_and_a_query(text: str, expected: Any) -> None:
    assert make().parse_tool_call(text) == expected


def broken(query: str) -> str:
    raise ZeroDivisionError("division by zero")


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("<request><Echo>hi<call>", "hi"),
        ("<request><broken>hi<call>", "Tool error: division by zero"),
        ("<request><count>hi<call>", "2"),
        ("<request><other>hi<call>", "Unknown tool other."),
        ("<request>other<call>", "Unknown tool call: <request>other<call>"),
    ],
)
def test_the_policy_reads_what_became_of_its_call(call: str, answer: str) -> None:
    environment = make(tools={"Echo": Echo(), "broken": broken, "count": len})
    history = environment.step(TextHistory(call, ids(call)))
    assert history.last_text_segment == f"{answer}<response>"
    assert history.token_masks[-1] == 0 and not history.completed


@pytest.mark.parametrize(("limit", "length"), [(10, 10), (30, 30), (41, 40), (80, 40)])
def test_long_answers_are_cut(limit: int, length: int) -> None:
    for name in ("max_tool_reponse", "max_tool_response"):
        environment = make(tools={"Echo": lambda _: "a" * 40}, **{name: limit})
        history = environment.step(TextHistory(CALL, ids(CALL)))
        assert len(history.last_text_segment.removesuffix("<response>")) == length


@pytest.mark.parametrize(
    ("turn", "answer", "text", "truncated"),
    [
        ("no call", "", "Do:\na" "no call", False),
        ("<submit>", "", "Do:\na<submit>", False),
        (f"{CALL}<|endoftext|>", "", f"Do:\na{CALL}<|endoftext|>", False),
        # what a tool answers does not end the episode, but its length does
        (CALL, "<submit><|endoftext|>", f"Do:\na{CALL}<submit><|endoftext|><response>end", False),
        (CALL, "a" * 60, f"Do:\na{CALL}", True),
    ],
)  # fmt: skip
def test_what_ends_an_episode(turn: str, answer: str, text: str, truncated: bool) -> None:
    with writing(turn, "end"):
        environment = make(tools={"Echo": lambda _: answer}, max_length=75)
        _, responses, _, _, (history,) = environment.run(["a"])
    assert history.text == text
    assert history.completed and history.truncated is truncated
    assert len(history.tokens) <= 75 and len(responses[0])


def test_turns_end_at_stop_strings_and_within_the_episodes_room() -> None:
    policy = make_policy()
    greedy = {"do_sample": False, "max_new_tokens": 12}
    queries = [ids("this is a test"), ids("this is another, longer test")]
    whole = make(model=policy, generation_kwargs=greedy)._generate_batched(queries)
    assert [len(row) for row in whole] == [12, 12]
    single = [make(model=policy, generation_kwargs=greedy)._generate_batched([q]) for q in queries]
    assert [row.tolist() for (row,) in single] == [row.tolist() for row in whole]

    stopped = make(model=policy, generation_kwargs=greedy)
    stopped.call_token = TOKENIZER.decode(whole[0][2:5])
    assert stopped._generate_batched(queries)[0].tolist() == whole[0][:5].tolist()
    stopped.call_token, stopped.submit_token = "<call>", stopped.call_token
    assert stopped._generate_batched(queries)[0].tolist() == whole[0][:5].tolist()
    settings = {**greedy, "stop_strings": TOKENIZER.decode(whole[0][2:5])}
    own = make(model=policy, generation_kwargs=settings)
    assert own._generate_batched(queries)[0].tolist() == whole[0][:5].tolist()

    _, responses, _, _, (history,) = make(model=policy, max_length=12).run(["task"])
    assert len(responses[0]) == 4 and history.truncated
    *_, (history,) = make(model=policy, generation_kwargs={"max_new_tokens": 500}).run(["task"])
    assert len(history.tokens) <= 192
    with pytest.raises(ValueError, match="task 1 has 14 tokens with its prompt, and an episode at"):
        make(max_length=9).run(["a", "ten tokens"])


def test_a_step_learns_from_an_episode() -> None:
    policy = make_policy()
    trainer = make_trainer(policy, batch_size=2, mini_batch_size=2, tokenizer=TOKENIZER)
    before = [p.detach().clone() for p in policy.parameters()]
    environment = make(model=trainer.model, generation_kwargs={"max_new_tokens": 6})
    queries, responses, masks, rewards, _ = environment.run(["a", "b"])
    stats = trainer.step(queries, responses, rewards, masks)
    assert stats["ppo/mean_scores"] == 0.5
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    assert all(1 <= len(r) <= 6 and m.all() for r, m in zip(responses, masks, strict=True))


def test_rewards_are_given_to_each_episode() -> None:
    def reward(texts: list[str], answers: list[str]) -> list[Tensor]:
        return [torch.tensor(float(a in t)) for t, a in zip(texts, answers, strict=True)]

    histories = [TextHistory(text, ids(text)) for text in ("it is 3", "it is 4")]
    make(reward_fn=reward).compute_reward(histories, answers=["3", "3"])
    assert [history.reward for history in histories] == [1, 0]
    with pytest.raises(ValueError, match="reward_fn returned 1 rewards for 2 episodes"):
        make(reward_fn=lambda texts: [1.0]).compute_reward(histories)


def test_arguments_of_another_type_are_refused() -> None:
    def search(query: str) -> str:
        return query

    environment = make(tools=[Echo(), search])
    assert list(environment.tools) == ["Echo", "search"] and environment.prompt == "Do:\n"
    with pytest.raises(ValueError, match="no call can name the tool <lambda>: pass a dictionary"):
        make(tools=[lambda query: query])
    with pytest.raises(ValueError, match="no call can name the tool Echo"):
        make(tools=[Echo(), Echo()])
    with pytest.raises(ValueError, match="reward_fn must be a function, got NoneType"):
        make(reward_fn=None)
    with pytest.raises(ValueError, match="model must be a language model, got NoneType"):
        make(model=None)
    with pytest.raises(ValueError, match="tokenizer must be a PreTrainedTokenizerBase, got NoneT"):
        TextEnvironment(POLICY, None, reward_fn=len)
