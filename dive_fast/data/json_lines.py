"""JSON lines, JSON arrays, CSV files, and any other sequence of rows (dicts) as records."""

import csv
import difflib
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dive_fast.data.counts import Records
from dive_fast.data.images import StoredImage, open_bytes
from dive_fast.data.loading import Loading, check_encodable, image_fault
from dive_fast.data.prompt import FINDINGS_REQUEST, collapse, compose_prompt
from dive_fast.data.record import Record
from dive_fast.errors import InputError

SUFFIXES = (".jsonl", ".json", ".csv")


def load_json_lines(
    path: str | Path,
    *,
    report: str = "report",
    prompt: str = "prompt",
    images: str = "image",
    id: str = "id",
    root: str | Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    skip_missing_images: bool = False,
    check_images: str = "exists",
) -> Records:
    """Records from a .jsonl (one object a line), .json (a list of objects) or .csv file, plain or gzipped (.gz).

    A row needs a report, and a prompt or an `indication` (which becomes "Indication: ...", then the request to describe
    the findings; it may be blank). Images are optional: a path, a list of paths, or nothing; a column `images` is
    accepted where there is no `image`. Rows without an id get "row-<line>" ("row-<index>" in .json). Other columns go
    to `meta`.

    Args:
        path: the file; its name decides the format.
        report, prompt, images, id: the columns' names.
        root: the folder relative image paths start from; by default the file's own.
        split: only the rows that say this in a column `split`; None takes all.
        limit, skip_missing_images, check_images: see `Loading`.

    Returns:
        Records with `counts`.

    Raises:
        InputError: no such file, unknown suffix, not JSON (with the line), a missing column (with those there are and
            the nearest name), an empty report or prompt, half of a surrogate pair in one or in an id, an id that occurs
            twice, images that are missing and may not be skipped.
    """
    loading = Loading(str(path), limit=limit, skip_missing_images=skip_missing_images, check_images=check_images)
    path = Path(path)
    if not path.is_file():
        raise InputError(f"path: expected a .jsonl, .json or .csv file (or .gz of one), there is no file at {path}")
    columns = {"report": report, "prompt": prompt, "images": images, "id": id}
    rows = _read_rows(path) if split is None else _of_split(_read_rows(path), split, path)
    for record in _checked(_records(rows, columns, str(path), Path(root) if root else path.parent), str(path)):
        if loading.full:
            break
        shown = loading.usable(record.id, record.images)
        if shown is not None:
            loading.add(record if shown == record.images else replace(record, images=shown))
    return loading.finish()


def _of_split(rows: Iterable[tuple[int, Mapping]], split: str, path: Path) -> Iterator[tuple[int, Mapping]]:
    for number, row in rows:
        if isinstance(row, Mapping) and "split" not in row:
            raise InputError(f"split: {path}, row {number}, has no column 'split'; leave split out to take all rows")
        if not isinstance(row, Mapping) or row["split"] == split:
            yield number, row


def rows_to_records(
    rows: Iterable[tuple[int, Mapping]], columns: Mapping[str, str], *, source: str, root: Path | None = None
) -> list[Record]:
    """Checked records from (number, row) pairs; errors name `number`, a line or index. See `load_json_lines`."""
    records = list(_records(rows, columns, source, root))
    check_records(records, source)
    return records


def check_records(records: Sequence[Record], source: str) -> None:
    """Raise InputError unless there are records, with different ids, prompts and reports with text, and image files.

    Ids, prompts and reports must encode as UTF-8.
    """
    if not records:
        raise InputError(f"{source}: expected at least one record, got none")
    for record in _checked(records, source):
        for image in record.images:
            if isinstance(image, (str, Path)) and image_fault(image, "exists")[0] == "missing":
                where = f"{source}, record {record.id!r}"
                raise InputError(f"{where}: image file not found: {image}. Mend the path, or give `root=` their folder")


def _records(rows, columns: Mapping[str, str], source: str, root: Path | None) -> Iterator[Record]:
    for number, row in rows:
        if not isinstance(row, Mapping):
            raise InputError(f"{source}, row {number}: expected an object with named columns, got {type(row).__name__}")
        yield _row_to_record(number, row, columns, source, root)


def _checked(records: Iterable[Record], source: str) -> Iterator[Record]:
    """The records as they come, each with an id of its own, and a prompt and a report with text that encodes."""
    seen = set()
    for record in records:
        if not isinstance(record, Record):
            raise InputError(f"{source}: expected records, got {type(record).__name__} among them")
        where = f"{source}, record {record.id!r}"
        if record.id in seen:
            raise InputError(f"{where}: this id occurs twice; ids must differ")
        seen.add(record.id)
        for field in ("report", "prompt"):
            text = getattr(record, field)
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{where}: its {field} must be a text that is not empty, got {text!r}; leave it out")
        check_encodable(where, record)
        yield record


