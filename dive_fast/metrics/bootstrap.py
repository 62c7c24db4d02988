"""Bootstrap over documents (Efron, 1979; paired for two systems: Koehn, EMNLP 2004).

The drawn documents depend on (n, bootstrap, seed) alone, so every metric and every system scored on the same n
documents sees the same resamples: differences between systems are paired.

Where every system was run with the same S seeds, documents and seeds are crossed, and both are drawn: in each resample
the documents once for all systems and seeds, and S of the seeds once for all systems, independently of one another (the
pigeonhole bootstrap: Owen, Annals of Applied Statistics 1(2), 2007). Its intervals cover both choices. It errs on the
wide side for the interaction of the two, and on the narrow side for the seeds where these are few, by sqrt((S - 1) / S)
of their own standard error.
"""

import numpy as np

from dive_fast.errors import InputError

# Draws held at once: 2^22 int64 indices are 32 MiB. Part of what a seed means, since it cuts the random stream.
DRAWS_PER_BLOCK = 2**22
INTERVAL = (2.5, 97.5)


def check_bootstrap(bootstrap, seed) -> None:
    if isinstance(bootstrap, bool) or not isinstance(bootstrap, int | np.integer) or bootstrap < 0:
        raise InputError(f"bootstrap: expected a number of resamples, 0 (no intervals) or more, got {bootstrap!r}")
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"seed: expected a whole number, 0 or more, got {seed!r}")


def resampled_sums(statistics: np.ndarray, bootstrap: int, seed: int) -> np.ndarray:
    """Column sums [B, K] of `statistics` [N, K] over B resamples of N rows drawn with replacement."""
    n = len(statistics)
    generator = np.random.default_rng(seed)
    rows_per_block = max(1, DRAWS_PER_BLOCK // n)
    sums = np.empty((bootstrap, statistics.shape[1]))
    for first in range(0, bootstrap, rows_per_block):
        rows = min(rows_per_block, bootstrap - first)
        drawn = generator.integers(0, n, size=(rows, n))
        # How often each resample holds each document: a sum over draws is then one matrix product for all columns.
        counts = np.bincount((drawn + n * np.arange(rows)[:, None]).ravel(), minlength=rows * n).reshape(rows, n)
        sums[first : first + rows] = counts.astype(np.float64) @ statistics
    return sums


def resampled_seeds(count: int, bootstrap: int, seed: int) -> np.ndarray:
    """[B, count] indices of runs, drawn with replacement and independently of the documents of `resampled_sums`."""
    return np.random.default_rng([seed, 1]).integers(0, count, size=(bootstrap, count))


def percentile_interval(distribution: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrap values [B]."""
    low, high = np.percentile(distribution, INTERVAL)
    return float(low), float(high)
