"""The tables of a report page: every record of every group, as its figures stand in the file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from dive_fast.bench.drawing import label
from dive_fast.bench.fits import line, power_law
from dive_fast.bench.noise import NOISY, is_noisy
from dive_fast.bench.results import Interval, Record
from dive_fast.bench.table import NONE, Table, digits, duration, faster, fixed, size, spread
from dive_fast.bench.targets import Verdict


class Group(NamedTuple):
    """How a group becomes a table.

    Attributes:
        title: of the table.
        holds: whether a record belongs to it.
        columns: of which `words` are words.
        rows: record -> its rows.
    """

    title: str
    holds: Callable[[Record], bool]
    columns: Sequence[str]
    words: int
    rows: Callable[[Record], Iterator[Sequence[str]]]


def _system(record: Record) -> str:
    return label(record.get("implementation") or NONE)


def _loss(r: Record) -> Iterator[Sequence[str]]:
    memory = r.get("peak_memory")
    yield (
        r.get("problem"),
        label(r.get("label") or r.get("implementation")),
        spread(r.seconds),
        fixed(_share_of_floor(r)),
        digits(r.get("gflops_per_second")),
        size(memory),
        f"{r.get('gradient_error'):.0e}",
    )


def _share_of_floor(r: Record) -> Interval:
    return r.seconds.under(r.get("floor_seconds"))


def _ratios(r: Record) -> Iterator[Sequence[str]]:
    for name in r.get("ratios"):
        memory = r.interval("ratios", name, "peak_memory")
        yield (
            r.get("problem"),
            _system(r),
            label(name),
            faster(r.interval("ratios", name)),
            fixed(memory),
            str(r.rounds),
        )


def _steer(r: Record) -> Iterator[Sequence[str]]:
    shape = f"T {r.get('T')}, D {r.get('D')}, r {r.get('r')}, {r.get('dtype')}, {r.get('direction')}"
    share = r.interval("ratios", "copy of the same bytes").under(1)
    yield shape, _system(r), spread(r.seconds), digits(r.get("gigabytes_per_second")), fixed(share)


def _kernel(r: Record) -> Iterator[Sequence[str]]:
    shape = f"{r.get('dtype')}, {r.get('K')} columns"
    share = fixed(r.interval("share_of_read_limit"))
    yield shape, str(r.get("B")), spread(r.seconds), digits(r.get("gigabytes_per_second")), share


def _decode(r: Record) -> Iterator[Sequence[str]]:
    beyond = r.get("memory_beyond_weights_and_cache")
    yield (
        r.get("problem"),
        _system(r),
        r.get("steering"),
        spread(r.seconds.times(1 / r.get("new_tokens"))),
        digits(r.get("tokens_per_second")),
        fixed(r.interval("share_of_read_limit") or r.interval("share_of_floor")),
        duration(r.get("first_token_seconds")),
        NONE if beyond is None else size(beyond),
    )


def _steering(r: Record) -> Iterator[Sequence[str]]:
    share = f"{100 * r.get('adapter_bytes_share'):.1f}"
    added = fixed(r.interval("overhead_percent"), 1)
    yield r.get("problem"), _system(r), r.get("steering"), added, share, str(r.rounds)


def _training(r: Record) -> Iterator[Sequence[str]]:
    for name, found in r.get("systems").items():
        reached = f"{found['steps']} of {r.get('steps')}" if found["reached"] else "not reached"
        seconds = duration(found["seconds"]) if found["reached"] else NONE
        ratio = r.interval("threshold_ratios", name)
        yield (
            r.get("problem"),
            label(name),
            reached,
            seconds,
            faster(ratio) if ratio else NONE,
            f"{found['final_loss']:.3f}",
            size(found["peak_memory"]),
            f"{found['learning_rate']:g}",
        )


def _writing(r: Record) -> Iterator[Sequence[str]]:
    for name, found in r.get("systems").items():
        rate = r.interval("systems", name, "reports_per_minute")
        yield (
            f"{r.get('problem')}, {r.get('steering')}",
            label(name),
            spread(rate, digits),
            faster(r.interval("ratios", name)),
            digits(found["tokens_per_second"]),
            digits(found["new_tokens"] / r.get("reports")),
            f"{100 * found['ended']:.0f} %",
        )


def _evaluate(r: Record) -> Iterator[Sequence[str]]:
    ratios = r.get("ratios") or {None: None}
    for name in ratios:
        error = r.get("difference")
        yield (
            r.get("metric"),
            f"{digits(r.get('documents_per_second'))}",
            name or NONE,
            faster(r.interval("ratios", name)) if name else NONE,
            NONE if error is None else f"{error:.0e}",
        )


GROUPS: Mapping[str, Group] = {
    "training": Group(
        "Training until the held-out loss is reached",
        lambda r: r.group == "end-to-end training",
        [
            "problem",
            "system",
            "steps until then",
            "time",
            "ours is faster",
            "loss at the end",
            "peak memory",
            "peak rate",
        ],
        2,
        _training,
    ),
    "reports": Group(
        "Writing reports, prompts included",
        lambda r: r.group == "end-to-end reports",
        ["problem", "system", "reports a minute", "ours is faster", "tokens/s", "tokens a report", "ended by itself"],
        2,
        _writing,
    ),
    "decode": Group(
        "Decoding",
        lambda r: r.group == f"decode {r.get('problem')}",
        ["problem", "system", "steering", "step", "tokens/s", "share of the limit", "first token", "memory beyond"],
        3,
        _decode,
    ),
    "decode-ratios": Group(
        "Decoding beside its peers, paired",
        lambda r: r.group == "decode ratios",
        ["problem", "system", "than", "faster", "memory", "rounds"],
        3,
        _ratios,
    ),
    "steering": Group(
        "What steering adds to a step, paired",
        lambda r: r.group == "decode steering",
        ["problem", "system", "steering", "adds, %", "its bytes, %", "rounds"],
        3,
        _steering,
    ),
    "train-step": Group(
        "Training step beside its peers, paired",
        lambda r: r.group == "train-step",
        ["problem", "system", "than", "faster", "peak memory : theirs", "rounds"],
        3,
        _ratios,
    ),
    "loss-ratios": Group(
        "Loss beside its peers, paired",
        lambda r: r.group == "loss ratios",
        ["problem", "system", "than", "faster", "peak memory : theirs", "rounds"],
        3,
        _ratios,
    ),
    "loss": Group(
        "Loss",
        lambda r: r.group.startswith("loss ") and r.group != "loss ratios",
        ["problem", "system", "time", "share of the floor", "GFLOP/s", "peak memory", "gradient's error"],
        2,
        _loss,
    ),
    "steer-op": Group(
        "Steering op",
        lambda r: r.group == "steer-op",
        ["size", "backend", "time", "GB/s", "share of copying the same bytes"],
        2,
        _steer,
    ),
    "decode-kernels": Group(
        "Projections of a decoding step",
        lambda r: r.group.startswith("decode kernels"),
        ["weights", "vectors", "time", "GB/s", "share of reading the weights"],
        1,
        _kernel,
    ),
    "evaluate": Group(
        "Metrics",
        lambda r: r.group == "evaluate",
        ["metric", "documents/s", "beside", "ours is faster", "values differ by"],
        1,
        _evaluate,
    ),
}


def group_table(name: str, records: Sequence[Record]) -> Table | None:
    """The table of a row of `GROUPS`; None without records."""
    group = GROUPS[name]
    rows = [list(row) for record in records if group.holds(record) for row in group.rows(record)]
    return Table(group.title, group.columns, rows, words=group.words) if rows else None


# Axis -> what grows, its unit, what is timed, the law by nature: an affine one throughout, a fixed part and a part a
# unit; the exponent beside it says how near a point where the growing part is all.
AXES: Mapping[str, tuple[str, str, str]] = {
    "decode context": ("cached positions", "position", "decoding step"),
    "decode rows": ("rows in the batch", "row", "decoding step"),
    "loss rows": ("rows that count", "row", "loss, forward and backward"),
    "loss vocabulary": ("tokens in the vocabulary", "token", "loss, forward and backward"),
    "step prompt": ("prompt tokens of a report", "token", "training step"),
}


def scaling(records: Sequence[Record]) -> list[tuple[Record, str]]:
    """The records of costs over sizes, each with what goes behind a system's name: its device, if there are several."""
    found = [record for record in records if record.group == "scaling" and record.get("axis") in AXES]
    several = len({record.device for record in found}) > 1
    return [(record, f", {record.device}" if several else "") for record in found]


