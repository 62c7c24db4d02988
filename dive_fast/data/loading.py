"""What the loaders of film-and-report sets share: choices of views, images that are there, limits and counts."""

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dive_fast.data.counts import LoadCounts, Records
from dive_fast.data.images import load_image
from dive_fast.data.record import Record
from dive_fast.errors import InputError

IMAGE_CHECKS = ("exists", "ends", "decode")

_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_JPEG_END, _PNG_END = b"\xff\xd9", b"IEND\xaeB`\x82"
_SHOWN = 3
# A wrong root is told after so many images, not after all reports have been read.
_HOPELESS = 100


def check_choice(argument: str, value, options: Iterable[str], otherwise: str = "") -> str:
    """`value`, which must be one of `options`; InputError otherwise."""
    if not isinstance(value, str) or value not in options:
        raise InputError(f"{argument}: expected one of {', '.join(options)}{otherwise}, got {value!r}")
    return value


def check_split(split: str | None, names: Sequence[str]) -> str | None:
    """The data set's own name of `split` ("val" is understood for its validation part); None is all."""
    if split is None:
        return None
    if split == "val":
        split = next((name for name in names if name.startswith("val")), split)
    return check_choice("split", split, names, " or None for all")


def check_count(argument: str, value: int | None) -> int | None:
    """`value`, which must be a number of 1 or more, or None for all; InputError otherwise."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InputError(f"{argument}: expected a positive number, or None for all, got {value!r}")
    return value


def check_encodable(where: str, record: Record) -> None:
    """Raise InputError, headed by `where`, unless the record's id, prompt and report can be written as UTF-8.

    JSON may hold half of a surrogate pair, such as an emoji that was cut; tokenizers and files refuse it.
    """
    for field in ("id", "prompt", "report"):
        try:
            str(getattr(record, field)).encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{where}: its {field} holds half of a surrogate pair, which cannot be encoded; replace it"
            ) from None


class Views:
    """Which views of a study are shown, and in which order.

    Args:
        chosen: "frontal", "lateral", "all", None (no images), or a list of these and of the data set's own names.
        groups: group -> the names in it, the preferred first; what "all" adds comes after them, in the file's order.
        others: further names that the data set has.
        most: at most so many images of a study; None: all.

    Raises:
        InputError: a name that is neither a group nor one of the data set's; a `most` (max_images) below 1.
    """

    def __init__(
        self,
        chosen: str | Sequence[str] | None,
        groups: Mapping[str, Sequence[str]],
        others: Sequence[str] = (),
        most: int | None = None,
    ):
        self._most = check_count("max_images", most)
        known = {name.upper(): name for names in (*groups.values(), others) for name in names}
        items = [] if chosen is None else [chosen] if isinstance(chosen, str) else list(chosen)
        self.wanted = chosen is not None
        self._all = "all" in items
        order: list[str] = []
        for item in groups if self._all else items or [None] * self.wanted:
            if not isinstance(item, str) or (item not in groups and item.upper() not in known):
                options = ", ".join([*groups, "all", *filter(None, known.values())])
                raise InputError(f"views: expected None for no images, or some of {options}, got {chosen!r}")
            order += groups.get(item, (item,))
        self._rank = {name.upper(): rank for rank, name in reversed(list(enumerate(order)))}

    def choose(self, images: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """The (view, path) pairs to show, the preferred views first."""
        ranked = [(self._rank.get(view.upper(), len(self._rank)), view, path) for view, path in images]
        kept = [item for item in ranked if self._all or item[0] < len(self._rank)]
        return [item[1:] for item in sorted(kept, key=lambda item: item[0])][: self._most]


class Loading:
    """Collects the records of one load; images that are missing or broken are gathered and told together.

    Args:
        source: the data set's name and place, for messages.
        limit: stop after so many records; None takes all.
        skip_missing_images: leave such images out, and records that have none left, instead of raising.
        check_images: "exists": the file is there and not empty; "ends": a JPEG or PNG also begins and ends as one (a
            file for which that does not hold is decoded), which finds downloads that were cut short; "decode": every
            image is decoded, which takes hours on a whole data set.

    Raises:
        InputError: a limit below 1, an unknown check.
    """

    def __init__(self, source: str, *, limit: int | None, skip_missing_images: bool, check_images: str):
        check_count("limit", limit)
        check_choice("check_images", check_images, IMAGE_CHECKS)
        self.source, self.limit = source, limit
        self.skip, self.check = skip_missing_images, check_images
        self.counts = LoadCounts()
        self._records: list[Record] = []
        self._ids: set[str] = set()
        self._faults: list[str] = []
        self._seen = 0

    @property
    def full(self) -> bool:
        return self.limit is not None and len(self._records) >= self.limit

    def drop(self, reason: str) -> None:
        """Count a study that becomes no record."""
        self.counts.dropped[reason] += 1

    def note(self, what: str, n: int = 1) -> None:
        """Count something that was met on the way."""
        self.counts.notes[what] += n

    def usable(self, record_id: str, paths: Sequence[str]) -> tuple[str, ...] | None:
        """Those of `paths` that can be read; None, and the record counted as dropped, where none is left."""
        kept = self.usable_films(record_id, [("", path) for path in paths])
        return None if kept is None else tuple(path for _, path in kept)

    def usable_films(self, record_id: str, films: Sequence[tuple[str, str]]) -> list[tuple[str, str]] | None:
        """`usable` for (view, path) pairs."""
        kept = [(view, path) for view, path in films if self._is_whole(record_id, path)]
        # What is not skipped ends in an error, and meanwhile counts as a record: a limit stops the search as it would.
        if not self.skip:
            return list(films)
        if not kept and films:
            self.drop("with no image that is there and whole")
            return None
        return kept

    def add(self, record: Record) -> None:
        """Keep a record; InputError where its id occurs twice, or a text cannot be encoded."""
        check_encodable(f"{self.source}, record {record.id!r}", record)
        if record.id in self._ids:
            raise InputError(f"{self.source}: the id {record.id!r} occurs twice; ids must differ")
        self._ids.add(record.id)
        self._records.append(record)

    def finish(self) -> Records:
        """The records with their counts.

        Raises:
            InputError: images are missing or broken and may not be skipped; no record at all.
        """
        if self._faults and not self.skip:
            self._raise_faults()
        self.counts.records = len(self._records)
        self.counts.images = sum(len(record.images) for record in self._records)
        if not self._records:
            raise InputError(f"{self.source}: expected at least one record, got {self.counts}")
        return Records(self._records, self.counts)

    def _is_whole(self, record_id: str, path: str) -> bool:
        self._seen += 1
        fault, why = image_fault(path, self.check)
        if fault is None:
            return True
        self.note(f"{fault} images")
        if len(self._faults) < _SHOWN:
            self._faults.append(f"{record_id}: {path} ({why})")
        if not self.skip and self.counts.notes["missing images"] == self._seen == _HOPELESS:
            self._raise_faults(" so far")
        return False

    def _raise_faults(self, when: str = "") -> None:
        missing, broken = (self.counts.notes[f"{fault} images"] for fault in ("missing", "broken"))
        raise InputError(
            f"{self.source}: {missing:,} images are missing and {broken:,} broken, of {self._seen:,} looked for{when}. "
            f"The first are {'; '.join(self._faults)}. Mend them or the folder they are looked for in, or leave them "
            "out with skip_missing_images=True"
        )


def image_fault(path: str | Path, check: str) -> tuple[str | None, str]:
    """("missing" | "broken" | None for a whole image, why); see `Loading` for what `check` looks at."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "missing", "no such file"
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        return "missing", getattr(error, "strerror", None) or str(error)
    if not stat.S_ISREG(status.st_mode):
        return "missing", "not a file"
    if status.st_size == 0:
        return "broken", "an empty file"
    if check == "exists" or (check == "ends" and _has_both_ends(path, status.st_size)):
        return None, ""
    try:
        load_image(path, record_id="")
    except InputError as error:
        why = str(error).removeprefix(f"record '': image {path}: ").split(";")[0]
        return "broken", why
    return None, ""


def _has_both_ends(path: str | Path, size: int) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(len(_PNG))
            file.seek(max(0, size - len(_PNG_END)))
            tail = file.read()
    except OSError:  # decoding says why
        return False
    return (head.startswith(_JPEG) and tail.endswith(_JPEG_END)) or (head == _PNG and tail == _PNG_END)
