"""Precision, recall and F1 of the decisive classes a report states.

A tagger turns each report into the set of its classes (for the lexicon: finding and polarity). With P_i and R_i the
sets of prediction and reference i, micro-averaged over documents:

    precision = sum |P_i & R_i| / sum |P_i|
    recall    = sum |P_i & R_i| / sum |R_i|
    f1        = 2 sum |P_i & R_i| / (sum |P_i| + sum |R_i|)

and 0 where a denominator is 0. It reads the reports as written: a protocol would cut them off and drop the commas
that end a negation.
"""

from collections import Counter
from collections.abc import Hashable

import numpy as np

from dive_fast.errors import InputError
from dive_fast.metrics.metric import Documents, Measurement, Metric, ratio
from dive_fast.supervision.tagger import Tagger, checked

KEYS = ("decisive_precision", "decisive_recall", "decisive_f1")


def measure(documents: Documents) -> Measurement:
    """Raises InputError when the tagger does not return (start, end, class) items within the text."""
    if read_ahead := getattr(documents.tagger, "read_ahead", None):
        # A tagger that runs a model is quicker with many texts than with one.
        read_ahead([*documents.predictions, *documents.references])
    predicted, stated, correct = Counter(), Counter(), Counter()
    rows = []
    for prediction, reference, name in zip(documents.predictions, documents.references, documents.names, strict=True):
        prediction_classes = classes(documents.tagger, prediction, name)
        reference_classes = classes(documents.tagger, reference, name)
        both = prediction_classes & reference_classes
        predicted.update(prediction_classes)
        stated.update(reference_classes)
        correct.update(both)
        rows.append((len(both), len(prediction_classes), len(reference_classes)))
    statistics = np.array(rows, dtype=np.float64)
    values = {key: float(value[0]) for key, value in combine(statistics.sum(0, keepdims=True), len(rows)).items()}
    return Measurement(values, statistics, per_class=_per_class(predicted, stated, correct))


def classes(tagger: Tagger, text: str, name: str) -> set[str]:
    """The classes `tagger` finds in `text`, written "Label/polarity"."""
    try:
        found = list(tagger(text))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"tagger: expected text -> [(start, end, class), ...], but {name} failed or gave something else: {error}"
        ) from error
    return {class_name(span.label) for span in checked(found, text, f"tagger: {name}")}


def class_name(label: Hashable) -> str:
    return "/".join(map(str, label)) if isinstance(label, tuple) else str(label)


def combine(sums: np.ndarray, n: int) -> dict[str, np.ndarray]:
    correct, predicted, stated = sums.T
    return {
        "decisive_precision": ratio(correct, predicted),
        "decisive_recall": ratio(correct, stated),
        "decisive_f1": ratio(2 * correct, predicted + stated),
    }


def _per_class(predicted: Counter, stated: Counter, correct: Counter) -> dict[str, dict[str, float]]:
    return {
        name: {
            "precision": float(ratio(correct[name], predicted[name])),
            "recall": float(ratio(correct[name], stated[name])),
            "f1": float(ratio(2 * correct[name], predicted[name] + stated[name])),
            "support": stated[name],
        }
        for name in sorted(predicted | stated)
    }


METRIC = Metric(KEYS, "report", measure, combine)
