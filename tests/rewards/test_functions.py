"""Python functions as rewards: what they get, what they may return, how their faults are told."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ppo_cli.config.functions import function_file
from ppo_cli.errors import ModelError, UsageError
from ppo_cli.rewards.batch import RewardBatch
from ppo_cli.rewards.functions import FunctionReward, load_function

COLUMNS = {"label": [1, None]}
BATCH = RewardBatch(
    ["q a b", "r c"],
    ["q", "r"],
    [" a b", " c"],
    COLUMNS,
    response_ids=[torch.tensor([1, 2]), torch.tensor([3])],
)
CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
CHATS = RewardBatch(BATCH.texts, BATCH.queries, BATCH.responses, {"messages": [CHAT, None]})
ANSWERS = [[{"role": "assistant", "content": text}] for text in BATCH.responses]


def keywords_of(function: Any, batch: RewardBatch) -> dict[str, Any]:
    """What a function is called with."""
    seen: dict[str, Any] = {}
    FunctionReward(function(seen), "f")(batch)
    return seen


def wants_all(seen: dict[str, Any]) -> Any:
    def function(**kwargs: Any) -> list[int]:
        seen.update(kwargs)
        return [0, 0]

    return function


def wants_some(seen: dict[str, Any]) -> Any:
    def function(label: Any, responses: Any, missing: str = "own") -> list[int]:
        seen.update(label=label, responses=responses, missing=missing)
        return [0, 0]

    return function


def test_a_function_gets_what_its_signature_names() -> None:
    assert keywords_of(wants_some, BATCH) == {
        "label": [1, None],
        "responses": [" a b", " c"],
        "missing": "own",
    }
    assert keywords_of(wants_all, BATCH) == {
        "texts": ["q a b", "r c"],
        "queries": ["q", "r"],
        "responses": [" a b", " c"],
        "prompts": ["q", "r"],
        "completions": [" a b", " c"],
        "completion_ids": [[1, 2], [3]],
        "label": [1, None],
    }


def test_conversations_have_the_form_of_trl() -> None:
    found = keywords_of(wants_all, CHATS)
    assert found["messages"] == [CHAT, None]
    assert found["prompts"] == [CHAT, [{"role": "user", "content": "r"}]]
    assert found["completions"] == ANSWERS
    assert found["queries"] == ["q", "r"]


def test_a_reward_function_of_trl_works_as_it_is() -> None:
    think = load_function("trl.rewards:think_format_reward")
    said = [" <think>\nx\n</think>\ny", " y"]
    batch = RewardBatch(said, ["q", "r"], [text.strip() for text in said], CHATS.columns)
    assert think(batch) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, None], [1.0, None]),
        ((True, 0.5), [1.0, 0.5]),
        (np.array([1.5, 2]), [1.5, 2.0]),
        (torch.tensor([1.5, 2]), [1.5, 2.0]),
        ([np.float32(1), torch.tensor(2)], [1.0, 2.0]),
    ],
)
def test_numbers_of_any_kind_and_none_are_taken(values: Any, expected: list[Any]) -> None:
    assert FunctionReward(lambda texts: values, "f")(BATCH) == expected


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (None, "returned None: return a list"),
        (1.0, r"returned 1\.0: return a list"),
        ([1.0], "returned 1 values for 2 texts"),
        ([1.0, "2"], "returned '2' for text 2 of 2"),
        ([float("nan"), 1], "returned nan for text 1 of 2"),
        ([1, float("inf")], "returned inf for text 2 of 2"),
        ([{}, 1], "returned {} for text 1"),
    ],
)
def test_anything_else_is_refused_with_the_function_and_its_file(values: Any, wanted: str) -> None:
    with pytest.raises(ModelError, match=rf"function f \(.*test_functions\.py\) {wanted}"):
        FunctionReward(lambda texts: values, "f")(BATCH)


def test_an_async_function_is_awaited_in_one_loop() -> None:
    loops = []

    async def slow(texts: list[str]) -> list[float]:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0)
        return [float(len(text)) for text in texts]

    reward = FunctionReward(slow, "slow")
    assert reward(BATCH) == reward(BATCH) == [5.0, 3.0]
    assert loops[0] is loops[1]  # a client that the function keeps works on


def test_a_file_may_import_its_neighbours_and_print(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "neighbour_of_rewards.py").write_text("LENGTH = 2\n")
    file = tmp_path / "my-rewards.py"
    file.write_text(
        "from neighbour_of_rewards import LENGTH\nprint('loaded')\n"
        "def f(texts):\n    print('called')\n    return [LENGTH] * len(texts)\n"
    )
    before = list(sys.path)
    assert load_function(f"{file}:f")(BATCH) == [2.0, 2.0]
    assert sys.path == before
    printed = capsys.readouterr()  # standard output is for results
    assert printed.out == "" and printed.err == "loaded\ncalled\n"


def test_a_module_is_found_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package_of_rewards"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('this code ran')")
    (package / "inner.py").write_text("def f(texts):\n    return [1, 1]\n")
    monkeypatch.chdir(tmp_path)
    # Looking for its file runs nothing.
    assert function_file("package_of_rewards.inner:f") == package / "inner.py"
    (package / "__init__.py").write_text("")
    assert load_function("package_of_rewards.inner:f")(BATCH) == [1.0, 1.0]
    assert function_file("package_of_rewards.other:f") is None


RAISING = """def f(texts):
    return helper(texts)

def helper(texts):
    return texts[9]

def g(texts):
    raise SystemExit(3)
"""


def test_what_a_function_raises_is_one_message_with_its_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "r.py"
    file.write_text(RAISING)
    with pytest.raises(ModelError) as caught:
        load_function(f"{file}:f")(BATCH)
    assert str(caught.value) == (
        f"{file}, line 5: the reward function f raised IndexError (list index out of range)"
    )
    with pytest.raises(ModelError, match=r"line 8: .* g raised SystemExit \(3\)"):
        load_function(f"{file}:g")(BATCH)
    file.write_text("def f(texts):\n    return [\n")
    with pytest.raises(ModelError, match=r"r\.py, line 2: .*SyntaxError"):
        load_function(f"{file}:f")
    file.write_text("1 / 0\n")
    with pytest.raises(ModelError, match=r"r\.py, line 1: .*ZeroDivisionError"):
        load_function(f"{file}:f")


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    file = tmp_path / "r.py"
    file.write_text("def score(texts): ...\n\ndef taught(lable): ...\n\ndef odd(texts, /): ...\n")
    with pytest.raises(UsageError, match=r"gone\.py: no such file for the reward function f"):
        load_function(f"{tmp_path / 'gone.py'}:f")
    with pytest.raises(UsageError, match=r"no\.such: no such module"):
        load_function("no.such:f")
    with pytest.raises(UsageError, match=r"no function 'skore'\. Did you mean 'score'\?"):
        load_function(f"{file}:skore")
    with pytest.raises(UsageError, match=r"needs 'lable'.*Did you mean 'label'\?.*texts"):
        load_function(f"{file}:taught")(BATCH)
    with pytest.raises(UsageError, match=r"odd takes 'texts' by position"):
        load_function(f"{file}:odd")
