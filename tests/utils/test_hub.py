"""A hub that refuses, fails or breaks off: one message in limited time, or a successful retry.

The hub is a server of this process's own, asked by the real client.
"""

from __future__ import annotations

import json
import socketserver
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model

from ppo_cli import AutoModelForCausalLMWithValueHead
from ppo_cli.config.schema import PolicyConfig, RewardConfig
from ppo_cli.data.embedded import classifier_folder
from ppo_cli.errors import ModelError, ModelNotFoundError, PPOCliError
from ppo_cli.models.loading import load_policy, load_tokenizer
from ppo_cli.rewards.loading import load_reward
from ppo_cli.utils import hub
from tests.conftest import make_gpt2, make_tokenizer

NAME = "org/name"
COMMIT = "0" * 40


@dataclass
class Fault:
    """An answer to the first `times` requests whose path contains `part`."""

    part: str
    status: int = 0
    cut_after: int | None = None
    times: int = 10**9
    headers: dict[str, str] = field(default_factory=dict)


class Hub(socketserver.ThreadingTCPServer):
    """Serves one model, after its `faults`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.faults: list[Fault] = []
        self.asked: list[str] = []


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        fault = next((f for f in self.server.faults if f.part in path and f.times > 0), None)
        if fault is not None and not (fault.cut_after is not None and self.command == "HEAD"):
            fault.times -= 1
            if fault.status:
                return self.answer(b"{}", fault.status, fault.headers)
        else:
            fault = None
        if path == f"/api/models/{NAME}":
            return self.answer(json.dumps({"id": NAME, "sha": COMMIT, "siblings": []}).encode())
        asked = path.removeprefix(f"/{NAME}/resolve/")
        file = self.server.folder / asked.partition("/")[2]
        if asked != path:
            self.server.asked.append(asked)
        if asked != path and file.is_file():
            return self.answer(file.read_bytes(), cut_after=fault and fault.cut_after)
        return self.answer(b"{}", 404, {"X-Error-Code": "EntryNotFound"})

    def answer(
        self,
        body: bytes,
        status: int = 200,
        headers: dict[str, str] | None = None,
        cut_after: int | None = None,
    ) -> None:
        start = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        self.send_response(status)
        for key, value in {
            "ETag": f'"{hash(body)}"', "X-Repo-Commit": COMMIT,
            "Content-Length": str(len(body) - start), **(headers or {}),
        }.items():  # fmt: skip
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[start : None if cut_after is None else start + cut_after])
        if cut_after is not None:
            self.close_connection = True


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_gpt2().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the process would have slept."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the endpoint as HF_ENDPOINT does when the client is imported."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # keeps the first one it used
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def server(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(model_folder) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        point_at(f"http://127.0.0.1:{server.server_address[1]}", monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        hub._ask_hub.cache_clear()
        hub._unanswered.clear()
        yield server
        server.shutdown()
    huggingface_hub.close_session()
    hub._ask_hub.cache_clear()


def load() -> Any:
    return load_policy(PolicyConfig(model=NAME), load_tokenizer(NAME))


GATED = {"X-Error-Code": "GatedRepo"}
FAULTS: list[tuple[list[Fault], type[Exception], list[str]]] = [
    ([Fault("/", 401, headers=GATED)], ModelError, ["asks for access", "HF_TOKEN"]),
    ([Fault("config.json", 401, headers=GATED)], ModelError, ["asks for access", "HF_TOKEN"]),
    ([Fault("/", 401, headers={"X-Error-Code": "RepoNotFound"})], ModelNotFoundError, ["neither"]),
    ([Fault("/", 403)], ModelError, ["403 (Forbidden)", "HF_TOKEN"]),
    ([Fault("/", 404)], ModelNotFoundError, ["neither a folder here nor a model on the hub"]),
    ([Fault("/", 429)], ModelError, ["429 (Too Many Requests)", "in a few minutes"]),
    ([Fault("/", 429, headers={"Retry-After": "300"})], ModelError, ["wait 300 s", "HF_TOKEN"]),
    ([Fault("/", 429, headers={"ratelimit": '"api";r=0;t=271'})], ModelError, ["wait 271 s"]),
    ([Fault("/", 500)], ModelError, ["500 (Internal Server Error)", "try again later"]),
    ([Fault("/", 503)], ModelError, ["503 (Service Unavailable)", "try again later"]),
    ([Fault("config.json", 503)], ModelError, ["503 (Service Unavailable)", "try again later"]),
    ([Fault("tokenizer.json", 500)], ModelError, ["500 (Internal Server Error)", "later"]),
    ([Fault("model.safetensors", 503)], ModelError, ["503 (Service Unavailable)", "later"]),
    ([Fault("model.safetensors", cut_after=10)], ModelError, ["breaks off", "run this again"]),
    ([Fault("config.json", cut_after=10)], ModelError, ["breaks off", "run this again"]),
]  # fmt: skip


@pytest.mark.parametrize(("faults", "kind", "wanted"), FAULTS)
def test_each_answer_has_its_message_in_bounded_time(
    faults: list[Fault], kind: type[Exception], wanted: list[str], server: Hub, slept: list[float]
) -> None:
    server.faults = [Fault(**vars(fault)) for fault in faults]
    with pytest.raises(PPOCliError) as caught:
        load()
    assert type(caught.value) is kind, caught.value
    message = str(caught.value)
    assert message.startswith(f"{NAME}: ")
    assert "\n" not in message
    for part in wanted:
        assert part in message
    assert sum(slept) < 30, slept


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/", 503, times=2),
        Fault("/", 429, times=3, headers={"Retry-After": "1"}),
        Fault("config.json", 500, times=2),
        Fault("model.safetensors", 429, times=1, headers={"ratelimit": '"api";r=0;t=5'}),
        Fault("model.safetensors", cut_after=5000, times=2),
    ],
)
def test_what_passes_is_waited_for(
    fault: Fault, server: Hub, slept: list[float], model_folder: Path
) -> None:
    server.faults = [Fault(**vars(fault))]
    policy = load()
    assert server.faults[0].times == 0
    assert sum(slept) < 30, slept
    expected = make_gpt2().state_dict()["transformer.wte.weight"]
    assert torch.equal(policy.pretrained_model.transformer.wte.weight, expected)


def test_a_hub_that_is_not_there_is_asked_for_seconds_not_minutes(
    server: Hub, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    point_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(ModelError, match=r"org/name: no such folder here, and the hub cannot be"):
        load()
    assert sum(slept) == sum(hub.WAITS)


def test_a_model_in_the_cache_needs_no_hub(
    server: Hub, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    slept.clear()
    for fault in ("503", "no server"):
        hub._ask_hub.cache_clear()
        server.faults = [Fault("/", 503)]
        if fault == "no server":
            point_at("http://127.0.0.1:9", monkeypatch)
        with pytest.warns(UserWarning, match="org/name is taken from the cache"):
            load()
        assert not constants.HF_HUB_OFFLINE
    assert slept == []


@pytest.mark.parametrize("subfolder", ["", "inner"])
def test_an_adapter_on_the_hub_is_loaded_and_then_found_in_the_cache(
    subfolder: str,
    server: Hub,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, fan_in_fan_out=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    model = get_peft_model(base, config).eval()
    server.folder = tmp_path / "hub"
    model.save_pretrained(server.folder / subfolder)
    make_tokenizer().save_pretrained(server.folder / subfolder)
    ids = torch.tensor([[1, 2, 3]])
    place = {"revision": "branch", **({"subfolder": subfolder} if subfolder else {})}
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        policy = AutoModelForCausalLMWithValueHead.from_pretrained(NAME, **place)
        assert policy.is_peft_model
        torch.testing.assert_close(policy(ids)[0], model(ids).logits)
        if not subfolder:  # which a configuration has no key for
            settings = PolicyConfig(model=NAME, revision="branch")
            assert load_tokenizer(NAME, "branch").get_vocab() == make_tokenizer().get_vocab()
            torch.testing.assert_close(load_policy(settings)(ids)[0], model(ids).logits)
    weights = f"{subfolder}/adapter_model.safetensors".lstrip("/")
    assert any(asked.endswith(f"/{weights}") for asked in server.asked)
    assert {asked.partition("/")[0] for asked in server.asked} <= {"branch", COMMIT}


def test_an_adapter_of_a_classifier_on_the_hub_is_loaded(server: Hub, tmp_path: Path) -> None:
    base = transformers.AutoModelForSequenceClassification.from_pretrained(classifier_folder())
    torch.manual_seed(1)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_lin"], init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    server.folder = tmp_path / "hub"
    model.save_pretrained(server.folder)
    found = load_reward(RewardConfig(model=NAME, revision="branch"), torch.device("cpu"))
    reward = found.classifiers[0]
    tokens = reward.tokenizer("This movie was wonderful", return_tensors="pt")
    expected = model(input_ids=tokens.input_ids).logits[0, reward.index]
    assert reward(["This movie was wonderful"]).item() == pytest.approx(expected.item(), abs=1e-4)
    assert {asked.partition("/")[0] for asked in server.asked} <= {"branch", COMMIT}
