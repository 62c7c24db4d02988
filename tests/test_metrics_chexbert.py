"""CheXbert F1 from labels: by hand, against scikit-learn, and under the bootstrap; no model runs here."""

import json

import numpy as np
import pytest

import dive_fast
from dive_fast.clinical.chexbert import LABELS
from dive_fast.errors import InputError

KEYS = ("chexbert_micro_f1_14", "chexbert_macro_f1_14", "chexbert_micro_f1_5", "chexbert_macro_f1_5")


def given(classes):
    """A labeler that gives text "i" row i."""
    return lambda texts: np.array([classes[int(text)] for text in texts])


def evaluate(predicted, true, uncertain="positive", **options):
    classes = np.concatenate([predicted, true])
    n = len(predicted)
    return dive_fast.evaluate(
        [str(i) for i in range(n)],
        [str(i) for i in range(n, 2 * n)],
        metrics=("chexbert",),
        metric_options={"chexbert": {"labeler": given(classes), "uncertain": uncertain}},
        **options,
    )


def row(**labels):
    """Classes of a report; names with _ for blanks, all others blank."""
    found = [0] * 14
    for name, value in labels.items():
        found[LABELS.index(name.replace("_", " "))] = value
    return found


# Two reports: the first reads cardiomegaly rightly, edema where it is denied; the second misses an uncertain edema and
# a fracture, and states an effusion that is uncertain in the reference.
PREDICTED = [row(Cardiomegaly=1, Edema=1), row(Pleural_Effusion=1, Edema=2)]
TRUE = [row(Cardiomegaly=1, Edema=2), row(Pleural_Effusion=3, Edema=3, Fracture=1)]


def test_a_case_worked_out_on_paper():
    # Uncertain as positive: cardiomegaly t=1 p=1 r=1, edema t=0 p=1 r=1, effusion t=1 p=1 r=1, fracture t=0 p=0 r=1.
    # 14 labels: micro 2 * 2 / (3 + 4), macro (1 + 0 + 1 + 0) / 14; top 5 without the fracture: 4 / 6 and 2 / 5.
    assert dict(evaluate(PREDICTED, TRUE)) == pytest.approx(dict(zip(KEYS, (4 / 7, 2 / 14, 4 / 6, 2 / 5), strict=True)))
    # As negative: edema t=0 p=1 r=0, effusion t=0 p=1 r=0: micro 2 * 1 / (3 + 2), macro 1 / 14; top 5: 2 / 4 and 1 / 5.
    negative = evaluate(PREDICTED, TRUE, "negative")
    assert dict(negative) == pytest.approx(dict(zip(KEYS, (2 / 5, 1 / 14, 2 / 4, 1 / 5), strict=True)))


def test_each_label_has_its_row():
    per_class = evaluate(PREDICTED, TRUE).per_class
    assert len(per_class) == 14
    assert per_class["CheXbert: Cardiomegaly"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1}
    assert per_class["CheXbert: Edema"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert per_class["CheXbert: No Finding"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}


def test_nothing_stated_anywhere_is_0():
    assert dict(evaluate([row()], [row()])) == dict.fromkeys(KEYS, 0.0)


def random_classes(rng, n):
    """[n, 14]; some labels are rare or never positive."""
    rare = rng.random(14) < 0.3
    classes = rng.integers(0, 4, (n, 14)) * (rng.random((n, 14)) < np.where(rare, 0.03, 0.6))
    classes[:, 13] = rng.integers(0, 2, n)
    return classes


@pytest.mark.parametrize("uncertain", ["positive", "negative"])
def test_the_scores_are_scikit_learns(uncertain):
    metrics = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")
    rng = np.random.default_rng(0)
    positive = [1, 3] if uncertain == "positive" else [1]
    for n in (1, 3, 40):
        for _ in range(20):
            predicted, true = random_classes(rng, n), random_classes(rng, n)
            scores = evaluate(predicted, true, uncertain, bootstrap=0)
            y_pred, y_true = np.isin(predicted, positive), np.isin(true, positive)
            for key, average, columns in zip(
                KEYS, ("micro", "macro") * 2, [slice(None)] * 2 + [[1, 4, 5, 7, 9]] * 2, strict=True
            ):
                expected = metrics.f1_score(y_true[:, columns], y_pred[:, columns], average=average, zero_division=0)
                assert scores[key] == pytest.approx(expected, abs=1e-12), key


def test_intervals_are_those_of_resampled_reports():
    rng = np.random.default_rng(1)
    n, resamples = 25, 200
    predicted, true = random_classes(rng, n), random_classes(rng, n)
    scores = evaluate(predicted, true, bootstrap=resamples, seed=5)
    drawn = np.random.default_rng(5).integers(0, n, size=(resamples, n))
    each = [dict(evaluate(predicted[rows], true[rows], bootstrap=0)) for rows in drawn]
    for key in KEYS:
        expected = np.percentile([values[key] for values in each], (2.5, 97.5))
        assert scores.intervals[key] == pytest.approx(tuple(expected), abs=1e-12)


def test_two_systems_are_compared_under_one_setting():
    better = evaluate(TRUE, TRUE)
    worse = evaluate(PREDICTED, TRUE)
    difference, interval = dive_fast.paired_difference(better, worse, "chexbert_micro_f1_14")
    assert difference == pytest.approx(1 - 4 / 7) and interval[0] <= difference <= interval[1]
    again = dive_fast.Scores.from_json(json.loads(json.dumps(worse.to_json())))
    assert dive_fast.paired_difference(better, again, "chexbert_micro_f1_14") == (difference, interval)
    with pytest.raises(InputError, match="one setting of 'chexbert'"):
        dive_fast.paired_difference(better, evaluate(PREDICTED, TRUE, "negative"), "chexbert_micro_f1_14")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uncertain": "maybe"}, "metric_options.chexbert.uncertain: expected 'positive' or 'negative', got 'maybe'"),
        ({"uncertan": "positive"}, "there is no option 'uncertan'; did you mean 'uncertain'"),
        ({"tokenizer": ""}, "tokenizer: expected a hub id or a folder, got ''"),
        ({"labeler": 3}, "labeler: expected a callable"),
        ({"batch_size": True}, "batch_size: expected a whole number >= 1, got True"),
        ({"labeler": lambda texts: np.zeros((1, 14))}, r"expected classes \[2, 14\], got \[1, 14\]"),
    ],
)
def test_wrong_options_say_what_was_expected(options, message):
    with pytest.raises(InputError, match=message):
        dive_fast.evaluate(["a"], ["a"], metrics=("chexbert",), metric_options={"chexbert": options})
