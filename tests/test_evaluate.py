"""The public functions: intervals, comparing systems, round trip, bad input."""

import json
import time
import warnings

import numpy as np
import pytest

from dive_fast import measurements
from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.evaluate import evaluate, paired_difference
from dive_fast.metrics import DEFAULT, METRICS
from dive_fast.metrics.bootstrap import resampled_sums
from dive_fast.metrics.scores import Scores

SENTENCES = [
    "The lungs are clear.",
    "The heart is enlarged.",
    "No pneumothorax.",
    "Small left effusion.",
    "No acute fracture, however degenerative changes are seen.",
    "Stable tube in the right place.",
]


def tagger(text: str):
    return [(0, 1, (s.split()[-1], "present")) for s in text.split(".") if s.split()]


def reports(n: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(SENTENCES, generator.integers(1, 6))) for _ in range(n)]


@pytest.fixture(scope="module")
def system():
    return evaluate(reports(120, 1), reports(120, 0), tagger=tagger, ids=[f"r{i}" for i in range(120)])


@pytest.fixture(scope="module")
def better_system():
    references = reports(120, 0)
    mixed = [r if i % 2 else p for i, (r, p) in enumerate(zip(references, reports(120, 1), strict=True))]
    return evaluate(mixed, references, tagger=tagger)


def test_perplexity_of_the_references_stands_beside_the_other_scores():
    nll, tokens = [2.0, 9.0, 4.0], [2, 3, 4]
    texts = reports(3, 0)
    scores = evaluate(texts, texts, metrics=["length"], likelihoods=(nll, tokens))
    assert scores["perplexity"] == pytest.approx(np.exp(15 / 9))
    assert scores.per_document["perplexity"] == pytest.approx([np.exp(1), np.exp(3), np.exp(1)])
    low, high = scores.intervals["perplexity"]
    assert np.exp(1) <= low <= scores["perplexity"] <= high <= np.exp(3)
    other = evaluate(texts, texts, metrics=["length"], likelihoods=([n + 1 for n in nll], tokens))
    assert paired_difference(other, scores, "perplexity")[0] == pytest.approx(np.exp(18 / 9) - np.exp(15 / 9))
    with pytest.raises(InputError, match="likelihoods: the metric 'perplexity' needs them"):
        evaluate(texts, texts, metrics=["perplexity"])
    with pytest.raises(InputError, match="expected one for each of the 3 documents, got 2"):
        evaluate(texts, texts, likelihoods=(nll[:2], tokens[:2]))
    with pytest.raises(InputError, match="the pair"):
        evaluate(texts, texts, likelihoods=nll)


def test_scores_are_a_mapping_with_everything_beside_it(system):
    assert set(system) == {key for name in DEFAULT for key in METRICS[name].keys}
    assert set(system.intervals) == set(system)
    assert all(isinstance(value, float) for value in system.values())
    assert all(low <= system[name] <= high and low < high for name, (low, high) in system.intervals.items())
    assert system.n == 120 and system.ids[7] == "r7" and system.tagger == "tagger"
    assert all(len(values) == 120 for values in system.per_document.values())
    assert system.protocol == {
        "name": "r2gen",
        "whitespace": "collapsed",
        "lowercase": True,
        "tokenizer": "r2gen_iu_xray",
        "max_prediction_tokens": 60,
        "max_reference_tokens": 59,
        "applies_to": ["bleu", "rouge_l", "cider", "meteor"],
    }
    with pytest.raises(KeyError):
        system["meteor"]


def test_the_table_shows_every_value_interval_and_class(system):
    lines = str(system).splitlines()
    assert "120 documents" in lines[0] and "r2gen" in lines[0] and "1000 resamples" in lines[0]
    low, high = system.intervals["bleu_4"]
    assert any(line.split() == ["bleu_4", f"{system['bleu_4']:.4f}", f"[{low:.4f},", f"{high:.4f}]"] for line in lines)
    row = system.per_class["clear/present"]
    assert any(line.startswith("clear/present") and line.endswith(f" {row['support']}") for line in lines)


def test_json_round_trip_is_exact(system, better_system):
    again = Scores.from_json(json.loads(json.dumps(system.to_json())))
    assert again == system and again.intervals == system.intervals
    assert again.to_json() == system.to_json() and str(again) == str(system)
    assert paired_difference(again, better_system, "bleu_4") == paired_difference(system, better_system, "bleu_4")


