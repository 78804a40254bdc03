"""Random configurations: each validates or is refused by name, none crashes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppo_cli.config.loading import load_config, validate
from ppo_cli.config.schema import RunConfig
from ppo_cli.errors import ConfigError
from ppo_cli.utils.yaml_io import dump_yaml, load_yaml
from tests.test_structure import config_keys

QUICK = settings(
    max_examples=80,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
KEYS = st.sampled_from(config_keys()) | st.text(max_size=8)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**40), 10**40)
    | st.integers(0, 200)
    | st.floats()
    | st.floats(0, 1)
    | st.text(max_size=12)
    | st.sampled_from(["kl", "logit", "positive", "embedded", "cpu", "wandb"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
SECTIONS = st.sampled_from(list(RunConfig.model_fields)) | st.text(max_size=8)
CONFIGURATIONS = st.dictionaries(SECTIONS, st.dictionaries(KEYS, VALUES, max_size=4) | VALUES)
# Values that fit most of the time, so that whole configurations come about too.
NEARLY = st.fixed_dictionaries(
    {},
    optional={
        "ppo": st.fixed_dictionaries(
            {},
            optional={
                "batch_size": st.sampled_from([1, 8, 128, 0]),
                "mini_batch_size": st.sampled_from([1, 8, 128]),
                "kl_penalty": st.sampled_from(["kl", "abs", "mse", "full", "KL"]),
                "gamma": st.floats(-0.2, 1.2),
                "score_clip": st.none() | st.floats(0.1, 5),
            },
        ),
        "run": st.fixed_dictionaries(
            {}, optional={"steps": st.integers(0, 9), "output": st.none() | st.text(max_size=5)}
        ),
        "prompts": st.fixed_dictionaries(
            {}, optional={"input_max_text_length": st.integers(1, 9), "source": st.text(max_size=5)}
        ),
        "policy": st.fixed_dictionaries(
            {}, optional={"adapter": st.none() | st.just({"r": 4}) | st.just({"q": 4})}
        ),
    },
)


def outcome(load: Callable[[], RunConfig]) -> tuple[str | None, RunConfig | None]:
    """What a configuration is refused with, or it."""
    try:
        return None, load()
    except ConfigError as error:
        return str(error), None


def named(data: dict[str, Any], message: str) -> bool:
    """Whether the message holds one of the configuration's own names."""
    names = [key for value in data.values() if isinstance(value, dict) for key in value]
    return any(str(name) in message for name in [*names, *data])


@QUICK
@given(CONFIGURATIONS | NEARLY)
def test_a_random_configuration_validates_or_is_refused_by_name(data: dict[str, Any]) -> None:
    message, config = outcome(lambda: validate(data))
    assert message is None or (message.startswith("configuration: ") and named(data, message))
    if config is not None:
        assert validate(load_yaml(config.to_yaml(), "again", {})) == config


@QUICK
@given(CONFIGURATIONS | NEARLY)
def test_the_same_through_a_file(tmp_path: Path, data: dict[str, Any]) -> None:
    file = tmp_path / "random.yaml"
    file.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    message, _ = outcome(lambda: load_config(str(file)))
    assert message is None or message.startswith(str(file))


@QUICK
@given(st.binary(max_size=60) | st.text("ab:-[]{}&*!\"'\n#|><%@`, 0.e", max_size=60))
def test_any_bytes_are_a_configuration_or_no_yaml(tmp_path: Path, content: bytes | str) -> None:
    file = tmp_path / "random.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    message, _ = outcome(lambda: load_config(str(file)))
    assert message is None or message.startswith(str(file))


@QUICK
@given(st.text("abppo.gamma=0[]{}:&*!\"'#", max_size=30) | st.builds("ppo.gamma={}".format, VALUES))
def test_any_assignment_is_taken_or_refused(text: str) -> None:
    message, _ = outcome(lambda: load_config("tiny", assignments=[text]))
    assert message is None or "--set" in message


@QUICK
@given(VALUES)
def test_what_is_written_as_yaml_is_shown_plainly_and_reads_back(value: Any) -> None:
    text = dump_yaml({"x": value})
    shown = text.replace("\n", "")
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u202e\u200b" for c in shown)
    plain = yaml.safe_dump({"x": value}, sort_keys=False)
    assert repr(yaml.safe_load(text)) == repr(yaml.safe_load(plain))


@pytest.mark.parametrize("value", ["\x1b[31m", "a\u202eb", "\x9b", "é😀", "two\nlines"])
def test_hidden_characters_are_escaped_in_yaml(value: str) -> None:
    text = dump_yaml({"x": value})
    assert yaml.safe_load(text) == {"x": value}
    assert ("\\" in text) == (value not in ("é😀", "two\nlines"))
