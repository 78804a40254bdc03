"""The cache's name as an argument; what is in it is looked at in `models/test_decode_loop.py`."""

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
