"""What the command line reads and writes: predictions, references, results, reports, and tables on the terminal."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

from dive_fast import checkpoints
from dive_fast.errors import InputError

_WIDEST = 10_000
"""Characters: wider than any table."""


def read_text(path: str | Path) -> str:
    """A text file's content; InputError where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected the path of a readable file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: expected text in UTF-8, got other bytes") from None


def read_json(path: str | Path) -> Any:
    """A JSON file's content; InputError with the line of a syntax error."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from None


def _read_rows(path: str | Path) -> list[tuple[int, dict]]:
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON: {error.msg}; expected one object a line") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected an object with named values, got {type(row).__name__}")
        rows.append((number, row))
    if not rows:
        raise InputError(f"{path}: expected at least one line, the file is empty")
    return rows


def _text(path: str | Path, number: int, row: Mapping, *names: str) -> str:
    for name in names:
        if isinstance(row.get(name), str):
            return row[name]
    wanted, there = " or ".join(map(repr, names)), ", ".join(map(str, row)) or "nothing"
    raise InputError(f"{path}, line {number}: expected {wanted} with a text; the line has {there}")


def _name(number: int, row: Mapping) -> str:
    return f"line-{number}" if row.get("id") is None else str(row["id"])


def _identified(
    path: str | Path, rows: Sequence[tuple[int, dict]], *, choose_sample: bool = False
) -> dict[str, tuple[int, dict]]:
    found: dict[str, tuple[int, dict]] = {}
    for number, row in rows:
        name = _name(number, row)
        if name in found:
            if choose_sample and "sample" in row:
                raise InputError(
                    f"--sample: {path} has several samples of {name!r}, and intervals take every row for a report of "
                    "its own; choose one of each, such as --sample 0"
                )
            raise InputError(f"{path}, line {number}: the id {name!r} occurs twice; ids must differ")
        found[name] = (number, row)
    return found


def _of_sample(path: str | Path, rows: Sequence[tuple[int, dict]], sample: int) -> list[tuple[int, dict]]:
    """The rows of one sample of every report; where a report has one row alone, that may be without a number."""
    chosen = [(number, row) for number, row in rows if row.get("sample", 0) == sample]
    there = {_name(number, row) for number, row in chosen}
    missing = list(dict.fromkeys(name for name in (_name(*numbered) for numbered in rows) if name not in there))
    if missing:
        raise InputError(
            f"--sample: {path} has no sample {sample} of {_listed(missing)}; choose one that every report has"
        )
    return chosen


def read_predictions(path: str | Path, references: str | Path | None = None, sample: int | None = None) -> list[dict]:
    """Rows with id, prediction, reference and finish_reason (None where it is missing), in the file's order.

    Args:
        references: a JSON-lines file with `id` and `reference` (or `report`), joined by id; None takes the references
            from the predictions' own lines.
        sample: of a report with several rows, the one whose `sample` is this; a row without it is sample 0.

    Raises:
        InputError: a missing file, broken line, missing or repeated id, a prediction without a reference, several
            samples of a report and none chosen, or a report without the chosen one.
    """
    numbered = _read_rows(path)
    if sample is not None:
        numbered = _of_sample(path, numbered, sample)
    predictions = _identified(path, numbered, choose_sample=sample is None)
    source = None
    if references is not None:
        rows = _read_rows(references)
        for which, numbered in ((path, predictions.values()), (references, rows)):
            number = next((number for number, row in numbered if row.get("id") is None), None)
            if number is not None:
                raise InputError(f"{which}, line {number}: expected an 'id', which joins predictions and references")
        source = _identified(references, rows)
        _require(predictions, source, f"{references}: no reference for")
        if len(source) > len(predictions):
            print(f"Note: {len(source) - len(predictions)} references have no prediction in {path}", file=sys.stderr)
    result = []
    for name, (number, row) in predictions.items():
        target = (path, number, row) if source is None else (references, *source[name])
        result.append(
            {
                "id": name,
                "prediction": _text(path, number, row, "prediction"),
                "reference": _text(*target, "reference", "report"),
                "finish_reason": row.get("finish_reason"),
            }
        )
    return result


def in_order_of(rows: Sequence[Mapping], others: Sequence[dict], path: str | Path) -> list[dict]:
    """`others` (read from `path`) in the order of `rows`; InputError unless both have the same ids."""
    by_id = {row["id"]: row for row in others}
    wanted = {row["id"] for row in rows}
    _require(wanted, by_id, f"{path}: no prediction for")
    _require(by_id, wanted, f"{path}: predictions that the first file does not have:")
    return [by_id[row["id"]] for row in rows]


def _require(names: Iterable[str], known, message: str) -> None:
    missing = [name for name in names if name not in known]
    if missing:
        raise InputError(f"{message} {_listed(missing)}; both files must hold the same reports")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def new_file(path: str | Path, overwrite: bool, inputs: Iterable[str | Path | None] = ()) -> Path:
    """The path of a file to be written row by row (`write_rows`), checked before any work is done for it.

    Args:
        inputs: as for `check_file`.

    Raises:
        InputError: what `check_file` refuses; without `overwrite` also a file that exists, or the rows of a run that
            was cut off.
    """
    path = check_file("--output", path, inputs)
    if path.exists() and not overwrite:
        raise InputError(f"--output: {path} exists; add --overwrite to replace it, or give another name")
    _partial(path, overwrite)
    return path


def _partial(path: Path, overwrite: bool) -> Path:
    """Where rows are kept until all are there."""
    part = path.with_name(path.name + ".part")
    if not overwrite and part.is_file() and part.stat().st_size:
        raise InputError(
            f"--output: {part} holds the rows of a run that was cut off; rename it to keep them, or add --overwrite to "
            "replace them"
        )
    return part


def check_file(
    option: str, path: str | Path, inputs: Iterable[str | Path | None] = (), *, devices: bool = False
) -> Path:
    """The path of a file to be written, checked before any work is done for it.

    Args:
        inputs: what the command reads; names of other things than files are passed over.
        devices: the command writes to a device or a pipe, such as /dev/stdout, where it is given one.

    Raises:
        InputError: the path is a folder, a device or one of the `inputs`, or lies where nothing can be written.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{option}: expected a file, {path} is a folder")
    if path.exists():
        if not path.is_file() and devices:
            return path
        if not path.is_file():
            raise InputError(f"{option}: expected a file, {path} is a device or a pipe; name a file")
        if any(source is not None and os.path.exists(source) and path.samefile(source) for source in inputs):
            raise InputError(f"{option}: {path} is read by this command and would be replaced; name another file")
    check_place(option, path, path.parent)
    return path


