"""PadChest: rows grouped to studies, its split by patient, and the columns of the published table."""

import csv
import gzip
import hashlib
import importlib.util
from pathlib import Path

import pytest

from dive_fast.data import load_data, load_padchest
from dive_fast.data.padchest import TABLE
from dive_fast.errors import InputError
from tests.data_fixtures import PADCHEST_COLUMNS, PADCHEST_ROWS, padchest_row, write_padchest

REQUEST = "Describe the findings of the chest X-ray in Spanish."


@pytest.fixture
def root(tmp_path):
    return write_padchest(tmp_path / "padchest")


def told(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_rows_become_studies(root):
    (record,) = records = load_padchest(root)
    assert (record.id, record.prompt, record.report) == ("s1", REQUEST, "nodul invent pulmon .")
    assert record.images == (str(root / "7" / "i2.png"),)
    assert record.meta == {
        "patient_id": "p2",
        "split": "train",
        "views": ("PA",),
        "labels": ("nodule", "normal"),
        "method": "Physician",
    }
    assert records.counts.dropped == {"with films of several patients": 1, "without a text in report": 1}
    labelled = load_data("padchest", root=root, target="labels", views="all")
    found = [(r.id, r.report, len(r.images)) for r in labelled]
    assert found == [("s1", "nodule; normal", 2), ("s2", "cardiomegaly", 1)]
    assert labelled[0].prompt == "Name the findings of the chest X-ray." and labelled[1].meta["method"] == "RNN_model"


def test_the_split_is_by_patient(root):
    tenths = {p: int(hashlib.sha256(p.encode()).hexdigest(), 16) % 10 for p in ("p2", "p3", "p5", "p13")}
    assert tenths == {"p2": 9, "p3": 3, "p5": 1, "p13": 0}
    assert [r.id for r in load_padchest(root, split="test")] == ["s4"]
    assert [r.id for r in load_padchest(root, split="val", views=["COSTAL"])] == ["s3"]
    every = load_padchest(root, split=None, views=None)
    assert {r.id: r.meta["split"] for r in every} == {"s1": "train", "s3": "val", "s4": "test"}


def test_films_in_one_folder_and_a_table_elsewhere(tmp_path, root):
    flat = write_padchest(tmp_path / "flat", flat=True)
    assert load_padchest(flat)[0].images == (str(flat / "i2.png"),)
    (flat / f"{TABLE}.gz").unlink()
    told(lambda: load_padchest(flat), f"looked for {flat / TABLE} or {flat / TABLE}.gz")
    assert load_padchest(flat, table=root / f"{TABLE}.gz")[0].images == (str(flat / "i2.png"),)
    assert load_padchest(table=root / f"{TABLE}.gz", views=None)[0].images == ()
    told(lambda: load_padchest(table=root / f"{TABLE}.gz"), "root: expected the folder with PadChest's films")
    told(lambda: load_padchest(), "root: expected")
    told(lambda: load_padchest(flat, table=tmp_path / "none.csv"), "table: expected", "none.csv")


def test_what_is_wrong(root):
    write_padchest(root, [*PADCHEST_ROWS, PADCHEST_ROWS[0]])
    told(lambda: load_padchest(root), "line 9: the ImageID 'i1.png' occurs twice")
    write_padchest(root, [*PADCHEST_ROWS, padchest_row("i8", "s8", "p2", "PA", "r", "['nodule")])
    told(lambda: load_padchest(root), "Labels must be a list such as ['normal'], got \"['nodule\"")
    write_padchest(root, [*PADCHEST_ROWS, padchest_row("i8", "s8", "p2", "PA", "r", "'normal'")])
    told(lambda: load_padchest(root), "Labels must be a list such as ['normal'], got \"'normal'\"")
    write_padchest(root)
    (root / "7" / "i2.png").unlink()
    told(lambda: load_padchest(root), "1 images are missing", "i2.png (no such file)")
    assert load_padchest(root, views="all", skip_missing_images=True)[0].images == (str(root / "7" / "i1.png"),)


def test_the_published_table_has_these_columns():
    spec = importlib.util.find_spec("torchxrayvision")
    if spec is None:
        pytest.skip("torchxrayvision is not installed, whose wheel carries PadChest's table")
    path = Path(spec.submodule_search_locations[0]) / "data" / f"{TABLE}.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        assert tuple(next(csv.reader(file))) == PADCHEST_COLUMNS
    records = load_padchest(table=path, split="test", views=None, limit=20)
    assert len(records) == 20 and all(record.report and record.meta["labels"] for record in records)
