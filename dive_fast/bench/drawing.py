"""How every plot looks: colours that colour-blind readers and printers tell apart, axes, intervals, and the machine.

Systems differ by colour and by marker, ours come first and are filled. matplotlib is imported by what draws.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dive_fast.bench.results import Interval, Record
from dive_fast.bench.table import digits
from dive_fast.errors import InputError

# Okabe and Ito's palette without its yellow, which paper swallows; ours is the first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, SOFT, RULE = "#1c2329", "#59646e", "#d9d5cc"
# Inches: what a page shows without scaling; a row of names; title, axis and machine.
WIDTH, ROW, HEAD = 9.0, 0.26, 1.2
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "figure.facecolor": "white",
    # Glyphs as shapes: the file looks the same where the font is missing.
    "svg.fonttype": "path",
    "svg.hashsalt": "dive_fast",
}


class Look(NamedTuple):
    """A system's colour and marker, and whether it is ours."""

    colour: str
    marker: str
    ours: bool


def looks(names: Iterable[str]) -> dict[str, Look]:
    """One look a name, ours first; the same names look the same in every panel of a plot."""
    names = sorted(dict.fromkeys(names), key=lambda name: not is_ours(name))
    count = len(COLOURS)
    # The second time round every colour has another marker.
    return {
        name: Look(COLOURS[i % count], MARKERS[(i + i // count) % count], is_ours(name)) for i, name in enumerate(names)
    }


def is_ours(name: str) -> bool:
    return name.startswith("dive_fast")


def label(name: str) -> str:
    """How a system is called in a plot."""
    return name.replace("dive_fast", "ours", 1) if is_ours(name) else name


def figure(title: str, records: Iterable[Record], rows: int = 1, columns: int = 1, height: float = 3.2, **options):
    """(a figure with its title above and its machine below, its axes as a flat list)."""
    size = (WIDTH, height)
    fig, axes = pyplot().subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    fig.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    fig.supxlabel(machine_line(records), x=0.01, ha="left", fontsize=7.5, color=SOFT)
    return fig, list(axes.flat)


def pyplot():
    """matplotlib.pyplot, drawing into files.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(f"--report: plots need matplotlib ({error}): pip install 'dive_fast[plots]'") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def machine_line(records: Iterable[Record]) -> str:
    """What these records were measured on: a line for every machine or commit among them."""
    return "\n".join(dict.fromkeys(machine_text(record.machine) for record in records))


def machine_text(machine: Mapping[str, str]) -> str:
    """One line: device, threads, versions and commit."""
    parts = [machine.get("gpu"), machine.get("processor")]
    parts += [f"{machine['threads']} thread{'s' * (machine['threads'] != '1')}"] if "threads" in machine else []
    parts += [f"{name} {machine[name]}" for name in ("torch", "transformers") if name in machine]
    commit = machine.get("commit", "")
    parts += [f"commit {commit[:9]}{' with changes' * commit.endswith('with changes')}"] if commit else []
    return " · ".join(part for part in parts if part) or "machine not recorded"


def style():
    """A context in which figures are made and saved."""
    return pyplot().rc_context(STYLE)


def save(fig, folder: Path, name: str) -> Path:
    """Writes `name`.svg and `name`.png, each whole or not at all; the SVG's path."""
    folder.mkdir(parents=True, exist_ok=True)
    # Without a date, or the same results would give another file.
    for suffix, options in ((".png", {"dpi": 150}), (".svg", {"metadata": {"Date": None}})):
        path = folder / f"{name}{suffix}"
        part = path.with_name(f"{path.name}.part")
        fig.savefig(part, format=suffix[1:], **options)
        os.replace(part, path)
    pyplot().close(fig)
    return path


def point(axis, place: float, value: Interval, look: Look, *, flat: bool = False, legend: str | None = None) -> None:
    """One figure with its interval; `flat`: the value runs along x."""
    reach = [[value.median - value.low], [value.high - value.median]] if value.known else None
    x, y = (value.median, place) if flat else (place, value.median)
    axis.errorbar(
        x,
        y,
        **{"xerr" if flat else "yerr": reach},
        fmt=look.marker,
        color=look.colour,
        markerfacecolor=look.colour if look.ours else "white",
        markersize=5.5,
        elinewidth=1.3,
        capsize=2.5,
        label=legend,
        zorder=3,
    )


def bars(axis, rows: Sequence[tuple[str, Interval, Look]], show=digits) -> None:
    """Horizontal bars from the top down, each with its figure behind it."""
    for place, (_, value, look) in enumerate(rows):
        reach = [[value.median - value.low], [value.high - value.median]] if value.known else None
        axis.barh(
            place,
            value.median,
            xerr=reach,
            height=0.62,
            color=look.colour if look.ours else "white",
            edgecolor=look.colour,
            hatch=None if look.ours else "////",
            linewidth=1.1,
            error_kw={"capsize": 2.5, "elinewidth": 1.3, "ecolor": "black"},
        )
        end = value.high if value.known else value.median
        axis.annotate(
            show(value.median), (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK
        )
    axis.set_yticks(range(len(rows)), [name for name, _, _ in rows], color=INK)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.14)


def rows_of_names(axis, names: Sequence[str]) -> None:
    """Names along y, from the top down."""
    axis.set_yticks(range(len(names)), names, color=INK)
    axis.set_ylim(len(names) - 0.5, -0.5)


def log_axes(axis, sizes: Sequence[float], *, y: bool = True) -> None:
    """Logarithmic, with the measured sizes as ticks and numbers that are written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.set_xticks(sizes, [f"{size:g}" if size < 10000 else f"{size / 1000:.3g}k" for size in sizes])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_minor_locator(LogLocator(subs=()))
    if y:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def log_along_x(axis) -> None:
    """Logarithmic, with numbers that are written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def legend(axis, names: Mapping[str, Look], **options) -> None:
    """What the markers mean."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=look.colour, marker=look.marker, linestyle="", markersize=5.5, label=label(name),
               markerfacecolor=look.colour if look.ours else "white")
        for name, look in names.items()
    ]  # fmt: skip
    axis.legend(handles=handles, **({"fontsize": 8, "handletextpad": 0.3} | options))
