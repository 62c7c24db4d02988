"""What a decisive-token tagger is: a callable from a text to labelled character spans."""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

POLARITIES = ("present", "absent", "uncertain")


class Span(NamedTuple):
    """Characters `text[start:end]` that carry the decision `label`; the lexicon's labels are (finding, polarity)."""

    start: int
    end: int
    label: Hashable


Tagger = Callable[[str], Sequence[Span]]
