"""Rows from files and from memory as records, and every way in which they can be wrong."""

import csv
import gzip
import io
import json

import pytest
from PIL import Image

from dive_fast.data import DATA_SETS, Record, load_data, load_image, load_json_lines, to_records
from dive_fast.errors import InputError

ROWS = [
    {"id": "a", "prompt": "Describe it.", "report": "No effusion.", "image": "films/1.png", "age": "60"},
    {"id": "b", "prompt": "Describe it too.", "report": "An invented mass, left.", "image": "films/2.png", "age": "61"},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "films").mkdir()
    for name in ("1.png", "2.png"):
        Image.new("L", (8, 8), 90).save(tmp_path / "films" / name)
    return tmp_path


def encode(rows, suffix):
    if suffix == ".json":
        return json.dumps(rows)
    if suffix == ".jsonl":
        return "\n".join(json.dumps(row) for row in rows) + "\n\n"
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(folder, rows, name="data.jsonl"):
    path = folder / name
    text = encode(rows, "." + name.split(".")[1])
    opener = gzip.open if name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_every_format_gives_the_same_records(folder, suffix, gz):
    records = load_json_lines(write(folder, ROWS, f"data{suffix}{gz}"))
    assert records == [
        Record(row["id"], row["prompt"], row["report"], (str(folder / row["image"]),), {"age": row["age"]})
        for row in ROWS
    ]


def test_columns_by_name_images_from_root_and_byte_order_mark(folder):
    path = folder / "deep" / "data.csv"
    path.parent.mkdir()
    path.write_text("\ufeffname,ask,text,film\nx,What?,Nothing.,1.png\n", encoding="utf-8")
    (record,) = load_json_lines(path, report="text", prompt="ask", images="film", id="name", root=folder / "films")
    assert record == Record("x", "What?", "Nothing.", (str(folder / "films" / "1.png"),), {})


def test_indication_instead_of_prompt_and_optional_columns(folder):
    rows = [
        {"indication": " cough \n and fever", "report": "Clear.", "images": ["films/1.png", "films/2.png"]},
        {"indication": "", "report": "Clear too.", "images": None},
        {"prompt": None, "indication": "pain", "report": "Clear as well."},
    ]
    records = load_json_lines(write(folder, rows))
    request = "Describe the findings of the chest X-ray."
    assert [r.prompt for r in records] == [
        f"Indication: cough and fever\n{request}",
        request,
        f"Indication: pain\n{request}",
    ]
    assert [len(r.images) for r in records] == [2, 0, 0]
    assert [r.id for r in records] == ["row-1", "row-2", "row-3"]


