"""A report of results files: a folder with one HTML page (self-contained), the same in Markdown, and the plots."""

import base64
import os
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from dive_fast.bench.chapters import CHAPTERS
from dive_fast.bench.drawing import machine_text, save, style
from dive_fast.bench.group_tables import fit_table, group_table, left_out, noise_note, target_tables
from dive_fast.bench.results import Record, Results, newest
from dive_fast.bench.table import Table, html, markdown
from dive_fast.bench.targets import judge
from dive_fast.report_assets.sections import section

TITLE = "Benchmarks of dive_fast"
# A table with more rows is folded away.
LONG = 24


class Plot(NamedTuple):
    """A drawn plot: its file's stem, its title, what it shows in words, its machine."""

    name: str
    caption: str
    path: Path
    machine: str


class Made(NamedTuple):
    """A chapter with its plots drawn and its tables made."""

    name: str
    heading: str
    lead: str
    plots: Sequence[Plot]
    tables: Sequence[Table]


def write_page(results: Sequence[Results], folder: Path) -> Path:
    """Writes `report.html`, `report.md` and `plots/`; the HTML's path.

    Raises:
        InputError: matplotlib is not installed.
        OSError: something cannot be written.
    """
    records = newest(results)
    chapters = [_made(name, records, folder / "plots") for name in CHAPTERS]
    chapters = [chapter for chapter in chapters if chapter.plots or chapter.tables]
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    texts = {page: _html(results, records, chapters), page.with_suffix(".md"): _markdown(results, records, chapters)}
    for path, text in texts.items():
        part = path.with_name(f"{path.name}.part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    return page


def _made(name: str, records: Sequence[Record], folder: Path) -> Made:
    chapter, drawn = CHAPTERS[name], []
    with style():
        for stem, drawing in chapter.plots.items():
            fig = drawing.draw(records)
            if fig is not None:
                machine = fig.get_supxlabel().replace("\n", "; ")
                drawn.append(Plot(stem, drawing.caption, save(fig, folder, stem), machine))
    found = [fit_table(records) if table == "fits" else group_table(table, records) for table in chapter.tables]
    return Made(name, chapter.heading, chapter.lead, drawn, [table for table in found if table is not None])


def _sources(results: Sequence[Results]) -> list[str]:
    return [f"{one.source}: scale {one.scale}, {machine_text(one.machine)}" for one in results]


def _markdown(results: Sequence[Results], records: Sequence[Record], chapters: Sequence[Made]) -> str:
    parts = [f"# {TITLE}", "\n".join(f"- {line}" for line in _sources(results)), noise_note(records)]
    parts.append("## Targets")
    for table in target_tables(judge(records)):
        parts += [f"### {table.title}", markdown(table)]
    for chapter in chapters:
        parts += [f"## {chapter.heading}", chapter.lead]
        for plot in chapter.plots:
            parts += [f"![{plot.caption}](plots/{plot.name}.png)", f"{plot.caption} {plot.machine}."]
        for table in chapter.tables:
            parts += [f"### {table.title}", markdown(table)]
    parts += ["## Left out", "\n".join(f"- {line}" for line in left_out(records))] if left_out(records) else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _html(results: Sequence[Results], records: Sequence[Record], chapters: Sequence[Made]) -> str:
    verdicts = judge(records)
    counts = ", ".join(f"{sum(v.status == s for v in verdicts)} {s}" for s in ("met", "missed", "not measured"))
    sources = "".join(f"<li>{escape(line)}</li>" for line in _sources(results))
    head = (
        f'<header><p class="eyebrow">dive_fast · benchmarks</p><h1>{TITLE}</h1>'
        f'<p class="finding">Of {len(verdicts)} targets: {counts}.</p><ul class="facts">{sources}</ul>'
        f'<p class="facts">{escape(noise_note(records))}</p></header>'
    )
    parts = [head, section("targets", "Targets", "".join(map(_folded, target_tables(verdicts))))]
    for chapter in chapters:
        body = "".join(map(_figure, chapter.plots)) + "".join(map(_folded, chapter.tables))
        parts.append(section(chapter.name, escape(chapter.heading), body, escape(chapter.lead)))
    reasons = "".join(f"<li>{escape(line)}</li>" for line in left_out(records))
    parts += [section("left-out", "Left out", f'<ul class="facts">{reasons}</ul>')] if reasons else []
    css = files("dive_fast.report_assets").joinpath("report.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{TITLE}</title><style>\n{css}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _figure(plot: Plot) -> str:
    data = base64.b64encode(plot.path.read_bytes()).decode()
    return (
        f'<figure class="panel drawing"><img alt="{escape(plot.caption)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
    )


def _folded(table: Table) -> str:
    made = html(table)
    if len(table.rows) <= LONG:
        return made
    return f"<details><summary><h3>{escape(table.title)}: {len(table.rows)} rows</h3></summary>{made}</details>"
