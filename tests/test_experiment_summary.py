"""Means over seeds, intervals over documents and seeds, paired differences: against a bootstrap written out by hand."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

import dive_fast
from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.evaluate import evaluate
from dive_fast.experiment.pieces import Piece
from dive_fast.experiment.scoring import Scorer
from dive_fast.experiment.settings import Evaluation
from dive_fast.experiment.summary import summarize
from dive_fast.metrics.bootstrap import resampled_seeds
from dive_fast.metrics.scores import Scores
from dive_fast.supervision import lexicon
from dive_fast.supervision.lexicon import LexiconTagger

REFERENCES = [
    "the lungs are clear", "no pleural effusion is seen", "mild cardiomegaly", "left pleural effusion",
    "no pneumothorax", "the heart is normal in size", "right lower lobe opacity",
]  # fmt: skip
N = len(REFERENCES)


def scores(skill: int, seed: int, references=REFERENCES, tagger=None):
    """Invented predictions: a system of some skill keeps so many of ten words, others it replaces."""
    rng = np.random.default_rng([skill, seed])
    texts = [" ".join(w if rng.integers(10) < skill else "opacity" for w in text.split()) for text in references]
    nll = [len(text.split()) * (12 - skill) / 3 + float(rng.random()) for text in references]
    tokens = [len(text.split()) + 1 for text in references]
    reasons = ["eos" if rng.random() < 0.7 else "length" for _ in references]
    return evaluate(texts, references, metrics=("rouge_l", "bleu", "length", "decisive"), protocol="lower", bootstrap=0,
                    likelihoods=(nll, tokens), finish_reasons=reasons, tagger=tagger)  # fmt: skip


@functools.cache
def systems() -> dict:
    return {"base": [scores(2, 9)] * 3, "a": [scores(5, s) for s in range(3)], "b": [scores(8, s) for s in range(3)]}


B, SEED = 60, 4


def on_documents(one, drawn) -> dict[str, float]:
    """Values of a system on drawn documents, from the metrics' definitions and nothing else."""
    nll, tokens = one.statistics["perplexity"][drawn].sum(axis=0)
    correct, predicted, stated = one.statistics["decisive"][drawn].sum(axis=0)
    error, words, reference_words = one.statistics["length"][drawn].sum(axis=0)
    return {
        "perplexity": np.exp(nll / tokens),
        "nll": nll / tokens,
        "rouge_l": np.mean([one.per_document["rouge_l"][i] for i in drawn]),
        "eos_rate": np.mean([one.per_document["eos_rate"][i] for i in drawn]),
        "decisive_f1": 2 * correct / (predicted + stated) if predicted + stated else 0.0,
        "length_error": error / len(drawn),
        "length_ratio": words / reference_words,
    }


KEYS = ("perplexity", "nll", "rouge_l", "eos_rate", "decisive_f1", "length_error", "length_ratio")


def by_hand() -> dict[str, dict[str, np.ndarray]]:
    """system -> key -> [B]: the same draws, one resample, one seed and one system at a time."""
    documents = np.random.default_rng(SEED).integers(0, N, size=(B, N))
    seeds = np.random.default_rng([SEED, 1]).integers(0, 3, size=(B, 3))
    found = {name: {key: np.zeros(B) for key in KEYS} for name in systems()}
    for b in range(B):
        for name, runs in systems().items():
            values = [on_documents(runs[s], documents[b]) for s in seeds[b]]
            for key in KEYS:
                found[name][key][b] = sum(one[key] for one in values) / 3
    return found


def test_values_are_means_over_the_seeds():
    found = summarize(systems(), reference="b", bootstrap=0, seed=0)
    for name, runs in systems().items():
        for key in ("perplexity", "rouge_l", "bleu_1"):
            assert found[name].values[key] == pytest.approx(sum(run[key] for run in runs) / 3, rel=1e-12)
        expected = sum(np.log(run["perplexity"]) for run in runs) / 3
        assert found[name].values["nll"] == pytest.approx(expected, rel=1e-12)
        assert [one["rouge_l"] for one in found[name].per_seed] == [run["rouge_l"] for run in runs]
        assert found[name].intervals == {}
    assert found["a"].differences["rouge_l"].interval is None and not found["a"].differences["rouge_l"].clear


def test_intervals_are_those_of_a_bootstrap_by_hand():
    found, expected = summarize(systems(), reference=None, bootstrap=B, seed=SEED), by_hand()
    for name in systems():
        for key in KEYS:
            low, high = np.percentile(expected[name][key], (2.5, 97.5))
            assert found[name].intervals[key] == pytest.approx((low, high), rel=1e-9, abs=1e-12), (name, key)
        assert found[name].differences == {}


