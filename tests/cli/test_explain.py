"""`stats --explain`: every key, with and without a run, and the words it may be asked in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ppo_cli.evaluation.quality import MEASURES, all_statistics
from ppo_cli.training import diagnostics
from tests.test_bad_input import run_here  # noqa: F401

Run = Callable[[list[str], Path], tuple[int, str, str]]
OLD_RUN = Path(__file__).parent.parent / "fixtures" / "run-0.1" / "run"


def test_every_statistic_has_what_is_said_of_it() -> None:
    for key, about in all_statistics().items():
        assert about.meaning and about.unit, key
        assert about.healthy or not about.remedy, key
    known = all_statistics()
    assert f"{diagnostics.MAX_CLIP_FRACTION:.0%}".replace("%", " %") in (
        known["ppo/policy/clipfrac"].healthy
    )
    assert f"over {diagnostics.MAX_APPROX_KL:g} " in known["ppo/policy/approxkl"].healthy
    assert f"below {diagnostics.MAX_LOGPROB_GAP:g}" in known["sampling/logprob_gap"].healthy
    assert f"below {diagnostics.MAX_KL_PER_TOKEN:g} a token" in known["objective/kl"].healthy


def test_it_works_without_a_run_and_repeats(tmp_path: Path, run_here: Run) -> None:  # noqa: F811
    about = all_statistics()["objective/kl"]
    code, out, err = run_here(
        ["stats", "--explain", "objective/kl", "--explain", "Distinct-2"], tmp_path
    )
    text = " ".join(out.split())
    assert code == 0, err
    assert "objective/kl" in text and "eval/distinct_2" in text
    for part in (about.unit, about.formula, about.healthy, about.remedy):
        assert part in text
    assert "value " not in text


def test_a_run_adds_its_value(tmp_path: Path, run_here: Run) -> None:  # noqa: F811
    rows = [json.loads(li) for li in (OLD_RUN / "metrics.jsonl").read_text().splitlines()]
    arguments = ["stats", str(OLD_RUN), "--explain", "objective/kl"]
    code, out, err = run_here([*arguments, "--json"], tmp_path)
    assert code == 0, err
    assert json.loads(out)["objective/kl"]["value"] == rows[-1]["objective/kl"]
    out = run_here([*arguments, "--step", "1"], tmp_path)[1]
    assert f"value    {rows[0]['objective/kl']:.5g}" in out


def test_all_lists_every_key_and_a_term_of_a_reward_has_a_name(
    tmp_path: Path,
    run_here: Run,  # noqa: F811
) -> None:
    out = run_here(["stats", "--explain", "all"], tmp_path)[1]
    assert [key for key in all_statistics() if key not in out] == []
    out = run_here(["stats", "--explain", "env/rewards/my music/mean"], tmp_path)[1]
    assert "env/rewards/my music/mean" in out and "times its weight" in out


def test_every_measure_of_the_tables_can_be_asked_for_by_its_name() -> None:
    from ppo_cli.reporting.explanations import explained

    for measure in MEASURES:
        for name in (measure.key, measure.name):
            assert list(explained([name])) == [f"eval/{measure.key}"]


def test_screens_point_to_it_once(tmp_path: Path, run_here: Run) -> None:  # noqa: F811
    err = run_here(["stats", str(OLD_RUN)], tmp_path)[2]
    assert err.count("ppo-cli stats --explain KEY") == 1
    assert run_here(["stats", str(OLD_RUN), "--json"], tmp_path)[2] == ""
