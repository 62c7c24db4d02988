"""The numbers of a result as people read them: which columns there are, how a value is written, what the finding is."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Column(NamedTuple):
    """A score: its key, its names for people (a short one if the terminal shows it), digits after the point."""

    key: str
    label: str
    short: str
    digits: int
    lower_is_better: bool = False
    percent: bool = False


COLUMNS = (
    Column("perplexity", "Perplexity", "PPL", 1, lower_is_better=True),
    Column("bleu_1", "BLEU-1", "", 3),
    Column("bleu_4", "BLEU-4", "BLEU4", 3),
    Column("rouge_l", "ROUGE-L", "", 3),
    Column("meteor", "METEOR", "", 3),
    Column("cider", "CIDEr", "CIDEr", 3),
    Column("decisive_f1", "Decisive F1", "Dec.F1", 3),
    Column("radgraph_partial", "RadGraph F1", "", 3),
    Column("chexbert_micro_f1_14", "CheXbert F1", "", 3),
    Column("eos_rate", "Ends by itself", "EOS", 0, percent=True),
    Column("length_error", "Length error", "Len.err", 0, lower_is_better=True, percent=True),
)


class Measure(NamedTuple):
    value: float
    interval: tuple[float, float] | None


def measure(system: Mapping, key: str) -> Measure | None:
    """A system's (or its "unseen" part's) score with its interval; None where it was not measured or is not finite."""
    scores, intervals = system.get("scores") or {}, system.get("intervals") or {}
    if key == "perplexity":
        value, interval = system.get("perplexity"), system.get("perplexity_interval")
    elif key == "eos_rate":
        value, interval = scores.get(key, (system.get("finish") or {}).get("eos")), intervals.get(key)
    else:
        value, interval = scores.get(key), intervals.get(key)
    if not _finite(value):
        return None
    usable = isinstance(interval, Sequence) and len(interval) == 2 and all(map(_finite, interval))
    return Measure(float(value), (float(interval[0]), float(interval[1])) if usable else None)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def show(value: float, column: Column) -> str:
    """A score with the digits of its column; large perplexities lose theirs."""
    if column.percent:
        return f"{100 * value:.{column.digits}f} %"
    return f"{value:,.{0 if column.key == 'perplexity' and value >= 1000 else column.digits}f}"


def label_of(system: Mapping) -> str:
    return str(system.get("label") or system.get("name"))


def count(value: Any) -> str:
    """A count for people: 1,234,567 parameters are 1.23 M."""
    if not _finite(value):
        return "–"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g}"


def seconds(value: Any, *, short: bool = False) -> str:
    """A duration for people: 75 is 1 min 15 s, or 75 s if short."""
    if not _finite(value):
        return "–"
    if short:
        return f"{value:,.0f} s"
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def best_adapter(result: Mapping) -> Mapping | None:
    """The adapter with the lowest perplexity; the first adapter where none has one; None where there is no adapter."""
    adapters = [system for system in result["systems"] if system.get("role") == "adapter"]
    return _lowest(adapters) or (adapters[0] if adapters else None)


def _lowest(systems: Sequence[Mapping]) -> Mapping | None:
    measured = [system for system in systems if measure(system, "perplexity")]
    return min(measured, key=lambda system: measure(system, "perplexity").value, default=None)


def finding(result: Mapping) -> str:
    """The result in one sentence, computed from the perplexities: best adapter against baseline and teacher."""
    systems = result["systems"]
    roles = ("adapter", "baseline", "teacher")
    lowest = {role: _lowest([system for system in systems if system.get("role") == role]) for role in roles}
    system = lowest["adapter"]
    if system is None:
        first = _lowest(systems)
        if first is None:
            return "No perplexity was measured."
        return f"{label_of(first)} has the lowest perplexity, {_perplexity(first)}."
    ours = measure(system, "perplexity")
    baseline = measure(lowest["baseline"] or {}, "perplexity")
    sentence = f"{label_of(system)} reaches a perplexity of {_perplexity(system)}"
    if baseline:
        sentence += _against_baseline(ours, lowest["baseline"], baseline)
    if lowest["teacher"]:
        sentence += _against_teacher(ours, lowest["teacher"], baseline)
    trained = system.get("trainable_parameters")
    return sentence + (f", with {count(trained)} trained parameters." if trained else ".")


def _perplexity(system: Mapping) -> str:
    return show(measure(system, "perplexity").value, COLUMNS[0])


def _against_baseline(ours: Measure, system: Mapping, base: Measure) -> str:
    text = f"{_perplexity(system)} of {label_of(system)}"
    if _overlap(ours, base):
        return f", not clearly different from the {text} (the intervals overlap)"
    return f", down from the {text}" if ours.value < base.value else f", worse than the {text}"


def _against_teacher(ours: Measure, system: Mapping, base: Measure | None) -> str:
    teacher = measure(system, "perplexity")
    text = f"the {_perplexity(system)} of {label_of(system)}"
    if _overlap(ours, teacher):
        return f" and level with {text} within the intervals"
    if ours.value < teacher.value:
        return f" and below {text}"
    if base is not None and teacher.value < ours.value < base.value:
        share = math.log(base.value / ours.value) / math.log(base.value / teacher.value)
        return f", {100 * share:.0f} % of the way to {text}, counted in nats per token"
    return f" and above {text}"


def _overlap(first: Measure, second: Measure) -> bool:
    if first.interval is None or second.interval is None:
        return False
    return first.interval[0] <= second.interval[1] and second.interval[0] <= first.interval[1]


def present_columns(systems: Sequence[Mapping]) -> list[Column]:
    """The columns that at least one system has a value for."""
    return [column for column in COLUMNS if any(measure(system, column.key) for system in systems)]


def best_value(systems: Sequence[Mapping], column: Column) -> float | None:
    """The best value of a column, None where fewer than two systems have one."""
    values = [found.value for system in systems if (found := measure(system, column.key))]
    if len(values) < 2:
        return None
    return min(values) if column.lower_is_better else max(values)
