"""The report of `compare --html`: what is in it, and how it behaves in a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe

from ppo_cli.config.schema import RunSettings
from ppo_cli.evaluation.best_of_n import best_of_n
from ppo_cli.evaluation.comparison_result import Comparison
from ppo_cli.evaluation.quality import MEASURES
from ppo_cli.reporting.comparison_page import MANY, PageDetails, comparison_html
from ppo_cli.reporting.frontier import trail
from tests.browser import browser  # noqa: F401
from tests.reporting.comparisons import comparison, quick

EVIL = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    "\"'`{{ 7 * 7 }}[red]\x1b[31m\u202eab\u200b"
)
TEXTS = [
    EVIL, "שלום עולם, this is fine", "👩‍👩‍👧 naïve 日本語", "Pneumono" * 60, "plain and good",
    "plain and bad", "two\nlines", "",
]  # fmt: skip
LONG = "runs/2026-11-27/" + "a-very-long-name-of-a-run-" * 3 + "é"
STEPS = 40


def metrics(offset: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"step": i, "ppo/loss/total": 1 / i, "env/reward_mean": offset + i, "objective/kl": i / 9}
        for i in range(1, STEPS + 1)
    ]
    rows[4]["ppo/loss/total"] = float("nan")
    for row in rows[9::10]:
        row |= {"eval/score": offset, "eval/kl": row["step"] / 9, "eval/reference_score": -0.5}
    return rows


def make_comparison() -> Comparison:
    total = len(TEXTS)
    scores = {
        LONG: [2.0, -1.0, 1.5, 2.5, 3.0, -2.0, 0.5, 0.25],
        "other": [-1.5, 1.0, 0.5, -2.5, 1.0, 2.0, -0.5, 0.0],
        "reference": [0.0, 0.5, -0.5, 1.0, -1.0, -2.0, 1.0, -0.25],
    }
    texts = {
        name: TEXTS if name == LONG else [f"{name} {i}" for i in range(total)] for name in scores
    }
    drawn = np.linspace(-2, 2, total)[:, None] + np.linspace(0, 1, 4)[None]
    return comparison(scores, texts=texts, queries=TEXTS[::-1], drawn=drawn)


def make_details() -> PageDetails:
    runs = {LONG: metrics(0.0), "other": metrics(1.0)}
    trails = [trail(LONG, runs[LONG], RunSettings(output="x"))]
    return PageDetails(runs, trails, None, {"Command": "ppo-cli compare <b>", "Version": "0.1"})


class Text(HTMLParser):
    """A page's tags and their attributes, and its text outside of style and script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.parts.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return comparison_html(make_comparison(), make_details())


def test_its_figures_are_those_of_the_json(page: str) -> None:
    document = make_comparison().as_dict()
    read = Text(page)
    items = [a for tag, a in read.tags if tag == "li" and "data-scores" in a]
    for row, item in zip(document["rows"], items, strict=True):
        scores = [answer["score"] for answer in row["responses"]]
        assert [float(value) for value in (item["data-scores"] or "").split()] == scores
        assert float(item["data-change"] or "nan") == scores[0] - scores[-1]
        assert all(
            f"{answer['score']:.2f} P {answer['probability']:.2f}" in read.text
            for answer in row["responses"]
        )
    for measure in MEASURES:
        key = measure.document_key or measure.key
        values = [f"{model[key]:.{measure.places}f}" for model in document["models"]]
        name = measure.name.format(label="POSITIVE")
        assert f"{name} {measure.meaning} {' '.join(values)}" in read.text
    for item in document["differences"]:
        gap = item["difference"]
        assert f"{gap['mean']:+.3f} ({gap['low']:+.3f} to {gap['high']:+.3f})" in read.text
        assert f"wins {item['win_rate']:.0%}" in read.text
    for point in document["best_of_n"]["points"]:
        assert f"{point['n']} {point['kl']:.2f} {point['score']:.3f}" in read.text


def test_it_asks_for_nothing_and_allows_its_own_script_alone(page: str) -> None:
    assert page.startswith("<!doctype html>")
    assert "://" not in page and "url(" not in page
    tags = Text(page).tags
    links = [a[key] for _, a in tags for key in ("src", "srcset", "href", "data") if key in a]
    assert links and all((link or "").startswith("#") for link in links)
    assert not {"img", "link", "iframe", "object"} & {tag for tag, _ in tags}
    assert page.count("<script") == 1
    assert re.search(r"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-", page)


