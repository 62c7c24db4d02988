"""The checks `dive_fast.evaluate` makes once; the metrics trust what they get."""

import difflib
from collections.abc import Iterable, Mapping, Sequence

from dive_fast.clinical import settings
from dive_fast.errors import InputError
from dive_fast.metrics.perplexity import likelihood_statistics
from dive_fast.metrics.protocols import PROTOCOLS, collapse_whitespace
from dive_fast.supervision.tagger import Tagger

FINISH_REASONS = ("eos", "stop", "length", "cancelled")
"""What `generate` gives; the first two are reports that ended by themselves (`dive_fast.metrics.termination`)."""


def as_list(argument: str, values) -> list:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(
            f"{argument}: expected a list with one entry for each document, got {type(values).__name__}; use a list"
        )
    return list(values)


def document_names(ids, n: int) -> list[str]:
    """How messages call the documents."""
    if ids is None:
        return [f"document {i}" for i in range(n)]
    ids = as_list("ids", ids)
    if len(ids) != n or len(set(ids)) != n:
        raise InputError(f"ids: expected {n} distinct names, got {len(ids)} with {len(set(ids))} distinct")
    return [f"document {i} (id {identity})" for i, identity in enumerate(ids)]


def texts(predictions, references, ids) -> tuple[list[str], list[str], list[str]]:
    """Checked predictions and references with collapsed white space, and the documents' names."""
    predictions, references = as_list("predictions", predictions), as_list("references", references)
    n = len(references)
    if len(predictions) != n:
        raise InputError(
            f"predictions, references: expected one prediction for each reference, got {len(predictions)} and {n}"
        )
    if n == 0:
        raise InputError("predictions, references: expected at least one document, got empty lists")
    names = document_names(ids, n)
    for argument, given in (("predictions", predictions), ("references", references)):
        for text, name in zip(given, names, strict=True):
            _check_text(argument, text, name)
    for text, name in zip(references, names, strict=True):
        if not has_words(text):
            raise InputError(f"references: {name} has no word in it ({text[:80]!r}); leave it out of both lists")
    return [collapse_whitespace(t) for t in predictions], [collapse_whitespace(t) for t in references], names


def _check_text(argument: str, text, name: str) -> None:
    if not isinstance(text, str):
        raise InputError(f"{argument}: expected a string for {name}, got {type(text).__name__}; decode it first")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{argument}: {name} holds half of a surrogate pair, which cannot be encoded; replace it"
        ) from None


def has_words(text: str) -> bool:
    return any(character.isalnum() for character in text)


def metric_names(metrics, finish_reasons, likelihoods, table) -> list[str]:
    """The distinct names asked for, in order; `finish_reasons` adds `termination`, `likelihoods` adds `perplexity`."""
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    for name in names:
        if name not in table:
            owner = next((key for key, metric in table.items() if name in metric.keys), None)
            hint = f", did you mean {owner!r}?" if owner else nearest(name, table)
            raise InputError(f"metrics: unknown metric {name!r}{hint} Known: {', '.join(table)}")
    if finish_reasons is not None:
        names.append("termination")
    if likelihoods is not None:
        names.append("perplexity")
    if not names:
        raise InputError(f"metrics: expected at least one of {', '.join(table)}; got none")
    return list(dict.fromkeys(names))


def metric_options(options, names: Sequence[str], table) -> dict[str, object]:
    """The settings of every metric asked for that has some; those not given are the defaults."""
    if options is not None and not isinstance(options, Mapping):
        raise InputError(
            f"metric_options: expected metric -> options, such as {{'chexbert': {{'device': 'cpu'}}}}, got {options!r}"
        )
    with_options = [name for name, metric in table.items() if metric.options is not None]
    for name in options or {}:
        if name not in with_options:
            raise InputError(
                f"metric_options: no metric with options is called {name!r}{nearest(name, with_options)} Known: "
                f"{', '.join(with_options)}"
            )
        if name not in names:
            raise InputError(f"metric_options: {name!r} is not among metrics ({', '.join(names)}); ask for it there")
    return {
        name: settings.read(table[name].options, (options or {}).get(name), f"metric_options.{name}")
        for name in names
        if name in with_options
    }


def check_protocol(protocol) -> None:
    if protocol not in PROTOCOLS:
        raise InputError(
            f"protocol: unknown protocol {protocol!r}{nearest(protocol, PROTOCOLS)} Known: {', '.join(PROTOCOLS)}"
        )


def nearest(name, known: Iterable[str]) -> str:
    """ ", did you mean ...?" or "." where nothing is near."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else "."


def checked_tagger(tagger: Tagger | None) -> Tagger:
    if tagger is None:
        from dive_fast.supervision.lexicon import LexiconTagger

        return LexiconTagger()
    if not callable(tagger):
        raise InputError(f"tagger: expected a callable text -> [(start, end, class), ...], got {type(tagger).__name__}")
    return tagger


def checked_finish_reasons(finish_reasons, n: int) -> list[str]:
    if finish_reasons is None:
        raise InputError(
            "finish_reasons: the metric 'termination' needs them, got None; pass the finish_reasons that generate() "
            "returned, or leave 'termination' out of metrics"
        )
    reasons = as_list("finish_reasons", finish_reasons)
    if len(reasons) != n:
        raise InputError(f"finish_reasons: expected one for each of the {n} documents, got {len(reasons)}")
    for reason in reasons:
        if reason not in FINISH_REASONS:
            expected = ", ".join(map(repr, FINISH_REASONS[:-1]))
            raise InputError(f"finish_reasons: expected {expected} or {FINISH_REASONS[-1]!r}, got {reason!r}")
    return reasons


def checked_likelihoods(likelihoods, n: int):
    """[N, 2] of `likelihoods`, the pair that `dive_fast.likelihood.report_nll` returns."""
    if likelihoods is None:
        raise InputError(
            "likelihoods: the metric 'perplexity' needs them, got None; pass what dive_fast.likelihood.report_nll "
            "returned, or leave 'perplexity' out of metrics"
        )
    if not isinstance(likelihoods, Sequence) or len(likelihoods) != 2:
        raise InputError("likelihoods: expected the pair (summed negative log-likelihoods, token counts)")
    statistics = likelihood_statistics(*likelihoods)
    if len(statistics) != n:
        raise InputError(f"likelihoods: expected one for each of the {n} documents, got {len(statistics)}")
    return statistics
