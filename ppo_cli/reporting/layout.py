"""Tables that fit the screen: nothing is cut, whatever its width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ppo_cli.utils.text import escape_controls

GAP, EDGES = 3, 2  # columns between two columns of a table, and at both its sides together
LEAST_TEXT = 24  # columns of text beside names and figures
MODEL = "model"  # the head of the names of those who wrote texts
NARROW = 64  # columns below which an explanation stands under what it explains

Line = Sequence[str]


def cell(text: str, style: str = "") -> Text:
    """A cell of untrusted text: no markup, control characters escaped."""
    return Text(escape_controls(text), style=style, overflow="fold")


def titled_table(title: str | None) -> Table:
    """An empty table in the style of all tables."""
    return Table(
        title=None if title is None else cell(title, style="italic"),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        header_style="bold",
    )


@dataclass(frozen=True)
class FittingTable:
    """Names on the left, figures on the right.

    Where that is too wide, the heads wrap. Where it still is, the columns are shown a few at a time
    or, with `by_row`, each row becomes a block of lines.

    Attributes:
        heads: of the columns.
        lines: the rows, a cell for each head.
        by_row: whether a row belongs together, rather than a column.
        texts: numbers of further columns that are on the left.
    """

    heads: Line
    lines: Sequence[Line]
    by_row: bool = False
    texts: Sequence[int] = ()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        everything = [*range(len(self.heads))]
        widest = sum(map(self._width, everything)) + GAP * len(everything)
        return Measurement(min(LEAST_TEXT, widest), widest)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = [*range(1, len(self.heads))]
        for abreast in (len(columns),) if self.by_row else range(len(columns), 0, -1):
            parts = [columns[i : i + abreast] for i in range(0, len(columns), abreast)]
            tables = [self._table([0, *part], options.max_width) for part in parts]
            if None not in tables:
                yield from tables  # type: ignore[misc]  # none of them is None
                return
        yield from self._blocks()

    def _width(self, column: int, *, wrap: bool = False) -> int:
        """Columns of the screen that a column needs, its head wrapped or whole."""
        head = escape_controls(self.heads[column])
        heads = head.split() or [""] if wrap else [head]
        cells = [escape_controls(line[column]) for line in self.lines]
        return max(map(cell_len, [*heads, *cells]))

    def _table(self, columns: Sequence[int], room: int) -> Table | None:
        """The table of some columns; None where it is wider than the room."""
        room -= EDGES + GAP * (len(columns) - 1)
        widths = [self._width(column) for column in columns]
        if sum(widths) > room:
            widths = [self._width(column, wrap=True) for column in columns]
            names = [escape_controls(line[0]).split() for line in self.lines]
            longest = max((cell_len(word) for words in names for word in words), default=0)
            widths[0] = min(widths[0], room - sum(widths[1:]))
            if widths[0] < longest:
                return None
        table = titled_table(None)
        for column, width in zip(columns, widths, strict=True):
            is_text = column == 0 or column in self.texts
            justify = "left" if is_text else "right"
            table.add_column(cell(self.heads[column]), justify=justify, width=width)  # type: ignore[arg-type]
        for line in self.lines:
            table.add_row(*(cell(line[column]) for column in columns))
        return table

    def _blocks(self) -> Iterator[RenderableType]:
        """Each row, or each column, as a block: its name, then a line for each of its cells."""
        if self.by_row:
            titles = [f"{self.heads[0]} {line[0]}" for line in self.lines]
            parts = [(self.heads[1:], line[1:]) for line in self.lines]
        else:
            titles = [*self.heads[1:]]
            rows = [line[0] for line in self.lines]
            parts = [(rows, [line[i + 1] for line in self.lines]) for i in range(len(titles))]
        for title, (names, values) in zip(titles, parts, strict=True):
            grid = Table.grid(padding=(0, 2, 0, 0))
            for name, value in zip(names, values, strict=True):
                if value:
                    grid.add_row(cell(name), cell(value))
            yield Text("")
            yield cell(title.strip(), style="bold")
            yield Padding(grid, (0, 0, 0, 2))
        yield Text("")


@dataclass(frozen=True)
class Said:
    """A text with who wrote it, and figures about it."""

    name: str
    figures: Line
    text: str


@dataclass(frozen=True)
class Texts:
    """Texts in groups, each below what it answers: name, figures, text.

    Attributes:
        groups: heading -> texts.
        heads: of the figures; where they are given, a line on top names the columns.
    """

    groups: Sequence[tuple[str, Sequence[Said]]]
    heads: Line = ()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(LEAST_TEXT, max(options.max_width, LEAST_TEXT))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        texts = [said for _, group in self.groups for said in group]
        written = [escape_controls(said.name) for said in texts]
        names = max(map(cell_len, [*written, MODEL] if self.heads else written))
        heads = self.heads or [""] * len(texts[0].figures)
        columns = zip(heads, *(said.figures for said in texts), strict=True)
        figures = [max(map(cell_len, column)) for column in columns]
        is_wide = options.max_width - 2 - names - sum(figures) - 2 * len(figures) >= LEAST_TEXT + 2
        if self.heads and is_wide:
            yield _row(MODEL, self.heads, cell("response"), names, figures, style="dim")
        for number, (heading, group) in enumerate(self.groups):
            if number or (self.heads and is_wide):
                yield Text("")
            yield cell(heading, style="bold")
            for said in group:
                text = cell(said.text)
                if is_wide:
                    yield _row(said.name, said.figures, text, names, figures)
                    continue
                pairs = zip(heads, said.figures, strict=True)
                shown = "  ".join([said.name, *(f"{h} {f}".strip() for h, f in pairs)])
                yield Padding(cell(shown, style="cyan"), (0, 0, 0, 2))
                yield Padding(text, (0, 0, 0, 4))


def _row(
    name: str, figures: Line, text: Text, names: int, widths: Sequence[int], style: str = ""
) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=names)
    for width in widths:
        grid.add_column(width=width, justify="right", style=style or "cyan")
    grid.add_column()
    grid.add_row(cell(name), *map(cell, figures), text, style=style)
    return Padding(grid, (0, 0, 0, 2))


@dataclass(frozen=True)
class Explained:
    """Names with a value and an explanation each, which stands below where the screen is narrow."""

    entries: Sequence[tuple[str, str, str]]

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(LEAST_TEXT, max(options.max_width, LEAST_TEXT))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        has_values = any(value for _, value, _ in self.entries)
        if options.max_width < NARROW:
            for name, value, meaning in self.entries:
                line = Table.grid(padding=(0, 2, 0, 0))
                line.add_row(cell(name), cell(value))
                yield line
                yield Padding(cell(meaning, style="dim"), (0, 0, 0, 4))
            return
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, min_width=28 if has_values else 0)
        if has_values:
            table.add_column(justify="right", no_wrap=True, min_width=10)
        table.add_column(style="dim")
        for name, value, meaning in self.entries:
            values = [cell(value)] if has_values else []
            table.add_row(cell(name), *values, cell(meaning))
        yield table
