"""MIMIC-CXR: sections of invented reports cut by hand, the join of its tables, and everything that can be wrong."""

import csv
import gzip
import io
import shutil

import pytest

from dive_fast.data import load_data, load_mimic_cxr
from dive_fast.data.mimic_sections import conclusion, named_sections, section_name, split_sections
from dive_fast.errors import InputError
from tests.data_fixtures import MIMIC_METADATA, MIMIC_SPLIT, film, mimic_text, table, write_mimic_cxr

FINDINGS, IMPRESSION = "Describe the findings of the chest X-ray.", "Write the impression of the chest X-ray."


@pytest.fixture
def root(tmp_path):
    return write_mimic_cxr(tmp_path / "mimic")


def told(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


# Sections


def test_sections_of_a_padded_report():
    title = "                 FINAL REPORT"
    text = f"{title}\n INDICATION:  ___F, cough.\n \n FINDINGS: \n Two\n lungs.\n \n IMPRESSION:  Fine."
    assert split_sections(text) == [
        ("preamble", f"{title}\n "),
        # The blank after the colon belongs to the header; a text runs to the line end before the next one.
        ("indication", " ___F, cough.\n "),
        ("findings", "\n Two\n lungs.\n "),
        ("impression", " Fine."),
    ]


def test_what_stands_in_a_headers_own_line_is_no_header():
    # "FINDINGS:" is followed by nothing, so its first line is the next one, and a header there would be its text.
    assert named_sections("x\n EXAMINATION:\n INDICATION:  Cough.\n FINDINGS:  Clear.") == {
        "preamble": "x",
        "examination": "INDICATION:  Cough.",
        "findings": "Clear.",
    }


def test_last_section_of_a_name_wins_and_empty_findings_are_none():
    text = mimic_text(("FINDINGS", "First."), ("CHEST, TWO VIEWS", "Second."), ("FINDINGS", " "), ("IMPRESSION", ""))
    assert named_sections(text) == {"preamble": "FINAL REPORT", "findings": "Second."}


def test_without_findings_and_impression_the_last_section_is_cut_at_its_first_blank_line():
    text = "x\n HISTORY:  Fever.\n \n Clear lungs.\n \n No more."
    assert split_sections(text)[1:] == [("history", " Fever."), ("last_paragraph", " Clear lungs.\n \n No more.")]
    assert conclusion("s1", text) == "Clear lungs.\n \n No more."
    assert split_sections("No header.\n It goes on.") == [("full report", "No header.\n It goes on.")]
    assert conclusion("s1", "No header.\n It goes on.") == ""
    assert conclusion("s1", "x\n COMPARISON:  Clear since.") == "Clear since."


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("IMPRESSION", "impression"),
        ("FINDINGS AND IMPRESSION", "impression"),
        ("CONCLUSION", "impression"),
        ("IMPRSSION", "impression"),
        ("NDICATION", "impression"),  # so in the data set's own table
        ("NEW FINDINGS ON THE LEFT", "findings"),
        ("CHEST (PORTABLE AP)", "findings"),
        ("PA AND LAT", "findings"),
        ("REASON FOR EXAM", "indication"),
        ("PFI", "history"),
        ("RECOMMENDATION(S)", "recommendations"),
        ("SURGICAL HISTORY", "history"),
        ("TECHNIQUE", "technique"),
        ("SOMETHING ELSE", "something else"),
    ],
)
def test_section_names(header, name):
    assert section_name(header) == name


def test_studies_with_a_rule_of_their_own():
    text = mimic_text(("INDICATION", "Said here."), ("TECHNIQUE", "Said there."), ("FINDINGS", "As usual."))
    assert conclusion("s57936451", text) == "Said here."
    assert conclusion("s59279892", text) == "Said there."
    assert conclusion("s56579911", text) == text[59:218].strip() != ""
    assert conclusion("s58235663", text) == ""
    assert conclusion("s59279893", text) == "As usual."
    assert conclusion("s56451190", text) == ""  # its section is not there


# Records


def test_records_of_the_training_part(root):
    records = load_mimic_cxr(root)
    first, second = records
    assert first.id == "s50000001" and second.id == "s50000002"
    assert first.prompt == f"Indication: ___F with an invented cough.\n{FINDINGS}"
    assert first.report == "Invented nodule, as of ___. Heart is normal."
    folder = root / "files" / "p10" / "p10000001" / "s50000001"
    assert first.images == (str(folder / "a3.jpg"), str(folder / "a2.jpg"))  # PA comes before AP
    assert first.meta == {
        "patient_id": "10000001",
        "split": "train",
        "views": ("PA", "AP"),
        "indication": "___F with an invented cough.",
        "has_deid": True,
    }
    assert second.report == "Line ends at the cavoatrial junction."
    assert second.prompt == f"Indication: Line placed.\n{FINDINGS}"
    # 4 and 5 have no findings, 3 has only a lateral film and one of unknown view.
    assert str(records.counts) == (
        "2 records with 3 images; left out: 2 without a text in findings, 1 without a film of the views asked for"
    )


