"""Score against KL: synthetic metrics and curves in pictures and tables, and a real run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ppo_cli.cli.plot import Seeds, plot
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
from tests.reporting.test_plots import figure_of, legend_of, texts
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


def frontier_of(*args: Any, **kwargs: Any) -> Any:
    return figure_of(*args, draw=plot_frontier, **kwargs)


def test_the_picture_names_runs_steps_and_n(tmp_path: Path) -> None:
    trails = [trail_of(make_run(tmp_path / name)) for name in ("ppo$x$", "b\u202e")]
    figure = frontier_of(trails, make_curve(1, 2, 8, 64), title="Two $runs")
    text = texts(figure).replace(r"\$", "$")
    for words in ("ppo$x$: best at step 20, last at step 40", "b\\u202e: best", "n=64", "\n8\n",
                  "best of n", "KL from", "Two $runs"):  # fmt: skip
        assert words in text, words
    assert not SEEN.search(text)
    assert "best of n" not in texts(frontier_of(trails, None))
    assert {"#0072B2", "#D55E00"} <= {line.get_color() for line in figure.axes[0].get_lines()}


def test_seeds_share_a_colour_and_their_mean_is_strong(tmp_path: Path) -> None:
    ways = [{10: (1.0, 2.0), 20: (2.0, 4.0), 30: (3.0, 6.0)}, {10: (3.0, 4.0), 20: (2.0, 8.0)}]
    trails = [
        trail_of(make_run(tmp_path / f"tiny-{i}", way, reference=i))
        for i, way in enumerate([*ways, WAY])
    ]
    names = [one.name for one in trails]
    figure = frontier_of(trails, None, groups=[names[:2], names[2:]])
    by_width = sorted(figure.axes[0].get_lines(), key=lambda line: line.get_linewidth())
    mean, thin = by_width[-1], by_width[:2]
    assert mean.get_xydata().tolist() == [[0.0, 0.5], [3.0, 2.0], [6.0, 2.0]]  # KL, score
    assert [len(line.get_xdata()) for line in thin] == [4, 3]
    assert {line.get_color() for line in [mean, *thin]} == {"#0072B2"}
    shown = [text.replace("\n", " ") for text in legend_of(figure)]
    assert shown[0].startswith("tiny (2 seeds): best at steps 10 to 30, last at steps 20 to")
    assert "thin, each seed" in texts(figure)
    shown = legend_of(frontier_of(trails, None, labels=["A", "B", "C"]))
    assert [text[:2] for text in shown[:3]] == ["A:", "B:", "C:"]
    with pytest.raises(UsageError, match="1 for 3 curves"):
        frontier_of(trails, None, labels=["A"])


def test_labels_of_the_curve_keep_apart(tmp_path: Path) -> None:
    figure = frontier_of([trail_of(make_run(tmp_path / "run"))], make_curve(*range(1, 65)))
    labels = [text.get_text() for text in figure.axes[0].texts if text.get_text()]
    assert "n=64" in labels and "63" not in labels
    assert 2 < len(labels) < 21


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
    wrong: dict[str, Any]
    for wrong in ({"metric": ["eval/kl"]}, {"smooth": 3}, {"log": True}, {"seeds": Seeds.se}):
        with pytest.raises(
            UsageError, match=f"each evaluation as it is: leave --{next(iter(wrong))}"
        ):
            plot(["run"], frontier=True, **wrong)
    for wrong in ({"title": "T"}, {"labels": "x"}, {"seeds": Seeds.each}, {"output": "x.png"}):
        with pytest.raises(UsageError, match=f"a table of each run: leave --{next(iter(wrong))}"):
            plot(["run"], frontier=True, terminal=True, **wrong)
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
