"""Pictures of metrics: what is drawn, through matplotlib's objects."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from ppo_cli.cli.plot import Seeds, plot
from ppo_cli.config.loading import load_config
from ppo_cli.errors import UsageError
from ppo_cli.reporting.plots import plot_training
from ppo_cli.training.run_directory import RunDirectory
from tests.conftest import SMALL_RUN

LOSS, SCORE = "ppo/loss/total", "env/reward_mean"


def run(steps: int = 40, **changes: Any) -> list[dict[str, Any]]:
    rng = np.random.RandomState(steps)
    return [
        {"step": i + 1, LOSS: float(rng.randn()), SCORE: i / 10, "objective/kl": 2.0} | changes
        for i in range(steps)
    ]


def sparse(steps: int = 40, every: int = 10) -> list[dict[str, Any]]:
    rows = run(steps)
    for row in rows[every - 1 :: every]:
        row |= {"eval/score": row[SCORE] + 1, "eval/kl": 3.0}
    return rows


def figure_of(*args: Any, draw: Any = plot_training, **kwargs: Any) -> Any:
    """The figure that would be saved; drawing its pixels is left out."""
    from matplotlib.figure import Figure

    seen: list[Any] = []

    def savefig(self: Figure, path: Path, **_: Any) -> None:
        seen.append(self)
        path.write_bytes(b"")

    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr(Figure, "savefig", savefig)
        draw(*args, output=Path(folder) / "x.png", **kwargs)
    return seen[0]


def drawn(*args: Any, **kwargs: Any) -> list[dict[str, tuple[list[float], str]]]:
    """Of each panel the labelled curves: their steps and their markers."""
    return [
        {
            line.get_label(): (list(line.get_xdata()), line.get_marker())
            for line in panel.get_lines()
            if not line.get_label().startswith("_")
        }
        for panel in figure_of(*args, **kwargs).axes
    ]


def texts(figure: Any) -> str:
    """All text of a figure."""
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def legend_of(figure: Any) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


HEADERS = {".png": b"\x89PNG\r\n\x1a\n", ".svg": b"<?xml", ".pdf": b"%PDF-", ".PNG": b"\x89PNG"}


@pytest.mark.parametrize("ending", HEADERS)
def test_every_ending_gives_a_picture_of_its_kind(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"training{ending}"
    plot_training({"good": run(7)}, path, [LOSS])
    data = path.read_bytes()
    assert data.startswith(HEADERS[ending])
    assert len(data) > 4000


def test_another_ending_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.png, \.svg, \.pdf"):
        plot_training({"good": run()}, tmp_path / "p.jpeg")
    with pytest.raises(UsageError, match=r"no metric 'env/reward_men'.*env/reward_mean"):
        plot_training({"good": run()}, tmp_path / "p.png", ["env/reward_men"])
    assert list(tmp_path.iterdir()) == []


def test_a_panel_a_metric_with_its_run_s_colour_title_and_axes() -> None:
    figure = figure_of({"good": run()}, metrics=[LOSS, SCORE, "objective/kl"])
    assert len(figure.axes) == 3
    assert {panel.get_lines()[0].get_color() for panel in figure.axes} == {"#0072B2"}
    shown = texts(figure)
    for words in ("PPO training loss over time", "PPO step", "mean of the last 2 steps"):
        assert words in shown


@pytest.mark.parametrize(
    ("metrics", "shape"), [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 2)), (7, (3, 3))]
)
def test_panels_stand_in_columns_and_none_is_empty(metrics: int, shape: tuple[int, int]) -> None:
    rows = [{"step": 1} | {f"m{i}": 1.0 for i in range(metrics)}]
    figure = figure_of({"good": rows}, metrics=[f"m{i}" for i in range(metrics)])
    assert len(figure.axes) == metrics
    assert figure.axes[0].get_gridspec().get_geometry() == shape


@pytest.mark.parametrize("name", ["_hidden", "$x^{", "a$b$c", "<b>&amp;", "\x1b[31mred", "日本"])
def test_names_of_runs_are_shown_not_interpreted(name: str) -> None:
    figure = figure_of({name: run(2), "other": run(2)}, title=f"T {name}")
    shown = legend_of(figure)[0].replace(r"\$", "$")
    assert shown == name.lstrip("_").replace("\x1b", "\\x1b")
    assert "\x1b" not in texts(figure)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
def test_steps_are_whole_numbers_and_few_are_marked(steps: int) -> None:
    figure = figure_of({"good": run(steps)})
    for panel in figure.axes:
        low, high = panel.get_xlim()
        ticks = [tick for tick in panel.get_xticks() if low <= tick <= high]
        assert ticks and all(tick == round(tick) for tick in ticks)
        assert low < 1 and steps < high
        assert (panel.get_lines()[0].get_marker() == "o") == (steps <= 10)
    assert "constant" not in texts(figure)


def test_what_a_panel_cannot_show_is_said_in_it() -> None:
    nowhere = run(5, **{LOSS: math.nan})
    old = [{"step": 1, LOSS: None}]
    figure = figure_of({"good": nowhere, "old": old}, metrics=[LOSS, SCORE, "objective/kl"])
    loss, score, kl = ("\n".join(t.get_text() for t in panel.texts) for panel in figure.axes)
    assert "no finite value" in loss
    assert score == "no values: old"
    assert kl == "no values: old; constant: 2"
    assert figure.axes[2].get_ylim() == (1.0, 3.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_a_value_alone_among_those_that_are_not_finite_is_marked(bad: float | None) -> None:
    rows = run(40)
    for row in rows[::2]:
        row[LOSS] = bad
    figure = figure_of({"good": rows}, metrics=[LOSS, SCORE], smooth=1)
    markers = [panel.get_lines()[0].get_marker() for panel in figure.axes]
    assert markers == ["o", "None"]


def test_evaluations_are_points_beside_the_mean_reward() -> None:
    loss, reward = drawn({"good": sparse(), "old": run()})
    assert set(loss) == {"good", "old"}
    assert set(reward) == {"good", "good, held-out", "old"}
    assert reward["good, held-out"] == ([10, 20, 30, 40], "o")
    assert reward["good"] == (list(range(1, 41)), "None")
    (panel,) = drawn({"good": sparse()}, metrics=["eval/kl"])
    assert panel == {"good": ([10, 20, 30, 40], "o")}


def seeds(*lengths: int) -> dict[str, list[dict[str, Any]]]:
    """Runs whose mean reward is the step plus their number."""
    return {
        f"r/tiny-{i}": [{"step": s, SCORE: float(s + i), LOSS: 1.0} for s in range(1, n + 1)]
        for i, n in enumerate(lengths)
    }


def test_seeds_are_thin_lines_and_their_mean_a_strong_one_in_a_band() -> None:
    runs = seeds(12, 12, 8) | {"big": sparse(12)}
    groups = [["r/tiny-0", "r/tiny-1", "r/tiny-2"], ["big"]]
    figure = figure_of(runs, metrics=[SCORE], smooth=1, groups=groups)
    (panel,) = figure.axes
    *thin, mean, big, _ = panel.get_lines()
    assert [len(line.get_xdata()) for line in thin] == [12, 12, 8]
    assert {line.get_color() for line in [*thin, mean]} == {"#0072B2"} != {big.get_color()}
    assert all(line.get_linewidth() < mean.get_linewidth() for line in thin)
    assert mean.get_xydata().tolist() == [[s, s + 1.0] for s in range(1, 9)]
    (band,) = panel.collections
    corners = band.get_paths()[0].vertices
    assert {(3.0, 3.0), (3.0, 5.0), (8.0, 8.0), (8.0, 10.0)} <= {*map(tuple, corners)}
    assert corners[:, 0].max() == 8
    assert legend_of(figure) == ["tiny (3 seeds)", "big", "held-out"]
    caption = texts(figure).replace("\n", " ")
    assert "from the lowest to the highest seed" in caption
    assert "The mean of tiny (3 seeds) ends with its shortest run, at step 8." in caption
    figure = figure_of(runs, metrics=[SCORE], smooth=1, groups=groups[:1], band="se")
    corners = figure.axes[0].collections[0].get_paths()[0].vertices
    edges = {round(y, 6) for x, y in corners.tolist() if x == 3}
    assert sorted(edges) == pytest.approx([4 - 3**-0.5, 4 + 3**-0.5], abs=1e-5)
    assert "standard error" in texts(figure)


def test_seeds_without_a_common_step_have_no_mean() -> None:
    runs = {"a": [{"step": 1, SCORE: 1.0}], "b": [{"step": 2, SCORE: 1.0}]}
    figure = figure_of(runs, metrics=[SCORE], groups=[["a", "b"]])
    assert "no mean: a, b (2 seeds) have no step in common" in texts(figure)


def test_a_long_band_keeps_its_extremes() -> None:
    runs = {name: [{"step": s, LOSS: 0.0} for s in range(20_000)] for name in "ab"}
    runs["b"][12_345][LOSS] = 9.0
    figure = figure_of(runs, metrics=[LOSS], smooth=1, groups=[["a", "b"]])
    corners = figure.axes[0].collections[0].get_paths()[0].vertices
    assert len(corners) < 5000 and corners[:, 1].max() == 9.0


def test_the_logarithmic_scale_is_linear_about_0_where_it_has_to_be() -> None:
    rows = [
        {"step": s, "a": 10.0**s, "b": s - 2.0, "c": 0.0, "d": 4.0 + s / 9} for s in (1, 2, 3, 4)
    ]
    figure = figure_of({"good": rows}, metrics=["a", "b", "c", "d"], log=True)
    assert [panel.get_yscale() for panel in figure.axes] == ["log", "symlog", "linear", "log"]
    notes = [panel.texts[0].get_text() for panel in figure.axes]
    assert "linear within ±1, as" in notes[1] and "all values are 0" in notes[2]
    low, high = figure.axes[3].get_ylim()
    assert sum(low <= tick <= high for tick in figure.axes[3].get_yticks()) >= 3
    assert {panel.get_yscale() for panel in figure_of({"good": rows}, metrics=["a"]).axes} == {
        "linear"
    }


def test_title_and_labels_are_those_that_are_given() -> None:
    runs = {"a": run(3), "b": run(3)}
    figure = figure_of(runs, title="Two runs", labels=["first, of two", "second"])
    assert figure.get_suptitle() == "Two runs"
    assert legend_of(figure) == ["first, of two", "second"]


def test_twelve_runs_look_different() -> None:
    figure = figure_of({f"run-{i}": run(3) for i in range(12)})
    (legend,) = figure.legends
    assert len({(h.get_color(), str(h.get_linestyle())) for h in legend.legend_handles}) == 12


DEEP = "/home/user-with-a-long-name/experiments-2026/sentiment-steering/gpt2-imdb-shaped-seed-17"


@pytest.mark.parametrize(
    "names",
    [
        ["good"],
        [f"{DEEP}/ppo-good", f"{DEEP}/ppo-bad"],
        [f"{DEEP}/{'very-' * 40}long"],
        [f"{DEEP}/seed-{i}" for i in range(30)],
        [f"{'x' * 90}{i}{'y' * 90}" for i in range(3)],
    ],
)
def test_panels_keep_their_size_whatever_the_runs_are_called(names: list[str]) -> None:
    figure = figure_of({name: sparse(10, 5) for name in names})
    figure.draw_without_rendering()
    width, height = figure.get_size_inches()
    for panel in figure.axes:
        box = panel.get_position()
        assert box.width * width > 4.5
        assert box.height * height > 2.2
    (legend,) = figure.legends
    inside = legend.get_window_extent()
    assert inside.x0 >= 0 and inside.x1 <= figure.bbox.width
    lowest = min(panel.get_tightbbox().y0 for panel in figure.axes)
    assert inside.y0 >= 0 and inside.y1 <= lowest
    (caption,) = figure.texts
    assert caption.get_window_extent().y1 <= inside.y0 or not caption.get_text()
    shown = legend_of(figure)
    assert len(set(shown)) == len(names) + 1 and shown[-1] == "held-out"


def test_no_setting_of_the_user_s_reaches_the_picture_which_is_always_the_same(
    tmp_path: Path,
) -> None:
    import matplotlib

    for ending in ("svg", "png", "pdf"):
        plot_training({"50%_of_{it}": sparse(8, 4)}, tmp_path / f"1.{ending}", [LOSS])
    changed = {"text.usetex": True, "axes.facecolor": "red", "svg.hashsalt": None}
    with matplotlib.rc_context(changed), pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1000000000")
        for ending in ("svg", "png", "pdf"):
            plot_training({"50%_of_{it}": sparse(8, 4)}, tmp_path / f"2.{ending}", [LOSS])
        assert matplotlib.rcParams["axes.facecolor"] == "red"
    for ending in ("svg", "png", "pdf"):
        pictures = [(tmp_path / f"{n}.{ending}").read_bytes() for n in (1, 2)]
        assert pictures[0] == pictures[1]


def test_an_svg_is_text_with_a_title_and_the_last_values_in_words(tmp_path: Path) -> None:
    from xml.etree import ElementTree

    plot_training({"a<b": run(7)}, tmp_path / "x.svg", [SCORE], title="T & t")
    root = ElementTree.parse(tmp_path / "x.svg").getroot()
    title, description = root[0], root[1]
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
    assert title.text == "T & t"
    assert description.text and "a<b: 0.6 at step 7" in description.text
    shown = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"T & t", "a<b", "PPO step", "PPO mean reward over time"} <= set(shown)


def test_a_long_run_is_a_small_file(tmp_path: Path) -> None:
    noise = np.random.RandomState(0).randn(30_000).tolist()
    rows = [{"step": i + 1, LOSS: value} for i, value in enumerate(noise)]
    plot_training({"good": rows}, tmp_path / "x.svg", [LOSS])
    assert (tmp_path / "x.svg").stat().st_size < 500_000


TINY = ["tiny-1", "tiny-2", "tiny-4"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three seeds of one configuration and one run of another."""
    monkeypatch.chdir(tmp_path)
    for name, seed, rate in (*((f"tiny-{n}", n, 0.1) for n in (1, 2, 4)), ("fast", 1, 0.2)):
        directory = RunDirectory(name)
        settings = [f"run.seed={seed}", f"ppo.learning_rate={rate}"]
        directory.create(load_config(SMALL_RUN, assignments=settings), False)
        directory.records.append("metrics.jsonl", run(12, **{SCORE: float(seed)}))
        directory.unlock()
    return tmp_path


