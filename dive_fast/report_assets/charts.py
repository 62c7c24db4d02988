"""Charts of the report page as HTML with stretched inline SVG.

Shapes are drawn in a unit square that the page stretches (`preserveAspectRatio="none"` with non-scaling strokes),
labels are HTML placed in per cent: the text keeps its size from 400 px to 1400 px, takes the page's colours in light
and dark, and needs no script. Systems differ by colour and by dash or marker, never by colour alone.
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from dive_fast.report_assets.numbers import best_adapter


class Style(NamedTuple):
    """How a system looks in every chart: a CSS class for its colour, a marker shape, an SVG dash pattern."""

    colour: str
    marker: str
    dash: str


DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2")


def styles(systems: Sequence[dict]) -> list[Style]:
    """Grey rings for baselines, amber diamonds for teachers, a colour and dash per adapter; the best solid blue."""
    looks, adapters, best = [], 1, best_adapter({"systems": systems})
    for system in systems:
        role = system.get("role")
        if role == "baseline":
            looks.append(Style("c-base", "ring", "3 3"))
        elif role == "teacher":
            looks.append(Style("c-teacher", "diamond", "6 2"))
        elif system is best:
            looks.append(Style("c-0", "disc", ""))
        else:
            looks.append(Style(f"c-{1 + (adapters - 1) % 5}", "disc", DASHES[adapters % len(DASHES)]))
            adapters += 1
    return looks


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most `count + 1` round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """At most 5 round numbers (1, 2, 5 times powers of ten) inside [low, high]; its ends where there are under 2."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [10.0**power * factor for power in powers for factor in (1, 2, 5) if low <= 10.0**power * factor <= high]
    inside = inside[:: math.ceil(len(inside) / 5) or 1]
    return inside if len(inside) >= 2 else [low, high]


def number(value: float) -> str:
    """A tick's label, as short as it can be: 0.25, 10, 1,500."""
    return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"


class Point(NamedTuple):
    label: str
    style: Style
    value: float
    interval: tuple[float, float] | None
    text: str


