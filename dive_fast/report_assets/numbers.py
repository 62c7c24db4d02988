"""The numbers of a result as people read them: which columns there are, how a value is written, what the finding is."""

import datetime
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


FURTHER_COLUMNS = (
    Column("nll", "Nats per token", "", 3, lower_is_better=True),
    Column("bleu_2", "BLEU-2", "", 3),
    Column("bleu_3", "BLEU-3", "", 3),
    Column("decisive_precision", "Decisive precision", "", 3),
    Column("decisive_recall", "Decisive recall", "", 3),
    Column("radgraph_simple", "RadGraph simple", "", 3),
    Column("radgraph_complete", "RadGraph complete", "", 3),
    Column("chexbert_macro_f1_14", "CheXbert macro", "", 3),
    Column("chexbert_micro_f1_5", "CheXbert micro 5", "", 3),
    Column("chexbert_macro_f1_5", "CheXbert macro 5", "", 3),
)
"""What a table may show beside `COLUMNS`."""


class Measure(NamedTuple):
    value: float
    interval: tuple[float, float] | None


def measure(system: Mapping, key: str) -> Measure | None:
    """A system's (or its "unseen" part's) score with its interval; None where it was not measured or is not finite."""
    scores, intervals = system.get("scores") or {}, system.get("intervals") or {}
    if key == "perplexity":
        value, interval = system.get("perplexity"), system.get("perplexity_interval")
    elif key == "eos_rate":
        ends = system.get("finish") or {}
        by_itself = ends["eos"] + ends.get("stop", 0) if "eos" in ends else None
        value, interval = scores.get(key, by_itself), intervals.get(key)
    else:
        value, interval = scores.get(key), intervals.get(key)
    if not _finite(value):
        return None
    usable = isinstance(interval, Sequence) and len(interval) == 2 and all(map(_finite, interval))
    return Measure(float(value), (float(interval[0]), float(interval[1])) if usable else None)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def difference(system: Mapping, key: str) -> tuple[Measure, bool] | None:
    """A system's score minus the reference's, and whether its interval leaves out 0; None where it is not known."""
    found = (system.get("differences") or {}).get(key) or {}
    value, interval = found.get("difference"), found.get("interval")
    if not _finite(value):
        return None
    usable = isinstance(interval, Sequence) and len(interval) == 2 and all(map(_finite, interval))
    bounds = (float(interval[0]), float(interval[1])) if usable else None
    return Measure(float(value), bounds), bool(found.get("clear")) and usable


def show_signed(value: float, column: Column) -> str:
    """A difference with its sign (a true minus, as wide as the plus); what rounds to nothing has none."""
    text = show(abs(value), column)
    if not any(digit in text for digit in "123456789"):
        return text
    return f"{'−' if value < 0 else '+'}{text}"


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


def size(value: Any) -> str:
    """Bytes for people: 1.53 GB, 412 MB."""
    if not _finite(value):
        return "–"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


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


def subject(result: Mapping) -> Mapping | None:
    """The adapter that a page is about: the one that others are compared with, else the best."""
    named = [system for system in result["systems"] if system.get("name") == result.get("compare_with")]
    if named and named[0].get("role") == "adapter" and measure(named[0], "perplexity"):
        return named[0]
    return best_adapter(result)


def finding(result: Mapping) -> str:
    """The result in words, computed from the perplexities: an adapter against baseline and teacher.

    Where systems were compared in pairs, that decides what differs, and adapters that are clearly better are named.
    """
    systems = result["systems"]
    lowest = {
        role: _lowest([s for s in systems if s.get("role") == role]) for role in ("adapter", "baseline", "teacher")
    }
    if lowest["adapter"] is None:
        first = _lowest(systems)
        if first is None:
            return "No perplexity was measured."
        return f"{label_of(first)} has the lowest perplexity, {_perplexity(first)}."
    system = subject(result)
    if system.get("name") != result.get("compare_with"):  # what others were compared with is none of them
        lowest = {role: other and {**other, "differences": None} for role, other in lowest.items()}
    ours = measure(system, "perplexity")
    baseline = measure(lowest["baseline"] or {}, "perplexity")
    sentence = f"{label_of(system)} reaches a perplexity of {_perplexity(system)}"
    if baseline:
        sentence += _against_baseline(ours, lowest["baseline"], baseline)
    if lowest["teacher"]:
        sentence += _against_teacher(ours, lowest["teacher"], baseline)
    trained = system.get("trainable_parameters")
    return sentence + (f", with {count(trained)} trained parameters." if trained else ".") + _better(result, system)


def _better(result: Mapping, system: Mapping) -> str:
    """A sentence on the adapters that are clearly below `system`, which they were compared with."""
    if system.get("name") != result.get("compare_with"):
        return ""
    others = [s for s in result["systems"] if s.get("role") == "adapter" and difference(s, "perplexity")]
    better = [s for s in others if (found := difference(s, "perplexity"))[1] and found[0].value < 0]
    if better:
        return " Clearly lower: " + ", ".join(f"{label_of(s)} ({_perplexity(s)})" for s in better) + "."
    return " No other adapter is clearly lower." if others else ""


def _perplexity(system: Mapping) -> str:
    return show(measure(system, "perplexity").value, COLUMNS[0])


def _against_baseline(ours: Measure, system: Mapping, base: Measure) -> str:
    text = f"{_perplexity(system)} of {label_of(system)}"
    if _level(ours, system, base):
        why = "the paired interval includes 0" if difference(system, "perplexity") else "the intervals overlap"
        return f", not clearly different from the {text} ({why})"
    return f", down from the {text}" if ours.value < base.value else f", worse than the {text}"


def _against_teacher(ours: Measure, system: Mapping, base: Measure | None) -> str:
    teacher = measure(system, "perplexity")
    text = f"the {_perplexity(system)} of {label_of(system)}"
    if _level(ours, system, teacher):
        paired = "in the paired comparison" if difference(system, "perplexity") else "within the intervals"
        return f" and level with {text} {paired}"
    if ours.value < teacher.value:
        return f" and below {text}"
    if base is not None and teacher.value < ours.value < base.value:
        share = math.log(base.value / ours.value) / math.log(base.value / teacher.value)
        return f", {100 * share:.0f} % of the way to {text}, counted in nats per token"
    return f" and above {text}"


def _level(ours: Measure, system: Mapping, theirs: Measure) -> bool:
    """Whether the two are not clearly different: by their paired difference, else by their intervals."""
    paired = difference(system, "perplexity")
    if paired is not None:
        return not paired[1]
    if ours.interval is None or theirs.interval is None:
        return False
    return ours.interval[0] <= theirs.interval[1] and theirs.interval[0] <= ours.interval[1]


def present_columns(systems: Sequence[Mapping], columns: Sequence[Column] = COLUMNS) -> list[Column]:
    """The columns that at least one system has a value for."""
    return [column for column in columns if any(measure(system, column.key) for system in systems)]


def best_value(systems: Sequence[Mapping], column: Column) -> float | None:
    """The best value of a column, None where fewer than two systems have one."""
    values = [found.value for system in systems if (found := measure(system, column.key))]
    if len(values) < 2:
        return None
    return min(values) if column.lower_is_better else max(values)


def moment(text: str) -> str:
    """A time as people read it, "2026-11-30 06:03 UTC" from ISO 8601 with an offset; other texts as they are."""
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{time.astimezone(datetime.UTC):%Y-%m-%d %H:%M} UTC" if time.tzinfo else text
