"""The result of `dive_fast.evaluate`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

import numpy as np


@dataclass(frozen=True, eq=False, repr=False)
class Scores(Mapping[str, float]):
    """A mapping from a value's name (`bleu_4`, `rouge_l`, `decisive_f1`, ...) to the corpus value.

    BLEU, ROUGE-L, METEOR, decisive precision/recall/F1, RadGraph and CheXbert F1 and the EOS rate lie in 0..1, CIDEr in
    0..10; `length_error` and `length_ratio` are relative to the reference's length.

    Attributes:
        corpus: the mapping itself as a dict.
        intervals: name -> (low, high), the 95 % percentile bootstrap interval over documents; empty with bootstrap=0.
        protocol: name and exact settings of the text protocol, and which metrics it applies to.
        per_class: "Label/polarity" -> precision, recall, f1, support (references that state the class).
        per_document: name -> one value a document, for the values that are defined for one.
        n: number of documents.
        ids: the documents' ids, where they were given.
        tagger: name of the tagger behind the decisive values.
        tagger_fingerprint: sha256 of what it tags by (a lexicon, weights), where it has one; its name does not tell two
            lexicons apart.
        settings: metric -> what else its values depend on, such as the sha256 of the weights behind RadGraph F1.
        statistics: metric -> per-document sufficient statistics [N, K], what `paired_difference` resamples.
        documents: digest of the references in their order; two systems can be compared only where it is equal.
        bootstrap, seed: what the intervals were made with.
    """

    corpus: dict[str, float]
    protocol: dict
    n: int
    documents: str
    bootstrap: int
    seed: int
    statistics: dict[str, np.ndarray]
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    per_document: dict[str, list[float]] = field(default_factory=dict)
    ids: list[str] | None = None
    tagger: str | None = None
    tagger_fingerprint: str | None = None
    settings: dict[str, dict[str, str]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.corpus[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.corpus)

    def __len__(self) -> int:
        return len(self.corpus)

    def __repr__(self) -> str:
        return f"Scores({self.corpus}, n={self.n}, protocol={self.protocol['name']!r})"

    def __str__(self) -> str:
        lines = [f"{self.n} documents, protocol {self.protocol['name']}"]
        if self.intervals:
            lines[0] += f", 95 % intervals from {self.bootstrap} resamples"
        width = max(map(len, (*self.corpus, *self.per_class)))
        for name, value in self.corpus.items():
            line = f"{name:<{width}}  {value:7.4f}"
            if name in self.intervals:
                low, high = self.intervals[name]
                line += f"  [{low:.4f}, {high:.4f}]"
            lines.append(line)
        if self.per_class:
            lines.append(f"{'class':<{width}}  precision  recall      f1  support")
            for name, row in self.per_class.items():
                rates = f"{row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1']:6.4f}"
                lines.append(f"{name:<{width}}  {rates}  {row['support']:7d}")
        return "\n".join(lines)

    def to_json(self) -> dict:
        """A dict of plain types that `json.dumps` takes and `from_json` reads back to the last bit."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["values"] = plain.pop("corpus")
        plain["statistics"] = {metric: table.tolist() for metric, table in self.statistics.items()}
        plain["intervals"] = {name: list(interval) for name, interval in self.intervals.items()}
        return plain

    @classmethod
    def from_json(cls, plain: dict) -> "Scores":
        """The inverse of `to_json`, also for what earlier versions wrote."""
        known = dict(plain)
        known["corpus"] = known.pop("values")
        known["statistics"] = {name: np.array(table, dtype=np.float64) for name, table in known["statistics"].items()}
        known["intervals"] = {name: tuple(interval) for name, interval in known["intervals"].items()}
        return cls(**known)
