"""The result of an experiment as Markdown and as LaTeX: scores with intervals, differences, costs.

A value that was not measured is a dash. The best value of a column is bold; a dagger marks a system whose difference
to the reference leaves out 0.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dive_fast.report_assets.numbers import (
    COLUMNS,
    FURTHER_COLUMNS,
    Column,
    best_value,
    count,
    difference,
    label_of,
    measure,
    present_columns,
    seconds,
    show,
    show_signed,
    size,
)

MISSING = "–"


class Cell(NamedTuple):
    """A value as text, its interval as text, and how it stands out."""

    text: str
    interval: tuple[str, str] | None = None
    best: bool = False
    clear: bool = False


class Grid(NamedTuple):
    """A table without its markup: rows are (label, cells)."""

    title: str
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]


def grids(result: Mapping) -> list[Grid]:
    """Every table of a result: scores, those on unseen texts, further scores, differences, costs."""
    systems = result["systems"]
    unseen = [system.get("unseen") or {} for system in systems]
    seeds = len(result.get("seeds") or ()) or 1
    size_of = next((part["n"] for part in unseen if part.get("n")), None)
    found = [
        _scores(f"Scores, mean over {seeds} seed{'s' if seeds > 1 else ''}", systems, systems, COLUMNS),
        _scores(f"The same on the {size_of} reports whose text does not occur in training", systems, unseen, COLUMNS),
        _scores("Further scores", systems, systems, FURTHER_COLUMNS),
        _differences(result),
        _costs(systems),
    ]
    return [grid for grid in found if grid.head and grid.rows]


def _scores(title: str, systems: Sequence[Mapping], parts: Sequence[Mapping], columns: Sequence[Column]) -> Grid:
    columns = present_columns(parts, columns)
    cells = [_score_cells(parts, column) for column in columns]
    rows = [(label_of(system), [column[i] for column in cells]) for i, system in enumerate(systems)]
    return Grid(title, [_heading(column) for column in columns], rows)


def _heading(column: Column) -> str:
    return f"{column.label} {'↓' if column.lower_is_better else '↑'}"


def _score_cells(parts: Sequence[Mapping], column: Column) -> list[Cell]:
    """One column. What reads the same as the best is best too, unless all of it does."""
    best = best_value(parts, column)
    found = [measure(part, column.key) for part in parts]
    texts = [MISSING if one is None else show(one.value, column) for one in found]
    shown = None if best is None or len(set(texts) - {MISSING}) == 1 else show(best, column)
    cells = []
    for part, one, text in zip(parts, found, texts, strict=True):
        compared = one and difference(part, column.key)
        interval = one and one.interval and tuple(show(end, column) for end in one.interval)
        cells.append(Cell(text, interval, text == shown, bool(compared and compared[1])))
    return cells


def _differences(result: Mapping) -> Grid:
    systems = [system for system in result["systems"] if system.get("differences")]
    columns = [column for column in COLUMNS if any(difference(system, column.key) for system in systems)]
    named = {system.get("name"): label_of(system) for system in result["systems"]}
    title = f"Difference to {named.get(result.get('compare_with'), '')}, paired"
    rows = [(label_of(system), [_difference_cell(system, column) for column in columns]) for system in systems]
    return Grid(title, [_heading(column) for column in columns], rows)


def _difference_cell(system: Mapping, column: Column) -> Cell:
    found = difference(system, column.key)
    if found is None:
        return Cell(MISSING)
    (value, interval), clear = found
    ends = interval and tuple(show_signed(end, column) for end in interval)
    return Cell(show_signed(value, column), ends, best=clear)


def _costs(systems: Sequence[Mapping]) -> Grid:
    head = [
        "Trained parameters",
        "Teacher",
        "Training",
        "Memory, training",
        "Writing",
        "Tokens/s",
        "Memory, writing",
        "Engine",
    ]
    return Grid("Costs, mean over seeds", head, [(label_of(system), _cost_cells(system)) for system in systems])


def _cost_cells(system: Mapping) -> list[Cell]:
    costs: Mapping[str, Any] = system.get("costs") or {}
    speed = costs.get("tokens_per_second")
    texts = (
        count(system.get("trainable_parameters")),
        "in training" if costs.get("teacher_in_training") else seconds(costs.get("teacher_seconds")),
        seconds(system.get("train_seconds")),
        size(costs.get("train_peak_bytes")),
        seconds(system.get("generate_seconds")),
        MISSING if speed is None else f"{speed:,.0f}",
        size(costs.get("write_peak_bytes")),
        str(system.get("engine") or MISSING),
    )
    return [Cell(text) for text in texts]


def notes(result: Mapping) -> list[str]:
    """What the tables' marks and intervals mean."""
    resamples = (result.get("bootstrap") or {}).get("resamples")
    data = result.get("data") or {}
    lines = []
    if data.get("eval"):
        seeds, unseen = len(result.get("seeds") or ()) or 1, data.get("unseen") or 0
        lines.append(
            f"{data['eval']:,} held-out reports, the texts of {unseen:,} of them not in training; {seeds} seeds."
        )
        lines.append(f"BLEU, ROUGE-L, METEOR and CIDEr by the protocol {result.get('protocol')}.")
    if resamples:
        over = "documents and seeds" if len(result.get("seeds") or ()) > 1 else "documents"
        lines.append(f"In brackets: 95 % intervals over {over}, from {resamples:,} bootstrap resamples.")
    if any(system.get("differences") for system in result["systems"]):
        named = {system.get("name"): label_of(system) for system in result["systems"]}
        lines.append(
            f"†: the paired difference to {named.get(result.get('compare_with'))} leaves out 0; such differences are "
            "bold in their own table."
        )
    if memory := sorted({str(s["costs"]["memory"]) for s in result["systems"] if (s.get("costs") or {}).get("memory")}):
        lines.append(f"Memory: the peak of the {', '.join(memory)}.")
    return lines