def changed(**change):
    return [ROWS[0], {**ROWS[1], **change}]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed(report=" \n"), "record 'b'.*report must be a text that is not empty"),
        (changed(report=None), "record 'b'.*report"),
        (changed(report=3), "row 2: report must be a text, got int"),
        (changed(prompt=""), "record 'b'.*prompt"),
        (changed(report="left \ud83d effusion"), "record 'b': its report holds half of a surrogate pair"),
        (changed(id="b\udc41"), r"record 'b\\udc41': its id holds half"),
        (changed(id="a"), "record 'a': this id occurs twice"),
        (changed(image="films/3.png"), "1 images are missing .*, of 2 .*b: .*films/3.png .*skip_missing_images"),
        (changed(image=7), "row 2: an image must be a path or a PIL image, got int"),
        (changed(image={"bytes": "text", "path": None}), "row 2: an image's bytes must be bytes, got str"),
        (changed(image="a" * 5000), "1 images are missing .*File name too long"),
        (
            [{"prompt": "p", "raport": "r"}],
            "no column 'report'; the columns are prompt, raport. Did you mean report='raport'",
        ),
        ([{"prompt": "p", "x": "r"}], "no column 'report'; the columns are prompt, x. Name it with report="),
        ([{"promt": "p", "report": "r"}], "no column 'prompt' or 'indication'; .*Did you mean prompt='promt'"),
        ([["p", "r"]], "row 1: expected an object with named columns, got list"),
        ([], "at least one record"),
    ],
)
def test_rows_that_are_wrong(folder, rows, message):
    with pytest.raises(InputError, match=message):
        load_json_lines(write(folder, rows))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "p", "report": "r"}\n{"prompt": ', r"a\.jsonl, line 2: not JSON"),
        ("a.json", '[\n{"prompt": "p"\n"report": "r"}]', r"a\.json, line 3: not JSON"),
        ("a.json", '{"train": [], "test": []}', "an object with the keys train, test"),
        ("a.json", "3", "expected a list of objects, got int"),
        ("a.csv", "prompt,report\np,one,two\n", "line 2: more cells than columns"),
        ("a.csv", "prompt,report\n", "at least one record"),
        ("a.txt", "x", r"expected a name ending in \.jsonl, \.json, \.csv"),
        ("a.csv.gz", "not gzip", "not a whole gzip file"),
    ],
)
def test_files_that_are_wrong(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load_json_lines(tmp_path / name)


def test_missing_file_cut_gzip_and_wrong_encoding(folder):
    with pytest.raises(InputError, match="there is no file"):
        load_json_lines(folder / "none.jsonl")
    path = write(folder, ROWS, "data.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a whole gzip file"):
        load_json_lines(path)
    (folder / "latin.csv").write_bytes("prompt,report\np,caf\xe9\n".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        load_json_lines(folder / "latin.csv")


def test_split_limit_and_missing_images(folder):
    rows = [{**row, "split": part} for row, part in zip([*ROWS, ROWS[0]], ("train", "test", "train"), strict=True)]
    rows[2] = {**rows[2], "id": "c", "image": ["films/none.png", "films/2.png"]}
    path = write(folder, rows)
    assert [r.id for r in load_json_lines(path, split="test")] == ["b"]
    assert [r.id for r in load_json_lines(path, limit=2)] == ["a", "b"]
    records = load_json_lines(path, split="train", skip_missing_images=True)
    assert [(r.id, len(r.images)) for r in records] == [("a", 1), ("c", 1)]
    assert records.counts.notes == {"missing images": 1} and records.counts.images == 2
    with pytest.raises(InputError, match="expected at least one record"):
        load_json_lines(path, split="val")
    with pytest.raises(InputError, match="row 1, has no column 'split'"):
        load_json_lines(write(folder, ROWS), split="test")


class ColumnDataset:
    """What `datasets.Dataset` shows of itself: columns, a length, rows as dicts."""

    def __init__(self, rows):
        self.rows, self.column_names = rows, list(rows[0])

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)


def test_to_records_accepts_every_kind(folder):
    film = Image.new("L", (4, 4))
    rows = [{"prompt": "p", "report": "r", "image": film}, {"prompt": "p", "report": "s", "image": None}]
    records = to_records(ColumnDataset(rows))
    assert [record.images for record in records] == [(film,), ()]
    assert to_records(rows) == records
    assert to_records(records) == records
    assert to_records(str(write(folder, ROWS))) == load_json_lines(folder / "data.jsonl")


def test_to_records_reads_undecoded_images(folder):
    encoded = (folder / "films" / "1.png").read_bytes()
    undecoded = [{"bytes": encoded, "path": None}, {"bytes": None, "path": str(folder / "films" / "1.png")}]
    records = to_records([{"id": str(i), "prompt": "p", "report": "r", "image": im} for i, im in enumerate(undecoded)])
    assert all(load_image(r.images[0], record_id=r.id).getpixel((0, 0)) == (90, 90, 90) for r in records)
    with pytest.raises(InputError, match="row 0: the image's bytes"):
        to_records([{"prompt": "p", "report": "r", "image": {"bytes": b"nothing", "path": None}}])


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([Record("a", "p", "r"), Record("a", "p", "s")], "'a': this id occurs twice"),
        ([Record("a", "p", "")], "record 'a'.*report"),
        ([Record("a", " ", "r")], "record 'a'.*prompt"),
        ([Record("a", "p \ud83d", "r")], "record 'a': its prompt holds half of a surrogate pair"),
        ([Record("a", "p", "r", ("none.png",))], "image file not found: none.png"),
        ([Record("a", "p", "r", ("a" * 5000,))], "image file not found: a"),
        ([Record("a", "p", "r"), {"prompt": "p", "report": "r"}], "expected records, got dict"),
        ([{"prompt": "p", "report": "r"}, 3], "row 1: expected an object"),
        ({"train": [], "test": []}, "a mapping of train, test; choose one part"),
        (None, "got NoneType"),
        (Record("a", "p", "r"), "got Record"),
        ([], "at least one record"),
    ],
)
def test_to_records_refuses(dataset, message):
    with pytest.raises(InputError, match=message):
        to_records(dataset)


def test_load_data_by_name(folder):
    assert load_data("json_lines", path=write(folder, ROWS))[1].id == "b"
    own_files = {"open_i", "iu_kaggle", "iu_r2gen", "mimic_cxr", "chexpert_plus", "padchest"}
    assert set(DATA_SETS) == own_files | {"json_lines", "hub", "films", "generated_films"}
    with pytest.raises(InputError, match="got 'openi'. Did you mean 'open_i'"):
        load_data("openi")
    with pytest.raises(InputError, match="json_lines.*its options are path, report"):
        load_data("json_lines", file="x")
    with pytest.raises(InputError, match="films.*root"):
        load_data("films")
