"""CSV files, plain or gzipped, read row by row: nothing but the row at hand is in memory."""

import csv
import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from dive_fast.errors import InputError

_SHOWN = 8


def find_file(root: str | Path, *names: str, what: str, argument: str = "root") -> Path:
    """The first of `names` that is a file under `root`.

    Raises:
        InputError: none is, with what was looked for and what lies there instead; `root` is no path.
    """
    if not isinstance(root, str | os.PathLike):
        raise InputError(f"{argument}: expected {what}, got {root!r}")
    root = Path(root)
    for name in names:
        if (root / name).is_file():
            return root / name
    if not root.is_dir():
        there = "which is a file" if root.exists() else "and there is no such folder"
        raise InputError(f"{argument}: expected {what} with {' or '.join(names)}, got {root}, {there}")
    found = sorted(path.name for path in root.iterdir())
    listed = ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    raise InputError(
        f"{argument}: expected {what}; looked for {' or '.join(str(root / name) for name in names)} and found no such "
        f"file. The folder holds {listed or 'nothing'}"
    )


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """(line number, the cells of `columns` in their order) of every row; columns are found by name.

    Raises:
        InputError: a column that is missing, a row of another length, a file that is not UTF-8, CSV or whole gzip.
    """
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        # utf-8-sig: spreadsheets write a byte-order mark, which would become part of the first column's name.
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            missing = [column for column in columns if column not in header]
            if missing:
                there = ", ".join(header) or "none: the file is empty"
                raise InputError(f"{path}: lacks the columns {', '.join(missing)}; those it has are {there}")
            wanted, width = [header.index(column) for column in columns], len(header)
            for row in reader:
                if len(row) == width:
                    yield reader.line_num, [row[index] for index in wanted]
                elif row:
                    raise InputError(
                        f"{path}, line {reader.line_num}: {len(row)} cells where the header has {width} columns; "
                        "the file may be cut short, or a text with commas not quoted. Copy it again"
                    )
    except PermissionError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); mend its permissions") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a whole gzip file ({error}); copy it again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    except csv.Error as error:
        raise InputError(f"{path}: not CSV near line {reader.line_num} ({error}); copy it again") from error


def cell_text(cell: str) -> str:
    """A cell's text with white space collapsed; "" where a data frame without a value was written as "nan"."""
    text = " ".join(cell.split())
    return "" if text.lower() == "nan" else text
