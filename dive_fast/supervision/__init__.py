"""Decisive-token supervision: what is up-weighted, and the teacher that is distilled.

`dive_fast.Supervision` and `dive_fast.Teacher` are the two settings of `dive_fast.train`.
"""

from dive_fast.supervision.settings import Supervision
from dive_fast.supervision.tagger import Span, Tagger
from dive_fast.supervision.teacher import Teacher

__all__ = ["Span", "Supervision", "Tagger", "Teacher"]
