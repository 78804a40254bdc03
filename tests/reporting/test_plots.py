"""Pictures and terminal charts of metrics."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppo_cli.errors import UsageError
from ppo_cli.reporting.plots import (
    BARS,
    legend_labels,
    moving_average,
    plot_training,
    terminal_chart,
)

LOSS, SCORE = "ppo/loss/total", "env/reward_mean"


def run(steps: int = 40, **changes: Any) -> list[dict[str, Any]]:
    rng = np.random.RandomState(steps)
    return [
        {"step": i + 1, LOSS: float(rng.randn()), SCORE: i / 10, "objective/kl": 2.0} | changes
        for i in range(steps)
    ]


@pytest.mark.parametrize("window", [1, 2, 5, 40, 100])
def test_moving_average_is_numpys_convolution_with_a_shorter_start(window: int) -> None:
    values = np.random.RandomState(0).randn(40) * 3 + 1
    smooth = moving_average(values.tolist(), window)
    assert smooth.shape == values.shape
    if window <= 40:
        inside = np.convolve(values, np.ones(window) / window, mode="valid")
        np.testing.assert_allclose(smooth[window - 1 :], inside)
    for i in range(min(window - 1, 40)):
        assert smooth[i] == pytest.approx(values[: i + 1].mean())


def test_a_value_that_is_not_finite_spoils_only_the_means_that_hold_it() -> None:
    values = [1.0, 2.0, math.nan, 4.0, 5.0, 6.0, math.inf, 8.0, 9.0, 10.0]
    smooth = moving_average(values, 2)
    assert smooth[[0, 1, 4, 5, 8, 9]].tolist() == pytest.approx([1, 1.5, 4.5, 5.5, 8.5, 9.5])


HEADERS = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF-", ".PNG": b"\x89PNG"}


@pytest.mark.parametrize("ending", HEADERS)
def test_every_ending_gives_a_picture_of_its_kind(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"training{ending}"
    plot_training({"good": run(), "bad": run(7)}, path)
    data = path.read_bytes()
    assert data.startswith(HEADERS[ending])
    assert len(data) > 5000


def test_the_png_is_not_blank_and_has_a_panel_a_metric(tmp_path: Path) -> None:
    from matplotlib.image import imread

    sizes = []
    for metrics in ((LOSS,), (LOSS, SCORE), (LOSS, SCORE, "objective/kl")):
        plot_training({"good": run()}, tmp_path / "p.png", metrics)
        pixels = imread(tmp_path / "p.png")
        sizes.append(pixels.shape[:2])
        colours = {tuple(c) for c in (pixels[..., :3].reshape(-1, 3) * 255).astype(int)}
        assert (0x00, 0x72, 0xB2) in colours  # the first run's line
    assert sizes[1][1] == 2 * sizes[0][1]
    assert sizes[2][0] == 2 * sizes[1][0]


def test_no_empty_frame_where_metrics_are_odd_in_number(tmp_path: Path) -> None:
    metrics = (LOSS, SCORE, "objective/kl")
    picture = svg_texts(tmp_path / "p.svg", {"good": run()}, metrics=metrics)
    assert picture.count('id="axes_') == 3


def svg_texts(path: Path, *args: Any, **kwargs: Any) -> str:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_training(*args, output=path, **kwargs)
    return path.read_text(encoding="utf-8")


def test_titles_axes_and_runs_are_named(tmp_path: Path) -> None:
    text = svg_texts(tmp_path / "p.svg", {"ppo-good": run(), "ppo-bad": run()})
    for words in (
        "PPO training loss over time",
        "PPO mean reward over time",
        "PPO step",
        "ppo-good",
        "ppo-bad",
        "mean of 2 steps",
    ):
        assert words in text


@pytest.mark.parametrize("name", ["_hidden", "$x^{", "a$b$c", "<b>&amp;", "\x1b[31mred"])
def test_names_of_runs_are_shown_not_interpreted(tmp_path: Path, name: str) -> None:
    text = svg_texts(tmp_path / "p.svg", {name: run(), "other": run()})
    shown = name.lstrip("_").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    if "\x1b" not in name:
        assert shown in text
    assert "\x1b" not in text


def test_another_ending_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png, \.svg, \.pdf"):
        plot_training({"good": run()}, tmp_path / "p.jpeg")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_metric_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"good has no metric 'env/reward_men'.*env/reward_mean"):
        plot_training({"good": run()}, tmp_path / "p.png", ["env/reward_men"])
    with pytest.raises(UsageError, match=r"no metric 'zzz'.*It has .*objective/kl"):
        terminal_chart({"good": run()}, "zzz")
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_one_step_is_drawn(tmp_path: Path) -> None:
    plot_training({"good": run(1)}, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000
    assert any("█" in line or "▁" in line for line in terminal_chart({"good": run(1)}, SCORE))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_values_that_are_not_finite_do_no_harm(tmp_path: Path, bad: float | None) -> None:
    rows = run(20)
    rows[5][LOSS] = bad
    plot_training({"good": rows}, tmp_path / "p.png", smooth=3)
    assert (tmp_path / "p.png").stat().st_size > 5000
    lines = terminal_chart({"good": rows}, LOSS)
    finite = [row[LOSS] for row in rows if row[LOSS] is not None and math.isfinite(row[LOSS])]
    assert f"{max(finite):.4g}" in "\n".join(lines)  # the axis is that of the finite values


def test_a_metric_that_is_never_finite_does_no_harm(tmp_path: Path) -> None:
    rows = run(5, **{LOSS: math.nan})
    plot_training({"good": rows}, tmp_path / "p.png")
    assert terminal_chart({"good": rows}, LOSS)


@pytest.mark.parametrize("steps", [1, 3, 60, 500])
@pytest.mark.parametrize("width", [40, 72, 120])
def test_no_line_of_a_terminal_chart_is_wider_than_asked(steps: int, width: int) -> None:
    lines = terminal_chart({"ppo-good": run(steps)}, "objective/kl", width=width)
    chart = [line for line in lines if "│" in line or "└" in line]  # the title may wrap
    assert len(chart) == 9
    assert max(len(line) for line in chart) <= width


def test_the_bars_of_a_terminal_chart_rise_with_the_values() -> None:
    rows = [{"step": i + 1, SCORE: float(i)} for i in range(10)]
    lines = terminal_chart({"good": rows}, SCORE, height=4)
    cells = [line.partition("│")[2] for line in lines if "│" in line]
    assert len(cells) == 4
    heights = [sum(BARS.index(row[i]) for row in cells) for i in range(10)]
    assert heights == sorted(heights)
    assert len(set(heights)) == 10
    assert heights[-1] == 32
    for i in range(10):  # each bar stands on the axis
        column = [BARS.index(row[i]) for row in cells]
        assert column == sorted(column)
    assert f"{9:10.4g}" in lines[2]
    assert "step 1 to 10" in lines[-1]


def test_a_terminal_chart_names_metric_and_run_and_has_one_a_run() -> None:
    text = "\n".join(terminal_chart({"ppo-good": run(), "ppo-bad": run(9)}, SCORE))
    assert "ppo-good" in text
    assert "ppo-bad" in text
    assert text.count(SCORE) == 2


def sparse(steps: int = 40, every: int = 10) -> list[dict[str, Any]]:
    rows = run(steps)
    for row in rows[every - 1 :: every]:
        row |= {"eval/score": row[SCORE] + 1, "eval/kl": 3.0}
    return rows


def saved(path: Path, *args: Any, **kwargs: Any) -> Any:
    """The figure that was saved."""
    from matplotlib.figure import Figure

    seen: list[Any] = []
    original = Figure.savefig

    def savefig(self: Figure, *a: Any, **k: Any) -> None:
        seen.append(self)
        original(self, *a, **k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        plot_training(*args, output=path, **kwargs)
    return seen[0]


def drawn(path: Path, *args: Any, **kwargs: Any) -> list[dict[str, tuple[list[float], str]]]:
    """Of each panel the labelled curves: their steps and their markers."""
    return [
        {
            line.get_label(): (list(line.get_xdata()), line.get_marker())
            for line in panel.get_lines()
            if not line.get_label().startswith("_")
        }
        for panel in saved(path, *args, **kwargs).axes
    ]


def test_evaluations_are_points_beside_the_mean_reward(tmp_path: Path) -> None:
    loss, reward = drawn(tmp_path / "p.png", {"good": sparse(), "old": run()})
    assert set(loss) == {"good", "old"}
    assert set(reward) == {"good", "good, held-out", "old"}
    assert reward["good, held-out"] == ([10, 20, 30, 40], "o")
    assert reward["good"] == (list(range(1, 41)), "None")


def test_a_metric_that_some_steps_have_is_drawn_at_those(tmp_path: Path) -> None:
    (panel,) = drawn(tmp_path / "p.png", {"good": sparse()}, metrics=["eval/kl"])
    assert panel == {"good": ([10, 20, 30, 40], "o")}
    lines = terminal_chart({"good": sparse()}, "eval/score")
    assert "step 10 to 40" in lines[-1]
    assert {len(line.partition("│")[2]) for line in lines if "│" in line} == {4}  # a bar each
    rows = sparse(45)  # the last step has none: the metric is known all the same
    with pytest.raises(UsageError, match=r"no metric 'eval/k'.*eval/kl"):
        plot_training({"good": rows}, tmp_path / "q.png", ["eval/k"])


DEEP = "/home/user-with-a-long-name/experiments-2026/sentiment-steering/gpt2-imdb-shaped-seed-17"


@pytest.mark.parametrize(
    "names",
    [
        ["good"],
        [f"{DEEP}/ppo-good", f"{DEEP}/ppo-bad"],
        [f"{DEEP}/{'very-' * 40}long"],
        [f"{DEEP}/seed-{i}" for i in range(30)],
    ],
)
def test_panels_keep_their_size_whatever_the_runs_are_called(
    names: list[str], tmp_path: Path
) -> None:
    figure = saved(tmp_path / "p.png", {name: sparse() for name in names})
    width, height = figure.get_size_inches()
    for panel in figure.axes:
        box = panel.get_position()
        assert box.width * width > 4.5
        assert box.height * height > 2.2
    (legend,) = figure.legends
    inside = legend.get_window_extent()
    assert inside.x0 >= 0 and inside.x1 <= figure.bbox.width
    assert inside.y0 >= 0 and inside.y1 <= min(p.get_window_extent().y0 for p in figure.axes)
    shown = [text.get_text() for text in legend.get_texts()]
    assert len(set(shown)) == len(names) + 1 and shown[-1] == "held-out"


def test_runs_are_called_by_what_tells_them_apart() -> None:
    names = ["/x/a/good", "/x/b/good", "/x/b/bad", "good", "."]
    assert [*legend_labels(names).values()] == ["a/good", "b/good", "bad", "good", "."]
    (long,) = legend_labels(["a/" + "word_" * 30]).values()
    assert max(map(len, long.split("\n"))) <= 40
    assert long.replace("\n", "") == "word_" * 30


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
def test_steps_are_whole_numbers(steps: int, tmp_path: Path) -> None:
    figure = saved(tmp_path / "p.png", {"good": run(steps)})
    ticks = [tick for panel in figure.axes for tick in panel.get_xticks()]
    assert ticks and all(tick == round(tick) for tick in ticks)


def test_a_chart_in_ascii_has_the_same_shape() -> None:
    fine = terminal_chart({"good": run()}, SCORE)
    coarse = terminal_chart({"good": run()}, SCORE, ascii_only=True)
    assert "".join(coarse).isascii()
    assert [len(line) for line in coarse] == [len(line) for line in fine]
    for one, other in zip(fine[2:10], coarse[2:10], strict=True):
        bars, ascii_bars = one.partition("│")[2], other.partition("|")[2]
        assert [bar == " " for bar in bars] == [bar == " " for bar in ascii_bars]


def test_no_setting_of_the_user_s_reaches_the_picture(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True}):  # names of runs are no TeX
        plot_training({"50%_of_{it}": run()}, tmp_path / "p.png")
        assert matplotlib.rcParams["text.usetex"] is True
