"""What a metric is: one function that measures documents and one that turns summed statistics into values.

Every metric leaves a table of per-document statistics [N, K] whose column sums decide its corpus value. That is all
the bootstrap needs, so resampling is one matrix product for every metric alike.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from dive_fast.supervision.tagger import Tagger


@dataclass(frozen=True)
class Documents:
    """N checked pairs of prediction and reference; every list has N entries."""

    predictions: Sequence[str]  # as written, white space collapsed
    references: Sequence[str]
    protocol_predictions: Sequence[str]  # tokens of the protocol, separated by single spaces; empty if none reads them
    protocol_references: Sequence[str]
    names: Sequence[str]  # how a message calls each document
    tagger: Tagger | None = None
    finish_reasons: Sequence[str] | None = None
    likelihoods: np.ndarray | None = None  # [N, 2]: summed negative log-likelihood, number of tokens
    options: Mapping[str, object] = field(default_factory=dict)  # metric -> its settings

    def scorer_inputs(self) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
        """(references, predictions) in the shape pycocoevalcap's scorers take."""
        references = {i: [text] for i, text in enumerate(self.protocol_references)}
        predictions = {i: [text] for i, text in enumerate(self.protocol_predictions)}
        return references, predictions


@dataclass(frozen=True)
class Measurement:
    """A metric's corpus values, its statistics [N, K] (float64) and what else it knows."""

    values: dict[str, float]
    statistics: np.ndarray
    per_document: dict[str, list[float]] = field(default_factory=dict)
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)  # what else the values depend on; compared values share it


class Metric(NamedTuple):
    """One row of the table in `dive_fast.metrics`.

    `combine(sums [B, K], n) -> {key: [B]}` gives the values of B corpora of n documents from their column sums.
    `options` is the dataclass behind `metric_options`, for a metric that has some.
    """

    keys: tuple[str, ...]
    reads: Literal["protocol", "report", "finish_reasons", "likelihoods"]
    measure: Callable[[Documents], Measurement]
    combine: Callable[[np.ndarray, int], dict[str, np.ndarray]]
    options: type | None = None


def ratio(numerator, denominator) -> np.ndarray:
    """numerator / denominator in float64, 0 where the denominator is 0."""
    numerator = np.asarray(numerator, dtype=np.float64)
    denominator = np.asarray(denominator, dtype=np.float64)
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


def identity(model) -> str:
    """What tells two models behind a metric apart: the sha256 of its weights, or the name of a user's callable."""
    return getattr(model, "fingerprint", None) or getattr(model, "__qualname__", type(model).__qualname__)


def mean_of(key: str) -> Callable[[np.ndarray, int], dict[str, np.ndarray]]:
    """The `combine` of a metric whose one statistic is the per-document value and whose corpus value is their mean."""
    return lambda sums, n: {key: sums[:, 0] / n}