def curves(records: Sequence[Record]) -> dict[str, dict[str, list[tuple[float, list[float]]]]]:
    """axis -> system -> (size, seconds of every round), by size. What two devices took is no one system's curve."""
    found: dict = {}
    for record, device in scaling(records):
        systems = found.setdefault(record.get("axis"), {})
        for name, times in record.get("times").items():
            systems.setdefault(name + device, []).append((record.get("size"), times))
    for systems in found.values():
        for points in systems.values():
            points.sort(key=lambda point: point[0])
    return {axis: found[axis] for axis in AXES if axis in found}


def fit_table(records: Sequence[Record]) -> Table | None:
    """The laws through the scaling group's times."""
    rows = []
    for axis, systems in curves(records).items():
        what, unit, timed = AXES[axis]
        for name, points in systems.items():
            sizes, times = [point[0] for point in points], [point[1] for point in points]
            law, affine = power_law(sizes, times), line(sizes, times)
            if law is None:
                continue
            rows.append(
                [
                    f"{timed} : {what}",
                    label(name),
                    f"{digits(sizes[0])} to {digits(sizes[-1])}",
                    fixed(law.exponent),
                    f"{law.r_squared:.3f}",
                    spread(affine.constant, _signed),
                    f"{spread(affine.slope, _signed)} a {unit}",
                    f"{affine.r_squared:.3f}",
                ]
            )
    if not rows:
        return None
    columns = ["cost : what grows", "system", "sizes", "exponent", "R²", "a", "b", "R²"]
    note = (
        "Exponent: of a power law, by least squares on logarithms. a + b × size: by least squares on relative errors. "
        "The intervals (95 %) are a bootstrap of the rounds at each size: how sure a fit is of these times. R² says "
        "whether the form fits."
    )
    return Table("How costs grow", columns, rows, words=2, note=note)


