"""The tagger `radgraph`: spans, weights and training, with annotations made by hand and with the package."""

import dataclasses
import json

import pytest

import dive_fast
from dive_fast import config
from dive_fast.clinical import radgraph as annotators
from dive_fast.clinical.radgraph import RadGraphSettings
from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from dive_fast.supervision.radgraph import RadGraphTagger, entity_class
from dive_fast.supervision.tagger import Span
from dive_fast.supervision.weights import checked_spans
from tests.radgraph_layout import write_radgraph

LABELS = {
    "effusion": "Observation::definitely absent",
    "pleural": "Anatomy::definitely present",
    "pleural effusion": "Observation::uncertain",
    "opacity": "OBS-DP",
}


class ByWord:
    """Annotates the words of LABELS wherever they stand, and remembers how it was called."""

    def __init__(self):
        self.calls = []

    def __call__(self, texts):
        self.calls.append(list(texts))
        return [self.annotation(text) for text in texts]

    @staticmethod
    def annotation(text):
        found = {
            str(number): {"label": label, "tokens": words, "relations": [], "start": start, "end": start + len(words)}
            for number, (words, label) in enumerate(LABELS.items(), start=1)
            if (start := text.find(words)) >= 0
        }
        return {"entities": found}


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("Observation::definitely present", ("Observation", "present")),
        ("Observation::definitely absent", ("Observation", "absent")),
        ("Observation::uncertain", ("Observation", "uncertain")),
        ("Anatomy::definitely present", ("Anatomy", "present")),
        ("OBS-DP", ("Observation", "present")),
        ("OBS-DA", ("Observation", "absent")),
        ("OBS-U", ("Observation", "uncertain")),
        ("ANAT-DP", ("Anatomy", "present")),
        ("Measurement", ("Measurement",)),
        ("Observation::measurement::definitely present", ("Observation::measurement", "present")),
        ("Observation::definitely maybe", ("Observation::definitely maybe",)),
    ],
)
def test_the_labels_of_both_versions_are_category_and_polarity(label, expected):
    assert entity_class(label) == expected


def tagger(annotator):
    return RadGraphTagger(RadGraphSettings(annotator=annotator))


def test_spans_are_the_entities_in_the_order_of_the_text():
    text = "Left opacity.\n No  pleural effusion."
    spans = tagger(ByWord())(text)
    assert spans == [
        Span(5, 12, ("Observation", "present")),
        Span(19, 26, ("Anatomy", "present")),
        Span(19, 35, ("Observation", "uncertain")),
        Span(27, 35, ("Observation", "absent")),
    ]
    assert checked_spans(tagger(ByWord()), text) == spans
    assert tagger(ByWord())("") == []


def test_texts_are_annotated_once_and_together():
    annotator = ByWord()
    tag = tagger(annotator)
    tag.read_ahead(["opacity", "clear", "opacity"])
    tag("opacity"), tag("clear")
    assert annotator.calls == [["opacity", "clear"]]
    tag("new"), tag("new")
    assert annotator.calls[1:] == [["new"]]


def test_scores_by_its_classes_annotate_all_reports_together():
    annotator = ByWord()
    scores = dive_fast.evaluate(
        ["no effusion", "opacity"], ["no effusion", "clear"], metrics="decisive", tagger=tagger(annotator), bootstrap=0
    )
    assert annotator.calls == [["no effusion", "opacity", "clear"]]
    assert scores["decisive_precision"] == 0.5 and scores["decisive_recall"] == 1.0
    assert scores.per_class["Observation/absent"]["support"] == 1


def test_a_list_that_a_caller_changes_is_a_copy():
    tag = tagger(ByWord())
    tag("opacity").clear()
    assert len(tag("opacity")) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tagger": "radgrap"}, "tagger: expected 'lexicon', 'disagreement', 'radgraph', a lexicon file"),
        ({"tagger_options": {"device": "cpu"}}, "tagger_options: only tagger='radgraph' has options, got .*'lexicon'"),
        ({"tagger": "radgraph", "tagger_options": {"wieghts": "x"}}, "tagger_options: .*did you mean 'weights'"),
        ({"tagger": "radgraph", "tagger_options": {"model_type": "xl"}}, "tagger_options.model_type: expected one of"),
        ({"tagger": "radgraph", "tagger_options": ["x"]}, "tagger_options: expected a mapping of options, got list"),
    ],
)
def test_wrong_settings_say_what_was_expected(options, message):
    with pytest.raises(InputError, match=message):
        dive_fast.Supervision(**options)


