"""RadGraph F1 from annotations: by hand, and against the radgraph package's own rewards; no model runs here."""

import json
import random

import pytest

import dive_fast
from dive_fast.errors import InputError
from dive_fast.metrics.radgraph import KEYS, rewards


def entity(tokens, label, *relations):
    return {"tokens": tokens, "label": label, "start_ix": 0, "end_ix": 0, "relations": [list(r) for r in relations]}


def annotation(*entities):
    return {"entities": {str(number): one for number, one in enumerate(entities, start=1)}}


# What the package's own test expects of the published first version for "no evidence of acute cardiopulmonary process
# moderate hiatal hernia" (radgraph 0.1.18, tests/radgraph_test.py).
HIATAL = annotation(
    entity("acute", "OBS-DA"),
    entity("cardiopulmonary", "ANAT-DP"),
    entity("process", "OBS-DA", ("located_at", "2")),
    entity("moderate", "OBS-DP"),
    entity("hiatal", "ANAT-DP"),
    entity("hernia", "OBS-DP"),
)
# Made up, for "no acute pulmonary process moderate hernia".
HERNIA = annotation(
    entity("acute", "OBS-DA"),
    entity("pulmonary", "ANAT-DP"),
    entity("process", "OBS-DA", ("located_at", "2")),
    entity("moderate", "OBS-DP", ("modify", "5")),
    entity("hernia", "OBS-DP"),
)
EMPTY = {"entities": {}}


def test_a_pair_worked_out_on_paper():
    # 6 items against 5.
    # simple: acute, process, moderate and hernia with their labels are in both: 2 * 4 / 11.
    # partial: moderate is the subject of a relation in one only; acute, process, hernia: 2 * 3 / 11.
    # complete: the process lies in two different places; acute and hernia are left: 2 * 2 / 11.
    assert rewards(HIATAL, HERNIA) == pytest.approx((8 / 11, 6 / 11, 4 / 11), abs=1e-15)
    assert rewards(HERNIA, HIATAL) == rewards(HIATAL, HERNIA)
    assert rewards(HIATAL, HIATAL) == (1.0, 1.0, 1.0)


def test_the_label_and_the_kind_of_a_relation_count():
    # "possible left effusion" against "left effusion": the label differs, only "left" is shared, and in the third
    # reward nothing is, for left modifies an effusion here and is located at one there.
    a = annotation(entity("left", "ANAT-DP", ("modify", "2")), entity("effusion", "OBS-U"))
    b = annotation(entity("left", "ANAT-DP", ("located_at", "2")), entity("effusion", "OBS-DP"))
    assert rewards(a, b) == (0.5, 0.5, 0.0)


def test_several_relations_of_an_entity_are_several_items():
    # One has (opacity, modify, left), (opacity, modify, right), left, right; the other (opacity, modify, left), left:
    # 2 * 2 / (4 + 2).
    a = annotation(
        entity("opacity", "OBS-DP", ("modify", "2"), ("modify", "3")),
        entity("left", "ANAT-DP"),
        entity("right", "ANAT-DP"),
    )
    b = annotation(entity("opacity", "OBS-DP", ("modify", "2")), entity("left", "ANAT-DP"))
    assert rewards(a, b)[2] == pytest.approx(2 / 3, abs=1e-15)
    # simple and partial: opacity and left of three and two, 2 * 2 / (3 + 2)
    assert rewards(a, b)[:2] == pytest.approx((0.8, 0.8), abs=1e-15)


def test_case_is_folded_and_a_repeated_entity_counts_once():
    a = annotation(entity("Effusion", "OBS-DA"), entity("EFFUSION", "OBS-DA"))
    b = annotation(entity("effusion", "OBS-DA"))
    assert rewards(a, b) == (1.0, 1.0, 1.0)


def test_a_side_without_entities_scores_0_and_so_do_two():
    for a, b in ((EMPTY, HIATAL), (HIATAL, EMPTY), (EMPTY, EMPTY)):
        assert rewards(a, b) == (0.0, 0.0, 0.0)


def random_annotation(rng):
    n = rng.randrange(5)
    words = ["effusion", "left", "lung", "clear", "opacity"]
    return annotation(
        *(
            entity(
                rng.choice(words),
                rng.choice(["OBS-DP", "OBS-DA", "ANAT-DP"]),
                *(
                    (rng.choice(["modify", "located_at"]), str(rng.randint(1, n)))
                    for _ in range(rng.choice([0, 0, 1, 2]))
                ),
            )
            for _ in range(n)
        )
    )


