"""Two results files, record by record: what became slower or faster, and what is only noise.

Compared is what has one name and did one work: other tokens, rows or dtypes under the same name are listed apart.
A record has moved if the 95 % intervals of its two medians do not overlap and the medians differ by more than 3 %.
Both conditions are needed: the first is about the rounds of each run alone, and a machine that others share, or that is
warmer than an hour ago, moves everything by a percent or two.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dive_fast.bench.noise import ratio_of_medians
from dive_fast.bench.results import Interval, Record, Results
from dive_fast.errors import InputError

LEAST_CHANGE = 0.03
RULE = f"the 95 % intervals of the medians do not overlap, and they differ by more than {LEAST_CHANGE:.0%}"
# What tells two machines apart; versions and commit may differ, they are what is compared.
MACHINE = ("processor", "kernel level", "gpu", "threads", "affinity", "governor")
# What a record says of its work, as against what was found.
WORK = (
    *("device", "dtype", "backbone", "implementation", "steering", "reduction", "weighted", "threads"),
    *("B", "T", "N", "D", "V", "r", "K", "size", "prompt_tokens", "new_tokens", "max_new_tokens", "tokens", "targets"),
    *("reports", "held_out", "documents", "batch", "steps", "resamples", "parameters"),
)


class Change(NamedTuple):
    """One record in both files.

    Attributes:
        before, after: its medians in seconds.
        ratio: after : before; above 1 is slower.
        verdict: "slower", "faster", "same", or "unknown" where a run has too few rounds for an interval.
    """

    record: Record
    before: Interval
    after: Interval
    ratio: Interval
    verdict: str


class Comparison(NamedTuple):
    """Changes by size, the largest first; records that one file has; how the machines differ; what did other work."""

    changes: Sequence[Change]
    only_before: Sequence[Record]
    only_after: Sequence[Record]
    machines: Sequence[str]
    other_work: Sequence[str]

    @property
    def slower(self) -> list[Change]:
        return [change for change in self.changes if change.verdict == "slower"]


def compare(before: Results, after: Results) -> Comparison:
    """Compare two runs of the suite.

    Raises:
        InputError: runs of different scales, or without a record in common.
    """
    if before.scale != after.scale:
        raise InputError(
            f"--compare: {before.source} is of scale {before.scale!r} and {after.source} of {after.scale!r}; "
            "compare runs of one scale"
        )
    old, new = ({(record.group, record.name): record for record in one.records} for one in (before, after))
    common = [key for key in new if key in old]
    if not common:
        raise InputError(
            f"--compare: {before.source} and {after.source} have no record in common; were they run with the same -k?"
        )
    other_work = {key: _differences(old[key].values, new[key].values, WORK) for key in common}
    changes = [_change(old[key], new[key]) for key in common if not other_work[key]]
    # Half the time is as large a change as twice the time.
    changes.sort(key=lambda change: abs(math.log(change.ratio.median)), reverse=True)
    return Comparison(
        changes,
        [record for key, record in old.items() if key not in new],
        [record for key, record in new.items() if key not in old],
        _differences(before.machine, after.machine, MACHINE),
        [f"{new[key].name}: {', '.join(found)}" for key, found in other_work.items() if found],
    )


def _change(before: Record, after: Record) -> Change:
    a, b = before.seconds, after.seconds
    ratio = ratio_of_medians(b, a)
    if not ratio.known:
        verdict = "unknown"
    elif abs(ratio.median - 1) <= LEAST_CHANGE or (a.low <= b.high and b.low <= a.high):
        verdict = "same"
    else:
        verdict = "slower" if ratio.median > 1 else "faster"
    return Change(after, a, b, ratio, verdict)


def _differences(before: Mapping, after: Mapping, labels: Sequence[str]) -> list[str]:
    pairs = ((label, before.get(label), after.get(label)) for label in labels)
    return [f"{label} {_said(a)} and {_said(b)}" for label, a, b in pairs if a != b]


def _said(value) -> str:
    return "not recorded" if value is None else repr(value)
