"""BLEU-1..4 (Papineni et al., ACL 2002) as pycocoevalcap computes it: corpus counts, closest reference length.

bleu_k = (prod_{j<=k} correct_j / guess_j)^(1/k) * min(1, exp(1 - reference_length / prediction_length))
"""

import numpy as np

from dive_fast.metrics.metric import Documents, Measurement, Metric
from dive_fast.metrics.peers import pycocoevalcap

ORDER = 4
KEYS = tuple(f"bleu_{k}" for k in range(1, ORDER + 1))

# The scorer's own guards against division by zero; the bootstrap has to use the same to agree with it.
SMALL = 1e-9
TINY = 1e-15


def measure(documents: Documents) -> Measurement:
    scorer = pycocoevalcap("bleu.bleu_scorer").BleuScorer(n=ORDER)
    for prediction, reference in zip(documents.protocol_predictions, documents.protocol_references, strict=True):
        scorer += (prediction, [reference])
    corpus, per_document = scorer.compute_score(option="closest")
    # One reference a document: its length is the closest one.
    rows = [[c["testlen"], c["reflen"][0], *c["guess"], *c["correct"]] for c in scorer.ctest]
    return Measurement(
        values=dict(zip(KEYS, map(float, corpus), strict=True)),
        statistics=np.array(rows, dtype=np.float64),
        per_document={key: [float(v) for v in values] for key, values in zip(KEYS, per_document, strict=True)},
    )


def combine(sums: np.ndarray, n: int) -> dict[str, np.ndarray]:
    prediction_length, reference_length = sums[:, 0], sums[:, 1]
    guess, correct = sums[:, 2 : 2 + ORDER], sums[:, 2 + ORDER :]
    precisions = np.cumprod((correct + TINY) / (guess + SMALL), axis=1)
    length_ratio = (prediction_length + TINY) / (reference_length + SMALL)
    brevity = np.exp(np.minimum(0.0, 1 - 1 / length_ratio))
    return {key: precisions[:, k] ** (1 / (k + 1)) * brevity for k, key in enumerate(KEYS)}


METRIC = Metric(KEYS, "protocol", measure, combine)
