"""The Indiana University X-rays as Kaggle and as R2Gen publish them."""

import pytest

from dive_fast.data import load_data, load_iu_kaggle, load_iu_r2gen
from dive_fast.errors import InputError
from tests.data_fixtures import (
    KAGGLE_FILMS,
    KAGGLE_REPORTS,
    KAGGLE_ROWS,
    R2GEN_ITEMS,
    r2gen_item,
    table,
    write_iu_kaggle,
    write_iu_r2gen,
)

REQUEST = "Describe the findings of the chest X-ray."


def told(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


@pytest.fixture
def kaggle(tmp_path):
    return write_iu_kaggle(tmp_path / "kaggle")


@pytest.fixture
def r2gen(tmp_path):
    return write_iu_r2gen(tmp_path / "r2gen")


def test_kaggle_has_r2gens_split(kaggle):
    (record,) = records = load_iu_kaggle(kaggle)
    assert record.id == "CXR5" and record.report == "Invented nodule, XXXX."
    assert record.prompt == f"Indication: Invented pain\n{REQUEST}"
    assert record.images == (str(kaggle / "images/images_normalized/5_IM-2117-1003002.dcm.png"),)
    assert record.meta == {
        "split": "train",
        "views": ("Frontal",),
        "indication": "Invented pain",
        "tags": ("Nodule/lung", "Opacity"),
        "has_deid": True,
    }
    # Study 1 is in train as well, with a lateral film only.
    assert str(records.counts) == "1 record with 1 image; left out: 1 without a film of the views asked for"
    parts = {part: [r.id for r in load_iu_kaggle(kaggle, split=part, views=None)] for part in ("train", "val", None)}
    assert parts == {"train": ["CXR5", "CXR1"], "val": ["CXR4"], None: ["CXR5", "CXR1", "CXR3", "CXR4"]}
    told(lambda: load_iu_kaggle(kaggle, split="test"), "got 0 records; left out: 1 without a text in findings")
    (test,) = load_iu_kaggle(kaggle, split="test", target="impression", indication=False)
    assert (test.report, test.prompt) == ("Clear.", "Write the impression of the chest X-ray.")


def test_kaggle_views_limit_and_place(tmp_path, kaggle):
    both = load_iu_kaggle(kaggle, views="all")
    assert [r.meta["views"] for r in both] == [("Frontal", "Lateral"), ("Lateral",)]
    assert [r.meta["views"] for r in load_iu_kaggle(kaggle, views=["lateral"])] == [("Lateral",)] * 2
    assert len(load_data("iu_kaggle", root=kaggle, views="all", limit=1)) == 1
    (kaggle / "images" / "images_normalized").rename(tmp_path / "films")
    told(lambda: load_iu_kaggle(kaggle), "1 images are missing", "skip_missing_images=True")
    assert load_iu_kaggle(kaggle, image_root=tmp_path / "films")[0].images[0].startswith(str(tmp_path / "films"))


def test_kaggle_errors(tmp_path, kaggle):
    told(lambda: load_iu_kaggle(tmp_path), "indiana_reports.csv", "The folder holds kaggle")
    write_iu_kaggle(kaggle, films=[*KAGGLE_FILMS, KAGGLE_FILMS[0]])
    told(lambda: load_iu_kaggle(kaggle), "projections.csv, line 7: the film '4_IM-2050-1001.dcm.png' occurs twice")
    write_iu_kaggle(kaggle, rows=[*KAGGLE_ROWS, KAGGLE_ROWS[1]])
    told(lambda: load_iu_kaggle(kaggle), "indiana_reports.csv, line 7: the uid '1' occurs twice")
    table(kaggle / "indiana_reports.csv", [c for c in KAGGLE_REPORTS if c != "findings"], [])
    told(lambda: load_iu_kaggle(kaggle), "lacks the columns findings")
    told(lambda: load_iu_kaggle(kaggle, target="impression"), "expected at least one record")
    (kaggle / "indiana_projections.csv").unlink()
    told(lambda: load_iu_kaggle(kaggle, target="impression"), "looked for", "indiana_projections.csv")


def test_r2gen_annotation(r2gen):
    (record,) = records = load_iu_r2gen(r2gen)
    assert record.id == "CXR2384_IM-0942" and record.prompt == REQUEST
    assert record.report == "Invented heart . Invented lungs ."
    assert record.images == tuple(str(r2gen / "images" / "CXR2384_IM-0942" / f"{i}.png") for i in range(2))
    assert record.meta == {"split": "train"}
    assert str(records.counts) == "1 record with 2 images; left out: 1 without a text in report"
    assert [r.meta["split"] for r in load_iu_r2gen(r2gen, split=None)] == ["train", "val", "test"]
    assert [len(r.images) for r in load_iu_r2gen(r2gen, split="val", max_images=1)] == [1]
    assert [len(r.images) for r in load_iu_r2gen(r2gen, split="test", images=False)] == [0]
    assert len(load_iu_r2gen(r2gen, split=None, limit=2)) == 2


def test_r2gens_mimic_annotation_has_patients(tmp_path):
    item = {**r2gen_item("0a1b", "test", "Clear .", films=1), "study_id": 50000007, "subject_id": 15000006}
    (record,) = load_iu_r2gen(write_iu_r2gen(tmp_path, [item]), split="test")
    assert record.meta == {"study_id": 50000007, "subject_id": 15000006, "split": "test", "patient_id": "15000006"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"train": [', ["annotation.json, line 1: not JSON"]),
        ("[]", ["expected an object with the lists train, val, test, got list"]),
        ('{"train": []}', ["got train"]),
        ('{"train": [3], "val": [], "test": []}', ["train[0]: expected an object with id, report, image_path"]),
        ('{"train": [{"id": "a"}], "val": [], "test": []}', ["it lacks report, image_path"]),
        (
            '{"train": [{"id": "a", "report": null, "image_path": []}], "val": [], "test": []}',
            ["train[0]: report must be a text, got NoneType"],
        ),
        (
            '{"train": [{"id": "a", "report": "r", "image_path": "x.png"}], "val": [], "test": []}',
            ["image_path must be a list of paths, got 'x.png'"],
        ),
        (
            '{"train": [{"id": "a", "report": "r \\ud83d", "image_path": []}], "val": [], "test": []}',
            ["record 'a': its report holds half of a surrogate pair"],
        ),
        ('{"train": [], "val": [], "test": []}', ["expected at least one record"]),
    ],
)
def test_r2gen_layouts_that_are_wrong(tmp_path, text, words):
    (tmp_path / "annotation.json").write_text(text)
    told(lambda: load_iu_r2gen(tmp_path), *words)


def test_r2gen_ids_files_and_images_that_are_wrong(tmp_path, r2gen):
    told(lambda: load_iu_r2gen(tmp_path), "annotation.json", "The folder holds r2gen")
    told(lambda: load_iu_r2gen(r2gen, split="validate"), "split: expected one of train, val, test")
    text = (r2gen / "annotation.json").read_bytes()
    (r2gen / "annotation.json").write_bytes(b"\xef\xbb\xbf" + text)
    assert len(load_iu_r2gen(r2gen)) == 1
    (r2gen / "annotation.json").write_bytes(b"\xff\xfe" + text)
    told(lambda: load_iu_r2gen(r2gen), "not UTF-8")
    write_iu_r2gen(r2gen, [R2GEN_ITEMS[0], R2GEN_ITEMS[0]])
    told(lambda: load_iu_r2gen(r2gen), "the id 'CXR2384_IM-0942' occurs twice")
    write_iu_r2gen(r2gen)
    (r2gen / "images" / "CXR2384_IM-0942" / "0.png").write_bytes(b"")
    told(lambda: load_iu_r2gen(r2gen), "0 images are missing and 1 broken, of 2", "0.png (an empty file)")
    assert len(load_iu_r2gen(r2gen, skip_missing_images=True)[0].images) == 1
