"""Metrics, one a file. A new one is a file with a `METRIC` and a row below."""

from dive_fast.metrics import (
    bleu,
    chexbert,
    cider,
    decisive,
    length,
    meteor,
    perplexity,
    radgraph,
    rouge_l,
    termination,
)
from dive_fast.metrics.metric import Metric

METRICS: dict[str, Metric] = {
    "bleu": bleu.METRIC,
    "rouge_l": rouge_l.METRIC,
    "cider": cider.METRIC,
    "meteor": meteor.METRIC,
    "decisive": decisive.METRIC,
    "radgraph": radgraph.METRIC,
    "chexbert": chexbert.METRIC,
    "length": length.METRIC,
    "termination": termination.METRIC,
    "perplexity": perplexity.METRIC,
}

# Those that need neither Java nor more than texts.
DEFAULT = ("bleu", "rouge_l", "cider", "decisive", "length")