def test_resampling_is_drawing_documents_with_replacement():
    table = np.random.default_rng(3).normal(size=(50, 3))
    sums = resampled_sums(table, 4000, seed=5)
    drawn = np.random.default_rng(5).integers(0, 50, size=(4000, 50))
    np.testing.assert_allclose(sums, table[drawn].sum(1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(sums.std(0) / np.sqrt(50), table.std(0), rtol=0.05)


def test_large_sets_are_resampled_in_blocks(monkeypatch):
    table = np.ones((50, 1))
    monkeypatch.setattr("dive_fast.metrics.bootstrap.DRAWS_PER_BLOCK", 120)
    assert (resampled_sums(table, 7, seed=0) == 50).all()


def test_bootstrap_is_deterministic_follows_the_seed_and_does_not_depend_on_the_other_metrics():
    predictions, references = reports(40, 1), reports(40, 0)
    first = evaluate(predictions, references, ("bleu", "rouge_l"), seed=3)
    assert first.intervals == evaluate(predictions, references, ("rouge_l", "bleu"), seed=3).intervals
    alone = evaluate(predictions, references, "bleu", seed=3)
    assert alone.intervals["bleu_4"] == first.intervals["bleu_4"]
    assert alone.intervals != evaluate(predictions, references, "bleu", seed=4).intervals
    assert evaluate(predictions, references, "bleu", bootstrap=0).intervals == {}


def test_bootstrap_interval_covers_the_true_value():
    """95 % intervals of a rate hold the true one about 95 times of 100."""
    generator = np.random.default_rng(0)
    held = 0
    for seed in range(100):
        reasons = np.where(generator.random(200) < 0.7, "eos", "length").tolist()
        scores = evaluate(["a"] * 200, ["a"] * 200, "termination", finish_reasons=reasons, bootstrap=400, seed=seed)
        low, high = scores.intervals["eos_rate"]
        held += low <= 0.7 <= high
    assert 88 <= held <= 100


def test_identical_systems_differ_by_zero(system):
    for name in system:
        assert paired_difference(system, system, name) == (0, (0, 0))


def test_paired_difference_by_redrawing_the_texts(system, better_system):
    """The interval is that of evaluating both systems again on each resample."""
    difference, (low, high) = paired_difference(better_system, system, "bleu_4", bootstrap=60, seed=2)
    assert difference == better_system["bleu_4"] - system["bleu_4"]
    assert 0 < low < difference < high
    references, worse = reports(120, 0), reports(120, 1)
    mixed = [r if i % 2 else p for i, (r, p) in enumerate(zip(references, worse, strict=True))]
    redrawn = []
    for drawn in np.random.default_rng(2).integers(0, 120, size=(60, 120)):
        a, b = (
            evaluate([p[i] for i in drawn], [references[i] for i in drawn], "bleu", bootstrap=0)["bleu_4"]
            for p in (mixed, worse)
        )
        redrawn.append(a - b)
    assert (low, high) == pytest.approx(tuple(np.percentile(redrawn, [2.5, 97.5])), abs=1e-12)
    reverse, (reverse_low, reverse_high) = paired_difference(system, better_system, "bleu_4", bootstrap=60, seed=2)
    assert (reverse, reverse_low, reverse_high) == pytest.approx((-difference, -high, -low))


def test_pairing_makes_the_difference_tighter_than_the_systems(system, better_system):
    _, (low, high) = paired_difference(better_system, system, "rouge_l")
    a, b = better_system.intervals["rouge_l"], system.intervals["rouge_l"]
    assert high - low < np.hypot(a[1] - a[0], b[1] - b[0])


def test_paired_difference_without_intervals(system, better_system):
    assert paired_difference(system, better_system, "cider", bootstrap=0) == (
        system["cider"] - better_system["cider"],
        None,
    )


def test_paired_difference_refuses_what_cannot_be_compared(system):
    references = reports(120, 0)
    other = evaluate(references, references[::-1], tagger=tagger, bootstrap=0)
    with pytest.raises(InputError, match="same documents"):
        paired_difference(system, other, "bleu_4")
    shorter = evaluate(references[:5], references[:5], tagger=tagger, bootstrap=0)
    with pytest.raises(InputError, match="same documents"):
        paired_difference(system, shorter, "bleu_4")
    raw = evaluate(references, references, protocol="raw", tagger=lambda text: [], bootstrap=0)
    with pytest.raises(InputError, match="one protocol, got 'r2gen' and 'raw'"):
        paired_difference(system, raw, "bleu_4")
    with pytest.raises(InputError, match="one tagger"):
        paired_difference(system, raw, "decisive_f1")
    paired_difference(system, raw, "length_error")
    with pytest.raises(InputError, match="name: a has no 'bleu4', did you mean 'bleu_4'"):
        paired_difference(system, system, "bleu4")
    with pytest.raises(InputError, match="bootstrap"):
        paired_difference(system, system, "bleu_4", bootstrap=-1)


def test_a_thousand_resamples_of_600_documents_take_a_moment():
    predictions, references = reports(600, 1), reports(600, 0)
    start = time.perf_counter()
    evaluate(predictions, references, tagger=tagger, bootstrap=0)
    without = time.perf_counter() - start
    start = time.perf_counter()
    evaluate(predictions, references, tagger=tagger, bootstrap=1000)
    assert time.perf_counter() - start - without < 2


def test_cider_of_one_document_warns_and_of_two_does_not():
    with pytest.warns(UserWarning, match="CIDEr of a single document"):
        assert evaluate(["a b"], ["a b"], "cider")["cider"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate(["a b c d", "e f g h"], ["a b c d", "e f g h"], "cider")["cider"] > 0


@pytest.mark.parametrize(
    ("predictions", "references", "options", "message"),
    [
        (["a"], ["a", "b"], {}, "got 1 and 2"),
        ([], [], {}, "at least one document"),
        ("a", ["a"], {}, "predictions: expected a list.*str"),
        (["a"], None, {}, "references: expected a list.*NoneType"),
        (["a", 3], ["a", "b"], {}, "predictions: expected a string for document 1, got int"),
        (["a", None], ["a", "b"], {"ids": ["x", "y"]}, r"document 1 \(id y\), got NoneType"),
        (["a", "b"], ["a", b"b"], {}, "references: expected a string for document 1, got bytes"),
        (["a", "b\ud800"], ["a", "b"], {}, "predictions: document 1 holds half of a surrogate"),
        (["a", "b"], ["a", " \n"], {}, "references: document 1 has no word"),
        (["a", "b"], ["...", "b"], {"ids": ["x", "y"]}, r"references: document 0 \(id x\) has no word"),
        (["a"], ["a"], {"metrics": "rouge"}, "unknown metric 'rouge', did you mean 'rouge_l'"),
        (["a"], ["a"], {"metrics": ["decisive_f1"]}, "unknown metric 'decisive_f1', did you mean 'decisive'"),
        (["a"], ["a"], {"metrics": ["spice"]}, "unknown metric 'spice'.*Known: bleu"),
        (["a"], ["a"], {"metrics": []}, "at least one of"),
        (["a"], ["a"], {"protocol": "r2gn"}, "unknown protocol 'r2gn', did you mean 'r2gen'"),
        (["a"], ["a"], {"protocol": None}, "unknown protocol None"),
        (["a"], ["a"], {"bootstrap": -1}, "bootstrap.*-1"),
        (["a"], ["a"], {"seed": -1}, "seed.*-1"),
        (["a"], ["a"], {"bootstrap": 2.5}, "bootstrap.*2.5"),
        (["a"], ["a"], {"metrics": "termination"}, "finish_reasons.*got None.*generate"),
        (["a"], ["a"], {"finish_reasons": ["eos", "eos"]}, "each of the 1 documents, got 2"),
        (["a"], ["a"], {"finish_reasons": [None]}, "expected 'eos', .* got None"),
        (["a"], ["a"], {"finish_reasons": ["end"]}, "expected 'eos', 'stop', 'length' or 'cancelled', got 'end'"),
        (["a", "b"], ["a", "b"], {"ids": ["x"]}, "2 distinct names, got 1"),
        (["a", "b"], ["a", "b"], {"ids": ["x", "x"]}, "2 distinct names, got 2 with 1 distinct"),
        (["a"], ["a"], {"metrics": "decisive", "tagger": "lexicon"}, "tagger: expected a callable.*str"),
        (["a"], ["a"], {"metrics": "decisive", "tagger": lambda text: [1]}, "tagger: document 0: expected tuples"),
        (
            ["a"],
            ["a"],
            {"metrics": "decisive", "tagger": lambda text: [(0, 9, "x")]},
            "tagger: document 0: .*<= 1",
        ),
        (["a"], ["a"], {"metrics": "decisive", "tagger": lambda text: None}, "tagger: expected text -> .*document 0"),
    ],
)
def test_bad_input_is_named(predictions, references, options, message):
    options = {"tagger": tagger, "bootstrap": 0, "metrics": ("bleu", "decisive")} | options
    with pytest.raises(InputError, match=message):
        evaluate(predictions, references, **options)


def test_how_reports_end_is_told_for_every_reason():
    records = [Record(id=str(i), prompt="p", report="a") for i in range(4)]
    reasons = ["eos", "stop", "stop", "cancelled"]
    finish = measurements.shape(records, ["a"] * 4, reasons, examples=0)["finish"]
    assert finish == {"eos": 0.25, "length": 0, "stop": 0.5, "cancelled": 0.25}
    assert list(measurements.shape(records, ["a"] * 4, ["eos"] * 4, examples=0)["finish"]) == ["eos", "length"]


def test_a_reference_the_protocol_empties_is_named():
    with pytest.raises(InputError, match=r"protocol 'r2gen' leaves nothing of document 1 \(id y\)"):
        evaluate(["a", "b"], ["a", "1. ..."], "bleu", ids=["x", "y"])