@pytest.mark.parametrize(
    ("options", "reports"),
    [
        ({"split": "val"}, {"s50000006": "Held out."}),
        ({"split": "validate"}, {"s50000006": "Held out."}),
        ({"split": "test", "target": "impression"}, {"s50000007": "Only an impression."}),
        ({"target": "impression"}, {"s50000001": "One invented nodule.", "s50000002": "Line as wanted."}),
        (
            {"views": "lateral"},
            {"s50000001": "Invented nodule, as of ___. Heart is normal.", "s50000003": "Invented haze."},
        ),
        (
            {"target": "conclusion", "views": None},
            {
                "s50000001": "One invented nodule.",
                "s50000002": "Line as wanted.",
                "s50000003": "Invented haze.",
                "s50000004": "Lungs are clear. No more.",
            },
        ),
    ],
)
def test_splits_targets_and_views(root, options, reports):
    assert {record.id: record.report for record in load_mimic_cxr(root, **options)} == reports


def test_choice_of_views(root):
    def films(**options):
        return [[path.split("/")[-1] for path in record.images] for record in load_mimic_cxr(root, **options)]

    assert films(views="all") == [["a3.jpg", "a2.jpg", "a1.jpg"], ["b1.jpg"], ["c1.jpg", "c2.jpg"]]
    assert films(views="all", max_images=1) == [["a3.jpg"], ["b1.jpg"], ["c1.jpg"]]
    assert films(views=["lateral", "PA"]) == [["a1.jpg", "a3.jpg"], ["c1.jpg"]]
    assert films(views=["ap"]) == [["a2.jpg"], ["b1.jpg"]]
    assert films(views=[""]) == [["c2.jpg"]]
    assert films(views=None) == [[], [], []]
    told(lambda: films(views="sideways"), "views: expected None for no images, or some of frontal, lateral, all, PA")