def test_an_annotation_without_places_and_a_text_that_is_none_are_refused():
    with pytest.raises(InputError, match="start and end of every entity"):
        tagger(lambda texts: [{"entities": {"1": {"label": "OBS-DP"}}}])("opacity")
    with pytest.raises(InputError, match="text: expected a str, got bytes"):
        tagger(ByWord())(b"opacity")


RECORDS = [
    Record(f"r{i}", f"Case {i % 3}.", ("No pleural effusion.", "Left opacity.", "The lungs are clear.")[i % 3])
    for i in range(6)
]
ARGS = {"max_steps": 2, "per_device_train_batch_size": 3, "logging_steps": 1, "disable_tqdm": True}


def train(folder, supervision, records=RECORDS, resume=False, **args):
    return dive_fast.train(
        tiny_llama(),
        records,
        folder,
        processor=tiny_tokenizer(),
        steering=dive_fast.DiveConfig(r=2),
        supervision=supervision,
        args=ARGS | args,
        resume=resume,
    )


def losses(result):
    return [entry["loss"] for entry in result.history if "loss" in entry]


def test_training_reads_all_reports_ahead_and_weighs_as_any_tagger_with_these_spans(tmp_path):
    annotator = ByWord()
    result = train(tmp_path / "a", dive_fast.Supervision(tagger="radgraph", tagger_options={"annotator": annotator}))
    assert annotator.calls == [list(dict.fromkeys(record.report for record in RECORDS))]
    spans = tagger(ByWord())
    assert losses(result) == losses(train(tmp_path / "b", dive_fast.Supervision(tagger=lambda text: spans(text))))
    assert losses(result) != losses(train(tmp_path / "c", dive_fast.Supervision(tagger=lambda text: [])))


def test_yaml_and_overrides_reach_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("supervision:\n  tagger: radgraph\n  tagger_options: {cache: a.jsonl, device: cpu}\n")
    run = config.load_config(file, [f"supervision.tagger_options.{item}" for item in ("weights=here", "device=null")])
    assert run.supervision["tagger_options"] == {"cache": "a.jsonl", "device": None, "weights": "here"}
    dive_fast.Supervision(**run.supervision)
    assert config.load_config(None).resolved().supervision["tagger_options"] is None


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    pytest.importorskip("radgraph", reason="needs the radgraph package")
    return write_radgraph(tmp_path_factory.mktemp("weights"))


def options(weights, **others):
    return {"weights": str(weights), "device": "cpu"} | others


def test_a_second_run_with_the_same_cache_needs_no_model(weights, tmp_path, monkeypatch):
    given = options(weights, cache=str(tmp_path / "annotations.jsonl"))
    first = train(tmp_path / "a", dive_fast.Supervision(tagger="radgraph", tagger_options=given))
    monkeypatch.setattr(annotators, "_load", lambda *args: pytest.fail("the model was loaded"))
    second = train(tmp_path / "b", dive_fast.Supervision(tagger="radgraph", tagger_options=given))
    assert losses(second) == losses(first)
    setup = json.loads((tmp_path / "a" / "dive_setup.json").read_text())
    assert setup["supervision"]["tagger_options"] == RadGraphTagger(RadGraphSettings(**given)).fingerprint


def test_a_run_goes_on_with_the_same_weights_wherever_they_lie(weights, tmp_path):
    first = dive_fast.Supervision(tagger="radgraph", tagger_options=options(weights))
    train(tmp_path / "run", first, max_steps=2, save_steps=1)
    moved = dataclasses.replace(first, tagger_options=options(weights, cache=str(tmp_path / "a.jsonl"), batch_size=2))
    train(tmp_path / "run", moved, max_steps=2, save_steps=1, resume=True)
    with pytest.raises(InputError, match="other settings .*supervision.tagger_options"):
        other = write_radgraph(tmp_path / "other")
        weights_file = other / "radgraph" / "weights.th"
        _change(weights_file)
        train(tmp_path / "run", dataclasses.replace(first, tagger_options=options(other)), save_steps=1, resume=True)


def _change(file):
    import torch

    state = torch.load(file, weights_only=True)
    next(iter(state.values())).add_(1)
    torch.save(state, file)


def test_what_is_missing_is_said_before_anything_is_written(weights, tmp_path):
    missing = dive_fast.Supervision(tagger="radgraph", tagger_options=options(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="config.json is missing"):
        train(tmp_path / "run", missing)
    assert not (tmp_path / "run").exists()
