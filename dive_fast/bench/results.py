"""Results files of the benchmark suite: what they hold, checked once, so that all else here can rely on it.

A file is {"scale": "smoke" | "laptop" | "gpu", "machine": {label: text}, "records": [record, ...]}; `make gpu-check`
adds "check". A record has "name", "group", "seconds" (median, iqr, min, mean, stddev, rounds and, since files hold
them, low and high: a 95 % bootstrap interval of the median) and what its group notes. Wherever a figure has an
interval, it is {"median", "low", "high"}.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dive_fast.errors import InputError

HOW = "expected a results file of the benchmark suite, as `dive-fast bench --output FILE` writes it"
# Figures with an interval: alone, and by name of what a record was measured in turn with.
INTERVALS = ("overhead_percent", "share_of_read_limit")
NAMED_INTERVALS = ("ratios", "threshold_ratios")
# Of a group, what its records must hold for tables and plots.
NEEDED = {
    "end-to-end training": ("systems", "threshold", "steps", "reports", "backbone", "dtype"),
    "end-to-end reports": ("systems", "problem", "steering", "reports", "batch"),
    "scaling": ("axis", "size", "times"),
    "evaluate": ("metric", "documents", "documents_per_second"),
    "train-step": ("problem", "implementation", "ratios"),
    "decode steering": ("problem", "implementation", "steering", "overhead_percent", "adapter_bytes_share"),
    "decode ratios": ("problem", "implementation", "ratios"),
    "loss ratios": ("problem", "implementation", "ratios"),
    "steer-op": ("implementation", "direction", "dtype", "ratios", "gigabytes_per_second"),
}
# A normal sample's median has 1.2533 times the standard error of its mean.
MEDIAN_ERROR = math.sqrt(math.pi / 2)
# The true median lies between the quickest and the slowest of n rounds with a probability of 1 - 2^(1 - n): with five
# that is 94 %, with four 88 %, whatever interval is made of them.
LEAST_ROUNDS = 5


class Interval(NamedTuple):
    """A figure and its 95 % interval; `low` and `high` are None where there is none."""

    median: float
    low: float | None = None
    high: float | None = None

    @property
    def known(self) -> bool:
        return self.low is not None

    def times(self, factor: float) -> "Interval":
        """Of the figure times a positive factor."""
        return Interval(*(None if end is None else factor * end for end in self))

    def under(self, whole: float) -> "Interval":
        """Of `whole` over the figure: what was its lower end is the upper one."""
        median, low, high = (None if end is None else whole / end for end in self)
        return Interval(median, high, low)


class Record(NamedTuple):
    """One measured thing.

    Attributes:
        values: the whole record, as it stands in the file.
        machine: of the file.
        source: the file's name.
    """

    name: str
    group: str
    values: Mapping[str, Any]
    machine: Mapping[str, str]
    source: str

    @property
    def seconds(self) -> Interval:
        """The median, with the interval that was stored or that its rounds' standard deviation gives."""
        found = self.values["seconds"]
        if "low" in found and found["rounds"] >= LEAST_ROUNDS:
            return Interval(found["median"], found["low"], found["high"])
        return _normal_interval(found)

    @property
    def device(self) -> str:
        """What it was measured on: the GPU where the machine has one, else the processor."""
        return self.machine.get("gpu") or self.machine.get("processor") or "a machine not recorded"

    @property
    def rounds(self) -> int:
        return self.values["seconds"]["rounds"]

    def get(self, *path: str):
        """The value at a path of keys, None where a key is missing."""
        value = self.values
        for key in path:
            if not isinstance(value, Mapping) or key not in value:
                return None
            value = value[key]
        return value

    def interval(self, *path: str) -> Interval | None:
        """The figure at a path, with the interval that the file holds there, if it is of `LEAST_ROUNDS` or more."""
        value = self.get(*path)
        if value is None or not isinstance(value, Mapping):
            return None if value is None else Interval(value)
        if value.get("rounds", self.rounds) < LEAST_ROUNDS:
            return Interval(value["median"])
        return Interval(value["median"], value["low"], value["high"])


