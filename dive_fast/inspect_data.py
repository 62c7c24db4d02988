"""What a data set holds before anything is trained on it: lengths, decisive words, what leaks between its parts."""

import math
import os
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, product
from typing import NamedTuple

from dive_fast.data.encoding import ReportEncoder
from dive_fast.data.prompt import collapse
from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.supervision.lexicon import LexiconTagger
from dive_fast.supervision.tagger import Tagger
from dive_fast.supervision.weights import checked_spans, decisive_mask

PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
NO_PART = "no split"


def inspect_data(
    parts: Mapping[str, Sequence[Record]],
    *,
    against: Mapping[str, Sequence[Record]] | None = None,
    tokenizer=None,
    tagger: Tagger | None = None,
    sample: int = 2000,
    samples: int = 3,
    seed: int = 0,
) -> dict:
    """Describe the parts of a data set, such as {"train": records, "test": records}, and what leaks between them.

    Args:
        against: the parts of another data set, held out from this one. They are described beside `parts` and each is
            compared with every one of these, not with each other.
        tokenizer: a fast tokenizer or a processor that counts lengths; None counts words.
        tagger: finds decisive words; None is the chest lexicon.
        sample: lengths and decisive words are taken from at most so many records of each part, drawn by `seed`.
            Counts and leakage are always of all.
        samples: records of each part to show.

    Returns:
        A dict that JSON can hold:

        - unit: "tokens" or "words". Reports count their EOS as a token; prompts count their text in the chat template
          without the tokens of images.
        - parts: name -> records, images, patients (None where a record does not name one), distinct_reports, measured
          (records that the next three are taken from), prompt_length and report_length (percentile -> length by
          nearest rank: the smallest that so many per cent do not exceed), decisive and samples.
        - decisive: share (of the reports' tokens that are decisive) and classes, label -> reports (share of reports
          that have it) and tokens (share of tokens that carry it), the most frequent first.
        - leakage: for every two parts (but records without a split), and for every part with every one of `against`,
          parts = [first, second], and for patients, reports (verbatim but for white space) and images (files by where
          their path leads, links followed): n = records of the second that share one with the first, and
          share = n / the second's records. patients is None where they are not named.

    Raises:
        InputError: no parts, an empty one, one name twice, or a number below 1 where records are to be drawn.
    """
    pairs = [pair for pair in combinations(parts, 2) if NO_PART not in pair] + list(product(parts, against or {}))
    twice = [name for name in against or {} if name in parts]
    if twice:
        raise InputError(f"against: expected other names than those of parts, got {twice[0]!r} in both; rename one")
    parts = {**parts, **(against or {})}
    if not parts or not all(len(records) for records in parts.values()):
        raise InputError(f"parts: expected parts with records, got {', '.join(map(str, parts)) or 'none'}")
    if sample < 1 or samples < 0:
        raise InputError(f"sample, samples: expected sample >= 1 and samples >= 0, got {sample} and {samples}")
    measure = _Words() if tokenizer is None else _Tokens(tokenizer)
    tagger = tagger or LexiconTagger()
    described = {}
    for name, records in parts.items():
        drawn = _draw(records, sample, f"inspect:{seed}:{name}")
        patients = _patients(records)
        described[name] = {
            "records": len(records),
            "images": sum(len(record.images) for record in records),
            "patients": None if patients is None else len(set(patients)),
            "distinct_reports": len({collapse(record.report) for record in records}),
            "measured": len(drawn),
            "prompt_length": _percentiles([measure.prompt(record) for record in drawn]),
            "report_length": _percentiles([len(measure.offsets(record.report)) + measure.end for record in drawn]),
            "decisive": _decisive(drawn, measure, tagger),
            "samples": [_shown(record) for record in drawn[:samples]],
        }
    keys = {name: _keys(parts[name]) for name in dict.fromkeys(name for pair in pairs for name in pair)}
    leaks = [{"parts": [first, second], **_leak(keys[first], keys[second])} for first, second in pairs]
    return {"unit": measure.unit, "parts": described, "leakage": leaks}


