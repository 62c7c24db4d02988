"""EOS rate: the share of reports that ended by themselves.

That is by the end-of-sequence token or at a stop string, which the model wrote too; not by the length limit, and not
because the call was cancelled.
"""

import numpy as np

from dive_fast.metrics.metric import Documents, Measurement, Metric, mean_of

ENDED = ("eos", "stop")


def measure(documents: Documents) -> Measurement:
    ended = np.array([reason in ENDED for reason in documents.finish_reasons], dtype=np.float64)
    return Measurement({"eos_rate": float(ended.mean())}, ended[:, None], {"eos_rate": ended.tolist()})


METRIC = Metric(("eos_rate",), "finish_reasons", measure, mean_of("eos_rate"))