def _normal_interval(seconds: Mapping) -> Interval:
    if seconds["rounds"] < LEAST_ROUNDS:
        return Interval(seconds["median"])
    reach = _student_t(seconds["rounds"] - 1) * MEDIAN_ERROR * seconds["stddev"] / math.sqrt(seconds["rounds"])
    # No interval of a median reaches below the quickest round.
    return Interval(seconds["median"], max(seconds["median"] - reach, seconds["min"]), seconds["median"] + reach)


def _student_t(degrees: int) -> float:
    """The 97.5 % quantile, by its expansion in 1 / degrees (Abramowitz and Stegun 26.7.5); within 3 % from 2 on."""
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


class Results(NamedTuple):
    """What one file holds."""

    source: str
    scale: str
    machine: Mapping[str, str]
    records: Sequence[Record]


def parse_results(content: Any, source: str) -> Results:
    """The content of a results file, checked.

    Args:
        content: what the JSON file held.
        source: its name, for messages and captions.

    Raises:
        InputError: not such a file, or a record that lacks what every record has; names file and record.
    """
    if not isinstance(content, Mapping) or not isinstance(content.get("records"), list):
        raise InputError(f"{source}: {HOW}; got {_kind(content)}")
    if not isinstance(content.get("scale"), str) or not isinstance(content.get("machine"), Mapping):
        raise InputError(f'{source}: {HOW}; "scale" or "machine" is missing')
    machine = {str(label): str(text) for label, text in content["machine"].items()}
    records, seen = [], set()
    for index, values in enumerate(content["records"]):
        record = _record(values, index, machine, source)
        if (record.group, record.name) in seen:
            raise InputError(f"{source}: the record {record.name!r} of group {record.group!r} occurs twice")
        seen.add((record.group, record.name))
        records.append(record)
    return Results(source, content["scale"], machine, records)


def _kind(content: Any) -> str:
    if isinstance(content, Mapping) and "systems" in content:
        return "a result of `dive-fast demo`, which `dive-fast report` turns into a page"
    if not isinstance(content, Mapping):
        return "no object"
    return f"an object with {', '.join(map(str, content)) or 'nothing'}"


def _record(values: Any, index: int, machine: Mapping, source: str) -> Record:
    name = values.get("name") if isinstance(values, Mapping) else None
    where = f"{source}: record {index} ({name!r})" if isinstance(name, str) else f"{source}: record {index}"
    if not isinstance(name, str) or not isinstance(values.get("group"), str):
        raise InputError(f'{where}: expected an object with "name" and "group"')
    seconds = values.get("seconds")
    wanted = ("median", "stddev", "min", "rounds")
    if not isinstance(seconds, Mapping) or not all(_finite(seconds.get(figure)) for figure in wanted):
        raise InputError(f'{where}: expected "seconds" with the numbers {", ".join(wanted)}')
    if min(seconds["median"], seconds["min"], seconds.get("low", 1)) <= 0 or seconds["rounds"] < 1:
        raise InputError(f"{where}: expected seconds above 0, of 1 round or more, got {dict(seconds)!r:.120}")
    missing = [key for key in NEEDED.get(values["group"], ()) if key not in values]
    if missing:
        raise InputError(f"{where}: a record of group {values['group']!r} needs {', '.join(missing)}")
    _check_intervals(values, where)
    return Record(name, values["group"], values, machine, source)


def _check_intervals(values: Mapping, where: str) -> None:
    found = {key: values[key] for key in INTERVALS if key in values}
    # The loss notes a plain number under that name.
    if isinstance(values.get("share_of_floor"), Mapping):
        found["share_of_floor"] = values["share_of_floor"]
    if "low" in values["seconds"]:
        found["seconds"] = values["seconds"]
    for key in NAMED_INTERVALS:
        named = values.get(key, {})
        if not isinstance(named, Mapping):
            raise InputError(f'{where}: expected "{key}" with a figure for every name, got {named!r:.80}')
        found |= {f"{key} of {name}": figure for name, figure in named.items()}
    for key, figure in found.items():
        if not isinstance(figure, Mapping) or not all(_finite(figure.get(end)) for end in ("median", "low", "high")):
            raise InputError(f"{where}: expected {key} with the numbers median, low and high, got {figure!r:.80}")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def newest(results: Iterable[Results]) -> list[Record]:
    """The records of all files; of those with the same group and name, the last file's."""
    found: dict[tuple[str, str], Record] = {}
    for one in results:
        found |= {(record.group, record.name): record for record in one.records}
    return list(found.values())
