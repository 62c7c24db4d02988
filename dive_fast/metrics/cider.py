"""CIDEr-D (Vedantam et al., CVPR 2015) as pycocoevalcap computes it: range 0 to 10, mean over documents.

The inverse document frequencies come from the references of the evaluated set itself. The bootstrap resamples the
per-document values and keeps those frequencies, so its intervals leave out the spread of the frequencies.
"""

import warnings

import numpy as np

from dive_fast.metrics.metric import Documents, Measurement, Metric, mean_of
from dive_fast.metrics.peers import pycocoevalcap


def measure(documents: Documents) -> Measurement:
    if len(documents.references) == 1:
        warnings.warn(
            "CIDEr of a single document is always 0: its n-gram weights are the logarithm of the number of documents; "
            "evaluate a whole test set at once",
            stacklevel=3,
        )
    corpus, per_document = pycocoevalcap("cider.cider").Cider().compute_score(*documents.scorer_inputs())
    per_document = np.asarray(per_document, dtype=np.float64)
    return Measurement({"cider": float(corpus)}, per_document[:, None], {"cider": per_document.tolist()})


METRIC = Metric(("cider",), "protocol", measure, mean_of("cider"))