def test_without_views_neither_films_nor_their_table_are_needed(root):
    (root / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    for folder in (root / "files").glob("*/*/s*"):
        if folder.is_dir():
            shutil.rmtree(folder)
    assert [record.images for record in load_mimic_cxr(root, views=None)] == [(), (), ()]
    told(lambda: load_mimic_cxr(root), "mimic-cxr-2.0.0-metadata.csv.gz", "found no such file", "The folder holds")


def test_options_of_prompt_limit_and_places(tmp_path, root):
    assert [record.prompt for record in load_mimic_cxr(root, indication=False)] == [FINDINGS] * 2
    assert load_mimic_cxr(root, target="impression", limit=1)[0].prompt.endswith(IMPRESSION)
    limited = load_data("mimic_cxr", root=root, limit=1)
    assert [record.id for record in limited] == ["s50000001"] and not limited.counts.dropped
    apart = write_mimic_cxr(tmp_path / "jpg", reports=tmp_path / "txt")
    assert [r.report for r in load_mimic_cxr(apart, reports_root=tmp_path / "txt")] == [
        r.report for r in load_mimic_cxr(root)
    ]


def test_line_ends_and_byte_order_marks_of_other_systems(root):
    report = root / "files" / "p10" / "p10000001" / "s50000001.txt"
    before = load_mimic_cxr(root)
    report.write_bytes(b"\xef\xbb\xbf" + report.read_bytes().replace(b"\n", b"\r\n"))
    split = root / "mimic-cxr-2.0.0-split.csv.gz"
    text = gzip.decompress(split.read_bytes()).replace(b"\n", b"\r\n")
    (root / "mimic-cxr-2.0.0-split.csv").write_bytes(b"\xef\xbb\xbf" + text)
    split.unlink()
    assert load_mimic_cxr(root) == before


# What is wrong


def test_wrong_root(tmp_path):
    told(lambda: load_mimic_cxr(tmp_path / "none"), "root: expected", "split.csv.gz", "there is no such folder")
    (tmp_path / "films").mkdir()
    looked = f"looked for {tmp_path / 'mimic-cxr-2.0.0-split.csv.gz'} or {tmp_path / 'mimic-cxr-2.0.0-split.csv'}"
    told(lambda: load_mimic_cxr(tmp_path), "root: expected", looked, "The folder holds films")


@pytest.mark.parametrize("root", [None, 3])
def test_a_root_that_is_no_path(root):
    told(lambda: load_mimic_cxr(root), "root: expected the folder of MIMIC-CXR-JPG", f"got {root!r}")


@pytest.mark.parametrize("kind", ["split", "metadata"])
def test_damaged_tables(root, kind):
    path = root / f"mimic-cxr-2.0.0-{kind}.csv.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-12])
    told(lambda: load_mimic_cxr(root), str(path), "not a whole gzip file", "copy it again")
    path.write_bytes(gzip.compress(gzip.decompress(whole).replace(b"dicom_id", b"image_id")))
    told(lambda: load_mimic_cxr(root), str(path), "lacks the columns dicom_id", "image_id")
    path.write_bytes(gzip.compress(gzip.decompress(whole)[:-8]))
    told(lambda: load_mimic_cxr(root), str(path), "cells where the header has")
    path.write_bytes(gzip.compress(gzip.decompress(whole) + b"\xff\xfe"))
    told(lambda: load_mimic_cxr(root), "not UTF-8")
    path.write_bytes(gzip.compress(b""))
    told(lambda: load_mimic_cxr(root), "the file is empty")


def rows_of(path):
    with gzip.open(path, "rt", newline="") as file:
        return list(csv.DictReader(io.StringIO(file.read())))


@pytest.mark.parametrize(("kind", "columns"), [("split", MIMIC_SPLIT), ("metadata", MIMIC_METADATA)])
def test_an_id_twice(root, kind, columns):
    path = root / f"mimic-cxr-2.0.0-{kind}.csv.gz"
    rows = rows_of(path)
    twice = next(row for row in rows if row["dicom_id"] == "a2")
    table(path, columns, [*rows, twice])
    told(lambda: load_mimic_cxr(root), f"{path.name}, line {len(rows) + 2}", "dicom_id 'a2' occurs twice")


def test_split_file_that_contradicts_itself(root):
    path = root / "mimic-cxr-2.0.0-split.csv.gz"
    rows = rows_of(path)
    extra = {"dicom_id": "z", "study_id": "50000001", "subject_id": "10000001", "split": "test"}
    table(path, MIMIC_SPLIT, [*rows, extra])
    told(lambda: load_mimic_cxr(root, split=None), "study 50000001 is of subject 10000001 in test", "in train")
    table(path, MIMIC_SPLIT, [*rows, {**extra, "split": "dev"}])
    told(lambda: load_mimic_cxr(root), "split is 'dev'; expected one of train, validate, test")


def test_films_that_the_metadata_does_not_have_are_counted(root):
    path = root / "mimic-cxr-2.0.0-metadata.csv.gz"
    table(path, MIMIC_METADATA, [row for row in rows_of(path) if row["dicom_id"] != "b1"])
    counts = load_mimic_cxr(root).counts
    assert counts.records == 1 and counts.dropped["without a film of the views asked for"] == 2
    assert counts.notes == {"films of the split that the metadata does not have": 1}


def test_missing_and_broken_images(root):
    folder = root / "files" / "p10" / "p10000001"
    (folder / "s50000001" / "a2.jpg").unlink()
    cut = folder / "s50000002" / "b1.jpg"
    cut.write_bytes(film(cut).read_bytes()[:-40])
    told(
        lambda: load_mimic_cxr(root),
        "1 images are missing and 1 broken, of 3 looked for",
        f"s50000001: {folder / 's50000001' / 'a2.jpg'} (no such file)",
        f"s50000002: {cut} (does not decode",
        "skip_missing_images=True",
    )
    (record,) = records = load_mimic_cxr(root, skip_missing_images=True)
    assert record.images == (str(folder / "s50000001" / "a3.jpg"),)
    assert records.counts.dropped["with no image that is there and whole"] == 1
    assert records.counts.notes == {"missing images": 1, "broken images": 1}
    # Whether a file is whole is not looked at then.
    assert len(load_mimic_cxr(root, skip_missing_images=True, check_images="exists")) == 2


def test_missing_reports(root):
    report = root / "files" / "p10" / "p10000001" / "s50000002.txt"
    report.unlink()
    told(lambda: load_mimic_cxr(root), "reports_root: report files are missing", str(report), "skip_missing_reports")
    records = load_mimic_cxr(root, skip_missing_reports=True)
    assert [r.id for r in records] == ["s50000001"] and records.counts.dropped["without a report file"] == 1
    (root / "files" / "p10" / "p10000001" / "s50000001.txt").write_bytes(b"\xff\xfe\x00")
    told(lambda: load_mimic_cxr(root, skip_missing_reports=True), "s50000001.txt is not UTF-8")


def test_reports_that_cannot_be_read_are_named(root):
    report = root / "files" / "p10" / "p10000001" / "s50000002.txt"
    report.unlink()
    report.mkdir()
    told(lambda: load_mimic_cxr(root), f"reports_root: {report} cannot be read (Is a directory)")
    report.rmdir()
    report.symlink_to(report)
    told(lambda: load_mimic_cxr(root), f"reports_root: {report} cannot be read (Too many levels of symbolic links)")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "dev"}, ["split: expected one of train, validate, test or None for all, got 'dev'"]),
        ({"split": 3}, ["split", "got 3"]),
        ({"target": "report"}, ["target: expected one of findings, impression, conclusion, got 'report'"]),
        ({"check_images": "all"}, ["check_images: expected one of exists, ends, decode"]),
        ({"limit": 0}, ["limit: expected a positive number"]),
        ({"limit": "5"}, ["limit: expected a positive number, or None for all, got '5'"]),
        ({"max_images": 0}, ["max_images: expected a positive number"]),
        ({"views": [3]}, ["views", "got [3]"]),
        ({"views": []}, ["views: expected None for no images", "got []"]),
        ({"split": "test"}, ["expected at least one record, got 0 records; left out: 1 without a text in findings"]),
    ],
)
def test_wrong_choices(root, options, words):
    told(lambda: load_mimic_cxr(root, **options), *words)
