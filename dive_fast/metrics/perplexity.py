"""Perplexity of a corpus from per-document sums of negative log-likelihood."""

import math
from collections.abc import Sequence

import numpy as np

from dive_fast.errors import InputError
from dive_fast.metrics.bootstrap import check_bootstrap, percentile_interval, resampled_sums
from dive_fast.metrics.metric import Documents, Measurement, Metric


def corpus_perplexity(
    nll_sums: Sequence[float], token_counts: Sequence[int], *, bootstrap: int = 1000, seed: int = 0
) -> tuple[float, tuple[float, float] | None]:
    """exp(sum nll / sum tokens) with its 95 % bootstrap interval over documents.

    Args:
        nll_sums: per document, the summed negative log-likelihood of its tokens in nats.
        token_counts: per document, how many tokens that sum has.
        bootstrap: resamples of the documents; 0 gives no interval.
        seed: equal seeds draw the same documents, as in `evaluate`.

    Returns:
        (perplexity, (low, high)), or (perplexity, None) with bootstrap=0.

    Raises:
        InputError: no documents, different lengths, a count below 1, a sum that is not finite, a negative bootstrap.
    """
    check_bootstrap(bootstrap, seed)
    statistics = likelihood_statistics(nll_sums, token_counts)
    perplexity = math.exp(statistics[:, 0].sum() / statistics[:, 1].sum())
    if bootstrap == 0:
        return perplexity, None
    resampled = combine(resampled_sums(statistics, bootstrap, seed), len(statistics))
    return perplexity, percentile_interval(resampled["perplexity"])


def likelihood_statistics(nll_sums: Sequence[float], token_counts: Sequence[int]) -> np.ndarray:
    """The checked table [N, 2] of summed negative log-likelihoods and token counts."""
    nll = np.array([float(value) for value in nll_sums], dtype=np.float64)
    tokens = np.array([float(value) for value in token_counts], dtype=np.float64)
    if len(nll) != len(tokens) or len(nll) == 0:
        raise InputError(
            f"nll_sums, token_counts: expected one entry each for every document, got {len(nll)} and {len(tokens)}"
        )
    if not np.isfinite(nll).all():
        raise InputError(f"nll_sums: expected finite numbers, entry {int(np.argmin(np.isfinite(nll)))} is not")
    # Probabilities of 1 round to either side of 0.
    if not (nll >= -1e-3 * np.maximum(tokens, 1)).all():
        index = int(np.argmin(nll))
        raise InputError(
            f"nll_sums: expected negative log-likelihoods >= 0, entry {index} is {nll[index]:g}; negate it"
        )
    if not (tokens >= 1).all():
        index = int(np.argmin(tokens >= 1))
        raise InputError(f"token_counts: expected at least 1, entry {index} is {tokens[index]:g}; leave it out")
    return np.stack([nll, tokens], axis=1)


def measure(documents: Documents) -> Measurement:
    statistics = documents.likelihoods
    nll, tokens = statistics.sum(axis=0)
    each = np.exp(statistics[:, 0] / statistics[:, 1]).tolist()
    return Measurement({"perplexity": math.exp(nll / tokens)}, statistics, {"perplexity": each})


def combine(sums: np.ndarray, n: int) -> dict[str, np.ndarray]:
    return {"perplexity": np.exp(sums[:, 0] / sums[:, 1])}


METRIC = Metric(("perplexity",), "likelihoods", measure, combine)
