"""What `generate` can be asked for, and the check of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dive_fast.errors import InputError

MOST_BEAMS = 8


@dataclass(frozen=True)
class Options:
    """The arguments of `generate` that shape what is generated; their meaning is documented there.

    Raises:
        InputError: a value out of range, or two that exclude each other.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    stop: Sequence[str] = ()
    log_probs: bool = False
    weights: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "stop", _strings(self.stop))
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        counts = {"max_new_tokens": 1, "min_new_tokens": 0, "top_k": 0, "num_return_sequences": 1, "num_beams": 1}
        for name, low in counts.items():
            check_count(name, getattr(self, name), low)
        if self.num_beams > MOST_BEAMS:
            raise InputError(f"num_beams: expected a whole number from 1 to {MOST_BEAMS}, got {self.num_beams}")
        for name, expected, fits in (
            ("temperature", "a number >= 0 (0 is greedy)", lambda x: 0 <= x < math.inf),
            ("top_p", "a number in (0, 1]", lambda x: 0 < x <= 1),
            ("min_p", "a number in [0, 1]", lambda x: 0 <= x <= 1),
            ("repetition_penalty", "a number > 0", lambda x: 0 < x < math.inf),
            ("length_penalty", "a finite number", math.isfinite),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"{name}: expected a number, got {value!r}")
            if not fits(value):
                raise InputError(f"{name}: expected {expected}, got {value!r}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InputError(f"early_stopping: expected False, True or 'never', got {self.early_stopping!r}")

        if self.weights not in (None, "int8"):
            raise InputError(f"weights: expected None or 'int8', got {self.weights!r}")

    def _check_combinations(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise InputError(f"min_new_tokens: {self.min_new_tokens} is more than max_new_tokens={self.max_new_tokens}")
        if self.temperature == 0 and (self.top_k or self.top_p < 1 or self.min_p > 0):
            raise InputError(
                "top_k, top_p, min_p: they shape sampling, and temperature=0 is greedy; give a temperature > 0"
            )
        if self.num_beams > 1 and self.temperature > 0:
            raise InputError(
                f"num_beams: beam search draws nothing, so temperature must be 0, got {self.temperature!r}; leave out "
                "one of them"
            )
        if self.num_beams > 1 and self.stop:
            raise InputError("stop: beam search knows no stop strings; leave out stop or num_beams")
        if self.num_beams == 1 and (self.length_penalty != 1 or self.early_stopping is not False):
            raise InputError("length_penalty, early_stopping: they shape beam search; give num_beams > 1")
        if self.num_return_sequences > 1 and self.temperature == 0 and self.num_return_sequences > self.num_beams:
            raise InputError(
                f"num_return_sequences: {self.num_return_sequences} different ones need a temperature > 0 or as many "
                f"beams, got temperature=0, num_beams={self.num_beams}"
            )


def check_count(name: str, value, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InputError(f"{name}: expected a whole number >= {low}, got {value!r}")


def _strings(stop) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) and s for s in strings):
        raise InputError(f"stop: expected strings that are not empty, got {stop!r}")
    return tuple(strings)
