"""Rows of a Hugging Face `datasets.Dataset`, from the hub or from disk; their images stay where they are until used."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from dive_fast.data.counts import LoadCounts, Records
from dive_fast.data.images import StoredImage
from dive_fast.data.json_lines import rows_to_records
from dive_fast.data.loading import check_count
from dive_fast.errors import InputError

INSTALL = "pip install 'dive_fast[datasets]'"


def load_hub(
    path: str,
    *,
    split: str | None = None,
    configuration: str | None = None,
    report: str = "report",
    prompt: str = "prompt",
    images: str = "image",
    id: str = "id",
    limit: int | None = None,
) -> Records:
    """Records from a folder that `save_to_disk` wrote, or from a data set of the Hugging Face hub.

    Texts are read once; images stay in the data set's memory-mapped files (downloaded once, into its own cache) and are
    read and decoded when a batch asks for them. Columns are as in `load_json_lines`.

    Args:
        path: the folder, or the hub id, such as "someone/films".
        split: the part of it; may be left out where there is one only.
        configuration: the hub data set's, where it has several.
        report, prompt, images, id: the columns' names.
        limit: only the first so many rows.

    Raises:
        InputError: the package `datasets` is missing, no such folder or hub id, no such split, or whatever
            `load_json_lines` refuses in a row.
    """
    check_count("limit", limit)
    dataset = _load(path, configuration, split)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    columns = {"report": report, "prompt": prompt, "images": images, "id": id}
    records = rows_to_records(dataset_rows(dataset, columns, str(path)), columns, source=str(path))
    return Records(records, LoadCounts(len(records), sum(len(record.images) for record in records)))


def dataset_rows(dataset, columns: Mapping[str, str], source: str) -> Iterator[tuple[int, dict]]:
    """(index, row) of a `datasets.Dataset`, encoded images as `StoredImage`; no image is read for it.

    Raises:
        InputError: a list of images with an empty place; headed by `source`.
    """
    from datasets import Image

    names = dataset.column_names
    column = "images" if columns["images"] == "image" and "image" not in names else columns["images"]
    feature = dataset.features.get(column)
    several = not isinstance(feature, Image) and isinstance(getattr(feature, "feature", None), Image)
    if not several and not isinstance(feature, Image):
        yield from enumerate(dataset)
        return
    undecoded = Image(decode=False)
    stored = dataset.cast_column(column, type(feature)(undecoded) if several else undecoded).select_columns([column])
    counts = _image_counts(stored, column, source)
    for index, row in enumerate(dataset.remove_columns([column])):
        handles = [
            StoredImage(partial(_encoded, stored, column, index, place), f"{dataset._fingerprint}:{index}:{place}")
            for place in range(next(counts))
        ]
        yield index, {**row, column: handles}


def _image_counts(stored, column: str, source: str) -> Iterator[int]:
    """Images per row, from the lengths and gaps that Arrow keeps apart from the bytes."""
    import pyarrow
    import pyarrow.compute

    before = 0
    for batch in stored.with_format("arrow").iter(batch_size=1000):
        cells = batch.column(column)
        if pyarrow.types.is_struct(cells.type):
            yield from map(int, cells.is_valid().to_pylist())
        else:
            empty = pyarrow.compute.list_flatten(cells).is_null()
            if pyarrow.compute.any(empty).as_py():
                row = pyarrow.compute.list_parent_indices(cells).filter(empty)[0].as_py()
                raise InputError(
                    f"{source}, row {before + row}: column {column!r} has an empty place among its images; leave it out"
                )
            yield from (length or 0 for length in pyarrow.compute.list_value_length(cells).to_pylist())
        before += len(cells)


def _encoded(stored, column: str, index: int, place: int):
    """The bytes or the path of one image."""
    cell = stored[index][column]
    cell = cell[place] if isinstance(cell, list) else cell
    return cell["path"] if cell["bytes"] is None else cell["bytes"]


def _load(path: str, configuration: str | None, split: str | None):
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise InputError(f"data set hub: the package datasets is not installed. Run `{INSTALL}`") from error
    try:
        loaded = datasets.load_from_disk(path) if Path(path).exists() else datasets.load_dataset(path, configuration)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        why = " ".join(str(error).split())
        raise InputError(
            f"path: expected a folder that save_to_disk wrote, or a hub id that can be reached, got {path!r} ({why})"
        ) from error
    if not isinstance(loaded, Mapping):
        if split not in (None, str(loaded.split)):
            raise InputError(f"split: {path} is one data set without parts; leave split out, got {split!r}")
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        raise InputError(f"split: expected one of {', '.join(map(str, loaded))}, got {split!r}")
    return loaded[split]