def test_curves_evaluations_and_settings_are_those_that_were_given(page: str) -> None:
    plain = comparison_html(make_comparison())
    full = Text(page).text
    assert "PPO step" in full and "Training" in full and "evaluations during training" in full
    assert "Command ppo-cli compare <b> Version 0.1" in full
    for absent in ("PPO step", "evaluations during training", "Command"):
        assert absent not in Text(plain).text
    charts = [a for tag, a in Text(page).tags if tag == "div" and a.get("role") == "img"]
    shown = [a["aria-label"] or "" for a in charts]
    assert [text.split(" against ")[0] for text in shown] == [
        "Mean score", "Loss", "Mean reward", "KL from the reference, nats",
    ]  # fmt: skip
    assert "other: 2 at step 1, 40.5 at 40" in shown[2]  # the mean of two steps
    assert page.count('<polyline class="pale') == plain.count('<polyline class="pale') + 1 + 6


def test_a_curve_of_the_run_stands_in_for_one_that_was_not_measured() -> None:
    found = comparison({"a": [1.0] * 10, "reference": [0.0] * 10})
    curves = {
        label: quick(best_of_n)(np.eye(4), [1, 3], label=label, seed=0)
        for label in ("POSITIVE", "joy")
    }
    pages = {
        label: comparison_html(found, PageDetails(curve=curve)) for label, curve in curves.items()
    }
    assert "held-out prompts" in pages["POSITIVE"] and "best of n from" in pages["POSITIVE"]
    assert "best of n from" not in pages["joy"], "a curve of another score"


def test_parts_that_say_nothing_are_left_out() -> None:
    alone = Text(comparison_html(comparison({"only": [1.0, 2.0]}, kl=None))).text
    for absent in ("Paired differences", "Score against KL", "What changed", "Show"):
        assert absent not in alone
    one = comparison_html(comparison({"a": [1.0], "b": [1.0]}, examples=0))
    assert "What changed" not in Text(one).text
    terms = comparison({"a": [3.0] * 4, "b": [1.0] * 4}, terms=["brief", "kind"])
    text = Text(comparison_html(terms)).text
    assert "3.00 brief 1.50 kind 1.50" in text and "reward brief" in text
    assert " P " not in text


def test_long_pages_draw_only_what_is_in_sight() -> None:
    texts = {"a": ["so good"] * (MANY + 1), "b": ["so bad"] * (MANY + 1)}
    found = comparison({"a": [1.0] * (MANY + 1), "b": [0.5] * (MANY + 1)}, texts=texts, examples=0)
    page = comparison_html(found)
    assert 'class="samples many"' in page
    assert len(page) < 60_000 + 2_000 * MANY, "markup of a prompt takes under 2,000 characters"
    assert "so good 100 % 0 %" in Text(page).text  # the pair of words that changed most


@pytest.fixture(scope="module")
def opened(browser: Any, page: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:  # noqa: F811
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page, encoding="utf-8")
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    shown = context.new_page()
    shown.asked, shown.said = [], []
    context.route("**/*", lambda route: (shown.asked.append(route.request.url), route.continue_()))
    shown.on("console", lambda message: shown.said.append(message.text))
    shown.on("pageerror", lambda error: shown.said.append(str(error)))
    shown.goto(path.as_uri())
    yield shown
    context.close()


@pytest.fixture
def fresh(opened: Any) -> Any:
    """The page as it is first seen."""
    opened.emulate_media(color_scheme="light", media="screen")
    opened.set_viewport_size({"width": 1280, "height": 900})
    opened.reload()
    return opened


SHOWN = """() => [...document.querySelectorAll("#samples > li")]
    .filter((one) => one.getBoundingClientRect().height > 0)
    .map((one) => Number(one.querySelector("small").textContent.split(" ")[1]))"""


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_axe_finds_nothing(fresh: Any, scheme: str, width: int) -> None:
    fresh.emulate_media(color_scheme=scheme)
    fresh.set_viewport_size({"width": width, "height": 900})
    found = Axe().run(fresh, options={"resultTypes": ["violations"]}).response["violations"]
    assert [(one["id"], one["nodes"][0]["html"][:200]) for one in found] == []


