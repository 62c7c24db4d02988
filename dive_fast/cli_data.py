"""`dive-fast data inspect`, and the one line about what a data set left out that other commands print."""

import inspect
import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence

from dive_fast import cli_files as files
from dive_fast.errors import InputError

_SHOWN_CLASSES = 12
_SHOWN_CHARACTERS = 300
_NONE = {"reports": 0.0, "tokens": 0.0}
_SHARED = {
    "patients": "are of a patient who is also in",
    "reports": "have a report that stands verbatim in",
    "images": "show an image that is also in",
}


def load_counted(section: Mapping, *, quiet: bool = False) -> Sequence:
    """The records of a `data` section; what was left out on the way is said on standard error."""
    from dive_fast import config

    records = config.load_records(section)
    counts = getattr(records, "counts", None)
    if counts is not None and (counts.dropped or counts.notes) and not quiet:
        print(f"{section['name']}: {counts}", file=sys.stderr)
    return records


def inspect_command(args: Namespace) -> int:
    """A data set's parts: counts, lengths, decisive words, samples, and what leaks between them or into --against."""
    from dive_fast import config
    from dive_fast.inspect_data import inspect_data
    from dive_fast.supervision.lexicon import LexiconTagger

    tagger = LexiconTagger(args.lexicon)
    tokenizer = None if args.tokenizer is None else _tokenizer(args.tokenizer)
    section = _section(args)
    records = load_counted(section, quiet=True)
    label = section.get("path", section["name"])
    parts, counts = _parts(records, label), {label: _counts(records)}
    against = {}
    if args.against:
        other = load_counted(_whole(config.data_with_options(args.against, [])), quiet=True)
        name = args.against if args.against not in (label, *parts) else f"{args.against} (--against)"
        against, counts[name] = _held_out_parts(other, name), _counts(other)
    drawing = {"sample": args.sample, "samples": args.samples, "seed": args.seed}
    found = inspect_data(parts, against=against, tokenizer=tokenizer, tagger=tagger, **drawing)
    found = {"data": section, "loaded": counts, **found}
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _show(found)
    return 0


def _section(args: Namespace) -> dict:
    from dive_fast import config

    given = {key: value for key, value in (("root", args.root), ("split", args.split)) if value is not None}
    limit = [] if args.limit is None else [f"limit={args.limit}"]
    return _whole(config.data_with_options(args.data, [*args.items, *limit]) | given)


def _whole(section: dict) -> dict:
    from dive_fast.data import DATA_SETS

    # All parts at once, where the loader can: what leaks between them shows only then. A hub's parts are loaded singly.
    loader = DATA_SETS.get(section["name"])
    if loader is not None and section["name"] != "hub" and "split" in inspect.signature(loader).parameters:
        section.setdefault("split", None)
    return section


def _parts(records: Sequence, label: str) -> dict[str, Sequence]:
    from dive_fast.inspect_data import NO_PART, by_split

    parts = by_split(records)
    return {label: records} if list(parts) == [NO_PART] else parts


def _held_out_parts(records: Sequence, label: str) -> dict[str, Sequence]:
    from dive_fast.inspect_data import by_split

    parts = by_split(records)
    return {label: records} if len(parts) == 1 else {f"{label} {name}": part for name, part in parts.items()}


def _counts(records: Sequence) -> dict:
    from dive_fast.data import Records

    counted = records if hasattr(records, "counts") else Records(records)
    return counted.counts.as_dict() | {"summary": str(counted.counts)}


def _tokenizer(name: str):
    from dive_fast.models.smollm2 import is_builtin

    if is_builtin(name):
        from dive_fast.models.backbone import load_backbone

        return load_backbone(name)[1]
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"--tokenizer: expected smollm2, a folder or a hub id, got {name!r} ({why})") from error


def _show(found: Mapping) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for name, counts in found["loaded"].items():
        console.print(f"{name}: {counts['summary']}", markup=False, soft_wrap=True)
    files.show_table(_part_table(found))
    files.show_table(_class_table(found))
    for name, part in found["parts"].items():
        for sample in part["samples"]:
            console.print(f"{name}, {sample['id']}", style="bold", markup=False)
            shown = [*sample["prompt"].splitlines(), f"-> {sample['report']}", *sample["images"]]
            for line in shown:
                console.print(f"  {_short(line)}", markup=False, soft_wrap=True)
            console.print()
    _show_leaks(console, found["leakage"])


def _part_table(found: Mapping):
    names = list(found["parts"])
    table = files.table(f"Lengths in {found['unit']}", "", *names)
    for row in ("records", "images", "patients", "distinct_reports", "measured"):
        values = [found["parts"][name][row] for name in names]
        table.add_row(row.replace("_", " "), *("not named" if value is None else f"{value:,}" for value in values))
    for row in ("prompt_length", "report_length"):
        for percentile in next(iter(found["parts"].values()))[row]:
            label = "longest" if percentile == "100" else f"{percentile} % up to"
            values = [found["parts"][name][row][percentile] for name in names]
            table.add_row(f"{row.split('_')[0]}: {label}", *(f"{value:,}" for value in values))
    return table


def _class_table(found: Mapping):
    """Classes as rows, the share of a part's reports that have each as columns; the first part's order."""
    rates = {name: part["decisive"] for name, part in found["parts"].items()}
    labels = list(dict.fromkeys(label for part in rates.values() for label in part["classes"]))
    table = files.table(f"Decisive {found['unit']}: share of all, and of the reports with each class", "", *rates)
    shares = (f"{part['share']:.1%}" for part in rates.values())
    table.add_row(f"all decisive {found['unit']}", *shares, end_section=True)
    for label in labels[:_SHOWN_CLASSES]:
        table.add_row(label, *(f"{part['classes'].get(label, _NONE)['reports']:.1%}" for part in rates.values()))
    if len(labels) > _SHOWN_CLASSES:
        table.add_row(f"{len(labels) - _SHOWN_CLASSES} more with --json")
    return table


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 4]} ..."


def _show_leaks(console, leaks: Sequence[Mapping]) -> None:
    if not leaks:
        hint = "Leakage: there is one part only; load all (no split), or give another one with --against"
        console.print(hint, soft_wrap=True)
    if any(leak["patients"] is None for leak in leaks):
        console.print("Leakage of patients cannot be told: not every record names its patient")
    for leak in leaks:
        first, second = leak["parts"]
        shared = [(what, leak[what]) for what in _SHARED if leak[what] and leak[what]["n"]]
        for what, found in shared:
            text = f"Warning: {found['n']:,} of {second}'s records ({found['share']:.1%}) {_SHARED[what]} {first}"
            console.print(text, style="bold yellow", markup=False, soft_wrap=True)
        if not shared:
            console.print(f"{first} -> {second}: no leak found", markup=False)
