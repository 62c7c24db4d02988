"""CheXbert F1: the observations that prediction and reference state, micro and macro, over 14 labels and the top 5.

CheXbert labels every report (`dive_fast.clinical.chexbert`); positive, and by default uncertain, count as stated. With
the true positives t_j, the predicted p_j and the stated r_j of label j over all documents,

    micro = 2 sum_j t_j / sum_j (p_j + r_j)        macro = mean_j 2 t_j / (p_j + r_j)

where a label that neither side states, and a sum that is 0, gives 0 (scikit-learn's zero_division=0). It reads the
reports as written. An empty prediction is labelled like any text: see `ChexbertLabeler`.
"""

import numpy as np

from dive_fast.clinical.chexbert import LABELS, POSITIVE, TOP_5, UNCERTAIN, ChexbertSettings
from dive_fast.errors import InputError
from dive_fast.metrics.metric import Documents, Measurement, Metric, identity, ratio

SUBSETS = {"14": list(range(len(LABELS))), "5": [LABELS.index(label) for label in TOP_5]}
KEYS = tuple(f"chexbert_{kind}_f1_{subset}" for subset in SUBSETS for kind in ("micro", "macro"))


def measure(documents: Documents) -> Measurement:
    settings: ChexbertSettings = documents.options["chexbert"]
    labeler = settings.build()
    n = len(documents.references)
    classes = np.asarray(labeler([*documents.predictions, *documents.references]))
    if classes.shape != (2 * n, len(LABELS)):
        raise InputError(
            f"metric_options.chexbert.labeler: expected classes [{2 * n}, {len(LABELS)}], got {list(classes.shape)}"
        )
    stated = (classes == POSITIVE) | ((classes == UNCERTAIN) & (settings.uncertain == "positive"))
    predicted, true = stated[:n], stated[n:]
    statistics = np.concatenate([predicted & true, predicted, true], axis=1).astype(np.float64)
    sums = statistics.sum(axis=0, keepdims=True)
    return Measurement(
        values={key: float(value[0]) for key, value in combine(sums, n).items()},
        statistics=statistics,
        per_class=_per_label(sums[0]),
        settings={"uncertain": settings.uncertain, "weights": identity(labeler)},
    )


def combine(sums: np.ndarray, n: int) -> dict[str, np.ndarray]:
    correct, predicted, true = np.split(sums, 3, axis=1)
    values = {}
    for subset, columns in SUBSETS.items():
        twice, both = 2 * correct[:, columns], predicted[:, columns] + true[:, columns]
        values[f"chexbert_micro_f1_{subset}"] = ratio(twice.sum(axis=1), both.sum(axis=1))
        values[f"chexbert_macro_f1_{subset}"] = ratio(twice, both).mean(axis=1)
    return values


def _per_label(sums: np.ndarray) -> dict[str, dict[str, float]]:
    rows = zip(LABELS, *np.split(sums, 3), strict=True)
    return {
        f"CheXbert: {label}": {
            "precision": float(ratio(correct, predicted)),
            "recall": float(ratio(correct, true)),
            "f1": float(ratio(2 * correct, predicted + true)),
            "support": int(true),
        }
        for label, correct, predicted, true in rows
    }


METRIC = Metric(KEYS, "report", measure, combine, ChexbertSettings)