def test_differences_are_paired_in_documents_and_seeds():
    found, expected = summarize(systems(), reference="b", bootstrap=B, seed=SEED), by_hand()
    assert found["b"].differences == {}
    for name in ("base", "a"):
        for key in KEYS:
            one = found[name].differences[key]
            assert one.value == pytest.approx(found[name].values[key] - found["b"].values[key], abs=1e-12)
            low, high = np.percentile(expected[name][key] - expected["b"][key], (2.5, 97.5))
            assert one.interval == pytest.approx((low, high), rel=1e-9, abs=1e-12), (name, key)
            assert one.clear == (low > 0 or high < 0), (name, key)
    assert found["base"].differences["perplexity"].clear and found["base"].differences["perplexity"].value > 0


def test_equal_systems_differ_by_nothing():
    twice = {"x": systems()["a"], "y": [scores(5, s) for s in range(3)]}
    found = summarize(twice, reference="y", bootstrap=B, seed=SEED)["x"].differences
    assert all(one.value == 0 and one.interval == (0, 0) and not one.clear for one in found.values())


def test_one_seed_gives_the_intervals_of_evaluate_and_paired_difference():
    one = {name: runs[:1] for name, runs in systems().items()}
    found = summarize(one, reference="b", bootstrap=200, seed=7)
    for key in ("perplexity", "rouge_l", "bleu_4", "decisive_f1"):
        difference, interval = dive_fast.paired_difference(one["a"][0], one["b"][0], key, bootstrap=200, seed=7)
        assert found["a"].differences[key].value == pytest.approx(difference)
        assert found["a"].differences[key].interval == pytest.approx(interval, abs=1e-12)


def test_seeds_that_differ_widen_the_interval():
    """With equal documents, what is left is the seeds: a mean of three drawn from three values."""
    same = [scores(5, 0)] * 3
    apart = [scores(2, 0), scores(5, 0), scores(8, 0)]
    found = summarize({"same": same, "apart": apart}, reference=None, bootstrap=400, seed=0)
    width = {name: found[name].intervals["rouge_l"][1] - found[name].intervals["rouge_l"][0] for name in found}
    assert width["apart"] > 1.3 * width["same"]
    draws = resampled_seeds(3, 400, 0)
    assert draws.shape == (400, 3) and set(draws.ravel()) == {0, 1, 2}


def test_systems_scored_on_other_documents_are_refused():
    other = {"a": systems()["a"], "z": [scores(5, s, REFERENCES[::-1]) for s in range(3)]}
    with pytest.raises(InputError, match="z and a differ in their documents; remove the files scores.json"):
        summarize(other, reference="a", bootstrap=10, seed=0)


@pytest.fixture
def other_lexicon(tmp_path) -> Path:
    path = tmp_path / "other.yaml"
    path.write_text("findings: {Heart: {mention: [heart]}}\ncues: {}\n")
    return path


def test_systems_scored_by_another_lexicon_are_refused(other_lexicon):
    """Two lexicons are one class; what tells them apart is kept in the file, and older files have none."""
    ours, theirs = scores(5, 0), scores(5, 0, tagger=LexiconTagger(other_lexicon))
    assert Scores.from_json(theirs.to_json()).tagger_fingerprint == LexiconTagger(other_lexicon).fingerprint
    older = ours.to_json()
    del older["tagger_fingerprint"]
    for one in (theirs, Scores.from_json(older)):
        with pytest.raises(InputError, match="x and a differ in their tagger"):
            summarize({"a": [ours], "x": [one]}, reference="a", bootstrap=0, seed=0)
        with pytest.raises(InputError, match=r"a, b: expected one tagger with one lexicon, got LexiconTagger \("):
            dive_fast.paired_difference(one, ours, "decisive_f1", bootstrap=0)
        assert dive_fast.paired_difference(one, ours, "rouge_l", bootstrap=0) == (0, None)


def test_another_version_of_the_chest_lexicon_scores_anew(other_lexicon, tmp_path, monkeypatch):
    records = [Record(str(i), "p", text, meta={"unseen_text": False}) for i, text in enumerate(REFERENCES)]
    rows = [{"id": r.id, "prediction": r.report, "finish_reason": "eos"} for r in records]
    (tmp_path / "predictions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "likelihood.json").write_text(json.dumps({"nll": [1.0] * N, "tokens": [2] * N}))
    found = []
    for metric in ("decisive", "length"):
        for path in (lexicon.CHEST_LEXICON, other_lexicon):
            monkeypatch.setattr(lexicon, "CHEST_LEXICON", path)
            Scorer(Evaluation(metrics=[metric])).score(records, Piece(tmp_path))
            found.append(json.loads((tmp_path / "scores.json").read_text())["key"])
        monkeypatch.undo()
    assert len(set(found)) == 3 and found[2] == found[3]
