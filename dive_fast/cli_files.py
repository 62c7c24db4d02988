"""Files the command line reads and writes: predictions, references, results and reports."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dive_fast.errors import InputError


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


def _identified(path: str | Path, rows: Sequence[tuple[int, dict]]) -> dict[str, tuple[int, dict]]:
    found: dict[str, tuple[int, dict]] = {}
    for number, row in rows:
        name = str(row.get("id", f"line-{number}"))
        if name in found:
            raise InputError(f"{path}, line {number}: the id {name!r} occurs twice; ids must differ")
        found[name] = (number, row)
    return found


def read_predictions(path: str | Path, references: str | Path | None = None) -> list[dict]:
    """Rows with id, prediction, reference and finish_reason (None where it is missing), in the file's order.

    Args:
        references: a JSON-lines file with `id` and `reference` (or `report`), joined by id; None takes the references
            from the predictions' own lines.

    Raises:
        InputError: a missing file, broken line, missing or repeated id, or a prediction without a reference.
    """
    predictions = _identified(path, _read_rows(path))
    source = None
    if references is not None:
        rows = _read_rows(references)
        for which, numbered in ((path, predictions.values()), (references, rows)):
            number = next((number for number, row in numbered if "id" not in row), None)
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
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InputError(f"{message} {listed}; both files must hold the same reports")


def new_file(path: str | Path, overwrite: bool) -> Path:
    """The path of a file to be written; InputError where it exists and may not be replaced."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"--output: expected a file, {path} is a folder")
    check_place("--output", path, path.parent)
    if path.exists() and not overwrite:
        raise InputError(f"--output: {path} exists; add --overwrite to replace it, or give another name")
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


def write_rows(path: Path, rows: Iterable[Mapping], total: int) -> int:
    """Write JSON lines as they come into `path`.part, which becomes `path` when all are there; returns their number.

    Raises:
        InputError: a file that cannot be written, or what making a row raises. Both name the partial file, if any.
        KeyboardInterrupt: with `saved_to`, the partial file, where the user stopped it.
    """
    part = path.with_name(path.name + ".part")
    with writing("--output", path):
        part.parent.mkdir(parents=True, exist_ok=True)
        file = part.open("w", encoding="utf-8")
    count = 0
    try:
        for row in rows:
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
    """Write a text file, with its folder, whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with writing("--output", path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text + "\n", encoding="utf-8")
            os.replace(part, path)
        except OSError:
            with suppress(OSError):
                part.unlink()
            raise


def report_text(text: str | None, path: str | None) -> str:
    """The report to tag: given, from a file, or from standard input."""
    if text is None and path is not None:
        text = read_text(path)
    elif text is None:
        if sys.stdin.isatty():
            raise InputError('TEXT: expected a report, such as dive-fast tag "No effusion.", or --file FILE')
        text = sys.stdin.read()
    if not text.strip():
        raise InputError("TEXT: expected a report, got only white space")
    return text.rstrip("\n")
