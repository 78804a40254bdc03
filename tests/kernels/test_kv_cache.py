"""The name of the cache argument. `models/test_decode_loop.py` tests the cache itself."""

from __future__ import annotations

from typing import Any

import pytest

from ppo_cli.kernels.kv_cache import cache_argument


class Older:
    def forward(self, input_ids: Any = None, past_key_values: Any = None) -> None: ...


class Newer:
    def forward(self, input_ids: Any = None, cache: Any = None) -> None: ...


@pytest.mark.parametrize(("model", "name"), [(Older(), "past_key_values"), (Newer(), "cache")])
def test_a_cache_goes_by_the_name_that_the_model_has_for_it(model: Any, name: str) -> None:
    assert cache_argument(model, "kept") == {name: "kept"}
    assert cache_argument(model, None) == {}
