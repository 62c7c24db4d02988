"""Scores of every finished run, kept beside it: metrics that run a model of their own are not asked twice."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from dive_fast import checkpoints, measurements
from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.experiment.pieces import Piece, digest
from dive_fast.experiment.settings import Evaluation
from dive_fast.metrics import METRICS, inputs
from dive_fast.metrics.bootstrap import check_bootstrap
from dive_fast.metrics.scores import Scores
from dive_fast.supervision.lexicon import LexiconTagger

FILE = "scores.json"
PARTS = ("all", "unseen")
"""The whole test set, and the records whose texts do not occur in training."""

# Two reports that exercise every metric: with a finding, a relation and a negation.
_REHEARSED = [
    Record("a", "prompt", "The heart is enlarged. Small left pleural effusion."),
    Record("b", "prompt", "The lungs are clear. No pneumothorax."),
]


class Scorer:
    """Scores runs with one set of metrics, whose models are loaded once.

    Raises:
        InputError: an unknown metric, protocol or option, no such lexicon, a negative count.
    """

    def __init__(self, evaluation: Evaluation):
        self.evaluation = evaluation
        check_bootstrap(evaluation.bootstrap, evaluation.seed)
        if type(evaluation.examples) is not int or evaluation.examples < 0:
            raise InputError(f"evaluation: examples: expected a number of reports >= 0, got {evaluation.examples!r}")
        names = inputs.metric_names(evaluation.metrics, ["eos"], ([1.0], [1]), METRICS)
        inputs.check_protocol(evaluation.protocol)
        self.metrics = tuple(names)
        self.options = inputs.metric_options(evaluation.metric_options, names, METRICS)
        self.tagger = LexiconTagger(evaluation.lexicon)
        self._models_are_loaded = False

    def rehearse(self) -> None:
        """Score two invented reports: everything that a metric needs is there, or this says what is missing.

        Raises:
            InputError: a package, Java, or weights are missing.
        """
        texts = [record.report for record in _REHEARSED]
        self._score(_REHEARSED, texts, ["eos", "length"], ([1.0, 1.0], [1, 1]), None)

    def score(self, records: Sequence[Record], piece: Piece) -> dict[str, Scores]:
        """The scores of a finished run by part, from its file where they were made with the same settings.

        A part of fewer than two records is left out.
        """
        rows, likelihood = piece.rows(), piece.read("likelihood.json")
        if [row["id"] for row in rows] != [record.id for record in records]:
            raise InputError(
                f"output: {piece.file('predictions.jsonl')} does not hold the test records in their order; remove "
                f"{piece.folder} to make this run again"
            )
        key = digest(json.dumps([self._settings(), rows, likelihood], sort_keys=True))
        kept = self._kept(piece, key)
        if kept is not None:
            return kept
        texts, reasons = [row["prediction"] for row in rows], [row["finish_reason"] for row in rows]
        likelihoods = likelihood["nll"], likelihood["tokens"]
        parts = {"all": None, "unseen": measurements.unseen_rows(records)}
        found = {
            part: self._score(records, texts, reasons, likelihoods, chosen)
            for part, chosen in parts.items()
            if chosen is None or len(chosen) > 1
        }
        plain = {part: scores.to_json() for part, scores in found.items()}
        try:
            checkpoints.write_json(piece.file(FILE), {"key": key, "parts": plain})
        except OSError as error:
            raise InputError(
                f"output: {piece.folder} cannot be written ({error.strerror or error}); free disk space and start the "
                "same command again, which goes on"
            ) from error
        return found

    def _score(self, records, texts, reasons, likelihoods, rows) -> Scores:
        return measurements.score(
            records,
            texts,
            reasons,
            likelihoods,
            rows,
            metrics=self.metrics,
            protocol=self.evaluation.protocol,
            bootstrap=0,
            tagger=self.tagger,
            metric_options=self._loaded_options(),
        )

    def _loaded_options(self) -> dict[str, Any]:
        if not self._models_are_loaded:
            self.options = {name: settings.loaded() for name, settings in self.options.items()}
            self._models_are_loaded = True
        return self.options

    def _settings(self) -> dict:
        """What scores depend on."""
        settings = dataclasses.asdict(self.evaluation)
        # Also of the package's own lexicon: another version of it tags otherwise.
        lexicon = self.tagger.fingerprint if "decisive" in self.metrics else None
        return {key: settings[key] for key in ("metrics", "protocol", "metric_options")} | {"lexicon": lexicon}

    def _kept(self, piece: Piece, key: str) -> dict[str, Scores] | None:
        if not piece.file(FILE).is_file():
            return None
        stored = piece.read(FILE)
        if stored.get("key") != key:
            return None
        return {part: Scores.from_json(plain) for part, plain in stored["parts"].items()}
