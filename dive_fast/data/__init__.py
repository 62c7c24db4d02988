"""Data sets as uniform records: one file per data set, one line per data set in `DATA_SETS`."""

import difflib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dive_fast.data.chexpert_plus import load_chexpert_plus
from dive_fast.data.counts import LoadCounts, Records
from dive_fast.data.demonstrations import DemonstrationPool, choose_demonstrations
from dive_fast.data.films import generated_films, load_films, split_by_patient
from dive_fast.data.hub import dataset_rows, load_hub
from dive_fast.data.images import load_image
from dive_fast.data.iu_kaggle import load_iu_kaggle
from dive_fast.data.iu_r2gen import load_iu_r2gen
from dive_fast.data.json_lines import check_records, load_json_lines, rows_to_records
from dive_fast.data.loading import check_count
from dive_fast.data.mimic_cxr import load_mimic_cxr
from dive_fast.data.open_i import load_open_i
from dive_fast.data.padchest import load_padchest
from dive_fast.data.record import Record
from dive_fast.errors import InputError

DATA_SETS: dict[str, Callable[..., Sequence[Record]]] = {
    "open_i": load_open_i,
    "iu_kaggle": load_iu_kaggle,
    "iu_r2gen": load_iu_r2gen,
    "mimic_cxr": load_mimic_cxr,
    "chexpert_plus": load_chexpert_plus,
    "padchest": load_padchest,
    "json_lines": load_json_lines,
    "hub": load_hub,
    "films": load_films,
    "generated_films": generated_films,
}

__all__ = [
    "DATA_SETS",
    "DemonstrationPool",
    "LoadCounts",
    "Record",
    "Records",
    "choose_demonstrations",
    "generated_films",
    "load_chexpert_plus",
    "load_data",
    "load_films",
    "load_hub",
    "load_image",
    "load_iu_kaggle",
    "load_iu_r2gen",
    "load_json_lines",
    "load_mimic_cxr",
    "load_open_i",
    "load_padchest",
    "split_by_patient",
    "to_records",
]


def load_data(name: str, *, limit: int | None = None, **options) -> Sequence[Record]:
    """The records of the data set `name`; `options` are its loader's arguments, `limit` takes the first records only.

    A result with an attribute `counts` (`LoadCounts`) says how many records were left out and why.

    Raises:
        InputError: no such data set, an option its loader does not have or needs and is not given, or the loader's own.
    """
    if name not in DATA_SETS:
        near = difflib.get_close_matches(str(name), DATA_SETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        known = f"one of {', '.join(DATA_SETS)}, or a .jsonl, .json or .csv file"
        raise InputError(f"data set: expected {known}, got {name!r}.{hint}")
    check_count("limit", limit)
    loader = DATA_SETS[name]
    signature = inspect.signature(loader)
    # A loader with a limit of its own stops reading there.
    if "limit" in signature.parameters:
        options["limit"] = limit
    try:
        signature.bind(**options)
    except TypeError as error:
        raise InputError(f"data set {name}: {error}; its options are {', '.join(signature.parameters)}") from error
    records = loader(**options)
    return records if "limit" in options or limit is None else Records(records[:limit])


def to_records(dataset, argument: str = "dataset") -> list[Record]:
    """Checked records from records, dicts, a `datasets.Dataset`, or the path of a .jsonl, .json or .csv file.

    Dicts and data set rows have the columns `load_json_lines` reads by default: report, prompt or indication, image,
    id. The images of a `datasets.Dataset` stay in its files until a batch asks for them; its texts are held in memory.
    Rows of any other kind are held as they come.

    Args:
        argument: what messages call it.

    Raises:
        InputError: another type, no records, or whatever `load_json_lines` refuses in a row.
    """
    if isinstance(dataset, (str, Path)):
        return load_json_lines(dataset)
    if isinstance(dataset, Mapping):
        parts = ", ".join(map(str, dataset))
        raise InputError(f"{argument}: expected one list of records, got a mapping of {parts}; choose one part")
    if isinstance(dataset, Record) or not hasattr(dataset, "__iter__"):
        got = type(dataset).__name__
        raise InputError(f"{argument}: expected a list of records or dicts, a Dataset or a path, got {got}")
    columns = {"report": "report", "prompt": "prompt", "images": "image", "id": "id"}
    # Where the package has not been imported, nothing can be one of its data sets.
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(dataset, getattr(datasets, "Dataset", ())):
        return rows_to_records(dataset_rows(dataset, columns, argument), columns, source=argument)
    rows = list(dataset)
    if rows and isinstance(rows[0], Record):
        check_records(rows, argument)
        return rows
    return rows_to_records(enumerate(rows), columns, source=argument)
