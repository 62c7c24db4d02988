"""Report length against the reference's, in words (split at white space) of the reports as written.

length_error = mean_i |words(p_i) - words(r_i)| / words(r_i)
length_ratio = sum_i words(p_i) / sum_i words(r_i)
"""

import numpy as np

from dive_fast.metrics.metric import Documents, Measurement, Metric

KEYS = ("length_error", "length_ratio")


def measure(documents: Documents) -> Measurement:
    predicted = np.array([len(text.split()) for text in documents.predictions], dtype=np.float64)
    stated = np.array([len(text.split()) for text in documents.references], dtype=np.float64)
    error = np.abs(predicted - stated) / stated
    statistics = np.stack([error, predicted, stated], axis=1)
    values = {key: float(value[0]) for key, value in combine(statistics.sum(0, keepdims=True), len(error)).items()}
    per_document = {"length_error": error.tolist(), "length_ratio": (predicted / stated).tolist()}
    return Measurement(values, statistics, per_document)


def combine(sums: np.ndarray, n: int) -> dict[str, np.ndarray]:
    return {"length_error": sums[:, 0] / n, "length_ratio": sums[:, 1] / sums[:, 2]}


METRIC = Metric(KEYS, "report", measure, combine)
