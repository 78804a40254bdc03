"""The settings of a run as a configuration: which are taken, and from where."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppo_cli.config.loading import load_config, recorded_run
from ppo_cli.errors import ConfigError
from tests.conftest import SMALL_RUN

OLD = Path(__file__).parents[1] / "fixtures/run-0.1/run"


@pytest.mark.parametrize("name", [OLD, OLD / "run.yaml"], ids=["directory", "file"])
def test_a_run_of_release_0_1_gives_its_settings_but_not_its_output(
    name: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(str(name), assignments=["ppo.gamma=0.5"])
    assert (config.ppo.learning_rate, config.ppo.gamma, config.run.seed) == (0.005, 0.5, 7)
    assert config.run.output is None and str(config.output) == "ppo-good"
    assert recorded_run(str(name)) == OLD
    assert recorded_run(SMALL_RUN) is None and recorded_run("tiny") is None


def test_relative_inputs_are_found_where_the_run_found_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "there"
    there.mkdir()
    record = (
        "inputs: {{policy.model: {{name: {}, path: {}}}, nonsense: 1, run.x: {{}}}}\nconfig: {}\n"
    )

    def model(name: str, recorded: str = "model") -> str:
        settings = f"{{policy: {{model: {name}}}}}"
        (tmp_path / "run.yaml").write_text(record.format(recorded, there, settings))
        return load_config("run.yaml").policy.model

    assert model("model") == str(there)
    assert model("other") == "other"  # edited since: the record is of another model
    (tmp_path / "model").mkdir()
    assert model("model") == "model"


def test_faults_in_the_settings_of_a_run_are_placed(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("versions: {}\nconfig:\n  ppo: {lam: 1}\n  run:\n    stepps: 3\n")
    with pytest.raises(ConfigError, match=r"run\.yaml, line 5: run\.stepps: .*'steps'"):
        load_config(str(file))
