"""An HTTP endpoint as a reward: JSON in, JSON out.

    POST {"texts": [...], "queries": [...], "responses": [...], "messages": [...], COLUMN: [...]}
    200  {"scores": [0.7, null, ...]}    or the list alone

A text has a number, or null where the reward does not apply. The token in the environment variable
`PPO_CLI_REWARD_TOKEN` goes along as a bearer token. The standard library's client is used: that of
huggingface_hub is off under HF_HUB_OFFLINE, and differs from release to release.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

from ppo_cli.errors import ModelError
from ppo_cli.rewards.batch import RewardBatch
from ppo_cli.rewards.functions import Value, numbers
from ppo_cli.utils.text import shortened

TOKEN = "PPO_CLI_REWARD_TOKEN"
OVERLOADED = (408, 425, 429)
MAX_WAIT = 30.0  # seconds between two attempts
MAX_ANSWER = 64 * 2**20  # bytes


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Texts and token go to the address that was given, and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


OPENER = urllib.request.build_opener(_NoRedirect)


class EndpointReward:
    """A server's numbers for a batch of texts.

    Args:
        url: takes POST requests.
        timeout: seconds to wait for an answer.
        retries: further attempts where there is no answer, or one of an overloaded server.
        batch_size: texts in a request; None for all.
    """

    def __init__(
        self, url: str, *, timeout: float = 60.0, retries: int = 3, batch_size: int | None = None
    ) -> None:
        self.name = url
        self._timeout = timeout
        self._retries = retries
        self._batch_size = batch_size

    def __call__(self, batch: RewardBatch) -> list[Value]:
        """Its values, a None where it does not apply.

        Raises:
            ModelError: the server does not answer, refuses, or answers something else.
        """
        columns = {name: list(values) for name, values in batch.columns.items()} | {
            "texts": list(batch.texts),
            "queries": list(batch.queries),
            "responses": list(batch.responses),
        }
        total = len(batch.texts)
        size = self._batch_size or max(total, 1)
        found: list[Value] = []
        for start in range(0, total, size):
            part = {name: values[start : start + size] for name, values in columns.items()}
            answer = self._ask(json.dumps(part, default=str).encode())
            if isinstance(answer, dict):
                answer = answer.get("scores")
            count = min(size, total - start)
            found += numbers(answer, count, "the reward endpoint", self.name)
        return found

    def _ask(self, body: bytes) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token := os.environ.get(TOKEN):
            headers["Authorization"] = f"Bearer {token}"
        for attempt in range(self._retries + 1):
            request = urllib.request.Request(self.name, body, headers)
            try:
                with OPENER.open(request, timeout=self._timeout) as answer:
                    return json.loads(answer.read(MAX_ANSWER))
            except urllib.error.HTTPError as error:
                text = " ".join(error.read(500).decode(errors="replace").split())
                fault = f"answered {error.code} {error.reason} ({shortened(text, 200)})"
                if error.code < 500 and error.code not in OVERLOADED:
                    break
            except (ValueError, RecursionError) as error:  # no JSON
                fault = f"answered with something else than JSON ({shortened(str(error), 100)})"
                break
            except OSError as error:  # no connection, no answer in time
                fault = f"did not answer ({getattr(error, 'reason', None) or error})"
            if attempt < self._retries:
                time.sleep(min(2.0**attempt, MAX_WAIT))
        tried = f" after {attempt + 1} attempts" if attempt else ""
        raise ModelError(
            f"the reward endpoint {self.name} {fault}{tried}: see that it runs and takes such "
            "requests (docs/rewards.md)"
        )