def interval_panel(
    title: str, note: str, points: Sequence[Point], *, percent: bool = False, unbounded: bool = False
) -> str:
    """One metric: a row per system with its dot and interval.

    The axis is logarithmic where values without an upper bound span a factor of 4; shares near 0 would only fill it
    with powers of ten.
    """
    ends = [end for point in points for end in (point.value, *(point.interval or ()))]
    low, high = min(ends), max(ends)
    log = unbounded and low > 0 and high / low > 4
    if not log:
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        low, high = (max(0.0, low - margin) if low >= 0 else low - margin), high + margin
    else:
        low, high = low / 1.15, high * 1.15

    def place(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return 100 * min(max(share, 0.0), 1.0)

    marks = log_ticks(low, high) if log else ticks(low, high, 4)
    grid = "".join(f'<i class="grid" style="left:{place(mark):.2f}%"></i>' for mark in marks)
    rows = "".join(_interval_row(point, grid, place) for point in points)
    names = [number(100 * mark if percent else mark) for mark in marks]
    names[-1] += " %" if percent else ""  # once: with a sign each, the labels run into each other
    axis = "".join(f'<span style="left:{place(m):.2f}%">{name}</span>' for m, name in zip(marks, names, strict=True))
    summary = f"{title}: " + "; ".join(f"{point.label} {point.text}" for point in points)
    return (
        f'<figure class="panel"><figcaption><strong>{escape(title)}</strong> <small>{escape(note)}'
        f"{', log scale' if log else ''}</small></figcaption>"
        f'<div class="dots" role="img" aria-label="{escape(summary)}">{rows}'
        f'<div class="dot-row axis"><span></span><span class="track">{axis}</span><span></span></div></div></figure>'
    )


def _interval_row(point: Point, grid: str, place) -> str:
    bar = ""
    if point.interval is not None:
        left, right = place(point.interval[0]), place(point.interval[1])
        bar = f'<i class="bar" style="left:{left:.2f}%;width:{right - left:.2f}%"></i>'
    dot = f'<i class="dot {point.style.marker}" style="left:{place(point.value):.2f}%"></i>'
    return (
        f'<div class="dot-row {point.style.colour}"><span class="name">{escape(point.label)}</span>'
        f'<span class="track">{grid}{bar}{dot}</span><span class="value">{escape(point.text)}</span></div>'
    )


def loss_points(history: Sequence[dict], key: str) -> list[tuple[float, float]]:
    """(step, loss) of the entries that carry a finite `key`."""
    pairs = [(entry.get("step"), entry.get(key)) for entry in history]
    return [(float(step), float(loss)) for step, loss in pairs if _finite(step) and _finite(loss)]


def _finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class Line(NamedTuple):
    label: str
    style: Style
    points: Sequence[tuple[float, float]]


def line_chart(title: str, x_label: str, lines: Sequence[Line]) -> str:
    """Losses over steps. A line of 30 points or more is drawn as a running mean over its faint raw values.

    The losses' axis is logarithmic where they span a factor of 5: objectives are not on one scale, and the largest
    would press the others flat.
    """
    losses = [y for line in lines for _, y in line.points]
    log = min(losses) > 0 and max(losses) / min(losses) > 5
    low_y, high_y = _span([math.log(y) for y in losses] if log else losses)
    low_x, high_x = 0.0, max(x for line in lines for x, _ in line.points) or 1.0

    def place_x(x: float) -> float:
        return (x - low_x) / (high_x - low_x)

    def place_y(y: float) -> float:
        return 1 - ((math.log(y) if log else y) - low_y) / (high_y - low_y)

    marks_x = ticks(low_x, high_x, 5)
    marks_y = log_ticks(math.exp(low_y), math.exp(high_y)) if log else ticks(low_y, high_y, 4)
    shapes = [f'<path class="gridline" d="M0 {place_y(y):.4f}H1"/>' for y in marks_y]
    for line in lines:
        raw = [(place_x(x), place_y(y)) for x, y in sorted(line.points)]
        if len(raw) >= 30:
            shapes.append(f'<path class="line raw {line.style.colour}" d="{_path(raw)}"/>')
        drawn = running_mean(raw)
        shapes.append(
            f'<path class="line {line.style.colour}" stroke-dasharray="{line.style.dash}" d="{_path(drawn)}"/>'
            if len(drawn) > 1
            else _lone_point(drawn[0], line.style)
        )
    summary = f"{title}: " + "; ".join(
        f"{line.label} from {number(min(line.points)[1])} to {number(max(line.points)[1])}" for line in lines
    )
    left = "".join(f'<span style="top:{100 * place_y(y):.2f}%">{number(y)}</span>' for y in marks_y)
    below = "".join(f'<span style="left:{100 * place_x(x):.2f}%">{number(x)}</span>' for x in marks_x)
    smoothed = ", running mean over the faint values" if any(len(line.points) >= 30 for line in lines) else ""
    return (
        f'<figure class="panel"><figcaption><strong>{escape(title)}</strong> '
        f"<small>over {escape(x_label)}{smoothed}{', log scale' if log else ''}</small></figcaption>"
        f'<div class="plot" role="img" aria-label="{escape(summary)}"><div class="y-ticks">{left}</div>'
        f'<svg viewBox="0 0 1 1" preserveAspectRatio="none" aria-hidden="true">{"".join(shapes)}</svg>'
        f'<div class="x-ticks">{below}</div></div></figure>'
    )


def running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred mean of y over about a tenth of the points (at least 5); fewer than 30 points stay as they are."""
    if len(points) < 30:
        return list(points)
    half = max(2, len(points) // 20)
    smooth = []
    for index, (x, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        window = points[index - reach : index + reach + 1]
        smooth.append((x, sum(y for _, y in window) / len(window)))
    return smooth


def legend(lines: Sequence[Line]) -> str:
    """The systems of a line chart with their colour and dash."""
    items = "".join(
        f'<li><svg class="sample" viewBox="0 0 34 8" aria-hidden="true"><path class="line {line.style.colour}" '
        f'stroke-dasharray="{line.style.dash}" d="M1 4H33"/></svg>{escape(line.label)}</li>'
        for line in lines
    )
    return f'<ul class="legend">{items}</ul>'


def histogram(label: str, style: Style, lengths: Sequence[int], references: Sequence[int], longest: int) -> str:
    """Share of reports by length in words, one system's outline over the references' filled silhouette."""
    edges = [longest * index / 24 for index in range(25)]
    ours, theirs = _shares(lengths, edges), _shares(references, edges)
    top = max([*ours, *theirs]) * 1.08 or 1.0
    middle, target = _median(lengths), _median(references)
    note = f"median {number(middle)} words, references {number(target)}"
    marks = ticks(0, longest, 4)
    below = "".join(f'<span style="left:{100 * mark / longest:.2f}%">{number(mark)}</span>' for mark in marks)
    return (
        f'<figure class="panel"><figcaption><strong>{escape(label)}</strong> <small>{note}</small></figcaption>'
        f'<div class="plot low" role="img" aria-label="{escape(label)}: {note}">'
        f'<svg viewBox="0 0 1 1" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="silhouette" d="{_steps(theirs, top)}"/>'
        f'<path class="line {style.colour} outline" d="{_steps(ours, top)}"/><path class="gridline" d="M0 1H1"/></svg>'
        f'<div class="x-ticks">{below}</div></div></figure>'
    )


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.4f} {y:.4f}" for x, y in points)


def _lone_point(point: tuple[float, float], style: Style) -> str:
    # A zero-length path with round caps: the one dot that a stretched drawing does not turn into an ellipse.
    return f'<path class="line lone {style.colour}" d="M{point[0]:.4f} {point[1]:.4f}h0"/>'


def _shares(lengths: Sequence[int], edges: Sequence[float]) -> list[float]:
    counts = [0] * (len(edges) - 1)
    for length in lengths:
        counts[min(int(length / edges[1]), len(counts) - 1)] += 1
    return [count / max(len(lengths), 1) for count in counts]


def _steps(shares: Sequence[float], top: float) -> str:
    width = 1 / len(shares)
    path = "M0 1"
    for index, share in enumerate(shares):
        path += f"V{1 - share / top:.4f}H{(index + 1) * width:.4f}"
    return path + "V1Z"


def _median(values: Sequence[int]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
