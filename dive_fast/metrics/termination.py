"""EOS rate: the share of reports that ended by the end-of-sequence token, not by the length limit."""

import numpy as np

from dive_fast.metrics.metric import Documents, Measurement, Metric, mean_of


def measure(documents: Documents) -> Measurement:
    ended = np.array([reason == "eos" for reason in documents.finish_reasons], dtype=np.float64)
    return Measurement({"eos_rate": float(ended.mean())}, ended[:, None], {"eos_rate": ended.tolist()})


METRIC = Metric(("eos_rate",), "finish_reasons", measure, mean_of("eos_rate"))
