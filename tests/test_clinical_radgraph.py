"""The annotator against the radgraph package itself, on random weights in exactly the published layout."""

import builtins
import re
import sys
import tarfile
import threading
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

import dive_fast
from dive_fast.clinical import radgraph as module
from dive_fast.clinical.radgraph import RadGraphAnnotator, RadGraphSettings, annotation, word_places
from dive_fast.clinical.tokenizer_methods import METHODS, tokenizer_methods
from dive_fast.errors import InputError
from tests.radgraph_layout import write_radgraph

TEXTS = [
    "No pleural effusion. Heart size is normal.",
    "clear",
    "The right lung is clear, (small) opacity at left base/consolidation: 2.5 cm.",
    "Heart size\nis  normal.\n\nNo effusion is seen at 50%, ...\u00e9\u00df\u4e2d\U0001fac1 !",
    " ".join(["opacity (left) base 123456789012345 is normal, no effusion."] * 20),  # more than 512 word pieces
    "\u200b",
    "Right lung. Left effusion: normal is heart.",  # as many words as the first
    "opacity",
    "pleural effusion /. seen, no base is clear.",
]


@pytest.fixture(scope="module")
def package():
    return pytest.importorskip("radgraph", reason="needs the radgraph package")


@pytest.fixture(scope="module", params=["radgraph", "radgraph-xl"])
def weights(request, package, tmp_path_factory):
    return write_radgraph(tmp_path_factory.mktemp("weights"), request.param), request.param


def settings(weights, **options):
    root, kind = weights
    return RadGraphSettings(weights=str(root), model_type=kind, device="cpu", **options)


def package_annotations(package, weights, texts):
    root, kind = weights
    with tokenizer_methods(), torch.no_grad():
        found = package.RadGraph(model_type=kind, model_cache_dir=str(root), cuda=-1)(texts)
    return [found[str(i)]["entities"] for i in range(len(texts))]


def without_places(annotations):
    return [
        {key: {k: v for k, v in e.items() if k not in ("start", "end")} for key, e in a["entities"].items()}
        for a in annotations
    ]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_annotations_are_the_packages_own_in_any_batch(package, weights, batch_size):
    found = RadGraphAnnotator(settings(weights, batch_size=batch_size))(TEXTS)
    expected = package_annotations(package, weights, TEXTS)
    assert without_places(found) == expected
    kinds = {kind for entities in expected for e in entities.values() for kind, _ in e["relations"]}
    labels = {e["label"] for entities in expected for e in entities.values()}
    assert len(kinds) > 1 and len(labels) > 1, "the fixture has to tell labels and relations apart"


def test_entities_lie_where_they_say(weights):
    for text, found in zip(TEXTS, RadGraphAnnotator(settings(weights))(TEXTS), strict=True):
        for e in found["entities"].values():
            written = text[e["start"] : e["end"]]
            assert re.sub(r"\s", "", written) == e["tokens"].replace(" ", "")
            assert written == written.strip()


def test_batches_hold_reports_of_one_length(weights):
    annotator = RadGraphAnnotator(settings(weights, batch_size=8))
    lengths = [300, 40, 2, 300, *[40] * 8, 100, *[100] * 6]
    batches = annotator._batches([["word"] * n for n in lengths])
    # 65536 / 100^2 = 6 reports of 100 words, and less than one of 300.
    assert [[lengths[row] for row in batch] for batch in batches] == [
        [2],
        [40] * 8,
        [40],
        [100] * 6,
        [100],
        [300],
        [300],
    ]


def test_texts_without_words_meet_no_model(weights, monkeypatch):
    monkeypatch.setattr(module, "_load", lambda *args: pytest.fail("the model was loaded"))
    assert RadGraphAnnotator(settings(weights))(["", " \n\t", "\u3000"]) == [{"entities": {}}] * 3
    if weights[1] == "radgraph-xl":  # which reads a written-out line break as white space
        assert RadGraphAnnotator(settings(weights))([r"\n"]) == [{"entities": {}}]


def test_a_cache_on_disk_needs_no_model_and_is_never_stale(weights, tmp_path, monkeypatch):
    cache = tmp_path / "made" / "annotations.jsonl"
    first = RadGraphAnnotator(settings(weights, cache=str(cache)))(TEXTS)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_load", lambda *args: pytest.fail("the model was loaded"))
        annotator = RadGraphAnnotator(settings(weights, cache=str(cache)))
        assert annotator(TEXTS[::-1]) == first[::-1]
    with pytest.raises(RuntimeError, match="loaded"):
        monkeypatch.setattr(module, "_load", lambda *args: (_ for _ in ()).throw(RuntimeError("loaded")))
        RadGraphAnnotator(settings(weights, cache=str(cache)))([TEXTS[0] + " "])


