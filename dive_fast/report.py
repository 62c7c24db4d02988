"""The result of an experiment as one self-contained HTML page, and as a table for the terminal.

The page needs no network, no script and no font of its own; it follows the reader's light or dark setting, prints, and
escapes every string that comes from data. A section whose numbers are missing from the result is left out.

`result` is plain JSON data:

    {"title", "created", "command", "protocol", "run": {...}, "environment": {...}, "reference_lengths": [int],
     "data": {"name", "licence", "train", "eval", "unseen"},
     "systems": [{"name", "label", "role": "baseline" | "teacher" | "adapter", "description", "trainable_parameters",
                  "train_seconds", "generate_seconds", "engine", "history": [{"step", "loss" | "eval_loss"}],
                  "perplexity", "perplexity_interval": [low, high], "scores": {name: float},
                  "intervals": {name: [low, high]}, "finish": {"eos": share, "length": share}, "lengths": [words],
                  "unseen": {"n", "perplexity", "perplexity_interval", "scores", "intervals"},
                  "samples": [{"id", "prompt", "reference", "prediction"}]}]}

A comparison over several seeds, as `dive-fast experiment` writes it, has means over them in these places, and besides

    {"seeds": [int], "compare_with": name, "bootstrap": {"resamples", "seed"},
     "systems": [{"seeds": [{"seed": int | "any", "scores": {name: float}}],
                  "differences": {name: {"difference", "interval": [low, high], "clear": bool}},
                  "costs": {"teacher_seconds", "teacher_in_training": bool, "train_peak_bytes", "tokens_per_second",
                            "write_peak_bytes", "memory": what the peaks count, "not_native": why another engine wrote},
                  "unseen": {..., "differences"}}]}

where a difference is to the system `compare_with`, paired, and "clear" if its interval leaves out 0. "history" is the
mean over the seeds, "lengths" are those of all, "samples" the first seed's.

Only "systems" is required, each with a "name" or a "label".
"""

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from dive_fast import checkpoints
from dive_fast.errors import InputError
from dive_fast.report_assets import sections
from dive_fast.report_assets.numbers import (
    Column,
    Measure,
    best_value,
    count,
    finding,
    label_of,
    measure,
    present_columns,
    seconds,
    show,
)
from dive_fast.report_assets.sections import Highlight


def write_report(result: Mapping, path: str | Path, *, highlight: Highlight | None = None) -> Path:
    """Write `result` (see the module's docstring) as one HTML file, whole or not at all, and return its path.

    Args:
        highlight: text -> (escaped HTML with the decisive tokens marked, their classes); default: the chest lexicon.

    Raises:
        InputError: `result` holds no systems, or one without a name, or a text that cannot be encoded.
        OSError: `path` cannot be written; a page that was there stays as it is.
    """
    check_result(result)
    parts = [
        sections.summary(result, finding(result)),
        sections.key_figures(result),
        sections.score_tables(result),
        sections.differences(result),
        sections.score_plots(result),
        sections.losses(result),
        sections.lengths(result),
        sections.examples(result, highlight or lexicon_highlight()),
        sections.making(result),
    ]
    title = escape(str(result.get("title") or "Steering report"))
    style = files("dive_fast.report_assets").joinpath("report.css").read_text(encoding="utf-8")
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{title}</title><style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )
    try:
        page.encode()
    except UnicodeEncodeError as error:
        half = ascii(page[error.start])[1:-1]
        raise InputError(
            f"result: a text holds {half}, half of a surrogate pair, which cannot be encoded; replace it"
        ) from None
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        path.write_text(page, encoding="utf-8")  # a pipe or a device such as /dev/stdout must not be replaced by a file
    else:
        checkpoints.write_text(path, page)
    return path


def check_result(result: Any) -> None:
    """Raise InputError unless `result` has systems with names."""
    systems = result.get("systems") if isinstance(result, Mapping) else None
    if not isinstance(systems, Sequence) or isinstance(systems, str) or not systems:
        raise InputError('result: expected a mapping with a list "systems", as in the result.json of the demo')
    for index, system in enumerate(systems):
        if not isinstance(system, Mapping) or not (system.get("name") or system.get("label")):
            raise InputError(f'result["systems"][{index}]: expected a mapping with a "name", got {system!r:.80}')


def lexicon_highlight() -> Highlight:
    """Mark the decisive tokens of the chest lexicon."""
    from dive_fast.supervision.lexicon import LexiconTagger
    from dive_fast.supervision.show import render_html

    tagger = LexiconTagger()

    def highlight(text: str) -> tuple[str, frozenset]:
        spans = tagger(text)
        return render_html(text, spans), frozenset(span[2] for span in spans)

    return highlight


def result_table(result: Mapping):
    """The systems and their main scores as a `rich.table.Table` that fits 80 columns; the best of a column is bold.

    Only the perplexity shows its interval here; the page has every score and interval.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    check_result(result)
    systems = result["systems"]
    columns = [column for column in present_columns(systems) if column.short]
    best = {column.key: best_value(systems, column) for column in columns}
    title = Text(str(result.get("title") or "Result"), style="bold")
    caption = Text(finding(result))
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
    table.padding = 0
    table.add_column("System", min_width=14)
    for column in columns:
        table.add_column(f"{column.short}{'↓' if column.lower_is_better else '↑'}", justify="right", no_wrap=True)
    table.add_column("Trained", justify="right", no_wrap=True)
    table.add_column("Time", justify="right", no_wrap=True)
    for system in systems:
        cells = [_cell(measure(system, column.key), column, best[column.key]) for column in columns]
        cost = (count(system.get("trainable_parameters")), seconds(system.get("train_seconds"), short=True))
        table.add_row(Text(label_of(system)), *cells, *map(Text, cost))
    return table


def _cell(found: Measure | None, column: Column, best: float | None):
    from rich.text import Text

    if found is None:
        return Text("–", style="dim")
    cell = Text(show(found.value, column), style="bold" if found.value == best else "")
    if found.interval and column.key == "perplexity":
        cell.append(f"\n{show(found.interval[0], column)}–{show(found.interval[1], column)}", style="not bold dim")
    return cell
