"""Score against KL: synthetic metrics and curves in pictures and tables, and a real run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ppo_cli.cli.plot import plot
from ppo_cli.config.loading import load_config
from ppo_cli.errors import UsageError
from ppo_cli.evaluation.best_of_n import BestOfN, BestOfPoint, kl_bound
from ppo_cli.evaluation.bootstrap import Interval
from ppo_cli.reporting.frontier import (
    CURVE_FILE,
    Trail,
    plot_frontier,
    read_curve,
    trail,
    write_curve,
)
from ppo_cli.reporting.tables import frontier_table
from ppo_cli.training.build import build_training
from ppo_cli.training.records import METRICS_FILE
from ppo_cli.training.run_directory import RunDirectory
from tests.conftest import SMALL_RUN
from tests.test_security import SEEN, shown

WAY = {10: (1.0, 0.5), 20: (2.0, 2.5), 30: (1.5, 3.5), 40: (9.0, 50.0)}  # step: score, KL


def make_run(
    folder: Path, way: Mapping[int, tuple[float, float]] = WAY, reference: float = -0.1
) -> RunDirectory:
    """Make a run directory with a line every five steps and these evaluations."""
    run = RunDirectory(folder)
    run.path.mkdir(parents=True)
    run.record(load_config(SMALL_RUN, assignments=["run.kl_limit=20"]))
    rows: list[dict[str, Any]] = []
    for step in range(5, 45, 5):
        rows.append({"step": step, "ppo/loss/total": 0.5})
        if step in way:
            score, kl = way[step]
            rows[-1] |= {"eval/score": score, "eval/kl": kl, "eval/reference_score": reference}
    run.records.append(METRICS_FILE, rows)
    return run


def trail_of(run: RunDirectory) -> Trail:
    return trail(str(run.path), run.records.metrics(), run.config().run)


def make_curve(*counts: int, score: float = 0.0) -> BestOfN:
    """Best-of-n whose score is `score` plus the logarithm of n."""
    scores = [score + math.log(n) for n in counts]
    points = [
        BestOfPoint(n, kl_bound(n), s, Interval(s, s - 0.1, s + 0.1))
        for n, s in zip(counts, scores, strict=True)
    ]
    return BestOfN("POSITIVE", 0, 4, max(counts), score, points)


def test_a_trail_is_the_evaluations_and_the_best_is_within_the_limit(tmp_path: Path) -> None:
    found = trail_of(make_run(tmp_path / "run", {**WAY, 25: (math.nan, 1.0)}))
    assert [e.step for e in found.evaluations] == [10, 20, 30, 40]
    assert found.best is not None and found.best.step == 20  # 40 scores higher, at a KL of 50
    assert found.reference_score == -0.1


def test_a_run_without_evaluations_is_one_clear_error(tmp_path: Path) -> None:
    make_run(tmp_path / "with")
    run = make_run(tmp_path / "without", {})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=r"without has no evaluation.*run\.eval_every"):
        plot([str(tmp_path / "with"), str(run.path)], frontier=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_curve_is_that_of_the_first_run_that_has_one(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in "abc"]
    assert read_curve([run.path for run in runs]) is None
    write_curve(runs[2].path, make_curve(1, 2))
    write_curve(runs[1].path, make_curve(1, 4))
    assert read_curve([run.path for run in runs]) == make_curve(1, 4)
    for damage in ("{", "[]", '{"label": 1}', json.dumps(make_curve(1).as_dict() | {"points": []})):
        (runs[0].path / CURVE_FILE).write_text(damage)
        with pytest.raises(UsageError, match=r"frontier\.json is damaged"):
            read_curve([run.path for run in runs])


def test_between_its_points_the_curve_is_straight_and_beyond_them_unknown() -> None:
    curve = make_curve(1, 4)
    assert curve.score_at(kl_bound(4) / 2) == pytest.approx(math.log(4) / 2)
    assert curve.score_at(kl_bound(4) * 1.01) is None
    assert curve.share_at(kl_bound(4), 0.5) == pytest.approx(0.5 / math.log(4))
    assert curve.share_at(0.0, 0.5) is None


def svg(path: Path, *args: Any) -> str:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_frontier(*args, path)
    return path.read_text(encoding="utf-8")


def test_the_picture_names_runs_steps_and_n(tmp_path: Path) -> None:
    trails = [trail_of(make_run(tmp_path / name)) for name in ("ppo$x$", "b\u202e")]
    text = svg(tmp_path / "p.svg", trails, make_curve(1, 2, 8, 64))
    for words in ("ppo$x$", "best: step 20, last: step 40", "n=64", ">8<", "best of n", "KL from"):
        assert words in text, words
    assert not SEEN.search(text)
    assert "best of n" not in svg(tmp_path / "p.svg", trails, None)
    assert {"#0072b2", "#d55e00"} <= set(text.lower().replace(";", " ").split())


def test_labels_of_the_curve_keep_apart(tmp_path: Path) -> None:
    crowd = make_curve(*range(1, 65))
    text = svg(tmp_path / "p.svg", [trail_of(make_run(tmp_path / "run"))], crowd)
    assert "n=64" in text and ">63<" not in text
    assert 1 < sum(f">{n}<" in text for n in range(2, 64)) < 20


def test_the_command_writes_a_picture_or_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(Path("run"))
    plot(["run"], frontier=True)
    out, err = capsys.readouterr()
    assert out == "run/frontier.png\n" and "run.best_of_n=[1,2,4,8,16,32,64]" in err
    assert Path("run/frontier.png").read_bytes().startswith(b"\x89PNG")
    write_curve(run.path, make_curve(1, 4, score=-0.2))
    plot(["run"], frontier=True, output="x.pdf")
    out, err = capsys.readouterr()
    assert (out, err) == ("x.pdf\n", "")
    plot(["run"], frontier=True, terminal=True)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    cells = [line.split() for line in lines]
    assert ["reference", "0.00", "-0.100", "-0.200", "-"] in cells
    there = -0.2 + math.log(4) * 0.5 / kl_bound(4)
    assert ["10", "0.50", "1.000", f"{there:.3f}", f"{1.2 / (there + 0.2):.2f}"] in cells
    assert ["20", "2.50", "2.000", "-", "-", "best"] in cells
    assert ["40", "50.00", "9.000", "-", "-", "last"] in cells
    for wrong in ({"metric": ["eval/kl"]}, {"smooth": 3}):
        with pytest.raises(UsageError, match="--metric and --smooth"):
            plot(["run"], frontier=True, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"\.png, \.svg, \.pdf"):
        plot(["run"], frontier=True, output="x.gif")
    assert not Path("x.gif").exists()


def test_names_in_the_table_are_text(tmp_path: Path) -> None:
    text = shown([frontier_table(trail_of(make_run(tmp_path / "[red]\x1b")), None)])
    assert "[red]\\x1b" in text and not SEEN.search(text)


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_measures_best_of_n_at_its_end_unless_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["prompts.held_out=6", "run.device=cpu", "run.steps=1", "run.best_of_n=[8, 2]"]
    training = build_training(load_config(SMALL_RUN, assignments=settings))
    list(training.steps())
    training.request_stop()
    training.finish()
    assert read_curve([training.directory.path]) is None
    training.stop_requested = False
    training.finish()
    curve = read_curve([training.directory.path])
    assert curve is not None
    assert [point.n for point in curve.points] == [1, 2, 8]
    assert (curve.prompts, curve.samples, curve.label) == (6, 8, "POSITIVE")
    scores = [point.score for point in curve.points]
    assert scores == sorted(scores)
    assert scores[0] == pytest.approx(curve.reference_score)
    training.directory.unlock()
