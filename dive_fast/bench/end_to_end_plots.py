"""Plots of what a user waits for: training to a loss, written reports, scored documents."""

from collections.abc import Sequence

from dive_fast.bench.drawing import (
    HEAD,
    ROW,
    SOFT,
    bars,
    figure,
    label,
    legend,
    log_along_x,
    looks,
    point,
    rows_of_names,
)
from dive_fast.bench.results import Interval, Record
from dive_fast.bench.table import size


def training_curves(records: Sequence[Record]):
    """Held-out loss over seconds of training, with the loss to reach."""
    found = [r for r in records if r.group == "end-to-end training"]
    if not found:
        return None
    systems = looks(name for r in found for name in r.get("systems"))
    fig, axes = figure("Training: held-out loss over time", found, columns=len(found), height=3.8)
    for axis, r in zip(axes, found, strict=True):
        for name, system in r.get("systems").items():
            look = systems[name]
            seconds, losses = zip(*((took, loss) for _, took, loss in system["curve"]), strict=True)
            axis.plot(seconds, losses, color=look.colour, marker=look.marker, markersize=4.5, linewidth=1.2,
                      markerfacecolor=look.colour if look.ours else "white")  # fmt: skip
        axis.axhline(r.get("threshold"), color=SOFT, linestyle="--", linewidth=1)
        axis.annotate(f"to reach: {r.get('threshold'):g}", (1, r.get("threshold")), (-2, 3), fontsize=8, color=SOFT,
                      xycoords=("axes fraction", "data"), textcoords="offset points", ha="right")  # fmt: skip
        axis.set_title(f"{r.get('backbone')}, {r.get('dtype')}, {r.get('reports')} reports a step")
        axis.set_xlabel("seconds of training, evaluations not counted")
    axes[0].set_ylabel("nats per token, held-out reports")
    legend(fig, systems, loc="outside upper right", ncols=len(systems))
    return fig


def training_memory(records: Sequence[Record]):
    """Peak memory of the end-to-end runs."""
    found = [r for r in records if r.group == "end-to-end training"]
    if not found:
        return None
    systems = looks(name for r in found for name in r.get("systems"))
    height = HEAD + sum(0.5 + ROW * len(r.get("systems")) for r in found)
    fig, axes = figure(
        "Training: peak memory of a step, beyond the frozen weights", found, rows=len(found), height=height
    )
    for axis, r in zip(axes, found, strict=True):
        peaks = {name: Interval(one["peak_memory"] / 2**20) for name, one in r.get("systems").items()}
        rows = [(label(name), peak, systems[name]) for name, peak in peaks.items()]
        bars(axis, rows, show=lambda value: size(value * 2**20))
        axis.set_title(f"{r.get('backbone')}, {r.get('dtype')}, {r.get('reports')} reports a step")
        axis.set_xlabel("MiB")
    return fig


def reports_per_minute(records: Sequence[Record]):
    """Reports a minute by system, steered and not."""
    found = [r for r in records if r.group == "end-to-end reports"]
    if not found:
        return None
    systems = looks(name for r in found for name in r.get("systems"))
    height = HEAD + sum(0.5 + ROW * len(r.get("systems")) for r in found)
    fig, axes = figure("Reports a minute, prompts and prefill included", found, rows=len(found), height=height)
    for axis, r in zip(axes, found, strict=True):
        rows = [
            (label(name), r.interval("systems", name, "reports_per_minute"), systems[name]) for name in r.get("systems")
        ]
        bars(axis, rows)
        axis.set_title(
            f"{r.get('problem')}, {r.get('steering')}: {r.get('reports')} reports, {r.get('batch')} at a time"
        )
        axis.set_xlabel("reports a minute (median, 95 % interval)")
    return fig


def documents_per_second(records: Sequence[Record]):
    """Documents a second of every metric, ours and pycocoevalcap's."""
    found = [r for r in records if r.group == "evaluate" and r.get("metric") != "bootstrap"]
    if not found:
        return None
    systems = looks(["dive_fast", "pycocoevalcap"])
    fig, (axis,) = figure("Metrics: documents a second", found, height=HEAD + 0.45 * len(found))
    rows_of_names(axis, [r.get("metric") for r in found])
    for place, r in enumerate(found):
        rate = r.seconds.under(r.get("documents"))
        point(axis, place - 0.13, rate, systems["dive_fast"], flat=True)
        ratio = r.interval("ratios", "pycocoevalcap")
        if ratio is not None:
            # Paired: theirs is ours times the quotient.
            theirs = ratio.times(rate.median)
            point(axis, place + 0.13, theirs, systems["pycocoevalcap"], flat=True)
    log_along_x(axis)
    axis.set_xlabel("documents a second (95 % intervals)")
    legend(fig, systems, loc="outside upper right", ncols=2)
    return fig
