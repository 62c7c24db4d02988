"""Plots of decoding, steering, training steps and the loss; one without its records is left out."""

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
    log_axes,
    looks,
    point,
    rows_of_names,
)
from dive_fast.bench.results import LEAST_ROUNDS, Interval, Record
from dive_fast.bench.table import size
from dive_fast.bench.targets import TARGETS
from dive_fast.bench.words import decode_words, step_words


def steering_overhead(records: Sequence[Record]):
    """What steering adds to a step, against kind, rank and rows, with the targets."""
    found = [r for r in records if r.group == "decode steering"]
    if not found:
        return None
    problems = sorted(
        {r.get("problem") for r in found}, key=lambda p: [r.get("B") for r in found if r.get("problem") == p]
    )
    names = list(dict.fromkeys(r.get("steering") for r in found))
    names.sort(key=_steering_order)
    systems = looks(r.get("implementation") for r in found)
    fig, axes = figure(
        "What steering every layer adds to a decoding step",
        found,
        columns=len(problems),
        height=HEAD + 0.3 + 0.3 * len(names),
        sharey=True,
    )
    for axis, problem in zip(axes, problems, strict=True):
        rows_of_names(axis, names)
        axis.axvline(0, color=SOFT, linewidth=1)
        for r in (r for r in found if r.get("problem") == problem):
            shift = 0.15 if len(systems) > 1 else 0.0
            shift = -shift if r.get("implementation").startswith("dive_fast") else shift
            place = names.index(r.get("steering")) + shift
            point(axis, place, r.interval("overhead_percent"), systems[r.get("implementation")], flat=True)
        for target in TARGETS:
            if target.group == "decode steering" and target.where["problem"] == problem:
                place = names.index(target.where["steering"]) if target.where["steering"] in names else None
                if place is not None:
                    axis.plot([target.most] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2, zorder=2)
        axis.set_title(decode_words(next(r for r in found if r.get("problem") == problem)))
        axis.set_xlabel("added to a step, %")
    legend(fig, systems, loc="outside upper right", ncols=len(systems))
    return fig


def _steering_order(name: str) -> tuple:
    rank = next((int(part[1:]) for part in name.split("-") if part[1:].isdigit()), 0)
    return "different" in name, rank > 0, name.split("-")[0], rank


def decode_steps(records: Sequence[Record]):
    """Time per step against the rows of a batch, by implementation."""
    found = [r for r in records if r.group == f"decode {r.get('problem')}" and r.get("steering") == "unsteered"]
    if not found:
        return None
    systems = looks(r.get("implementation") for r in found)
    kinds = list(dict.fromkeys((r.get("problem").rsplit("-B", 1)[0]) for r in found))
    fig, axes = figure("Decoding: time per step", found, columns=len(kinds), height=3.6)
    for axis, kind in zip(axes, kinds, strict=True):
        inside = [r for r in found if r.get("problem").rsplit("-B", 1)[0] == kind]
        for name, look in systems.items():
            line = sorted((r for r in inside if r.get("implementation") == name), key=lambda r: r.get("B"))
            steps = [r.seconds.times(1e3 / r.get("new_tokens")) for r in line]
            axis.plot([r.get("B") for r in line], [s.median for s in steps], color=look.colour, linewidth=1.2)
            for r, step in zip(line, steps, strict=True):
                point(axis, r.get("B"), step, look)
        limits = {r.get("B"): _limit_ms(r) for r in inside if r.get("implementation") == "dive_fast"}
        if limits and None not in limits.values():
            axis.plot(*zip(*sorted(limits.items()), strict=True), color=SOFT, linestyle="--", linewidth=1.2)
            axis.annotate(
                "limit of ours", min(limits.items()), (2, -11), textcoords="offset points", fontsize=8, color=SOFT
            )
        log_axes(axis, sorted({r.get("B") for r in inside}))
        axis.set_title(kind)
        axis.set_xlabel("rows in the batch")
    axes[0].set_ylabel("milliseconds per step")
    legend(fig, systems, loc="outside upper right", ncols=len(systems))
    return fig


def _limit_ms(record: Record) -> float | None:
    share = record.interval("share_of_read_limit") or record.interval("share_of_floor")
    return None if share is None else record.get("milliseconds_per_step") * share.median


def train_steps(records: Sequence[Record]):
    """How many times faster a training step is than what it replaces."""
    found = [r for r in records if r.group == "train-step"]
    if not found:
        return None
    others = looks(dict.fromkeys(name for r in found for name in r.get("ratios")))
    names = [step_words(r) for r in found]
    fig, (axis,) = figure("Training step: times faster than", found, height=HEAD + 0.55 * len(found))
    rows_of_names(axis, names)
    for place, r in enumerate(found):
        for index, (name, look) in enumerate(others.items()):
            ratio = r.interval("ratios", name)
            if ratio is not None:
                shift = 0.22 * (index - (len(others) - 1) / 2)
                point(axis, place + shift, ratio.under(1), look, flat=True)
    axis.axvline(1, color=SOFT, linewidth=1, linestyle="--")
    log_along_x(axis)
    axis.set_xlabel(f"times faster (95 % intervals where there are {LEAST_ROUNDS} rounds or more)")
    legend(fig, others, loc="outside upper right", ncols=len(others))
    return fig


def loss_memory(records: Sequence[Record]):
    """Peak memory of the loss by implementation, for the problems that the targets name."""
    found = [r for r in records if r.group.startswith("loss ") and r.get("peak_memory") and r.group != "loss ratios"]
    wanted = {r.get("problem") for r in records if r.group == "loss ratios"} or {r.get("problem") for r in found}
    found = [r for r in found if r.get("problem") in wanted]
    return _memory("Peak memory of the loss, above the level before it", found, "problem", "implementation")


def _memory(title: str, found: Sequence[Record], panel: str, name: str):
    if not found:
        return None
    panels = list(dict.fromkeys(r.get(panel) for r in found))
    systems = looks(r.get(name) for r in found)
    longest = max(sum(r.get(panel) == one for r in found) for one in panels)
    fig, axes = figure(title, found, rows=len(panels), height=0.9 + len(panels) * (0.75 + ROW * longest))
    for axis, one in zip(axes, panels, strict=True):
        inside = sorted((r for r in found if r.get(panel) == one), key=lambda r: r.get("peak_memory"))
        rows = [(label(r.get(name)), Interval(r.get("peak_memory") / 2**20), systems[r.get(name)]) for r in inside]
        bars(axis, rows, show=lambda value: size(value * 2**20))
        axis.set_title(one)
        axis.set_xlabel("MiB")
    return fig


def train_memory(records: Sequence[Record]):
    """Peak memory of a training step over plain hooks'."""
    found = [r for r in records if r.group == "train-step" and r.get("ratios", "plain hooks", "peak_memory")]
    if not found:
        return None
    look = looks(["dive_fast"])["dive_fast"]
    fig, (axis,) = figure("Peak memory of a training step : plain hooks'", found, height=HEAD + 0.42 * len(found))
    bars(axis, [(step_words(r), r.interval("ratios", "plain hooks", "peak_memory"), look) for r in found])
    axis.axvline(1, color=SOFT, linewidth=1, linestyle="--")
    axis.set_xlabel("share of what a step with plain hooks takes (1: as much)")
    return fig
