"""The plots of the group `scaling`: time and memory against size, with the straight lines through the times."""

from collections.abc import Mapping, Sequence

import numpy as np

from dive_fast.bench.drawing import Look, figure, legend, log_axes, looks, point
from dive_fast.bench.fits import line
from dive_fast.bench.group_tables import AXES, curves, scaling
from dive_fast.bench.results import Interval, Record

PER_ROW = 2
PANEL = 3.1  # inches


def times(records: Sequence[Record]):
    """One panel an axis: the medians with their spread, and a + b * size."""
    found = curves(records)
    if not found:
        return None
    used = [r for r in records if r.group == "scaling"]
    fig, axes = _panels("Time against size", used, len(found))
    for axis, (name, lines) in zip(axes, found.items(), strict=False):
        systems = looks(lines)
        sizes = sorted({size for points in lines.values() for size, _ in points})
        for system, points in lines.items():
            for size, seconds in points:
                # All rounds: they are few.
                spread = Interval(*(1e3 * float(x) for x in (np.median(seconds), min(seconds), max(seconds))))
                point(axis, size, spread, systems[system])
            law = line([size for size, _ in points], [seconds for _, seconds in points])
            if law is not None:
                dense = np.geomspace(points[0][0], points[-1][0], 50)
                drawn = [(x, 1e3 * law.at(x)) for x in dense if law.at(x) > 0]
                axis.plot(*zip(*drawn, strict=True), color=systems[system].colour, linewidth=1.1, zorder=2)
        _finish(axis, name, sizes, "milliseconds", systems)
    return fig


def memory(records: Sequence[Record]):
    """One panel an axis whose records hold peak memory."""
    found: dict[str, dict[str, list[tuple[int, int]]]] = {}
    used = [(r, device) for r, device in scaling(records) if r.get("peak_memory")]
    for r, device in used:
        for name, count in r.get("peak_memory").items():
            if count > 0:
                found.setdefault(r.get("axis"), {}).setdefault(name + device, []).append((r.get("size"), count))
    if not found:
        return None
    fig, axes = _panels("Peak memory against size, above the level before", [r for r, _ in used], len(found))
    for axis, (name, lines) in zip(axes, found.items(), strict=False):
        systems = looks(lines)
        for system, points in lines.items():
            points.sort()
            axis.plot(*zip(*((x, count / 2**20) for x, count in points), strict=True), color=systems[system].colour,
                      linewidth=1.1, zorder=2)  # fmt: skip
            for x, count in points:
                point(axis, x, Interval(count / 2**20), systems[system])
        _finish(axis, name, sorted({x for points in lines.values() for x, _ in points}), "MiB", systems)
    return fig


def _panels(title: str, records: Sequence[Record], count: int):
    columns = min(PER_ROW, count)
    rows = -(-count // columns)
    fig, axes = figure(title, records, rows=rows, columns=columns, height=0.9 + PANEL * rows)
    for axis in axes[count:]:
        axis.set_visible(False)
    return fig, axes


def _finish(axis, name: str, sizes: Sequence[float], unit: str, systems: Mapping[str, Look]) -> None:
    what, _, timed = AXES[name]
    log_axes(axis, sizes)
    axis.set_title(timed)
    axis.set_xlabel(what)
    axis.set_ylabel(unit)
    legend(axis, systems, loc="best")
