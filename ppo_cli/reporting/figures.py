"""The look of all pictures: style, colours, axes, the legend below, and how they are saved."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from textwrap import wrap
from typing import Any
from xml.sax.saxutils import escape

from ppo_cli.errors import UsageError
from ppo_cli.reporting.curves import LABEL_WIDTH
from ppo_cli.utils.files import replacing
from ppo_cli.utils.text import escape_controls

ENDINGS = (".png", ".svg", ".pdf")
# The palette of Okabe and Ito, which colour-blind readers can distinguish, without its yellow,
# which is faint on white. After six curves it is used again with another style of line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
LINE_STYLES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
GREY = "#666666"
# Text of an SVG stays text, which can be searched and read aloud, and its ids are always the same.
STYLE = {
    "text.usetex": False,  # with it, names would have to be valid TeX
    "svg.fonttype": "none",
    "svg.hashsalt": "ppo-cli",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.formatter.useoffset": False,
    "lines.solid_joinstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
}
# Fonts with the characters that matplotlib's own lacks; those that are installed are used.
FURTHER_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Hiragino Sans", "Microsoft YaHei",
                 "Malgun Gothic", "Noto Sans", "Segoe UI", "Arial Unicode MS")  # fmt: skip
NO_TIME = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
MARGIN = 0.08  # inches about legend and caption


def check_ending(output: Path) -> None:
    """Raise `UsageError` unless `output` has the ending of a picture."""
    if output.suffix.lower() not in ENDINGS:
        raise UsageError(f"{output}: a picture ends in {', '.join(ENDINGS)}")


@contextmanager
def drawing(
    output: Path, width: float, height: float, title: str = "", description: str = ""
) -> Iterator[Any]:
    """Make a figure, sizes in inches, and save it when the block ends.

    Settings of the user's do not reach it, and the same drawing gives the same file.

    Args:
        output: the file, replaced as a whole.
        width, height: of the figure, which the block may change.
        title, description: what is in the picture in words, stored in the file; those who cannot
            see an SVG have them read aloud.

    Raises:
        UsageError: `output` has no ending of a picture.
    """
    check_ending(output)
    # Importing matplotlib logs a warning where it cannot cache its list of fonts.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = output.suffix.lower()
    # Its warnings are hidden: a character that no font has is not the user's concern.
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"font.family": _fonts()})
        figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        yield figure
        words = {"Title": title, "Subject" if kind == ".pdf" else "Description": description}
        metadata = NO_TIME[kind] | {key: text for key, text in words.items() if text}
        with replacing(output) as unfinished:
            figure.savefig(unfinished, format=kind[1:], metadata=metadata)
            if kind == ".svg":
                _add_description(unfinished, description)


def _fonts() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return [
        "DejaVu Sans",
        *(name for name in FURTHER_FONTS if name in installed),
        "sans-serif",
    ]


def _add_description(svg: Path, description: str) -> None:
    """Let screen readers read title and description of an SVG instead of its pieces."""
    text = svg.read_text(encoding="utf-8")
    before, title, after = text.partition("</title>")
    if title:
        before = before.replace("<svg ", '<svg role="img" aria-labelledby="title description" ', 1)
        before = before.replace("<title>", '<title id="title">', 1)
        after = f'\n <desc id="description">{escape(description)}</desc>{after}'
        svg.write_text(before + title + after, encoding="utf-8")


def looks() -> Iterator[dict[str, Any]]:
    """Colour and style of line of each curve, distinct for the first 24."""
    for style in cycle(LINE_STYLES):
        for colour in COLOURS:
            yield {"color": colour, "linestyle": style}


def add_title(figure: Any, title: str | None) -> None:
    """Write a title over all panels."""
    if title:
        figure.suptitle(
            wrapped(title, int(figure.get_figwidth() * 9)),
            x=MARGIN / figure.get_figwidth(),
            ha="left",
            fontsize=14,
            fontweight="bold",
        )


def name_axes(panel: Any, title: str, x_label: str, y_label: str, note: str = "") -> None:
    """Write title and labels of a panel, and a note in small letters below its title."""
    lines = wrap(note, 70)
    panel.set_title(plain(title), pad=6 + 11 * len(lines))
    panel.annotate(
        plain(*lines) if lines else "",
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 4),
        textcoords="offset points",
        fontsize=8,
        color=GREY,
    )
    panel.set_xlabel(x_label)
    panel.set_ylabel(plain(y_label) if y_label else "")


def add_footer(figure: Any, handles: Sequence[Any], caption: str) -> None:
    """Add a legend below the panels, and a caption below it; the figure grows by their height."""
    width, height = figure.get_size_inches()
    renderer = figure.canvas.get_renderer()
    text = figure.text(
        MARGIN / width, 0, wrapped(caption, int(width * 16)), fontsize=8, color=GREY, va="bottom"
    )
    caption_height = text.get_window_extent(renderer).height / figure.dpi if caption else 0.0
    for columns in range(min(len(handles), 6), 0, -1):
        legend = figure.legend(handles=handles, loc="lower center", ncols=columns, borderaxespad=0)
        box = legend.get_window_extent(renderer)
        if columns == 1 or box.width / figure.dpi <= width - 2 * MARGIN:
            break
        legend.remove()
    below = caption_height + (2 if caption else 1) * MARGIN
    footer = below + box.height / figure.dpi
    whole = height + footer
    figure.set_size_inches(width, whole)
    text.set_y(MARGIN / whole)
    legend.set_bbox_to_anchor((0, below / whole, 1, 1))
    figure.get_layout_engine().set(rect=(0, footer / whole, 1, height / whole))


def wrapped(text: str, width: int = LABEL_WIDTH) -> str:
    """Text for matplotlib on lines of at most `width` characters."""
    return plain(*wrap(escape_controls(text), width)) if text else ""


def plain(*lines: str) -> str:
    """Text for matplotlib, without `$` as mathematics and a leading `_`, which hides a label."""
    shown = "\n".join(map(escape_controls, lines))
    return shown.replace("$", r"\$").lstrip("_") or "run"