def test_the_rewards_are_the_packages_own_on_lower_case_annotations():
    package = pytest.importorskip("radgraph.rewards", reason="needs the radgraph package")
    rng = random.Random(0)
    for _ in range(2000):
        a, b = random_annotation(rng), random_annotation(rng)
        assert rewards(a, b) == pytest.approx(package.compute_reward(a, b, "all"), abs=1e-12)


ANNOTATED = {"moderate hiatal hernia": HIATAL, "moderate hernia": HERNIA, "": EMPTY}


def annotator(texts):
    return [ANNOTATED[text] for text in texts]


def evaluate(predictions, references, **options):
    given = {"annotator": annotator} | options
    return dive_fast.evaluate(predictions, references, metrics=("radgraph",), metric_options={"radgraph": given})


def test_evaluate_averages_over_documents_with_intervals():
    scores = evaluate(
        ["moderate hiatal  hernia", "moderate hernia", " "], ["moderate hernia", "moderate hernia", "moderate hernia"]
    )
    # Documents score (8, 6, 4) / 11, 1 and 0.
    assert dict(scores) == pytest.approx(
        {"radgraph_simple": 19 / 33, "radgraph_partial": 17 / 33, "radgraph_complete": 15 / 33}
    )
    assert scores.per_document["radgraph_partial"] == pytest.approx([6 / 11, 1.0, 0.0])
    for key in KEYS:
        low, high = scores.intervals[key]
        assert 0 <= low <= scores[key] <= high <= 1
    assert dive_fast.Scores.from_json(json.loads(json.dumps(scores.to_json()))).settings == scores.settings
    assert scores.settings == {"radgraph": {"weights": "annotator"}}


def test_two_systems_are_compared_only_under_the_same_annotator():
    references = ["moderate hernia", "moderate hernia"]
    a = evaluate(["moderate hernia", "moderate hernia"], references)
    b = evaluate(["", "moderate hernia"], references)
    difference, (low, high) = dive_fast.paired_difference(a, b, "radgraph_partial")
    assert difference == 0.5 and low == 0.0 and high == 1.0
    other = evaluate(["", ""], references, annotator=lambda texts: [EMPTY for _ in texts])
    with pytest.raises(InputError, match="one setting of 'radgraph'"):
        dive_fast.paired_difference(a, other, "radgraph_partial")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radgrph": {}}, "did you mean 'radgraph'"),
        ({"bleu": {}}, "no metric with options is called 'bleu'"),
        ({"chexbert": {}}, "'chexbert' is not among metrics"),
        (
            {"radgraph": {"weight": "x"}},
            r"metric_options.radgraph: there is no option 'weight'; did you mean 'weights'",
        ),
        ({"radgraph": {"model_type": "v1"}}, "metric_options.radgraph.model_type: expected one of radgraph"),
        ({"radgraph": {"batch_size": 0}}, "batch_size: expected a whole number >= 1, got 0"),
        ({"radgraph": {"device": 0}}, "device: expected a name"),
        ({"radgraph": {"weights": None}}, "weights: expected a hub id or a local path, got None"),
        ({"radgraph": {"cache": 3}}, "cache: expected a file name"),
        ({"radgraph": {"annotator": "mine"}}, "annotator: expected a callable"),
        ({"radgraph": "weights"}, "metric_options.radgraph: expected a mapping"),
        ("radgraph", "metric_options: expected metric -> options"),
        ({"radgraph": {"annotator": lambda texts: []}}, "expected 2 annotations, one a text, got 0"),
        ({"radgraph": {"annotator": lambda texts: [{}, {}]}}, "document 0: not an annotation in RadGraph's form"),
        ({"radgraph": {"annotator": lambda texts: [{"entities": {"1": "x"}}] * 2}}, "not an annotation"),
    ],
)
def test_wrong_options_say_what_was_expected(options, message):
    with pytest.raises(InputError, match=message):
        dive_fast.evaluate(["a"], ["a"], metrics=("radgraph",), metric_options=options)


def test_one_of_its_names_leads_to_the_metric():
    with pytest.raises(InputError, match="unknown metric 'radgraph_partial', did you mean 'radgraph'"):
        dive_fast.evaluate(["a"], ["a"], metrics=("radgraph_partial",))
