"""Data sets as uniform records: one file per data set, one line per data set in `DATA_SETS`."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path

from dive_fast.data.demonstrations import DemonstrationPool, choose_demonstrations
from dive_fast.data.films import generated_films, load_films, split_by_patient
from dive_fast.data.images import load_image
from dive_fast.data.json_lines import check_records, load_json_lines, rows_to_records
from dive_fast.data.open_i import load_open_i
from dive_fast.data.record import Record
from dive_fast.errors import InputError

DATA_SETS: dict[str, Callable[..., list[Record]]] = {
    "open_i": load_open_i,
    "json_lines": load_json_lines,
    "films": load_films,
    "generated_films": generated_films,
}

__all__ = [
    "DATA_SETS",
    "DemonstrationPool",
    "Record",
    "choose_demonstrations",
    "generated_films",
    "load_data",
    "load_films",
    "load_image",
    "load_json_lines",
    "load_open_i",
    "split_by_patient",
    "to_records",
]


def load_data(name: str, **options) -> list[Record]:
    """The records of the data set `name`; `options` are its loader's arguments.

    Raises:
        InputError: no such data set, an option its loader does not have or needs and is not given, or the loader's own.
    """
    if name not in DATA_SETS:
        near = difflib.get_close_matches(str(name), DATA_SETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = f"one of {', '.join(DATA_SETS)}, or a .jsonl, .json or .csv file"
        raise InputError(f"data set: expected {known}, got {name!r}.{hint}")
    loader = DATA_SETS[name]
    signature = inspect.signature(loader)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise InputError(f"data set {name}: {error}; its options are {', '.join(signature.parameters)}") from error
    return loader(**options)


def to_records(dataset) -> list[Record]:
    """Checked records from records, dicts, a `datasets.Dataset`, or the path of a .jsonl, .json or .csv file.

    Dicts and data set rows have the columns `load_json_lines` reads by default: report, prompt or indication, image,
    id. Decoded images would all be held in memory: cast a Dataset's image column to `Image(decode=False)` first.

    Raises:
        InputError: another type, no records, or whatever `load_json_lines` refuses in a row.
    """
    if isinstance(dataset, (str, Path)):
        return load_json_lines(dataset)
    if isinstance(dataset, Mapping):
        parts = ", ".join(map(str, dataset))
        raise InputError(f"dataset: expected one list of records, got a mapping of {parts}; choose one part")
    if isinstance(dataset, Record) or not hasattr(dataset, "__iter__"):
        got = type(dataset).__name__
        raise InputError(f"dataset: expected a list of records or dicts, a Dataset or a path, got {got}")
    rows = list(dataset)
    if rows and isinstance(rows[0], Record):
        check_records(rows, "dataset")
        return rows
    columns = {"report": "report", "prompt": "prompt", "images": "image", "id": "id"}
    return rows_to_records(enumerate(rows), columns, source="dataset")
