"""A predictions file written piece by piece: finished shards are files of their own until all are there.

A shard's file appears under its name when it is whole, so what is there after a crash is finished work. `setup.json`
says what the shards were made with; another run's shards are never mixed in.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dive_fast.data.images import image_key
from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.run_settings import changes, read_settings

SETUP = "setup.json"


class Shards:
    """The shards of one predictions file, in a folder beside it.

    Args:
        output: the file that `join` writes; the shards lie in `<output>.shards`.
        records: of the whole data set, in order; shard i holds records i * size to (i + 1) * size - 1.
        size: records per shard.
        setup: what the predictions depend on, as JSON values.

    Raises:
        InputError: the folder holds shards that were made with another setup, with what differs, or with one that
            cannot be read.
    """

    def __init__(self, output: Path, records: Sequence[Record], size: int, setup: Mapping[str, Any]):
        self.output, self.folder = output, output.with_name(output.name + ".shards")
        self.shards = [records[start : start + size] for start in range(0, len(records), size)]
        self.samples = setup.get("options", {}).get("num_return_sequences", 1)
        self.setup = json.loads(json.dumps(setup))
        if any(self.path(index).exists() for index in range(len(self))):
            self._check_setup()

    def _check_setup(self) -> None:
        file = self.folder / SETUP
        before = read_settings(file, "--output", f"remove {self.folder} to start again")
        changed = changes(before, self.setup)
        if changed:
            raise InputError(
                f"--output: the finished shards in {self.folder} were made with other settings ({changed}); "
                "give the same ones, name another --output, or remove the folder to start again"
            )

    def __len__(self) -> int:
        return len(self.shards)

    def path(self, index: int) -> Path:
        """Where a finished shard lies."""
        return self.folder / f"shard-{index:06d}.jsonl"

    def unfinished(self) -> list[int]:
        """The shards that are still to be computed; one that was damaged since is among them."""
        return [index for index in range(len(self)) if self._text(index) is None]

    def save(self, index: int, rows: Iterable[Mapping]) -> None:
        """Keep a shard, whole or not at all.

        Raises:
            InputError: the rows are not those of the shard's records, or the disk refuses them.
        """
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if not self._belongs(index, text):
            raise InputError(f"shard {index}: expected {self.samples} rows for each of its records, in their order")
        try:
            if not self.folder.is_dir() or not any(self.path(i).exists() for i in range(len(self))):
                self.folder.mkdir(parents=True, exist_ok=True)
                _write(self.folder / SETUP, json.dumps(self.setup, indent=1) + "\n")
            _write(self.path(index), text)
        except OSError as error:
            raise InputError(
                f"--output: {self.path(index)} cannot be written ({error.strerror or error}); free disk space, then "
                "start the same command again, which goes on from the finished shards"
            ) from error

    def join(self) -> int:
        """Write all shards into the output, remove their folder, and return the number of rows.

        Raises:
            InputError: a shard is missing or damaged, or the disk refuses the output.
        """
        # Not the .part that predictions of one process gather in, which somebody may want to keep.
        part, count = self.output.with_name(self.output.name + ".joining"), 0
        try:
            with open(part, "w", encoding="utf-8") as file:
                for index in range(len(self)):
                    text = self._text(index)
                    if text is None:
                        raise InputError(f"shard {index}: {self.path(index)} is missing or damaged; run again")
                    file.write(text)
                    count += len(self.shards[index]) * self.samples
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.output)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise InputError(
                f"--output: {self.output} cannot be written ({error.strerror or error}); free disk space, then start "
                f"the same command again, which goes on from {self.folder}"
            ) from error
        self._remove()
        return count

    def _remove(self) -> None:
        for index in range(len(self)):
            self.path(index).unlink(missing_ok=True)
        (self.folder / SETUP).unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _text(self, index: int) -> str | None:
        try:
            text = self.path(index).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        return text if self._belongs(index, text) else None

    def _belongs(self, index: int, text: str) -> bool:
        expected = [record.id for record in self.shards[index] for _ in range(self.samples)]
        try:
            return [json.loads(line)["id"] for line in text.split("\n")[:-1]] == expected and text.endswith("\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            return False


def records_fingerprint(records: Iterable[Record]) -> str:
    """A hash of everything in the records that a prediction or its row depends on."""
    digest = hashlib.sha256()
    for record in records:
        images = [image_key(image, pixels=True) for image in record.images]
        digest.update(json.dumps([record.id, record.prompt, record.report, images]).encode())
    return digest.hexdigest()


def _write(path: Path, text: str) -> None:
    """`path` holds all of `text`, on the disk, or is not there."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
