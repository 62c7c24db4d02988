"""ROUGE-L (Lin, 2004) as pycocoevalcap computes it: longest common subsequence, F of beta 1.2, mean over documents."""

from dive_fast.metrics.metric import Documents, Measurement, Metric, mean_of
from dive_fast.metrics.peers import pycocoevalcap


def measure(documents: Documents) -> Measurement:
    corpus, per_document = pycocoevalcap("rouge.rouge").Rouge().compute_score(*documents.scorer_inputs())
    return Measurement({"rouge_l": float(corpus)}, per_document[:, None], {"rouge_l": per_document.tolist()})


METRIC = Metric(("rouge_l",), "protocol", measure, mean_of("rouge_l"))