def _signed(seconds: float) -> str:
    return f"−{duration(-seconds)}" if seconds < 0 else duration(max(seconds, 1e-12))


def target_tables(verdicts: Sequence[Verdict]) -> list[Table]:
    """What became of every target: those that were measured, and those that were not."""
    found, missing = [], []
    for v in verdicts:
        if v.figure is None or v.record is None:
            missing.append([v.target.what, v.target.bound])
            continue
        status = v.status if v.clear else f"{v.status}, the interval crosses it"
        found.append(
            [v.target.what, status, v.record.device, v.target.bound, f"{spread(v.figure, digits)}{v.target.unit}"]
        )
    tables = [
        Table("Measured", ["target", "result", "on", "bound", "found (95 % interval)"], found, words=3),
        Table("Not measured", ["target", "bound"], missing),
    ]
    return [table for table in tables if table.rows]


def noise_note(records: Sequence[Record]) -> str:
    """How many records have a wide interval."""
    noisy = [record.name for record in records if is_noisy(record)]
    if not noisy:
        return f"No interval is wider than {NOISY:.0%} of its figure."
    names = ", ".join(noisy[:5]) + (f" and {len(noisy) - 5} more" if len(noisy) > 5 else "")
    return (
        f"{len(noisy)} of {len(records)} records have an interval wider than {NOISY:.0%} of their figure: the machine "
        f"was not quiet for them, or their rounds were few ({names})."
    )


def left_out(records: Sequence[Record]) -> list[str]:
    """What was not measured beside the rest, with its reason."""
    found = {f"{name}: {reason}": None for r in records for name, reason in (r.get("left_out") or {}).items()}
    return list(found)