def test_the_random_numbers_around_it_stay_as_they_were(weights):
    before = torch.random.get_rng_state()
    RadGraphAnnotator(settings(weights))(["no effusion"])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_other_weights_have_another_fingerprint(weights, tmp_path):
    root, kind = weights
    before = RadGraphAnnotator(settings(weights)).fingerprint
    copy = tmp_path / kind
    copy.mkdir()
    (copy / "vocabulary").mkdir()
    for path in [*(root / kind / "vocabulary").glob("*.txt"), root / kind / "config.json"]:
        (copy / path.relative_to(root / kind)).write_bytes(path.read_bytes())
    state = torch.load(root / kind / "weights.th", weights_only=True)
    torch.save(state, copy / "weights.th")
    state["_events._distance_embedding.weight"][0, 0] += 1
    torch.save(state, copy / "weights.th")
    assert RadGraphAnnotator(settings((tmp_path, kind))).fingerprint != before


def test_evaluate_runs_the_model_once_for_both_sides(package, weights):
    root, kind = weights
    references = [TEXTS[0], TEXTS[2]]
    scores = dive_fast.evaluate(
        [TEXTS[0].upper(), ""],
        references,
        metrics=("radgraph",),
        metric_options={"radgraph": {"weights": str(root), "model_type": kind, "device": "cpu"}},
    )
    # An uncased encoder reads capitals alike, and the words are compared in lower case.
    assert scores.per_document["radgraph_simple"] == [1.0, 0.0]
    assert scores["radgraph_partial"] == scores["radgraph_complete"] == 0.5
    assert scores.settings["radgraph"]["weights"] == RadGraphAnnotator(settings(weights)).fingerprint


@pytest.mark.gpu
def test_a_gpu_annotates_alike(weights):
    root, kind = weights
    on_gpu = RadGraphAnnotator(RadGraphSettings(weights=str(root), model_type=kind, device="cuda"))
    assert on_gpu(TEXTS) == RadGraphAnnotator(settings(weights))(TEXTS)
    assert next(on_gpu._model.model.parameters()).is_cuda


# -- what is in the way ----------------------------------------------------------------------------------------------


def truncate(folder):
    whole = (folder / "weights.th").read_bytes()
    (folder / "weights.th").write_bytes(whole[: len(whole) // 2])


def of_another_model(folder):
    torch.save({"linear.weight": torch.zeros(2, 2)}, folder / "weights.th")


def of_another_vocabulary(folder):
    file = next((folder / "vocabulary").glob("*__ner_labels.txt"))
    file.write_text(file.read_text() + "Observation::new\n")


BREAK = {
    "truncated": (truncate, "cannot be loaded as"),
    "text": (lambda folder: (folder / "weights.th").write_text("not weights"), "cannot be loaded as"),
    "empty": (lambda folder: (folder / "weights.th").write_bytes(b""), "cannot be loaded as"),
    "another model": (of_another_model, "cannot be loaded as .*Missing key"),
    "another vocabulary": (of_another_vocabulary, "cannot be loaded as .*size mismatch"),
    "no weights": (lambda folder: (folder / "weights.th").unlink(), "weights.th is missing"),
    "no labels": (lambda folder: next((folder / "vocabulary").glob("*ner*")).unlink(), "ner_labels.txt is missing"),
    "config": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json is not a configuration of RadGraph",
    ),
    "config of another": (lambda folder: (folder / "config.json").write_text('{"model": {}}'), "not a configuration"),
}


@pytest.mark.parametrize("how", BREAK)
def test_damaged_or_mismatched_files_are_refused_by_name(package, tmp_path, how):
    write_radgraph(tmp_path)
    damage, message = BREAK[how]
    damage(tmp_path / "radgraph")
    with pytest.raises(InputError, match=f"weights: (?s:.*){message}"):
        RadGraphAnnotator(settings((tmp_path, "radgraph")))(["no effusion"])
    assert not any(hasattr(PreTrainedTokenizerBase, name) for name in METHODS), "left behind after an error"


def test_a_missing_folder_says_what_it_should_hold(package, tmp_path):
    with pytest.raises(
        InputError, match=r"weights.*config.json is missing; expected the folder ROOT that holds ROOT/radgraph"
    ):
        RadGraphAnnotator(settings((tmp_path / "nowhere", "radgraph")))


def test_a_hub_that_cannot_be_reached_says_so(package):
    with pytest.raises(InputError, match="radgraph.tar.gz of 'StanfordAIMI/RRG_scorers' cannot be downloaded"):
        RadGraphAnnotator(RadGraphSettings(device="cpu"))


def test_a_device_that_is_not_here(package, weights):
    root, kind = weights
    with pytest.raises(InputError, match="device: 'cuda:99' is not here"):
        RadGraphAnnotator(RadGraphSettings(weights=str(root), model_type=kind, device="cuda:99"))
    with pytest.raises(InputError, match="device: expected a name such as"):
        RadGraphAnnotator(RadGraphSettings(weights=str(root), model_type=kind, device="gpu"))


def test_an_archive_of_the_hub_is_unpacked_once(package, weights, tmp_path, monkeypatch):
    root, kind = weights
    archive = tmp_path / f"{kind}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted((root / kind).iterdir()):
            tar.add(path, path.name)
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda **what: asked.append(what) or str(archive))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    annotator = RadGraphAnnotator(RadGraphSettings(weights="someone/scorers", model_type=kind, device="cpu"))
    assert asked == [{"repo_id": "someone/scorers", "filename": f"{kind}.tar.gz"}]
    assert annotator(TEXTS[:1]) == RadGraphAnnotator(settings(weights))(TEXTS[:1])
    assert len(list((tmp_path / ".cache" / "dive_fast").iterdir())) == 1
    RadGraphAnnotator(RadGraphSettings(weights="someone/scorers", model_type=kind, device="cpu"))

    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be unpacked"):
        RadGraphAnnotator(RadGraphSettings(weights="someone/scorers", model_type=kind, device="cpu"))


