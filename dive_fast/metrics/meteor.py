"""METEOR 1.5 (Denkowski and Lavie, 2014), English, `-norm`, computed by the Java program inside pycocoevalcap.

The corpus value is the program's aggregate over all documents, not the mean of the per-document values. The bootstrap
resamples the per-document values and is shifted so that the full sample gives the aggregate.
"""

import os
import re
import subprocess
import tempfile
import threading

import numpy as np

from dive_fast.errors import InputError
from dive_fast.metrics.metric import Documents, Measurement, Metric, mean_of
from dive_fast.metrics.peers import java, pycocoevalcap

JAVA_OPTIONS = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8", "-Xmx2G")
METEOR_OPTIONS = ("-", "-", "-stdio", "-l", "en", "-norm")  # pycocoevalcap's


def measure(documents: Documents) -> Measurement:
    """Raises InputError when Java is missing or its program ends early."""
    corpus, per_document = _score(
        [_safe(t) for t in documents.protocol_references], [_safe(t) for t in documents.protocol_predictions]
    )
    return Measurement({"meteor": corpus}, np.array(per_document)[:, None], {"meteor": per_document})


def _safe(text: str) -> str:
    # "|||" separates the fields of the program's line protocol.
    return " ".join(re.sub(r"\|{3,}", " ", text).split())


def _score(references: list[str], predictions: list[str]) -> tuple[float, list[float]]:
    with tempfile.TemporaryFile() as errors:
        scorer = _scorer_class()(java("metrics: 'meteor'"), errors)
        try:
            corpus, per_document = scorer.compute_score(
                {i: [text] for i, text in enumerate(references)}, {i: [text] for i, text in enumerate(predictions)}
            )
        except (OSError, ValueError) as error:
            scorer.close()
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()[-400:] or "nothing"
            raise InputError(
                f"metrics: the Java program of 'meteor' ended early, saying: {said}; check that `java -version` runs "
                "and that 2 GB of memory are free"
            ) from error
        finally:
            scorer.close()
    return float(corpus), [float(value) for value in per_document]


def _scorer_class():
    module = pycocoevalcap("meteor.meteor")

    class Meteor(module.Meteor):
        """pycocoevalcap's scorer with its process started and ended safely; the scoring is inherited.

        The original passes on a decimal-comma locale (the program then dies), lets a C locale decode every letter
        outside ASCII to the same character, never reads the stderr pipe, and deadlocks in `__del__` after any failure.
        """

        def __init__(self, java_path: str, errors):
            self.lock = threading.Lock()
            self.meteor_p = subprocess.Popen(
                [java_path, *JAVA_OPTIONS, "-jar", module.METEOR_JAR, *METEOR_OPTIONS],
                cwd=os.path.dirname(os.path.abspath(module.__file__)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )

        def close(self) -> None:
            self.meteor_p.kill()
            self.meteor_p.wait()
            self.meteor_p.stdout.close()
            try:
                self.meteor_p.stdin.close()
            except BrokenPipeError:
                pass  # closing flushes what a dead process can no longer take

        def __del__(self) -> None:
            pass  # `close` has run; the inherited version waits for a lock that a failure leaves taken

    return Meteor


METRIC = Metric(("meteor",), "protocol", measure, mean_of("meteor"))
