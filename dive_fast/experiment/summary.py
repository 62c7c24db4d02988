"""From the scores of every system and seed to means, intervals and paired differences.

With v(s, D) a metric's corpus value of seed s on documents D, a system's value is the mean over its S seeds. A resample
draws N documents D* and S seeds s*_1 .. s*_S, with replacement, once for all systems:

    value*      = 1/S sum_j v(s*_j, D*)
    difference* = value*(system) - value*(reference)

and an interval is the central 95 % of these over all resamples. It covers the choice of documents and of seeds; the
difference is paired in both (`dive_fast.metrics.bootstrap` has the source). With one seed it covers the documents
alone. Since every metric's value follows from column sums of a table, all resamples are one matrix product.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dive_fast.errors import InputError
from dive_fast.evaluate import resampled_values
from dive_fast.metrics import METRICS
from dive_fast.metrics.bootstrap import percentile_interval, resampled_seeds, resampled_sums
from dive_fast.metrics.scores import Scores

NLL = "nll"
"""The logarithm of the perplexity: nats per token."""


@dataclass
class Difference:
    """A system's value minus the reference's, with its paired interval; `clear`: the interval leaves out 0."""

    value: float
    interval: tuple[float, float] | None
    clear: bool


@dataclass
class Summary:
    """One system's figures over all seeds.

    Attributes:
        values: name -> mean over seeds.
        intervals: name -> (low, high); empty without a bootstrap.
        per_seed: a mapping from name to value for every seed, in the seeds' order.
        differences: name -> Difference to the reference; empty for the reference itself, or without one.
    """

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_seed: list[dict[str, float]]
    differences: dict[str, Difference] = field(default_factory=dict)


def summarize(
    scores: Mapping[str, Sequence[Scores]], *, reference: str | None, bootstrap: int, seed: int
) -> dict[str, Summary]:
    """Summaries by system.

    Args:
        scores: system -> its scores, one per seed in the same order for every system; a system that no seed changes has
            one Scores in all places.
        reference: the system that differences are taken to; None: there are no differences.
        bootstrap: resamples; 0 gives no intervals.
        seed: of the resampling.

    Raises:
        InputError: systems scored on other documents, by other metrics or with another lexicon or other weights.
    """
    _check_alike(scores)
    runs = next(iter(scores.values()))
    drawn = _resampled(scores, bootstrap, seed) if bootstrap else {}
    chosen = resampled_seeds(len(runs), bootstrap, seed) if bootstrap else None
    found, means = {}, {}
    for name, own in scores.items():
        per_seed = [_with_nll(dict(one)) for one in own]
        values = {key: float(np.mean([one[key] for one in per_seed])) for key in per_seed[0]}
        means[name] = {key: _mean_of_drawn([drawn[id(one)][key] for one in own], chosen) for key in values if bootstrap}
        intervals = {key: percentile_interval(distribution) for key, distribution in means[name].items()}
        found[name] = Summary(values, intervals, per_seed)
    if reference in found:
        for name, summary in found.items():
            if name != reference:
                summary.differences = _differences(summary, found[reference], means[name], means[reference])
    return found


def _resampled(scores: Mapping[str, Sequence[Scores]], bootstrap: int, seed: int) -> dict[int, dict[str, np.ndarray]]:
    """id of a Scores -> key -> its values [B] on the drawn documents."""
    distinct = {id(one): one for own in scores.values() for one in own}
    tables = [(one, metric, one.statistics[metric]) for one in distinct.values() for metric in one.statistics]
    sums = resampled_sums(np.concatenate([table for *_, table in tables], axis=1), bootstrap, seed)
    found: dict[int, dict[str, np.ndarray]] = {key: {} for key in distinct}
    start = 0
    for one, metric, table in tables:
        own = sums[:, start : start + table.shape[1]]
        found[id(one)] |= resampled_values(METRICS[metric], table, one, own)
        start += table.shape[1]
    return {key: _with_nll(values) for key, values in found.items()}


def _mean_of_drawn(values: Sequence[np.ndarray], chosen: np.ndarray) -> np.ndarray:
    """[B]: the mean over the drawn seeds [B, S] of values [B] per seed."""
    return np.take_along_axis(np.stack(values, axis=1), chosen, axis=1).mean(axis=1)


def _with_nll(values: dict) -> dict:
    return values | {NLL: np.log(values["perplexity"])} if "perplexity" in values else values


def _differences(summary: Summary, reference: Summary, own: Mapping, others: Mapping) -> dict[str, Difference]:
    found = {}
    for key, value in summary.values.items():
        if key in reference.values:
            interval = percentile_interval(own[key] - others[key]) if key in own else None
            # As shown with four digits: what is left of a smoothing constant is no difference.
            clear = interval is not None and (round(interval[0], 4) > 0 or round(interval[1], 4) < 0)
            found[key] = Difference(value - reference.values[key], interval, clear)
    return found


def _check_alike(scores: Mapping[str, Sequence[Scores]]) -> None:
    everything = [(name, one) for name, own in scores.items() for one in own]
    first_name, first = everything[0]
    for name, one in everything:
        for what, ours, theirs in (
            ("documents", (one.n, one.documents), (first.n, first.documents)),
            ("protocol", one.protocol, first.protocol),
            ("tagger", (one.tagger, one.tagger_fingerprint), (first.tagger, first.tagger_fingerprint)),
            ("metrics' settings", one.settings, first.settings),
            ("metrics", list(one), list(first)),
        ):
            if ours != theirs:
                raise InputError(
                    f"scores: {name} and {first_name} differ in their {what}; remove the files scores.json of the "
                    "experiment, and all are scored anew"
                )