def _row_to_record(number: int, row: Mapping, columns: Mapping[str, str], source: str, root: Path | None) -> Record:
    where = f"{source}, row {number}"
    if columns["report"] not in row:
        raise _missing_column(where, "report", columns, row)
    image_column = "images" if columns["images"] == "image" and "image" not in row else columns["images"]
    used = {columns["report"], columns["prompt"], columns["id"], image_column}
    name = row.get(columns["id"])
    return Record(
        id=f"row-{number}" if name is None or name == "" else str(name),
        prompt=_prompt(where, row, columns),
        report=_text(where, "report", row[columns["report"]]),
        images=_images(where, row.get(image_column), root),
        meta={column: value for column, value in row.items() if column not in used},
    )


def _prompt(where: str, row: Mapping, columns: Mapping[str, str]) -> str:
    if row.get(columns["prompt"]) is not None:
        return _text(where, "prompt", row[columns["prompt"]])
    if "indication" not in row:
        raise _missing_column(where, "prompt", columns, row, " or 'indication'")
    return compose_prompt([("Indication", collapse(_text(where, "indication", row["indication"])))], FINDINGS_REQUEST)


def _text(where: str, field: str, value) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: {field} must be a text, got {type(value).__name__}")
    return value.strip()


def _images(where: str, value, root: Path | None) -> tuple:
    if value is None or value == "":
        return ()
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_image(where, item, root) for item in items)


def _image(where: str, item, root: Path | None):
    if isinstance(item, (str, Path)):
        return str(root / item) if root else str(item)
    # What a datasets.Dataset yields for Image(decode=False); PIL decodes such bytes only when they are used.
    if isinstance(item, Mapping) and item.keys() == {"bytes", "path"}:
        if item["bytes"] is None:
            return _image(where, item["path"], root)
        if not isinstance(item["bytes"], bytes):
            raise InputError(f"{where}: an image's bytes must be bytes, got {type(item['bytes']).__name__}")
        return open_bytes(item["bytes"], record_id=where)
    if isinstance(item, StoredImage) or (hasattr(item, "convert") and hasattr(item, "size")):
        return item
    raise InputError(f"{where}: an image must be a path or a PIL image, got {type(item).__name__}")


def _missing_column(where: str, role: str, columns: Mapping[str, str], row: Mapping, other: str = "") -> InputError:
    # A column that already plays another part is no likely answer, however near its name ("prompt" for "report").
    candidates = [str(name) for name in row if name not in columns.values()]
    near = difflib.get_close_matches(columns[role], candidates, n=1, cutoff=0.5)
    hint = f" Did you mean {role}={near[0]!r}?" if near else f" Name it with {role}=..."
    there = ", ".join(map(str, row)) or "none"
    return InputError(f"{where}: no column {columns[role]!r}{other}; the columns are {there}.{hint}")


def _read_rows(path: Path) -> Iterator[tuple[int, Mapping]]:
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix not in SUFFIXES:
        raise InputError(
            f"path: expected a name ending in {', '.join(SUFFIXES)}, or in one of them and .gz, got {path}"
        )
    reader = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}[suffix]
    opener = gzip.open if name.endswith(".gz") else open
    try:
        # utf-8-sig: spreadsheets write a byte-order mark, which would become part of the first column's name.
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield from reader(file, path)
    except PermissionError as error:
        raise InputError(f"path: {path} cannot be read ({error.strerror}); mend its permissions") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"path: {path} is not a whole gzip file ({error}); copy it again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"path: {path} is not UTF-8 text ({error}); save it as UTF-8") from error


def _read_jsonl(file, path: Path) -> Iterator[tuple[int, Mapping]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}") from error


def _read_json(file, path: Path) -> Iterator[tuple[int, Mapping]]:
    try:
        rows = json.load(file)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(rows, list):
        got = f"an object with the keys {', '.join(rows)}" if isinstance(rows, dict) else type(rows).__name__
        raise InputError(f"{path}: expected a list of objects, got {got}; save one part as a list")
    yield from enumerate(rows)


def _read_csv(file, path: Path) -> Iterator[tuple[int, Mapping]]:
    reader = csv.DictReader(file)
    try:
        for row in reader:
            if None in row:
                raise InputError(f"{path}, line {reader.line_num}: more cells than columns; quote texts with commas")
            yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not CSV: {error}") from error