def test_the_command_gathers_seeds_unless_each_is_asked_for(folder: Path) -> None:
    def command(**options: Any) -> list[str]:
        def draw(output: Path) -> None:
            plot([*TINY, "fast", "tiny-2"], output=str(output), **options)

        figure = figure_of(draw=draw)
        return [*legend_of(figure), figure.get_suptitle(), figure.axes[0].get_yscale()]

    assert command() == ["tiny (3 seeds)", "fast", "", "linear"]
    labelled = command(labels='"0.1, all",0.2', title="T", log=True, metric=[SCORE])
    assert labelled == ["0.1, all (3 seeds)", "0.2", "T", "log"]
    assert command(seeds=Seeds.each)[:4] == [*TINY, "fast"]
    with pytest.raises(UsageError, match=r"3 for 2 curves \(tiny \(3 seeds\), fast\)"):
        command(labels="a,b,c")


def test_the_band_is_of_the_kind_that_is_asked_for(folder: Path) -> None:
    def band(**options: Any) -> list[float]:
        def draw(output: Path) -> None:
            plot(TINY, metric=[SCORE], output=str(output), **options)

        ((band,),) = [panel.collections for panel in figure_of(draw=draw).axes]
        return sorted({round(float(y), 6) for _, y in band.get_paths()[0].vertices})

    assert band() == band(seeds=Seeds.range) == [1.0, 4.0]
    error = (14 / 6 / 3) ** 0.5  # of 1, 2, 4 about 7/3: squares 16/9 + 1/9 + 25/9, over 2, over 3
    assert band(seeds=Seeds.se) == pytest.approx([7 / 3 - error, 7 / 3 + error], abs=1e-6)


def test_the_command_draws_in_the_terminal(folder: Path, capsys: pytest.CaptureFixture) -> None:
    runs = [*TINY, "fast"]
    plot(runs, terminal=True, metric=[SCORE], title="Two rates", labels="slow,fast")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Two rates" and lines[2].startswith("PPO mean reward")
    assert lines[-1].split() == [*["o", "mean", "of", "slow", "(3", "seeds)", "x", "fast"]]
    assert max(map(len, lines)) <= 80
    plot(["fast"], terminal=True, metric=[LOSS], log=True, smooth=12)
    assert "log scale" in capsys.readouterr().out
    for wrong in ({"output": "x.png"}, {"seeds": Seeds.se}):
        with pytest.raises(UsageError, match=f"no band: leave --{next(iter(wrong))}"):
            plot(runs, terminal=True, **wrong)  # type: ignore[arg-type]
    assert not (folder / "x.png").exists()
