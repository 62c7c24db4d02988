"""How near each op comes to its limit: the time of what cannot be left out, over the time that the op takes."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from dive_fast.bench.drawing import HEAD, ROW, SOFT, figure, legend, looks, point, rows_of_names
from dive_fast.bench.results import Interval, Record
from dive_fast.bench.words import decode_words


class Share(NamedTuple):
    """A row in the plot of shares: what was measured, of which system, and the share."""

    name: str
    system: str
    value: Interval


def loss_shares(records: Sequence[Record]) -> list[Share]:
    found = [r for r in records if r.group.startswith("loss ") and r.get("floor_seconds") and r.get("implementation")]
    found = [r for r in found if r.get("implementation").startswith("dive_fast") and r.group != "loss ratios"]
    return [
        Share(r.get("problem"), r.get("implementation"),
              r.seconds.under(r.get("floor_seconds")))
        for r in found
    ]  # fmt: skip


def steer_shares(records: Sequence[Record]) -> list[Share]:
    return [
        Share(
            f"T {r.get('T')}, D {r.get('D')}, r {r.get('r')}, {r.get('dtype')}, {r.get('direction')}",
            r.get("implementation"),
            r.interval("ratios", "copy of the same bytes").under(1),
        )
        for r in records
        if r.group == "steer-op"
    ]


def kernel_shares(records: Sequence[Record]) -> list[Share]:
    return [
        Share(
            f"{r.get('dtype')}, {r.get('K')} columns, {r.get('B')} vectors",
            r.get("implementation"),
            r.interval("share_of_read_limit"),
        )
        for r in records
        if r.group.startswith("decode kernels")
    ]


def decode_shares(records: Sequence[Record]) -> list[Share]:
    return [
        Share(
            f"{decode_words(r)}, {r.get('steering')}",
            r.get("implementation"),
            r.interval("share_of_read_limit") or r.interval("share_of_floor"),
        )
        for r in records
        if r.get("problem") and r.group == f"decode {r.get('problem')}"
    ]


# Name -> rows, what the limit is.
SHARES: Mapping[str, tuple[Callable[[Sequence[Record]], list[Share]], str]] = {
    "loss": (loss_shares, "time of the bare products by torch.mm : time"),
    "steering op": (steer_shares, "time of copying the same bytes : time"),
    "decoding kernels": (kernel_shares, "time of reading the weights : time"),
    "decoding": (decode_shares, "time of reading or copying what a step must read : time"),
}


def shares(name: str) -> Callable:
    """A plot of how near an op comes to its limit."""
    rows_of, axis_label = SHARES[name]

    def draw(records: Sequence[Record]):
        rows = [row for row in rows_of(records) if row.value is not None]
        if not rows:
            return None
        used = [r for r in records if any(rows_of([r]))]
        names = list(dict.fromkeys(row.name for row in rows))
        systems = looks(row.system for row in rows)
        fig, (axis,) = figure(f"Share of the limit: {name}", used, height=HEAD + ROW * len(names))
        for row in rows:
            point(axis, names.index(row.name), row.value, systems[row.system], flat=True)
        rows_of_names(axis, names)
        if len(systems) > 1:
            legend(fig, systems, loc="outside upper right", ncols=len(systems))
        axis.axvline(1, color=SOFT, linewidth=1, linestyle="--")
        axis.set_xlim(0, max(1.05, *(1.08 * (row.value.high or row.value.median) for row in rows)))
        axis.set_xlabel(f"{axis_label} (1 is the limit; 95 % intervals)")
        return fig

    return draw
