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
    return _bars_of_systems(
        "Training: peak memory of a step, beyond the frozen weights",
        "MiB",
        found,
        lambda r, name: Interval(r.get("systems")[name]["peak_memory"] / 2**20),
        lambda r: f"{r.get('backbone')}, {r.get('dtype')}, {r.get('reports')} reports a step",
        show=lambda value: size(value * 2**20),
    )


def reports_per_minute(records: Sequence[Record]):
    """Reports a minute by system, steered and not."""
    found = [r for r in records if r.group == "end-to-end reports"]
    return _bars_of_systems(
        "Reports a minute, prompts and prefill included",
        "reports a minute (median, 95 % interval)",
        found,
        lambda r, name: r.interval("systems", name, "reports_per_minute"),
        lambda r: f"{r.get('problem')}, {r.get('steering')}: {r.get('reports')} reports, {r.get('batch')} at a time",
    )


def _bars_of_systems(title: str, unit: str, records: Sequence[Record], value, heading, **how):
    """A panel a record, a bar a system; `value(record, system)` an interval, `heading(record)` the panel's title."""
    if not records:
        return None
    systems = looks(name for r in records for name in r.get("systems"))
    height = HEAD + sum(0.5 + ROW * len(r.get("systems")) for r in records)
    fig, axes = figure(title, records, rows=len(records), height=height)
    for axis, r in zip(axes, records, strict=True):
        bars(axis, [(label(name), value(r, name), systems[name]) for name in r.get("systems")], **how)
        axis.set_title(heading(r))
        axis.set_xlabel(unit)
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