def markdown(result: Mapping) -> str:
    """All tables in GitHub's Markdown."""
    parts = [f"# {_markdown_text(str(result.get('title') or 'Result'))}", *map(_markdown_text, notes(result))]
    if result.get("command"):
        parts.insert(1, f"`{result['command']}`")
    for grid in grids(result):
        rows = [
            "| | " + " | ".join(map(_markdown_text, grid.head)) + " |",
            "|---|" + "---|" * len(grid.head),
            *(
                f"| {_markdown_text(label)} | " + " | ".join(map(_markdown_cell, cells)) + " |"
                for label, cells in grid.rows
            ),
        ]
        parts.append(f"## {_markdown_text(grid.title)}\n\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _markdown_text(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else cell.text
    text += "†" if cell.clear else ""
    return text if cell.interval is None else f"{text} ({cell.interval[0]} to {cell.interval[1]})"


def latex(result: Mapping) -> str:
    """All tables as tabulars for `booktabs`, one after another."""
    parts = [
        "% Made by dive-fast experiment. In the preamble: \\usepackage{booktabs}",
        *(f"% {line}" for line in notes(result)),
    ]
    for grid in grids(result):
        rows = [
            f"% {_one_line(grid.title)}",
            f"\\begin{{tabular}}{{l{'r' * len(grid.head)}}}",
            "\\toprule",
            _latex_row("System", [latex_text(name) for name in grid.head]),
            "\\midrule",
            *(_latex_row(latex_text(label), [_latex_cell(cell) for cell in cells]) for label, cells in grid.rows),
            "\\bottomrule",
            "\\end{tabular}",
        ]
        parts.append("\n" + "\n".join(rows))
    return "\n".join(parts) + "\n"


def _latex_row(label: str, cells: Sequence[str]) -> str:
    return f"{label} & {' & '.join(cells)} \\\\"


def _latex_cell(cell: Cell) -> str:
    text = latex_text(cell.text)
    text = f"\\textbf{{{text}}}" if cell.best else text
    text += "$^\\dagger$" if cell.clear else ""
    if cell.interval is None:
        return text
    return f"{text} {{\\scriptsize({latex_text(cell.interval[0])} to {latex_text(cell.interval[1])})}}"


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "–": "--",
    "−": "$-$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "†": r"$^\dagger$",
}
_LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def latex_text(text: str) -> str:
    """`text` as LaTeX shows it, whatever its characters mean there."""
    return "".join(_LATEX.get(character, character) for character in _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.split())
