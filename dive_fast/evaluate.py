"""Scoring predicted reports against references, with intervals, and comparing two systems."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from dive_fast.errors import InputError
from dive_fast.metrics import DEFAULT, METRICS, inputs
from dive_fast.metrics.bootstrap import check_bootstrap, percentile_interval, resampled_sums
from dive_fast.metrics.metric import Documents, Metric
from dive_fast.metrics.protocols import PROTOCOLS
from dive_fast.metrics.scores import Scores
from dive_fast.supervision.tagger import Tagger


def evaluate(
    predictions: Sequence[str],
    references: Sequence[str],
    metrics: Sequence[str] = DEFAULT,
    protocol: str = "r2gen",
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    tagger: Tagger | None = None,
    finish_reasons: Sequence[str] | None = None,
    likelihoods: tuple[Sequence[float], Sequence[int]] | None = None,
    ids: Sequence[str] | None = None,
    metric_options: Mapping[str, Mapping] | None = None,
) -> Scores:
    """Score N predicted reports against their references.

    Args:
        predictions: N texts. An empty one is legal and scores 0.
        references: N texts, each with a word in it.
        metrics: names out of bleu (BLEU-1..4), rouge_l, cider, meteor (needs Java), decisive (precision, recall and F1
            of the stated classes), radgraph (RadGraph F1: simple, partial, complete; needs the extra `clinical`),
            chexbert (CheXbert F1, micro and macro over 14 and 5 labels), length (relative length error, length ratio),
            termination (EOS rate), perplexity.
        protocol: raw, lower, ptb (needs Java), r2gen (the custom for IU X-ray) or r2gen_mimic; described in
            `dive_fast.metrics.protocols`. It applies to bleu, rouge_l, cider and meteor; the others read the reports
            as written.
        bootstrap: resamples of the documents for the 95 % intervals; 0 gives none. The same documents are drawn for
            every metric and, with equal N and seed, for every system.
        seed: seed of the resampling.
        tagger: text -> [(start, end, class), ...] for `decisive`; default
            `dive_fast.supervision.lexicon.LexiconTagger()`.
        finish_reasons: N times "eos", "stop", "length" or "cancelled", as `generate` returns them; giving them adds
            `termination`, to which the first two have ended by themselves.
        likelihoods: N summed negative log-likelihoods of the references under the model and their N token counts, as
            `dive_fast.likelihood.report_nll` returns them; giving them adds `perplexity`.
        ids: N distinct names of the documents, for messages and for `Scores.ids`.
        metric_options: metric -> its options, such as {"chexbert": {"weights": "chexbert.pth", "device": "cpu"},
            "radgraph": {"weights": "folder", "cache": "annotations.jsonl"}}; see
            `dive_fast.clinical.radgraph.RadGraphSettings` and `dive_fast.clinical.chexbert.ChexbertSettings`.

    Returns:
        Scores, a mapping from name to value.

    Raises:
        InputError: lengths differ or are 0; an entry is not a text; a reference is empty; an unknown metric or
            protocol or option; a missing package, Java, weights, finish reason or likelihood; a negative `bootstrap` or
            `seed`.

    Warns:
        UserWarning: CIDEr of a single document, which is always 0.
    """
    names = inputs.metric_names(metrics, finish_reasons, likelihoods, METRICS)
    inputs.check_protocol(protocol)
    check_bootstrap(bootstrap, seed)
    options = inputs.metric_options(metric_options, names, METRICS)
    predictions, references, document_names = inputs.texts(predictions, references, ids)
    tagger = inputs.checked_tagger(tagger) if "decisive" in names else None
    if "termination" in names:
        finish_reasons = inputs.checked_finish_reasons(finish_reasons, len(references))
    if "perplexity" in names:
        likelihoods = inputs.checked_likelihoods(likelihoods, len(references))
    tokenized = [], []
    if any(METRICS[name].reads == "protocol" for name in names):
        tokenized = _apply_protocol(protocol, predictions, references, document_names)
    documents = Documents(
        predictions, references, *tokenized, document_names, tagger, finish_reasons, likelihoods, options
    )

    values, statistics, intervals, per_class, per_document, settings = {}, {}, {}, {}, {}, {}
    for name in names:
        measured = METRICS[name].measure(documents)
        values |= measured.values
        statistics[name] = measured.statistics
        per_class |= measured.per_class
        per_document |= measured.per_document
        if measured.settings:
            settings[name] = measured.settings
        if bootstrap:
            resampled = _distribution(METRICS[name], measured.statistics, measured.values, bootstrap, seed)
            intervals |= {key: percentile_interval(resampled[key]) for key in measured.values}
    return Scores(
        corpus=values,
        protocol=_protocol_settings(protocol),
        n=len(references),
        documents=hashlib.sha256("\n".join(references).encode()).hexdigest(),
        bootstrap=int(bootstrap),
        seed=int(seed),
        statistics=statistics,
        intervals=intervals,
        per_class=per_class,
        per_document=per_document,
        ids=None if ids is None else [str(identity) for identity in ids],
        tagger=None if tagger is None else getattr(tagger, "__qualname__", type(tagger).__qualname__),
        tagger_fingerprint=_fingerprint(tagger),
        settings=settings,
    )


def paired_difference(
    a: Scores, b: Scores, name: str, *, bootstrap: int = 1000, seed: int = 0
) -> tuple[float, tuple[float, float] | None]:
    """a[name] - b[name] for two systems on the same documents, with its 95 % paired bootstrap interval.

    Both systems are resampled with the same documents (Koehn, EMNLP 2004), so what is hard for both cancels; an
    interval that leaves out 0 is a difference beyond the choice of documents.

    Args:
        a, b: results of `evaluate` on the same references in the same order, with the same protocol, tagger and
            lexicon.
        name: a value both have, such as "bleu_4".
        bootstrap: number of resamples; 0 gives no interval.
        seed: seed of the resampling.

    Returns:
        (difference, (low, high)), or (difference, None) with bootstrap=0.

    Raises:
        InputError: different documents, protocols, taggers, lexicons or weights; a value that is missing; a negative
            `bootstrap`.
    """
    check_bootstrap(bootstrap, seed)
    for argument, scores in (("a", a), ("b", b)):
        if name not in scores:
            raise InputError(
                f"name: {argument} has no {name!r}{inputs.nearest(name, scores)} Known: {', '.join(scores)}"
            )
    if (a.n, a.documents) != (b.n, b.documents):
        raise InputError(
            f"a, b: expected scores of the same documents in the same order, but their references ({a.n} and {b.n}) "
            "differ; evaluate both systems with one list of references"
        )
    metric = next(key for key, metric in METRICS.items() if name in metric.keys)
    if METRICS[metric].reads == "protocol" and a.protocol != b.protocol:
        raise InputError(
            f"a, b: expected one protocol, got {a.protocol['name']!r} and {b.protocol['name']!r}; evaluate both alike"
        )
    if metric == "decisive" and (a.tagger, a.tagger_fingerprint) != (b.tagger, b.tagger_fingerprint):
        one, other = (f"{s.tagger} ({str(s.tagger_fingerprint)[:8]})" for s in (a, b))
        raise InputError(f"a, b: expected one tagger with one lexicon, got {one} and {other}; evaluate both alike")
    if a.settings.get(metric) != b.settings.get(metric):
        raise InputError(
            f"a, b: expected one setting of {metric!r}, got {a.settings.get(metric)} and {b.settings.get(metric)}; "
            "evaluate both alike"
        )
    difference = a[name] - b[name]
    if bootstrap == 0:
        return difference, None
    of_a, of_b = (_distribution(METRICS[metric], s.statistics[metric], s, bootstrap, seed)[name] for s in (a, b))
    return difference, percentile_interval(of_a - of_b)


def _distribution(
    metric: Metric, statistics: np.ndarray, values: Mapping[str, float], bootstrap: int, seed: int
) -> dict[str, np.ndarray]:
    """Bootstrap values [B] of each key."""
    return resampled_values(metric, statistics, values, resampled_sums(statistics, bootstrap, seed))


def resampled_values(
    metric: Metric, statistics: np.ndarray, values: Mapping[str, float], sums: np.ndarray
) -> dict[str, np.ndarray]:
    """Values [B] of each key from the column sums [B, K] of resamples of `statistics` [N, K], shifted so that the full
    sample gives the reported value.

    The shift is rounding for all but METEOR, whose corpus value is not the mean of its per-document values.
    """
    n = len(statistics)
    full = metric.combine(statistics.sum(axis=0, keepdims=True), n)
    resampled = metric.combine(sums, n)
    return {key: resampled[key] + (values[key] - full[key][0]) for key in metric.keys}


def _fingerprint(tagger: Tagger | None) -> str | None:
    found = getattr(tagger, "fingerprint", None)
    return found if isinstance(found, str) else None  # a callable of the user's may mean something else by the name


def _protocol_settings(protocol: str) -> dict:
    applies_to = [name for name, metric in METRICS.items() if metric.reads == "protocol"]
    return PROTOCOLS[protocol].settings() | {"applies_to": applies_to}


def _apply_protocol(
    protocol: str, predictions: list[str], references: list[str], names: list[str]
) -> tuple[list[str], list[str]]:
    predicted, stated = PROTOCOLS[protocol].apply(predictions, references)
    for text, written, name in zip(stated, references, names, strict=True):
        if not inputs.has_words(text):
            raise InputError(
                f"references: protocol {protocol!r} leaves nothing of {name} ({written[:80]!r}); leave it out of both "
                "lists or use protocol='raw'"
            )
    return predicted, stated