def test_without_the_package_the_command_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "radgraph"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "radgraph", None)
    with pytest.raises(InputError, match=r"pip install 'dive_fast\[clinical\]'"):
        dive_fast.evaluate(["a"], ["a"], metrics=("radgraph",))


# -- the two tokenizer methods ---------------------------------------------------------------------------------------


def test_tokenizer_methods_are_there_inside_and_gone_after_also_when_nested():
    assert not any(hasattr(PreTrainedTokenizerBase, name) for name in METHODS)
    with tokenizer_methods():
        with tokenizer_methods():
            pass
        assert all(hasattr(PreTrainedTokenizerBase, name) for name in METHODS)
    assert not any(name in vars(PreTrainedTokenizerBase) for name in METHODS)


def test_a_method_that_transformers_has_stays_its_own(monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerBase, "encode_plus", builtins.len, raising=False)
    with tokenizer_methods():
        assert PreTrainedTokenizerBase.encode_plus is builtins.len
    assert PreTrainedTokenizerBase.encode_plus is builtins.len


def test_threads_do_not_take_the_methods_from_each_other():
    missed, start = [], threading.Barrier(8)

    def use():
        start.wait()
        for _ in range(200):
            with tokenizer_methods():
                missed.extend(name for name in METHODS if not hasattr(PreTrainedTokenizerBase, name))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert missed == [] and not any(hasattr(PreTrainedTokenizerBase, name) for name in METHODS)


def test_threads_share_an_annotator(weights):
    annotator = RadGraphAnnotator(settings(weights))
    found = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: annotator([TEXTS[i]])[0]})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == RadGraphAnnotator(settings(weights))(TEXTS[:4])


# -- places of words, without the package ----------------------------------------------------------------------------


def test_word_places_by_hand():
    text = "No  effusion,\nheart(normal)."
    words = ["No", "effusion", ",", "heart", "(", "normal", ")", "."]
    assert word_places(text, words) == [(0, 2), (4, 12), (12, 13), (14, 19), (19, 20), (20, 26), (26, 27), (27, 28)]


def test_what_the_xl_types_replace_keeps_its_place():
    # A backslash and an n are read as white space, a backslash and a quotation mark as two graves.
    text = r"a\n\"b"
    assert word_places(text, ["a", "``", "b"], replaced=True) == [(0, 1), (3, 5), (5, 6)]


def test_an_annotation_by_hand():
    words = ["No", "left", "effusion", "."]
    entities = [(1, 1, "ANAT-DP"), (2, 2, "OBS-DA")]
    relations = [((1, 1), (2, 2), "modify"), ((1, 1), (0, 0), "located_at"), ((3, 3), (2, 2), "modify")]
    assert annotation("No left effusion.", words, entities, relations)["entities"] == {
        "1": {
            "tokens": "left",
            "label": "ANAT-DP",
            "start_ix": 1,
            "end_ix": 1,
            "relations": [["modify", "2"]],  # the other one's object is no entity
            "start": 3,
            "end": 7,
        },
        "2": {
            "tokens": "effusion",
            "label": "OBS-DA",
            "start_ix": 2,
            "end_ix": 2,
            "relations": [],
            "start": 8,
            "end": 16,
        },
    }
