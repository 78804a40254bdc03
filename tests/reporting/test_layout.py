"""Tables on screens of every width: nothing is cut, figures stand in columns."""

from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType

from ppo_cli.evaluation.samples import Generated, Sample
from ppo_cli.reporting.layout import Explained, FittingTable, Said, Texts
from ppo_cli.reporting.tables import generated_texts, marked

HEADS = ("", "ppo-good", "runs/ppo-bad", "reference")
LINES = [
    ("mean P(POSITIVE)", "0.990", "0.010", "0.598"),
    ("  95 % interval", "2.66 to 4.31", "2.31 to 4.18", "0.00 to 0.00"),
]


def shown(width: int, what: RenderableType) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(what)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("width", [100, 80, 50, 34])
def test_every_cell_is_there_at_every_width(width: int, by_row: bool) -> None:
    lines = shown(width, FittingTable(HEADS, LINES, by_row=by_row))
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    for cell in (*HEADS[1:], *LINES[0][1:], *LINES[1][1:]):
        assert cell in text
    assert "…" not in text


def test_columns_are_shown_a_few_at_a_time_and_rows_as_blocks() -> None:
    assert len(shown(80, FittingTable(HEADS, LINES))) == 6
    narrow = shown(50, FittingTable(HEADS, LINES))
    assert sum("─" in line for line in narrow) == 2
    assert sum("95 % interval" in line for line in narrow) == 2
    blocks = shown(50, FittingTable(("run", *HEADS[1:]), LINES, by_row=True))
    assert "run mean P(POSITIVE)" in blocks and "  ppo-good      0.990" in blocks
    assert not any("─" in line for line in blocks)


def test_a_head_wraps_before_the_layout_changes() -> None:
    table = FittingTable(("step", "KL", "best-of-n there"), [("10", "1.00", "2.00")], by_row=True)
    assert any("best-of-n there" in line for line in shown(40, table))
    narrow = shown(28, table)
    assert any(line.endswith("best-of-n") for line in narrow)
    assert any("─" in line for line in narrow)


GROUPS = [
    ("a prompt", [Said("ppo-good", ["2.18"], "good " * 20), Said("reference", ["-12.13"], "bad")])
]


def test_figures_of_texts_stand_in_a_column() -> None:
    lines = shown(60, Texts(GROUPS, ("score",)))
    assert lines[0] == "  model       score  response"
    assert "a prompt" in lines
    first, second = (next(li for li in lines if li.startswith(f"  {n}")) for n in ("ppo", "ref"))
    assert first.index("2.18") + 4 == second.index("-12.13") + 6
    assert {li.index("good") for li in lines if li.strip().startswith("good")} == {
        second.index("bad")
    }


def test_on_a_narrow_screen_a_text_stands_below_its_name_and_figures() -> None:
    lines = shown(
        36, Texts([("p", [Said("experiments/ppo-good", ["2.18"], "good " * 9)])], ("score",))
    )
    assert lines[:2] == ["p", "  experiments/ppo-good  score 2.18"]
    assert all(line.startswith("    good") for line in lines[2:] if line)
    entries = Explained([("objective/kl", "2.7", "the KL penalty of a response, nats")])
    assert shown(50, entries)[:2] == ["objective/kl  2.7", "    the KL penalty of a response, nats"]
    assert shown(90, entries)[0].startswith("objective/kl ")
    assert shown(90, entries)[0].endswith("2.7  the KL penalty of a response, nats")


def test_an_ellipsis_marks_where_a_text_is_only_a_part() -> None:
    assert marked(" It was good and", ends=False) == "It was good and…"
    assert marked(' She said "it was."', ends=False) == 'She said "it was."'
    assert marked(" no full stop") == "no full stop"
    assert marked("ster", begins=False) == "…ster"
    samples = [
        Sample("a po", "ster and", 1.0, None, ended=False),
        Sample("a film", " that ends", 1.0, None),
        Sample("translate", "good", 1.0, None, continues=False),
    ]
    lines = shown(80, generated_texts([Generated("m", samples)], True))
    assert [" ".join(line.split()) for line in lines if line] == [
        *("model score response", "a po…", "m 1.00 …ster and…"),
        *("a film", "m 1.00 that ends", "translate", "m 1.00 good"),
    ]
