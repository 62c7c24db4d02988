"""Records that say how many they are, and what was left out on the way to them and why."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from dive_fast.data.record import Record


@dataclass
class LoadCounts:
    """What a loader kept and what it left out.

    Attributes:
        records: kept.
        images: of the kept records.
        dropped: reason -> studies or rows that became no record.
        notes: anything else that was met on the way, such as single images that are missing -> how many.
    """

    records: int = 0
    images: int = 0
    dropped: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)

    def __str__(self) -> str:
        """One line: "1,234 records with 1,300 images; left out: 12 without a findings section"."""
        text = _many(self.records, "record") + (f" with {_many(self.images, 'image')}" if self.images else "")
        for heading, counter in (("left out", self.dropped), ("also", self.notes)):
            if counter:
                text += f"; {heading}: " + ", ".join(f"{n:,} {reason}" for reason, n in counter.most_common())
        return text

    def as_dict(self) -> dict:
        """The same as plain dicts and numbers, for JSON."""
        return {**asdict(self), "dropped": dict(self.dropped), "notes": dict(self.notes)}


def _many(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


class Records(list[Record]):
    """A list of records with `counts`; slices and copies are plain lists."""

    def __init__(self, records: Iterable[Record] = (), counts: LoadCounts | None = None):
        super().__init__(records)
        images = sum(len(record.images) for record in self)
        self.counts = counts or LoadCounts(records=len(self), images=images)