@pytest.mark.parametrize("width", [390, 768])
def test_nothing_is_wider_than_the_window(fresh: Any, width: int) -> None:
    fresh.set_viewport_size({"width": width, "height": 900})
    wide = """() => [...document.querySelectorAll("body *:not(.skip)")].filter((one) =>
        one.checkVisibility() && one.getBoundingClientRect().right > innerWidth + 1)
        .map((one) => one.outerHTML.slice(0, 99))"""
    assert fresh.evaluate("document.documentElement.scrollWidth") == width
    assert [one for one in fresh.evaluate(wide) if "thead" not in one] == []


def test_no_request_leaves_and_no_script_in_a_text_runs(fresh: Any) -> None:
    fresh.evaluate(
        """() => { const one = document.createElement("script");
        one.textContent = "window.hacked = 3"; document.body.append(one); }"""
    )
    assert fresh.evaluate("window.hacked") is None
    assert {address.split(":")[0] for address in fresh.asked} == {"file"}
    assert len(set(fresh.asked)) == 1
    assert all("Content Security Policy" in text for text in fresh.said[-1:])
    assert len(fresh.said) == 1, "only the script that was added here is complained of"
    text = fresh.locator("#samples .answers .text").first.inner_text()
    assert text.startswith("<script>window.hacked = 1</script>") and "{{ 7 * 7 }}" in text
    assert "\\x1b[31m\\u202eab\\u200b" in text


def test_the_keyboard_sorts_filters_and_searches(fresh: Any) -> None:
    first = list(range(1, 9))
    assert fresh.evaluate(SHOWN) == first
    count = fresh.locator("#count")
    assert count.inner_text() == "8 of 8 prompts shown"
    assert count.get_attribute("aria-live") == "polite"
    fresh.keyboard.press("Tab")
    assert fresh.evaluate("document.activeElement.className") == "skip"
    fresh.locator("nav a").last.focus()
    fresh.keyboard.press("Tab")
    fresh.keyboard.press("ArrowDown")  # the largest gain first
    assert fresh.evaluate("document.activeElement.id") == "sort"
    assert fresh.evaluate(SHOWN) == [5, 1, 3, 4, 8, 6, 7, 2]
    fresh.keyboard.press("ArrowDown")
    assert fresh.evaluate(SHOWN) == [2, 7, 6, 8, 4, 1, 3, 5]  # equals in their own order
    fresh.keyboard.press("End")  # the last model's score, lowest first
    assert fresh.evaluate(SHOWN) == [6, 5, 3, 8, 1, 2, 4, 7]
    fresh.keyboard.press("Tab")
    fresh.keyboard.press("ArrowDown")  # the first model is better
    assert fresh.evaluate(SHOWN) == [5, 3, 8, 1, 4]
    fresh.keyboard.press("ArrowDown")
    assert fresh.evaluate(SHOWN) == [2, 7]
    fresh.keyboard.press("ArrowDown")
    assert fresh.evaluate(SHOWN) == [6]
    fresh.keyboard.press("Home")
    fresh.keyboard.press("Tab")
    fresh.keyboard.type("PLAIN bad")
    assert fresh.evaluate(SHOWN) == [6, 3]  # a response, a query
    assert count.inner_text() == "2 of 8 prompts shown"
    fresh.keyboard.press("Tab")
    fresh.keyboard.press("Enter")  # reset
    fresh.wait_for_function("document.getElementById('count').textContent.startsWith('8')")
    assert fresh.evaluate(SHOWN) == first


def test_print_has_every_response_and_no_controls(fresh: Any) -> None:
    fresh.fill("#search", "plain")
    assert len(fresh.evaluate(SHOWN)) == 4
    fresh.emulate_media(media="print", color_scheme="dark")
    assert len(fresh.evaluate(SHOWN)) == 8
    for hidden in ("#controls", "nav", "#count", ".skip"):
        assert not fresh.locator(hidden).is_visible()
    colour = "getComputedStyle(document.body).backgroundColor"
    assert fresh.evaluate(colour) == "rgb(255, 255, 255)"
    fresh.emulate_media(media="screen", color_scheme="dark")
    assert fresh.evaluate(colour) != "rgb(255, 255, 255)"


def test_without_its_script_the_page_is_whole(browser: Any, page: str) -> None:  # noqa: F811
    shown = browser.new_page(java_script_enabled=False)
    shown.set_content(page)
    assert not shown.locator("#controls").is_visible()
    assert all(one.is_visible() for one in shown.locator("#samples > li").all())
    shown.close()
