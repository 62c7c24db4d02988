"""What a decisive-token tagger is: a callable from a text to labelled character spans."""

import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

from dive_fast.errors import InputError

POLARITIES = ("present", "absent", "uncertain")


class Span(NamedTuple):
    """Characters `text[start:end]` that carry the decision `label`; the lexicon's labels are (finding, polarity)."""

    start: int
    end: int
    label: Hashable


Tagger = Callable[[str], Sequence[Span]]


def checked(spans: Iterable, text: str, name: str = "spans") -> list[Span]:
    """`spans` as sorted `Span`s of `text`; raises InputError, headed by `name`, for one that is not a span of it."""
    if isinstance(spans, (str, bytes)) or not isinstance(spans, Iterable):
        raise InputError(f"{name}: expected a sequence of (start, end, class), got {type(spans).__name__}")
    return sorted((_span(span, text, name) for span in spans), key=operator.itemgetter(0, 1))


def _span(span, text: str, name: str) -> Span:
    if isinstance(span, (str, bytes)) or not isinstance(span, Sequence) or len(span) != 3:
        raise InputError(f"{name}: expected tuples (start, end, class), got {span!r}")
    start, end, label = span
    try:
        if isinstance(start, bool) or isinstance(end, bool):
            raise TypeError
        start, end = operator.index(start), operator.index(end)
    except TypeError:
        raise InputError(f"{name}: start and end must be integers (characters of the text), got {span!r}") from None
    if not 0 <= start < end <= len(text):
        raise InputError(
            f"{name}: {span!r} must satisfy 0 <= start < end <= {len(text)}, the length of the text {text[:60]!r}"
        )
    try:
        hash(label)
    except TypeError:
        raise InputError(
            f"{name}: the class of {span!r} must be hashable, such as a string or a tuple of strings"
        ) from None
    return Span(start, end, label)