def check_place(option: str, path: Path, folder: Path) -> None:
    """Refuse a `path` in a `folder` that is not there and cannot be made, before any work is done for it."""
    above = folder.absolute()
    while not os.path.exists(above):
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(
            f"{option}: {path} cannot be written, {above} is no folder that may be written to; name another"
        )


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """What the system refuses while `path` is written, as an InputError that names the option."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{option}: {path} cannot be written ({error.strerror or error}); free disk space or name another place"
        ) from error


def write_rows(path: Path, rows: Iterable[Mapping], total: int, *, overwrite: bool = False) -> int:
    """Write JSON lines as they come into `path`.part, which becomes `path` when all are there; returns their number.

    Args:
        overwrite: the first row may replace those that an earlier run left in `path`.part.

    Raises:
        InputError: a file that cannot be written, rows of an earlier run and no `overwrite`, or what making a row
            raises. Names the partial file, if any.
        KeyboardInterrupt: with `saved_to`, the partial file, where the user stopped it.
    """
    part = _partial(path, overwrite)
    rows = iter(rows)
    # Nothing is opened before there is a row to keep: a run without one leaves what an earlier run wrote.
    first = list(islice(rows, 1))
    with writing("--output", path):
        part.parent.mkdir(parents=True, exist_ok=True)
        file = part.open("w", encoding="utf-8")
    count = 0
    try:
        for row in chain(first, rows):
            with writing("--output", path):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
            count += 1
            if sys.stderr.isatty():
                print(f"\r{count} of {total}", end="" if count < total else "\n", file=sys.stderr, flush=True)
    except (InputError, KeyboardInterrupt) as stop:
        _abandon(file, part, keep=count > 0)
        if isinstance(stop, InputError):
            raise InputError(f"{stop}. The first {count} predictions are in {part}" if count else str(stop)) from stop
        stop.saved_to = part if count else None
        raise
    with writing("--output", path):
        file.close()
        os.replace(part, path)
    return count


def _abandon(file, part: Path, keep: bool) -> None:
    with suppress(OSError):  # a full disk refuses the rest of the buffer once more
        file.close()
    if not keep:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, with its folder, whole or not at all; InputError where that cannot be."""
    path = Path(path)
    with writing("--output", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_text(path, text + "\n")


def report_text(text: str | None, path: str | None) -> str:
    """The report to tag: given, from a file, or from standard input; InputError where there is no text in UTF-8."""
    if text is None and path is not None:
        text = read_text(path)
    elif text is None:
        if sys.stdin.isatty():
            raise InputError('TEXT: expected a report, such as dive-fast tag "No effusion.", or --file FILE')
    try:
        text = sys.stdin.read() if text is None else text
        text.encode()  # where the locale is lenient, bytes that are no text come as halves of surrogate pairs
    except UnicodeError:
        raise InputError("TEXT: expected a report in UTF-8, got other bytes; convert it") from None
    if not text.strip():
        raise InputError("TEXT: expected a report, got only white space")
    return text.rstrip("\n")


def table(title: str, first: str, *columns: str):
    """A `rich.table.Table` of rows with a name under `first` and values under `columns`; see `show_table`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    found.add_column(first, no_wrap=True)
    for column in columns:
        found.add_column(column, justify="right")
    return found


def show_table(table) -> None:
    """Print a table with no name and no number shortened.

    On a terminal cells are wrapped between words, and lines grow longer than the terminal where that is not enough.
    Elsewhere no cell is wrapped.
    """
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(highlight=False)
    needed = Measurement.get(console, console.options.update(max_width=_WIDEST), table)
    console.width = max(console.width, needed.minimum if console.is_terminal else needed.maximum)
    console.print(table)
