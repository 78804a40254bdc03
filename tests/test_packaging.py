"""What pyproject.toml says of versions and addresses holds for the files that repeat it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import ppo_cli

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
WRITTEN = [*PROJECT["dependencies"], *(one for extra in EXTRAS.values() for one in extra)]
REQUIRED = [Requirement(one) for one in WRITTEN]


def pins() -> dict[str, str]:
    """Name -> version of each line of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(one.name): next(iter(one.specifier)).version for one in pinned}


@pytest.mark.parametrize("required", REQUIRED, ids=WRITTEN)
def test_each_pin_lies_within_the_bounds(required: Requirement) -> None:
    pinned = pins().get(canonicalize_name(required.name))
    if pinned is None:  # of a feature that the tests do without
        tested = [Requirement(one).name for one in (*PROJECT["dependencies"], *EXTRAS["dev"])]
        assert required.name not in tested, "constraints.txt does not pin it"
    else:
        assert required.specifier.contains(pinned), f"constraints.txt has {pinned}"


def test_each_bound_that_is_written_twice_is_one() -> None:
    bounds: dict[str, set[str]] = {}
    for required in REQUIRED + [Requirement(one) for one in PYPROJECT["build-system"]["requires"]]:
        bounds.setdefault(required.name, set()).add(str(required.specifier))
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}


def test_torch_and_transformers_have_upper_bounds() -> None:
    bounded = {
        one.name for one in REQUIRED if any(bound.operator == "<" for bound in one.specifier)
    }
    assert {"torch", "transformers"} <= bounded


def test_the_lowest_python_is_one_everywhere() -> None:
    allowed = SpecifierSet(PROJECT["requires-python"])
    lowest = next(bound.version for bound in allowed if bound.operator == ">=")
    assert PYPROJECT["tool"]["mypy"]["python_version"] == lowest
    named = [one.rpartition(" ")[2] for one in PROJECT["classifiers"] if "Python :: 3." in one]
    assert lowest in named
    assert all(version in allowed for version in named)
    assert default_environment()["python_version"] in allowed
    assert set(re.findall(r"Python (3\.\d+)", (ROOT / "README.md").read_text())) <= {lowest}


def test_version_and_address_are_one_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    address = PROJECT["urls"]["Repository"]
    assert f"version: {PROJECT['version']}\n" in citation
    assert ppo_cli.__version__ == PROJECT["version"]
    texts = [citation, (ROOT / "SECURITY.md").read_text(), (ROOT / "pyproject.toml").read_text()]
    for text in texts:
        found = re.findall(r"https://github\.com/[\w.-]+/[\w.-]+", text)
        assert set(found) == {address}
