"""A table as data, and how figures are written in one: Markdown for files, HTML for the page."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from dive_fast.bench.results import Interval

NONE = "–"


class Table(NamedTuple):
    """Rows of text under columns.

    Attributes:
        words: as many of the first columns are words, the rest figures.
        strong: the rows that are ours.
        note: a sentence below, or "".
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    strong: frozenset[int] = frozenset()
    note: str = ""


def markdown(table: Table) -> str:
    """The table without its title; ours is bold in the first column."""
    rows = [[f"**{row[0]}**", *row[1:]] if index in table.strong else list(row) for index, row in enumerate(table.rows)]
    rule = ["---" if column < table.words else "---:" for column in range(len(table.columns))]
    lines = [_pipes(table.columns), "|" + "|".join(rule) + "|", *map(_pipes, rows)]
    return "\n".join([*lines, *(["", table.note] if table.note else [])])


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def html(table: Table) -> str:
    """A figure of the page, its title the caption."""
    head = "".join(f'<th scope="col"{_words(table, i)}>{escape(name)}</th>' for i, name in enumerate(table.columns))
    body = "".join(_html_row(table, index, row) for index, row in enumerate(table.rows))
    note = f'<p class="lead">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="scroll"><table><caption><span>{escape(table.title)}</span></caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}"
    )


def _html_row(table: Table, index: int, row: Sequence[str]) -> str:
    first = f"<b>{escape(row[0])}</b>" if index in table.strong else escape(row[0])
    cells = "".join(f"<td{_words(table, i)}>{escape(cell)}</td>" for i, cell in enumerate(row[1:], 1))
    return f'<tr><th scope="row">{first}</th>{cells}</tr>'


def _words(table: Table, column: int) -> str:
    return ' class="words"' if 0 < column < table.words else ""


def digits(value: float, count: int = 3) -> str:
    """With `count` significant digits, never as a power of ten; whole digits are kept."""
    if not value:
        return "0"
    after = count - 1 - math.floor(math.log10(abs(value)))
    if after > 0 and abs(round(value, after)) >= 10 ** (count - after):
        after -= 1  # 9.996 is 10.0
    return f"{value:,.{max(0, after)}f}"


def duration(seconds: float) -> str:
    """4.56 ms, 301 ms, 3.62 s."""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size * 0.9995:
            return f"{digits(seconds / size)} {unit}"
    return f"{digits(seconds / 1e-6)} µs"


def size(count: float) -> str:
    """Bytes as 54 MiB, 1.31 GiB."""
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= factor:
            return f"{digits(count / factor)} {unit}"
    return f"{digits(count / 2**10)} KiB"


def fixed(figure: Interval | None, after: int = 2, unit: str = "") -> str:
    """A figure with `after` digits behind the point and, if known, its interval: 0.99 (0.93 to 1.11)."""
    if figure is None:
        return NONE
    text = f"{figure.median:.{after}f}{unit}"
    return f"{text} ({figure.low:.{after}f} to {figure.high:.{after}f})" if figure.known else text


def spread(figure: Interval, show=duration) -> str:
    """A figure and, if known, its interval, both as `show` writes them."""
    return f"{show(figure.median)} ({show(figure.low)} to {show(figure.high)})" if figure.known else show(figure.median)


def faster(ratio: Interval | None) -> str:
    """Time of ours : time of another one, as how many times faster ours is: 6.2 × (5.9 to 6.4)."""
    if ratio is None:
        return NONE
    found = ratio.under(1)
    text = f"{digits(found.median)} ×"
    return f"{text} ({digits(found.low)} to {digits(found.high)})" if found.known else text