def by_split(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by meta["split"]: train, validation and test parts first; "no split" for those without one."""
    parts: dict[str, list[Record]] = {}
    for record in records:
        parts.setdefault(str(record.meta.get("split") or NO_PART), []).append(record)
    order = ("train", "val", "valid", "validate", "validation", "dev", "test")
    known = [name for name in order if name in parts]
    return {name: parts[name] for name in [*known, *(name for name in parts if name not in known)]}


class _Words:
    unit, end = "words", 0

    def offsets(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in re.finditer(r"\S+", text)]

    def prompt(self, record: Record) -> int:
        return len(record.prompt.split())


class _Tokens:
    unit, end = "tokens", 1

    def __init__(self, tokenizer):
        self._encoder = ReportEncoder(tokenizer)

    def offsets(self, text: str) -> list[tuple[int, int]]:
        return self._encoder.response(text).offsets

    def prompt(self, record: Record) -> int:
        text = self._encoder.prompt_text(replace(record, images=()))
        return len(self._encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _draw(records: Sequence[Record], most: int, seed: str) -> list[Record]:
    if len(records) <= most:
        return list(records)
    return [records[index] for index in sorted(random.Random(seed).sample(range(len(records)), most))]


def _percentiles(lengths: Sequence[int]) -> dict[str, int]:
    ranked = sorted(lengths)
    return {str(p): ranked[math.ceil(p / 100 * len(ranked)) - 1] for p in PERCENTILES}


def _decisive(records: Sequence[Record], measure: _Words | _Tokens, tagger: Tagger) -> dict:
    total = decisive = 0
    reports, tokens = Counter(), Counter()
    for record in records:
        offsets, spans = measure.offsets(record.report), checked_spans(tagger, record.report)
        total += len(offsets)
        decisive += sum(decisive_mask(offsets, spans))
        by_label: dict[str, list] = {}
        for span in spans:
            by_label.setdefault(_label(span.label), []).append(span)
        for label, own in by_label.items():
            reports[label] += 1
            tokens[label] += sum(decisive_mask(offsets, own))
    classes = {
        label: {"reports": n / len(records), "tokens": tokens[label] / max(total, 1)}
        for label, n in reports.most_common()
    }
    return {"share": decisive / max(total, 1), "classes": classes}


def _label(label) -> str:
    return " ".join(map(str, label)) if isinstance(label, tuple) else str(label)


def _patients(records: Sequence[Record]) -> list[str] | None:
    found = [record.patient for record in records]
    return None if None in found else found


class _Keys(NamedTuple):
    """What a part may share with another, of each of its records."""

    patients: list[str] | None
    reports: list[str]
    images: list[set[str]]


def _keys(records: Sequence[Record]) -> _Keys:
    reports = [collapse(record.report) for record in records]
    # One file has many names: relative ones, with "..", through links.
    images = [{os.path.realpath(path) for path in record.images if isinstance(path, str)} for record in records]
    return _Keys(_patients(records), reports, images)


def _leak(first: _Keys, second: _Keys) -> dict:
    total, patients = len(second.reports), None
    if first.patients is not None and second.patients is not None:
        known = set(first.patients)
        patients = _share(sum(patient in known for patient in second.patients), total)
    texts, films = set(first.reports), set().union(*first.images)
    return {
        "patients": patients,
        "reports": _share(sum(text in texts for text in second.reports), total),
        "images": _share(sum(not films.isdisjoint(paths) for paths in second.images), total),
    }


def _share(n: int, total: int) -> dict:
    return {"n": n, "share": n / total}


def _shown(record: Record) -> dict:
    images = [image if isinstance(image, str) else repr(image) for image in record.images]
    return {"id": record.id, "prompt": record.prompt, "report": record.report, "images": images}
