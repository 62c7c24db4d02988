"""CheXpert Plus: rows grouped to studies, both suffixes, sections that are NaN, and what can be wrong."""

import gzip

import pytest

from dive_fast.data import load_chexpert_plus, load_data
from dive_fast.errors import InputError
from tests.data_fixtures import CHEXPERT_COLUMNS, CHEXPERT_ROWS, chexpert_row, table, write_chexpert_plus

NAME = "df_chexpert_plus_240401.csv"


@pytest.fixture
def root(tmp_path):
    return write_chexpert_plus(tmp_path / "plus")


def told(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_rows_become_studies(root):
    (record,) = records = load_chexpert_plus(root)
    assert record.id == "patient00001/study1"
    assert record.prompt == "Indication: 61 years old, invented dyspnea\nDescribe the findings of the chest X-ray."
    assert record.report == "1. Invented effusion."
    assert record.images == (str(root / "train/patient00001/study1/view1_frontal.jpg"),)
    assert record.meta == {
        "patient_id": "patient00001",
        "split": "train",
        "views": ("AP",),
        "indication": "61 years old, invented dyspnea",
    }
    # An empty cell and one that says "nan" are no findings.
    assert str(records.counts) == "1 record with 1 image; left out: 2 without a text in findings"


def test_targets_splits_and_views(root):
    impressions = load_chexpert_plus(root, target="impression")
    assert {r.id: r.report for r in impressions} == {
        "patient00001/study1": "1. Effusion.",
        "patient00001/study2": "Unchanged.",
        "patient00002/study1": "No fracture.",
    }
    assert impressions[2].prompt == "Indication: Invented trauma\nWrite the impression of the chest X-ray."
    assert impressions[2].meta["views"] == ("PA",)
    for split in ("val", "valid"):
        assert [r.report for r in load_chexpert_plus(root, split=split)] == ["Invented valid text."]
    assert len(load_data("chexpert_plus", root=root, split=None, target="impression", limit=2)) == 2
    both = load_chexpert_plus(root, views="all")[0]
    assert both.meta["views"] == ("AP", "Lateral") and both.images[1].endswith("study1/view2_lateral.jpg")
    assert load_chexpert_plus(root, views="lateral")[0].images == both.images[1:]
    assert [r.id for r in load_chexpert_plus(root, views=["PA"], target="impression")] == ["patient00002/study1"]
    assert load_chexpert_plus(root, views=None, indication=False)[0].images == ()


@pytest.mark.parametrize(("place", "suffix"), [("", ".jpg"), ("", ".png"), ("PNG", ".png")])
def test_films_of_either_suffix(tmp_path, place, suffix):
    root = write_chexpert_plus(tmp_path, place=place, suffix=suffix)
    for record in load_chexpert_plus(root, split=None, target="impression", views="all"):
        for image in record.images:
            assert image.startswith(str(root / place / "train")) and image.endswith(suffix)


def test_films_elsewhere_and_a_gzipped_table(tmp_path, root):
    films = write_chexpert_plus(tmp_path / "films", place="PNG", suffix=".png")
    (table_only := tmp_path / "table").mkdir()
    (table_only / f"{NAME}.gz").write_bytes(gzip.compress((root / NAME).read_bytes()))
    (record,) = load_chexpert_plus(table_only, image_root=films)
    assert record.images == (str(films / "PNG/train/patient00001/study1/view1_frontal.png"),)
    told(lambda: load_chexpert_plus(table_only), "1 images are missing", "table/train/patient00001/study1/view1")


def test_missing_images(root):
    film = root / "train/patient00001/study1/view1_frontal.jpg"
    film.unlink()
    told(lambda: load_chexpert_plus(root, views="all"), "1 images are missing and 0 broken, of 2", str(film))
    (record,) = load_chexpert_plus(root, views="all", skip_missing_images=True)
    assert [image[-12:] for image in record.images] == ["_lateral.jpg"]
    told(lambda: load_chexpert_plus(root, skip_missing_images=True), "got 0 records; left out: 2 without")


def test_what_is_wrong_in_the_table(tmp_path, root):
    told(lambda: load_chexpert_plus(tmp_path), "root: expected the folder of CheXpert Plus", NAME, "holds plus")
    path = root / NAME
    columns = [name if name != "section_findings" else "findings" for name in CHEXPERT_COLUMNS]
    table(path, columns, [])
    told(lambda: load_chexpert_plus(root), "lacks the columns section_findings", "section_impression")

    def with_row(row):
        table(path, CHEXPERT_COLUMNS, [*CHEXPERT_ROWS, row])
        return lambda: load_chexpert_plus(root)

    told(with_row(CHEXPERT_ROWS[0]), "'train/patient00001/study1/view1_frontal.jpg' occurs twice", "line ")
    told(with_row({**CHEXPERT_ROWS[0], "path_to_image": "view1.jpg"}), "path_to_image is 'view1.jpg'; expected such as")
    told(with_row({**CHEXPERT_ROWS[0], "split": "test"}), "split is 'test'; expected one of train, valid")
    told(lambda: load_chexpert_plus(root, split="test"), "split: expected one of train, valid or None")
    told(lambda: load_chexpert_plus(root, target="conclusion"), "target: expected one of findings, impression")
    path.write_bytes(path.read_bytes()[:-60])
    told(lambda: load_chexpert_plus(root), NAME)


def test_a_study_of_two_patients_or_splits_is_refused(root):
    """Its films would be one record, and a leak that nobody sees."""

    def with_row(path, **cells):
        table(root / NAME, CHEXPERT_COLUMNS, [*CHEXPERT_ROWS, chexpert_row(path, **cells)])
        return lambda: load_chexpert_plus(root, split=None)

    folder, told_of = "patient00001/study1", "study patient00001/study1 is of patient "
    told(with_row(f"train/{folder}/v.jpg", deid_patient_id="p9"), told_of + "p9 in train, and above of patient00001 in")
    told(with_row(f"valid/{folder}/v.jpg"), told_of + "patient00001 in valid, and above of patient00001 in train")


def test_a_study_has_its_first_rows_text_that_is_one(root):
    rows = [{**CHEXPERT_ROWS[3], "section_findings": "nan", "section_clinical_history": ""}, *CHEXPERT_ROWS[:3]]
    write_chexpert_plus(root, rows)
    (record,) = records = load_chexpert_plus(root, views="all")
    assert record.report == "1. Invented effusion." and record.meta["indication"] == "61 years old, invented dyspnea"
    assert not records.counts.notes


def test_a_film_with_another_text_than_its_study_is_counted(root):
    other = chexpert_row("train/patient00001/study1/view3_frontal.jpg", section_findings="Another text.")
    write_chexpert_plus(root, [*CHEXPERT_ROWS, other])
    (record,) = records = load_chexpert_plus(root)
    assert record.report == "1. Invented effusion." and len(record.images) == 2
    assert records.counts.notes == {"rows with another text than their study's first, which counts": 1}
