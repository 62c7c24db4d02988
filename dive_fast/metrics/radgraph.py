"""RadGraph F1 (Delbrouck et al., EMNLP Findings 2022): overlap of the entities and relations of two reports.

From a report's annotation (`dive_fast.clinical.radgraph`) one set of items is made per reward; case is folded::

    simple     (words, label) of every entity                                                RG_E
    partial    (words, label, whether the entity is the subject of a relation)               RG_ER, widely reported
    complete   (words, label, relation, words of its object) for every relation of an entity,
               (words, label) for an entity without one                                      RG_bar_ER

A document scores 2 |P & R| / (|P| + |R|) for the sets P of its prediction and R of its reference, 0 where either has no
entity (also where neither has one: there is nothing to agree on, and that is what published numbers do); the corpus
value is the mean over documents. A prediction without words scores 0 and is not shown to the model. Published code
folds case only in part of the third reward; its annotations are otherwise scored alike.
"""

from collections.abc import Mapping

import numpy as np

from dive_fast.clinical.radgraph import RadGraphSettings
from dive_fast.errors import InputError
from dive_fast.metrics.metric import Documents, Measurement, Metric, identity

KEYS = ("radgraph_simple", "radgraph_partial", "radgraph_complete")


def measure(documents: Documents) -> Measurement:
    """Raises InputError when radgraph or its weights are missing, or a user's annotator gives something else."""
    settings: RadGraphSettings = documents.options["radgraph"]
    annotator = settings.build()
    n = len(documents.references)
    annotations = list(annotator([*documents.predictions, *documents.references]))
    if len(annotations) != 2 * n:
        raise InputError(
            f"metric_options.radgraph.annotator: expected {2 * n} annotations, one a text, got {len(annotations)}"
        )
    rows = []
    for predicted, stated, name in zip(annotations[:n], annotations[n:], documents.names, strict=True):
        try:
            rows.append(rewards(predicted, stated))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(
                f"metric_options.radgraph.annotator: {name}: not an annotation in RadGraph's form "
                f"({type(error).__name__}: {error})"
            ) from error
    statistics = np.array(rows, dtype=np.float64)
    return Measurement(
        values={key: float(value[0]) for key, value in combine(statistics.sum(0, keepdims=True), n).items()},
        statistics=statistics,
        per_document={key: column.tolist() for key, column in zip(KEYS, statistics.T, strict=True)},
        settings={"weights": identity(annotator)},
    )


def rewards(predicted: Mapping, stated: Mapping) -> tuple[float, float, float]:
    """(simple, partial, complete) of two annotations."""
    return tuple(f1(items(predicted), items(stated)) for items in (simple_items, partial_items, complete_items))


def f1(predicted: set, stated: set) -> float:
    """2 |P & R| / (|P| + |R|), the harmonic mean of precision and recall; 0 where a set is empty."""
    return 2 * len(predicted & stated) / (len(predicted) + len(stated)) if predicted and stated else 0.0


def simple_items(annotation: Mapping) -> set[tuple]:
    return {(entity["tokens"].lower(), entity["label"]) for entity in annotation["entities"].values()}


def partial_items(annotation: Mapping) -> set[tuple]:
    return {
        (entity["tokens"].lower(), entity["label"], bool(entity["relations"]))
        for entity in annotation["entities"].values()
    }


def complete_items(annotation: Mapping) -> set[tuple]:
    entities = annotation["entities"]
    items = set()
    for entity in entities.values():
        head = (entity["tokens"].lower(), entity["label"])
        related = {(*head, kind, entities[key]["tokens"].lower()) for kind, key in entity["relations"]}
        items |= related or {head}
    return items


def combine(sums: np.ndarray, n: int) -> dict[str, np.ndarray]:
    return {key: sums[:, column] / n for column, key in enumerate(KEYS)}


METRIC = Metric(KEYS, "report", measure, combine, RadGraphSettings)
