"""Which records a teacher sees in its context: chosen per query, without leaking the query's own report."""

import hashlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice

import numpy as np

from dive_fast.data.images import image_key
from dive_fast.data.prompt import collapse
from dive_fast.data.record import Record
from dive_fast.errors import InputError

HOW = ("random", "nearest", "fixed")


class DemonstrationPool:
    """Chooses `shots` demonstrations for a record out of `pool`.

    Never chosen: the record itself (same id), a record with the same report (white space and case aside), or one of the
    same patient where both have meta["patient_id"]. The choice depends on the settings, the query and the pool's
    content, not on the pool's order or on earlier queries.

    how:
        random: drawn anew for every record by (seed, record.id).
        nearest: the highest TF-IDF cosine between prompts (idf = log(N / df), words lower-cased), most similar last,
            next to the query; ties by id. The seed plays no part.
        fixed: the same for all, drawn by seed; one that would leak is replaced, in its place, by the first spare that
            does not.

    Raises:
        InputError: unknown `how`, negative `shots`, two pool records with one id, fewer records than shots; and from
            `for_record` when too few are left once leaking ones are set aside.
    """

    def __init__(self, pool: Sequence[Record], shots: int, how: str = "random", seed: int = 0):
        if how not in HOW:
            raise InputError(f"demos: expected one of {', '.join(HOW)}, got {how!r}")
        if isinstance(shots, bool) or not isinstance(shots, int) or shots < 0:
            raise InputError(f"shots: expected a whole number of 0 or more, got {shots!r}")
        if len(pool) < shots:
            raise InputError(
                f"shots: {shots} demonstrations asked of a pool of {len(pool)}; ask for fewer or give more"
            )
        self.pool = sorted(pool, key=lambda record: record.id)
        self.shots, self.how, self.seed = shots, how, seed
        repeated = [a.id for a, b in zip(self.pool, self.pool[1:], strict=False) if a.id == b.id]
        if repeated:
            raise InputError(f"pool: the id {repeated[0]!r} occurs twice; ids must differ")
        self._reports = [_report_key(record) for record in self.pool]
        if how == "nearest":
            self._index = _TfidfIndex([record.prompt for record in self.pool])
        elif how == "fixed":
            self._order = random.Random(f"fixed:{seed}").sample(range(len(self.pool)), len(self.pool))

    def check(self, records: Sequence[Record]) -> None:
        """Raises the InputError of `for_record` for the first of `records` that has too few demonstrations left."""
        reports, patients = Counter(self._reports), Counter(record.patient for record in self.pool)
        for record in records:
            patient = 0 if record.patient is None else patients[record.patient]
            if len(self.pool) - 1 - reports[_report_key(record)] - patient < self.shots:  # counting some twice
                self.for_record(record)

    def for_record(self, record: Record) -> tuple[Record, ...]:
        """The demonstrations for `record`, in the order they stand in the context."""
        report, patient = _report_key(record), record.patient

        def allowed(index: int) -> bool:
            other = self.pool[index]
            same_patient = patient is not None and other.patient == patient
            return other.id != record.id and self._reports[index] != report and not same_patient

        if self.how == "fixed":
            spares = filter(allowed, self._order[self.shots :])
            chosen = [i if allowed(i) else next(spares, None) for i in self._order[: self.shots]]
            chosen = [i for i in chosen if i is not None]
        else:
            ranked = self._index.ranked(record.prompt) if self.how == "nearest" else self._drawn(record)
            chosen = list(islice(filter(allowed, ranked), self.shots))
        if len(chosen) < self.shots:
            raise InputError(
                f"shots: record {record.id!r} needs {self.shots} demonstrations, only {len(chosen)} of the pool's "
                f"{len(self.pool)} are left without itself, its patient and its report's text; ask for fewer"
            )
        if self.how == "nearest":
            chosen.reverse()
        return tuple(self.pool[i] for i in chosen)

    def _drawn(self, record: Record) -> Iterator[int]:
        rng, count = random.Random(f"random:{self.seed}:{record.id}"), len(self.pool)
        # An inside-out Fisher-Yates over a dict of moved entries: a few draws do not cost a shuffle of the whole pool.
        moved: dict[int, int] = {}
        for start in range(count):
            other = rng.randrange(start, count)
            drawn = moved.get(other, other)
            moved[other] = moved.get(start, start)
            yield drawn

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of settings and pool content, for the settings of a run; images count as `image_key` says."""
        digest = hashlib.sha256()
        digest.update(json.dumps(["demonstrations-2", self.shots, self.how, self.seed]).encode())
        for record in self.pool:
            images = [image_key(image, pixels=True) for image in record.images]
            digest.update(json.dumps([record.id, record.prompt, record.report, images, record.patient]).encode())
        return digest.hexdigest()


def choose_demonstrations(
    query: Record, pool: Sequence[Record], shots: int, how: str = "random", *, seed: int = 0
) -> list[Record]:
    """`DemonstrationPool(pool, shots, how, seed).for_record(query)` as a list, for a single query."""
    return list(DemonstrationPool(pool, shots, how, seed).for_record(query))


def _report_key(record: Record) -> str:
    return collapse(record.report).lower()


class _TfidfIndex:
    """Cosine of TF-IDF vectors through an inverted index: a query touches only the texts that share a word with it."""

    def __init__(self, texts: Sequence[str]):
        counts = [_words(text) for text in texts]
        frequency = Counter(word for words in counts for word in words)
        # A word of every text has idf 0: the request's fixed wording costs nothing and pulls nothing together.
        self._idf = {word: math.log(len(texts) / n) for word, n in frequency.items() if n < len(texts)}
        postings: dict[str, tuple[list[int], list[float]]] = {word: ([], []) for word in self._idf}
        for index, words in enumerate(counts):
            for word, weight in self._unit_vector(words).items():
                postings[word][0].append(index)
                postings[word][1].append(weight)
        self._postings = {word: (np.array(rows), np.array(weights)) for word, (rows, weights) in postings.items()}
        self._size = len(texts)

    def _unit_vector(self, words: Counter) -> dict[str, float]:
        vector = {word: words[word] * self._idf[word] for word in sorted(words) if word in self._idf}
        norm = math.sqrt(math.fsum(weight * weight for weight in vector.values()))
        return {word: weight / norm for word, weight in vector.items()}

    def scores(self, text: str) -> np.ndarray:
        """Cosine with every text, [N] float64; 0 where no word is shared."""
        scores = np.zeros(self._size)
        for word, weight in self._unit_vector(_words(text)).items():
            rows, weights = self._postings[word]
            scores[rows] += weight * weights
        return scores

    def ranked(self, text: str) -> Iterator[int]:
        """Indices from the most similar down; equal scores in index order."""
        # Rounded, since equal vectors can differ in the last bits of their sums.
        return iter(np.argsort(-self.scores(text).round(12), kind="stable").tolist())


def _words(text: str) -> Counter:
    return Counter(re.findall(r"\w+", text.lower()))
