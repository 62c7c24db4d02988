"""How a cost grows: a power law and a straight line through times at several sizes, with intervals.

The intervals are a bootstrap of the rounds at each size, so they say how sure the fit is of these sizes' times; whether
the form is the right one, R^2 says. S sizes, B bootstrap draws.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dive_fast.bench.results import Interval

DRAWS = 1000
# Through two points goes every law.
LEAST_SIZES = 3


class PowerLaw(NamedTuple):
    """seconds = factor * size ** exponent, by least squares on the logarithms."""

    exponent: Interval
    factor: Interval
    r_squared: float

    def at(self, size: float) -> float:
        return self.factor.median * size**self.exponent.median


class Line(NamedTuple):
    """seconds = constant + slope * size, by least squares on the relative errors: timings err in proportion."""

    constant: Interval
    slope: Interval
    r_squared: float

    def at(self, size: float) -> float:
        return self.constant.median + self.slope.median * size


def power_law(sizes: Sequence[float], times: Sequence[Sequence[float]]) -> PowerLaw | None:
    """Through the medians of the rounds `times` at S sizes; None with fewer than three sizes."""
    found = _fit(sizes, times, np.log, lambda seconds: np.ones_like(seconds))
    if found is None:
        return None
    (factor, exponent), r_squared = found
    return PowerLaw(exponent, Interval(*map(math.exp, factor)), r_squared)


def line(sizes: Sequence[float], times: Sequence[Sequence[float]]) -> Line | None:
    """Through the medians of the rounds `times` at S sizes; None with fewer than three sizes."""
    found = _fit(sizes, times, lambda values: values, lambda seconds: 1 / seconds)
    if found is None:
        return None
    (constant, slope), r_squared = found
    return Line(constant, slope, r_squared)


def _fit(
    sizes: Sequence[float], times: Sequence[Sequence[float]], scale: Callable, weigh: Callable
) -> tuple[list[Interval], float] | None:
    """(intercept and slope of scale(seconds) over scale(size), R^2), both of errors times weigh(seconds)."""
    if len(set(sizes)) < LEAST_SIZES:
        return None
    x = scale(np.asarray(sizes, dtype=float))
    medians = np.array([[np.median(rounds) for rounds in times]])
    draws = np.random.default_rng(0)
    resampled = np.stack([np.median(draws.choice(rounds, (DRAWS, len(rounds))), axis=1) for rounds in times], axis=1)
    coefficients, r_squared = _least_squares(x, medians, scale, weigh)
    spread, _ = _least_squares(x, resampled, scale, weigh)
    low, high = np.quantile(spread, (0.025, 0.975), axis=0)
    intervals = [Interval(*map(float, ends)) for ends in zip(coefficients[0], low, high, strict=True)]
    return intervals, float(r_squared[0])


def _least_squares(x_S: np.ndarray, seconds_BS: np.ndarray, scale: Callable, weigh: Callable):
    """([B, 2] coefficients, [B] R^2)."""
    weights, y = weigh(seconds_BS), scale(seconds_BS)
    design = np.stack([np.ones_like(x_S), x_S], axis=-1)
    design = weights[..., None] * design
    target = weights * y
    coefficients = (np.linalg.pinv(design) @ target[..., None])[..., 0]
    residual = (target - (design @ coefficients[..., None])[..., 0]) ** 2
    mean = (weights**2 * y).sum(-1, keepdims=True) / (weights**2).sum(-1, keepdims=True)
    total = ((weights * (y - mean)) ** 2).sum(-1)
    explained = 1 - residual.sum(-1) / np.where(total > 0, total, 1.0)
    return coefficients, np.where(total > 0, explained, 1.0)
