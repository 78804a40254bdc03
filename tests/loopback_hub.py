"""A model hub on this machine that takes uploads, over the calls that huggingface_hub makes."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".png")  # sent as large files, which go another way


@dataclass
class Hub:
    """What the hub holds, and what it answers.

    Attributes:
        address: of the hub.
        fails: part of a path -> status that is answered there.
        repositories: name -> branch -> path -> content.
        settings: name -> what its maker asked for.
        commits: the header of each commit.
        received: every request: its path, headers and body.
        cards: name -> metadata in the card of a model that is there to be asked for.
    """

    address: str = ""
    fails: dict[str, int] = field(default_factory=dict)
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    received: list[tuple[str, bytes]] = field(default_factory=list)
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve a hub on a free port of this machine."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, content: Any = None, status: int = 200) -> None:
        data = json.dumps({} if content is None else content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _handle(self) -> None:
        hub, path = self.hub, unquote(self.path.partition("?")[0])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.received.append((path, body))
        for part, status in hub.fails.items():
            if part in path:
                return self._answer({"error": f"refused with {status}"}, status)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self._answer({"transfer": "basic", "objects": self._places(json.loads(body))})
        if path.startswith("/large/"):
            hub.large[path.removeprefix("/large/")] = body
            return self._answer()
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/(.+))?", path):
            return self._model(found[1], found[2], found[3], body)
        return self._answer({"error": "no such call"}, 404)

    do_GET = do_POST = do_PUT = _handle

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            return self._answer({"error": "You already created this model repo"}, 409)
        self.hub.repositories[name] = {"main": {".gitattributes": b""}}
        self.hub.settings[name] = asked
        return self._answer({"url": f"{self.hub.address}/{name}", "name": name})

    def _places(self, asked: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {**one, "actions": {"upload": {"href": f"{self.hub.address}/large/{one['oid']}"}}}
            for one in asked["objects"]
        ]

    def _model(self, name: str, call: str | None, rest: str, body: bytes) -> None:
        hub = self.hub
        if call is None and name in hub.cards:
            return self._answer({"id": name, "cardData": hub.cards[name]})
        if name not in hub.repositories:
            return self._answer({"error": "Repository not found"}, 404)
        branches = hub.repositories[name]
        if call == "branch":
            branches[rest] = {}
        elif call == "preupload":
            files = json.loads(body)["files"]
            modes = [(f["path"], "lfs" if f["path"].endswith(LARGE) else "regular") for f in files]
            made = [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]
            return self._answer({"files": made})
        elif call == "commit":
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    hub.commits.append(value)
                elif line["key"] == "file":
                    branches[rest][value["path"]] = base64.b64decode(value["content"])
                else:
                    branches[rest][value["path"]] = hub.large[value["oid"]]
            return self._answer({"commitUrl": f"{hub.address}/{name}", "commitOid": COMMIT})
        elif call == "tree":
            return self._answer(
                [{"type": "file", "path": p, "size": 0, "oid": ""} for p in branches["main"]]
            )
        private = hub.settings.get(name, {}).get("visibility") == "private"
        files = [{"rfilename": path} for path in branches["main"]]
        return self._answer({"id": name, "private": private, "siblings": files})
