"""Charts in the terminal."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from ppo_cli.reporting.terminal_chart import BARS, terminal_chart
from tests.reporting.test_plots import LOSS, SCORE, run, sparse


def chart(*args: Any, **kwargs: Any) -> list[str]:
    return [line.plain for line in terminal_chart(*args, **kwargs)]


def cells(lines: list[str]) -> list[str]:
    return [line.partition("│")[2] for line in lines if "│" in line]


@pytest.mark.parametrize("steps", [1, 3, 60, 500])
@pytest.mark.parametrize("width", [50, 80, 120, 200])
def test_no_line_is_wider_than_asked(steps: int, width: int) -> None:
    names = {"ppo-good": run(steps), "a/" + "very-" * 40 + "long": run(7), "日本" * 30: run(9)}
    for runs in ({"ppo-good": run(steps)}, names):
        lines = terminal_chart(runs, "objective/kl", width=width)
        assert max(line.cell_len for line in lines) <= width
    assert len(cells(chart({"good": run(steps)}, SCORE, width=width))) == 8


def test_the_bars_rise_with_the_values() -> None:
    rows = [{"step": i + 1, SCORE: float(i)} for i in range(10)]
    lines = chart({"good": rows}, SCORE, height=4)
    drawn = cells(lines)
    assert len(drawn) == 4
    heights = [sum(BARS.index(row[i]) for row in drawn) for i in range(10)]
    assert heights == sorted(heights)
    assert len(set(heights)) == 10
    assert heights[-1] == 32
    for i in range(10):  # each bar stands on the axis
        column = [BARS.index(row[i]) for row in drawn]
        assert column == sorted(column)
    assert f"{9:10.4g}" in lines[1]
    assert "step 1 to 10" in lines[-1]


def test_several_runs_share_one_chart_with_a_symbol_and_a_colour_each() -> None:
    up = [{"step": i + 1, SCORE: float(i)} for i in range(20)]
    down = [{"step": i + 1, SCORE: 19.0 - i} for i in range(20)]
    lines = terminal_chart({"good": up, "bad": down, "old": [{"step": 1, LOSS: 1.0}]}, SCORE, 40)
    drawn = cells([line.plain for line in lines])
    assert len(drawn) == 14 and {len(row) for row in drawn} == {28}
    for symbol, rows in (("o", drawn[::-1]), ("x", drawn)):  # one rises, one falls
        columns = [row.index(symbol) for row in rows if symbol in row]
        assert len(columns) > 9 and columns == sorted(columns)
    assert [line.plain.strip() for line in lines[-3:-1]] == ["o good", "x bad"]
    assert "+ old: no finite value" in lines[-1].plain
    colours = {str(span.style) for line in lines for span in line.spans}
    assert {"cyan", "red", "green"} <= colours


def test_between_far_points_there_are_dots_and_curves_that_meet_take_turns() -> None:
    few = [{"step": 1, SCORE: 0.0}, {"step": 31, SCORE: 1.0}]
    (top, *_, bottom) = cells(chart({"a": few, "b": few}, SCORE, 42))
    assert top.endswith("x") and bottom.startswith("o")  # the last column is odd
    text = "".join(cells(chart({"a": few, "b": few[:1]}, SCORE, 42)))
    assert text.count("·") == 28 and text.count("o") + text.count("x") == 2
    assert chart({"a": few, "b": few}, SCORE, 42, ascii_only=True)[-3].isascii()


def test_of_several_seeds_the_mean_is_drawn() -> None:
    runs = {
        f"tiny-{i}": [{"step": s, SCORE: float(i + s)} for s in range(1, 9 - i)] for i in range(3)
    }
    (heading, top, *_) = lines = chart(runs, SCORE, groups=[[*runs]])
    assert "mean of tiny (3 seeds)" in heading
    assert top.split()[0] == "7" and "step 1 to 6" in lines[-1]  # the shortest has 6 steps


def test_smoothing_and_the_logarithmic_scale_change_the_chart() -> None:
    rows = [{"step": i + 1, SCORE: 10.0**i} for i in range(8)]
    drawn = cells(chart({"good": rows}, SCORE, log=True))
    heights = [sum(BARS.index(row[i]) for row in drawn) for i in range(8)]
    assert {b - a for a, b in pairwise(heights)} == {9}
    lines = chart({"good": rows}, SCORE, log=True)
    assert "log scale" in lines[1] and "1e+07" in lines[2]
    zero = chart({"good": [{"step": 0, SCORE: -1.0}, *rows]}, SCORE, log=True)
    assert "linear within 10000 of 0" in zero[1]
    assert (
        "linear scale: all values are 0"
        in chart({"g": [{"step": 1, SCORE: 0.0}]}, SCORE, log=True)[1]
    )
    smooth = chart({"good": rows}, SCORE, smooth=2)
    assert smooth[1].split()[0] == "5.5e+06"


def test_a_chart_names_metric_and_run() -> None:
    assert "(env/reward_mean), ppo-good" in chart({"ppo-good": run()}, SCORE)[0]
    lines = chart({"good": sparse()}, "eval/score", labels=["my run"])
    assert "my run" in lines[0] and "step 10 to 40" in lines[-1]
    assert {len(row) for row in cells(lines)} == {4}  # a bar each


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_the_axis_is_that_of_the_finite_values(bad: float | None) -> None:
    rows = run(20)
    rows[5][LOSS] = bad
    finite = [row[LOSS] for row in rows if row[LOSS] is not None and math.isfinite(row[LOSS])]
    assert f"{max(finite):.4g}" in "\n".join(chart({"good": rows}, LOSS))
    assert chart({"good": run(5, **{LOSS: bad})}, LOSS)[-1] == " no finite value"


def test_a_chart_in_ascii_has_the_same_shape() -> None:
    fine = chart({"good": run()}, SCORE)
    coarse = chart({"good": run()}, SCORE, ascii_only=True)
    assert "".join(coarse).isascii()
    assert [len(line) for line in coarse] == [len(line) for line in fine]
    for one, other in zip(fine[1:9], coarse[1:9], strict=True):
        bars, ascii_bars = one.partition("│")[2], other.partition("|")[2]
        assert [bar == " " for bar in bars] == [bar == " " for bar in ascii_bars]
