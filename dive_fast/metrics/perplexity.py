"""Perplexity of a corpus from per-document sums of negative log-likelihood."""

import math
from collections.abc import Sequence

import numpy as np

from dive_fast.errors import InputError
from dive_fast.metrics.bootstrap import check_bootstrap, percentile_interval, resampled_sums


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
    nll = np.array([float(value) for value in nll_sums], dtype=np.float64)
    tokens = np.array([float(value) for value in token_counts], dtype=np.float64)
    if len(nll) != len(tokens) or len(nll) == 0:
        raise InputError(
            f"nll_sums, token_counts: expected one entry each for every document, got {len(nll)} and {len(tokens)}"
        )
    if not np.isfinite(nll).all():
        raise InputError(f"nll_sums: expected finite numbers, entry {int(np.argmin(np.isfinite(nll)))} is not")
    if not (tokens >= 1).all():
        index = int(np.argmin(tokens >= 1))
        raise InputError(f"token_counts: expected at least 1, entry {index} is {tokens[index]:g}; leave it out")
    perplexity = math.exp(nll.sum() / tokens.sum())
    if bootstrap == 0:
        return perplexity, None
    sums = resampled_sums(np.stack([nll, tokens], axis=1), bootstrap, seed)
    return perplexity, percentile_interval(np.exp(sums[:, 0] / sums[:, 1]))
