"""What a comparison measures of one system; `demo` and `experiment` do it alike.

A system is a model, perhaps adapted, perhaps with demonstrations in its context. It writes a report for every held-out
record, and what it says of their reports is measured in likelihood and in scores.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from dive_fast.data.demonstrations import DemonstrationPool
from dive_fast.data.record import Record
from dive_fast.decode import GenerateOutput, generate
from dive_fast.evaluate import evaluate
from dive_fast.metrics.scores import Scores
from dive_fast.supervision.teacher import TeacherRunner

Likelihoods = tuple[Sequence[float], Sequence[int]]
"""Per record the summed negative log-likelihood of its report and its tokens, as `report_nll` returns them."""


def fill_teacher_cache(
    runner: TeacherRunner,
    records: Sequence[Record],
    track: Callable[[Sequence[Record]], Iterable[Record]] = iter,
) -> float:
    """Compute the teacher's results for the records that have none yet, so that training finds them; returns seconds.

    Args:
        track: wraps the records, to show progress.
    """
    start = time.perf_counter()
    for record in track(records):
        runner.targets(record)
    return time.perf_counter() - start


def write_reports(
    model: nn.Module, processor, records: Sequence[Record], pool: DemonstrationPool | None = None, **options
) -> tuple[GenerateOutput, float]:
    """A report for every record, and the seconds that took.

    Args:
        pool: where the demonstrations in the context come from; None: the prompt alone.
        options: of `dive_fast.generate`.
    """
    start = time.perf_counter()
    demonstrations = None if pool is None else [pool.for_record(record) for record in records]
    written = generate(model, records, processor=processor, demonstrations=demonstrations, **options)
    return written, time.perf_counter() - start


def prediction_lines(records: Sequence[Record], written: GenerateOutput) -> str:
    """The reports as JSON lines, which `dive-fast evaluate` reads."""
    rows = zip(records, written.texts, written.finish_reasons, strict=True)
    lines = (
        {"id": r.id, "prompt": r.prompt, "prediction": text, "reference": r.report, "finish_reason": reason}
        for r, text, reason in rows
    )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def score(
    records: Sequence[Record],
    texts: Sequence[str],
    finish_reasons: Sequence[str],
    likelihoods: Likelihoods,
    rows: Sequence[int] | None = None,
    **options,
) -> Scores:
    """Scores of the reports at `rows` (None: of all), with perplexity and the share that ends by itself.

    Args:
        options: of `dive_fast.evaluate`.
    """
    rows = range(len(records)) if rows is None else rows
    return evaluate(
        [texts[i] for i in rows],
        [records[i].report for i in rows],
        finish_reasons=[finish_reasons[i] for i in rows],
        likelihoods=tuple([values[i] for i in rows] for values in likelihoods),
        ids=[records[i].id for i in rows],
        **options,
    )


def unseen_rows(records: Sequence[Record]) -> list[int]:
    """The records whose texts do not occur in training, where the data set says so (`meta["unseen_text"]`)."""
    return [i for i, record in enumerate(records) if record.meta.get("unseen_text")]


def figures(values: Mapping[str, float], intervals: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Values and their intervals as a result file has them (see `dive_fast.report`)."""
    found = {"perplexity": values["perplexity"]}
    if "perplexity" in intervals:
        found["perplexity_interval"] = list(intervals["perplexity"])
    found["scores"] = dict(values)
    found["intervals"] = {name: list(bounds) for name, bounds in intervals.items()}
    return found


def shape(records: Sequence[Record], texts: Sequence[str], finish_reasons: Sequence[str], examples: int) -> dict:
    """How the reports end, how long they are, and the first of them, as a result file has it.

    `finish` has "eos" and "length", and "stop" and "cancelled" where reports end so (see `GenerateOutput`).
    """
    reasons = dict.fromkeys(("eos", "length", *finish_reasons))
    shown = list(zip(records, texts, strict=True))[:examples]
    return {
        "finish": {reason: finish_reasons.count(reason) / len(records) for reason in reasons},
        "lengths": [len(text.split()) for text in texts],
        "samples": [{"id": r.id, "prompt": r.prompt, "reference": r.report, "prediction": text} for r, text in shown],
    }
