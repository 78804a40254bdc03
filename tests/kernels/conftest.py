"""All fast paths are on in the tests of them, whatever the environment says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ppo_cli.kernels.switch import using


@pytest.fixture(autouse=True)
def fast_paths() -> Iterator[None]:
    with using("auto"):
        yield
