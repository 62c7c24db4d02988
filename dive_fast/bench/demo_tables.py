"""Scores of the demo, and of experiments, as a README shows them: from the result files that they write."""

import io
from collections.abc import Mapping

from dive_fast.bench.table import NONE, Table
from dive_fast.report import result_table
from dive_fast.report_assets.numbers import (
    COLUMNS,
    best_adapter,
    count,
    difference,
    label_of,
    measure,
    seconds,
    show,
    show_signed,
    size,
)

SHOWN = ("bleu_4", "rouge_l", "cider", "decisive_f1", "eos_rate", "length_error")
BY_KEY = {column.key: column for column in COLUMNS}
# The columns of the terminal that the table is rendered for.
WIDTH = 80


def scores(result: Mapping) -> Table:
    """One row a system: perplexity with its interval, scores, parameters and times."""
    held_out = (result.get("data") or {}).get("eval", "")
    rows = [[label_of(system), *_row(system)] for system in result["systems"]]
    columns = ["", "perplexity (95 % interval)", "of unseen texts", *(BY_KEY[key].label for key in SHOWN)]
    columns += ["trained", "training", f"writing {held_out}".strip()]
    best = best_adapter(result)
    ours = [index for index, system in enumerate(result["systems"]) if system is best]
    return Table("Demo", columns, rows, strong=frozenset(ours), note=_note(result))


def quality(result: Mapping) -> Table:
    """One row a system of `dive-fast experiment`: every score with its interval over documents and seeds."""
    rows = [
        [label_of(system), *(_interval(system, key) for key in ("perplexity", *SHOWN))] for system in result["systems"]
    ]
    columns = ["", "perplexity", *(BY_KEY[key].label for key in SHOWN)]
    ours = [i for i, system in enumerate(result["systems"]) if system.get("name") == result.get("compare_with")]
    seeds, data = len(result.get("seeds") or [0]), result.get("data") or {}
    note = (
        f"Means over {seeds} seeds on {data.get('eval')} held-out reports; in brackets 95 % intervals over documents "
        "and seeds."
    )
    return Table("Quality", columns, rows, strong=frozenset(ours), note=note)


def differences(result: Mapping) -> Table:
    """One row a system that was compared with the experiment's reference: its score minus the reference's, paired."""
    compared = [system for system in result["systems"] if system.get("differences")]
    rows = [[label_of(system), *(_difference(system, key) for key in ("perplexity", *SHOWN))] for system in compared]
    named = {system.get("name"): label_of(system) for system in result["systems"]}
    columns = [f"minus {named.get(result.get('compare_with'))}", "perplexity", *(BY_KEY[key].label for key in SHOWN)]
    note = "Paired over documents and seeds; in brackets 95 % intervals. † leaves out 0."
    return Table("Differences", columns, rows, note=note)


def costs(result: Mapping) -> Table:
    """One row a system of an experiment: what it cost to train and to write with, means over seeds."""
    rows = []
    for system in result["systems"]:
        found = system.get("costs") or {}
        teacher = (
            "in training" if found.get("teacher_in_training") else seconds(found.get("teacher_seconds"), short=True)
        )
        speed = found.get("tokens_per_second")
        rows.append(
            [
                label_of(system),
                count(system.get("trainable_parameters")),
                teacher,
                seconds(system.get("train_seconds"), short=True),
                size(found.get("train_peak_bytes")),
                seconds(system.get("generate_seconds"), short=True),
                NONE if speed is None else f"{speed:,.0f}",
                size(found.get("write_peak_bytes")),
                str(system.get("engine") or NONE),
            ]
        )
    columns = ["", "trained", "teacher", "training", "peak memory", "writing", "tokens/s", "peak memory", "written by"]
    environment, run = result.get("environment") or {}, result.get("run") or {}
    note = (
        f"{run.get('steps')} steps of {run.get('batch_size')} reports, {run.get('dtype')}; "
        f"{environment.get('processor')}, PyTorch {environment.get('torch')}."
    )
    return Table("Costs", columns, rows, note=note)


def _row(system: Mapping) -> list[str]:
    unseen = measure(system.get("unseen") or {}, "perplexity")
    cells = [_interval(system, "perplexity"), NONE if unseen is None else show(unseen.value, BY_KEY["perplexity"])]
    for key in SHOWN:
        found = measure(system, key)
        cells.append(NONE if found is None else show(found.value, BY_KEY[key]))
    trained = system.get("trainable_parameters")
    times = (system.get(name) for name in ("train_seconds", "generate_seconds"))
    return [*cells, count(trained) if trained else "0", *(seconds(time, short=True) for time in times)]


def _interval(system: Mapping, key: str) -> str:
    found = measure(system, key)
    if found is None:
        return NONE
    text = show(found.value, BY_KEY[key])
    if found.interval is None:
        return text
    low, high = (show(end, BY_KEY[key]) for end in found.interval)
    return f"{text} ({low} to {high})"


def _difference(system: Mapping, key: str) -> str:
    found = difference(system, key)
    if found is None:
        return NONE
    (value, interval), clear = found
    text = show_signed(value, BY_KEY[key])
    if interval is not None:
        low, high = (show_signed(end, BY_KEY[key]) for end in interval)
        text += f" ({low} to {high})"
    return f"{text} †" if clear else text


def _note(result: Mapping) -> str:
    run, data = result.get("run") or {}, result.get("data") or {}
    environment = result.get("environment") or {}
    sentences = [
        f"{run.get('steps')} steps of {run.get('batch_size')} reports for each adapter, {run.get('dtype')}; "
        f"{data.get('eval')} held-out reports of R2Gen's test split, {data.get('unseen')} of them with texts that do "
        f"not occur in training; seed {run.get('seed')}; {environment.get('processor')}, "
        f"PyTorch {environment.get('torch')}."
    ]
    if run.get("teacher_seconds"):
        sentences.append(
            f"The teacher's pass over the {data.get('train')} training reports, shared by the adapters, took "
            f"{seconds(run['teacher_seconds'], short=True)} more."
        )
    if run.get("seconds_total"):
        sentences.append(f"The whole demo took {run['seconds_total'] / 60:.1f} minutes.")
    return " ".join(sentences)


def terminal(result: Mapping) -> str:
    """What `dive-fast demo` prints at its end, as a block of code."""
    from rich.console import Console

    file = io.StringIO()
    console = Console(file=file, width=WIDTH, color_system=None, legacy_windows=False)
    console.print(result_table(result))
    if (result.get("run") or {}).get("seconds_total"):
        console.print(f"Finished in {result['run']['seconds_total'] / 60:.1f} minutes.")
    lines = [line.rstrip() for line in file.getvalue().strip("\n").splitlines()]
    return "\n".join(f"    {line}".rstrip() for line in lines)
