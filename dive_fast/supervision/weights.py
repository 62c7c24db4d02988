"""From decisive character spans to loss weights: w_t = 1 + pathology_weight * [decisive] + eos_weight * [EOS]."""

import math
import operator
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from dive_fast.errors import InputError
from dive_fast.supervision.tagger import Span, Tagger, checked


def checked_spans(tagger: Tagger, text: str) -> list[Span]:
    """Run any tagger on `text` and check what it returns.

    Spans may overlap and come in any order; they are returned sorted by (start, end).

    Raises:
        InputError: `tagger` is not callable, or a span is no (start, end, class) with integers
            0 <= start < end <= len(text) and a hashable class; the message shows the offending span.
    """
    if not callable(tagger):
        raise InputError(f"tagger: expected a callable text -> [(start, end, class)], got {type(tagger).__name__}")
    return checked(tagger(text), text, f"tagger {getattr(tagger, '__name__', type(tagger).__name__)}")


def decisive_mask(offsets: Sequence[tuple[int, int]], spans: Iterable[Span]) -> list[bool]:
    """Whether each token shares at least one character with a span.

    - A byte-level BPE or SentencePiece token that carries its leading blank (" effusion") counts by its word; one that
      holds the blank alone counts only inside a phrase, where that blank is a character of the span.
    - A character spread over several tokens (é, µ or an emoji in bytes) gives each its offsets: all count or none.
    - A token without characters (offsets (n, n)) never counts.
    """
    merged = []
    for start, end, _ in sorted(spans, key=operator.itemgetter(0, 1)):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    starts = [start for start, _ in merged]

    def decisive(first: int, last: int) -> bool:
        before_last = bisect_right(starts, last - 1) - 1  # the last span that begins before the token ends
        return first < last and before_last >= 0 and merged[before_last][1] > first

    return [decisive(first, last) for first, last in offsets]


def token_weights(
    offsets: Sequence[tuple[int, int]], spans: Iterable[Span], *, pathology_weight: float, eos_weight: float
) -> list[float]:
    """Loss weights of a report's tokens, and last that of the EOS token appended to them: len(offsets) + 1 values.

        w_t = 1 + pathology_weight * [token t shares a character with a span] + eos_weight * [token t is EOS]

    Both weights 0 give exactly 1.0 everywhere.

    Raises:
        InputError: a weight is negative, infinite or not a number.
    """
    for name, value in (("pathology_weight", pathology_weight), ("eos_weight", eos_weight)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name}: expected a finite number >= 0 (0 switches it off), got {value!r}")
    return [1.0 + pathology_weight * decisive for decisive in decisive_mask(offsets, spans)] + [1.0 + eos_weight]
