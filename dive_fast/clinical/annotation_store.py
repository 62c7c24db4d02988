"""Annotations by key: in memory, or in a file of JSON lines that a killed process leaves readable."""

import errno
import json
import os
from pathlib import Path

from dive_fast.errors import InputError

HEADER = b'{"format": "dive_fast annotations 1"}\n'


class AnnotationStore:
    """A mapping from key to annotation (plain JSON types).

    The file is only ever appended to, a whole line at a time. What a killed process left of a line is passed over and
    its annotation made again; processes that append at the same time at worst store an annotation twice. The file
    holds words of the reports: it belongs where the reports belong.

    Args:
        path: the file, made where there is none; None keeps all in memory.

    Raises:
        InputError: `path` is a folder, cannot be read or written, or holds something else.
    """

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(path).expanduser()
        self._memory: dict[str, dict] = {}
        self._places: dict[str, tuple[int, int]] = {}  # key -> first byte and length of its line in the file
        if self.path is not None:
            try:
                self._open()
            except OSError as error:
                raise self._unusable(error) from error

    def __contains__(self, key: str) -> bool:
        return key in self._memory or key in self._places

    def __getitem__(self, key: str) -> dict:
        if key in self._memory:
            return self._memory[key]
        first, length = self._places[key]
        with self.path.open("rb") as file:
            file.seek(first)
            return json.loads(file.read(length))["annotation"]

    def __setitem__(self, key: str, annotation: dict) -> None:
        if self.path is None:
            self._memory[key] = annotation
            return
        line = json.dumps({"key": key, "annotation": annotation}, separators=(",", ":")).encode() + b"\n"
        try:
            self._places[key] = (self._append(line), len(line))
        except OSError as error:
            raise self._unusable(error) from error

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            file.seek(0)
            head = file.read(len(HEADER))
            if head != HEADER:
                if not HEADER.startswith(head):
                    raise InputError(f"cache: {self.path} holds something else than annotations; name another file")
                # Empty, or cut short in its very first line.
                file.truncate(0)
                file.write(HEADER)
                return
            place = len(HEADER)
            for line in file:
                key = _key(line)
                if key is not None:
                    self._places[key] = (place, len(line))
                place += len(line)

    def _append(self, line: bytes) -> int:
        """The place of `line` at the end of the file, on a line of its own."""
        with self.path.open("ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(end - 1)
            torn = file.read(1) != b"\n"
            # One write: other processes append whole lines before or after it, never inside.
            data = b"\n" + line if torn else line
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return file.tell() - len(line)

    def _unusable(self, error: OSError) -> InputError:
        return InputError(
            f"cache: {self.path} cannot be used as a file ({error.strerror or error}); name another, or free disk space"
        )


def _key(line: bytes) -> str | None:
    """The key of a whole line, None for one that was cut short."""
    try:
        row = json.loads(line)
        return row["key"] if isinstance(row["annotation"], dict) else None
    except (ValueError, KeyError, TypeError):
        return None
