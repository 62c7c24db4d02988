"""How sure a figure is: the ratio of two medians, and whether the machine was quiet enough to be believed."""

import math
from collections.abc import Iterator

from dive_fast.bench.results import INTERVALS, NAMED_INTERVALS, Interval, Record

# A figure whose 95 % interval is wider than this share of it was taken on a noisy machine.
NOISY = 0.10


def ratio_of_medians(numerator: Interval, denominator: Interval) -> Interval:
    """numerator : denominator of two runs, with the interval that theirs give it.

    In logarithms the intervals of two independent figures add by squares on each side, "method of variance estimates
    recovery" (Zou and Donner, Statistics in Medicine 2008).
    """
    ratio = numerator.median / denominator.median
    if not (numerator.known and denominator.known):
        return Interval(ratio)
    below = math.hypot(math.log(numerator.median / numerator.low), math.log(denominator.high / denominator.median))
    above = math.hypot(math.log(numerator.high / numerator.median), math.log(denominator.median / denominator.low))
    return Interval(ratio, ratio * math.exp(-below), ratio * math.exp(above))


def width(figure: Interval) -> float | None:
    """The interval's width as a share of the figure; None without an interval."""
    return (figure.high - figure.low) / abs(figure.median) if figure.known and figure.median else None


def is_noisy(record: Record) -> bool:
    """Whether the record's time, or a ratio that it exists for, is known to no better than `NOISY`.

    A record that was measured in turn with others is there for the ratios: drift moves its time and not them.
    """
    figures = list(_ratios(record)) or [record.seconds]
    return any((width(figure) or 0.0) > NOISY for figure in figures)


def _ratios(record: Record) -> Iterator[Interval]:
    for key in NAMED_INTERVALS:
        for name in record.get(key) or {}:
            yield record.interval(key, name)
    for key in INTERVALS:
        # Of an overhead, which may be 0, the ratio it was made of counts.
        if key != "overhead_percent" and record.get(key) is not None:
            yield record.interval(key)
