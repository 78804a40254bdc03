"""HTTP endpoints as rewards, against a server on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ppo_cli.errors import ModelError
from ppo_cli.rewards import endpoint
from ppo_cli.rewards.batch import RewardBatch
from ppo_cli.rewards.endpoint import EndpointReward

BATCH = RewardBatch(
    ["q a", "r b", "s c"], ["q", "r", "s"], [" a", " b", " c"], {"label": [1, 2, 3]}
)


class Server(ThreadingHTTPServer):
    """Answers with what `answers` holds, one after the other: (status, body, headers)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[tuple[int, str, dict[str, str]]] = []
        self.bodies: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/score"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies.append(json.loads(body))
        self.server.tokens.append(self.headers["Authorization"])
        status, text, headers = self.server.answers.pop(0)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(endpoint.time, "sleep", lambda _: None)
    monkeypatch.delenv(endpoint.TOKEN, raising=False)
    running.answers, running.bodies, running.tokens = [], [], []
    return running


def test_texts_and_columns_go_out_and_numbers_come_back(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers = [(200, '{"scores": [1, null, -2.5]}', {})]
    assert EndpointReward(server.url)(BATCH) == [1.0, None, -2.5]
    assert server.bodies == [
        {
            "texts": ["q a", "r b", "s c"],
            "queries": ["q", "r", "s"],
            "responses": [" a", " b", " c"],
            "label": [1, 2, 3],
        }
    ]
    assert server.tokens == [None]
    monkeypatch.setenv(endpoint.TOKEN, "word")
    server.answers = [(200, "[1, 2]", {}), (200, "[3]", {})]
    assert EndpointReward(server.url, batch_size=2)(BATCH) == [1.0, 2.0, 3.0]
    assert [body["label"] for body in server.bodies[1:]] == [[1, 2], [3]]
    assert server.tokens[1:] == ["Bearer word"] * 2


def test_an_overloaded_server_is_asked_again(server: Server) -> None:
    server.answers = [(503, "busy", {}), (429, "slow down", {}), (200, "[1, 2, 3]", {})]
    assert EndpointReward(server.url, retries=2)(BATCH) == [1.0, 2.0, 3.0]
    server.answers = [(503, "busy", {})] * 2
    with pytest.raises(ModelError, match=r"answered 503 .*busy.* after 2 attempts"):
        EndpointReward(server.url, retries=1)(BATCH)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ((404, "no such path", {}), r"answered 404 .*no such path"),
        ((200, "<html>", {}), "something else than JSON"),
        ((200, '{"score": 1}', {}), "returned None: return a list"),
        ((200, "[1]", {}), "returned 1 values for 3 texts"),
        ((200, '["a", 1, 2]', {}), "returned 'a' for text 1"),
        ((302, "", {"Location": "http://127.0.0.1:1/"}), "answered 302"),
    ],
)
def test_other_answers_end_it_at_once(server: Server, answer: Any, wanted: str) -> None:
    server.answers = [answer]
    with pytest.raises(ModelError, match=wanted) as caught:
        EndpointReward(server.url)(BATCH)
    assert server.url in str(caught.value) and len(server.bodies) == 1


def test_no_answer_is_waited_for_as_long_as_it_says(server: Server) -> None:
    with pytest.raises(ModelError, match=r"did not answer \(.*refused\) after 2 attempts"):
        EndpointReward("http://127.0.0.1:1/score", retries=1)(BATCH)
    hanging = threading.Event()
    server.answers = [(200, "[1, 2, 3]", {})]
    old = Handler.do_POST
    try:
        Handler.do_POST = lambda self: hanging.wait(5) and None  # type: ignore[method-assign]
        with pytest.raises(ModelError, match=r"did not answer \(.*timed out\)"):
            EndpointReward(server.url, timeout=0.05, retries=0)(BATCH)
    finally:
        hanging.set()
        Handler.do_POST = old  # type: ignore[method-assign]
