"""What loaders share: whole and damaged images, choices of views, tables, counts, and `datasets.Dataset`."""

import pickle

import pytest
from PIL import Image

from dive_fast.data import LoadCounts, Record, Records, load_data, load_hub, load_image, to_records
from dive_fast.data.loading import Loading, Views, image_fault
from dive_fast.data.tables import cell_text, read_table
from dive_fast.errors import InputError
from tests.data_fixtures import WRITERS, film

GROUPS = {"frontal": ("PA", "AP"), "lateral": ("L",)}


def told(call, *words):
    with pytest.raises(InputError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp"])
def test_whole_images_pass_every_check(tmp_path, suffix):
    path = film(tmp_path / f"a{suffix}")
    assert [image_fault(path, check) for check in ("exists", "ends", "decode")] == [(None, "")] * 3


def test_damaged_images(tmp_path):
    jpeg, png = tmp_path / "a.jpg", tmp_path / "a.png"
    for path in (jpeg, png):
        Image.effect_noise((64, 64), 50).save(path)
    (padded := tmp_path / "padded.jpg").write_bytes(jpeg.read_bytes() + b"\0\0")
    assert image_fault(padded, "ends") == (None, "")  # does not end as a JPEG does, but decodes
    (page := tmp_path / "page.jpg").write_text("<html>404 not found</html>")
    for path in (jpeg, png):
        whole = path.read_bytes()
        path.write_bytes(whole[:-200])
        assert image_fault(path, "ends")[0] == "broken"
        assert "does not decode" in image_fault(path, "ends")[1]
        assert image_fault(path, "exists") == (None, "")
    assert image_fault(page, "ends") == ("broken", "not an image PIL can read")
    # Whole at both ends and broken between them: only decoding finds it.
    png.write_bytes(whole[:60] + bytes(200) + whole[260:])
    assert image_fault(png, "ends") == (None, "") and image_fault(png, "decode")[0] == "broken"
    assert image_fault(tmp_path / "none.jpg", "exists") == ("missing", "no such file")
    assert image_fault(tmp_path, "exists") == ("missing", "not a file")
    assert image_fault(page / "under_a_file.jpg", "exists") == ("missing", "no such file")
    (loop := tmp_path / "loop.jpg").symlink_to(loop)
    for path, why in ((loop, "Too many levels"), ("a" * 5000, "File name too long"), ("a\0b.jpg", "null ")):
        fault, said = image_fault(path, "exists")
        assert fault == "missing" and why in said


def test_a_wrong_folder_is_told_before_all_is_read(tmp_path):
    loading = Loading("invented", limit=None, skip_missing_images=False, check_images="ends")
    for index in range(99):
        loading.usable(f"r{index}", [str(tmp_path / f"{index}.png")])
    told(lambda: loading.usable("r99", [str(tmp_path / "99.png")]), "100 images are missing", "of 100 looked for so")


@pytest.mark.parametrize(
    ("chosen", "most", "shown"),
    [
        ("frontal", None, ["c", "d", "b"]),
        ("frontal", 2, ["c", "d"]),
        ("lateral", None, ["a"]),
        ("all", None, ["c", "d", "b", "a", "e"]),
        (["lateral", "AP"], None, ["a", "b"]),
        (["ap", "frontal"], None, ["b", "c", "d"]),
        ([""], None, ["e"]),
        (None, None, []),
    ],
)
def test_views(chosen, most, shown):
    films = [("L", "a"), ("ap", "b"), ("PA", "c"), ("PA", "d"), ("", "e")]
    views = Views(chosen, GROUPS, ("",), most)
    assert views.wanted == (chosen is not None)
    assert ([path for _, path in views.choose(films)] if views.wanted else []) == shown


def test_records_with_counts_are_a_list():
    records = Records([Record("a", "p", "r", ("x", "y")), Record("b", "p", "s")])
    assert records.counts == LoadCounts(records=2, images=2) and str(records.counts) == "2 records with 2 images"
    assert records == list(records) and type(records[:1]) is list
    assert pickle.loads(pickle.dumps(records)).counts == records.counts
    counts = LoadCounts(1200, 0)
    counts.dropped.update({"x": 1, "y": 3000})
    counts.notes["z"] = 2
    assert str(counts) == "1,200 records; left out: 3,000 y, 1 x; also: 2 z"
    assert counts.as_dict() == {"records": 1200, "images": 0, "dropped": {"x": 1, "y": 3000}, "notes": {"z": 2}}


@pytest.mark.parametrize(
    ("name", "lost", "views"),
    [
        ("mimic_cxr", "files/p10/p10000001/s50000001/a3.jpg", ("AP", "LATERAL")),
        ("chexpert_plus", "train/patient00001/study1/view1_frontal.jpg", ("Lateral",)),
        ("iu_kaggle", "images/images_normalized/5_IM-2117-1003002.dcm.png", ("Lateral",)),
        ("padchest", "7/i2.png", ("L",)),
    ],
)
def test_views_are_those_of_the_images_kept(tmp_path, name, lost, views):
    (WRITERS[name](tmp_path) / lost).unlink()
    record = load_data(name, root=tmp_path, views="all", skip_missing_images=True)[0]
    assert record.meta["views"] == views and len(record.images) == len(views)


def test_tables_by_name_with_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfb,a\r\n1,"two\r\nlines"\r\n\r\n3,4\r\n')
    assert list(read_table(path, ("a", "b"))) == [(3, ["two\r\nlines", "1"]), (5, ["4", "3"])]
    path.write_text("a,b\n1\n")
    told(lambda: list(read_table(path, ("a",))), f"{path}, line 2: 1 cells where the header has 2 columns")
    path.write_text("a\n" + "x" * 200_000 + "\n")
    told(lambda: list(read_table(path, ("a",))), "not CSV near line", "field larger")
    assert [cell_text(cell) for cell in (" a\n\tb ", "NaN", "nan", "nanny", "\n")] == ["a b", "", "", "nanny", ""]


# datasets.Dataset


@pytest.fixture
def hub(tmp_path):
    """A Dataset with encoded images, written to disk."""
    datasets = pytest.importorskip("datasets", reason="the package datasets, an optional extra, is not installed")
    paths = [str(film(tmp_path / f"{level}.png", level)) for level in (10, 20, 30)]
    columns = {
        "id": ["a", "b", "c"],
        "prompt": ["p", "p", "q"],
        "report": ["One.", "Two.", "Three."],
        "image": [paths[0], None, paths[2]],
        "age": [1, 2, 3],
    }
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    stored = tmp_path / "stored"
    datasets.DatasetDict({"train": dataset, "test": dataset.select([2, 0])}).save_to_disk(stored)
    return stored


def test_images_of_a_dataset_are_read_when_they_are_used(hub, monkeypatch):
    records = load_hub(str(hub), split="train")
    assert [(r.id, r.prompt, r.report, len(r.images), r.meta) for r in records] == [
        ("a", "p", "One.", 1, {"age": 1}),
        ("b", "p", "Two.", 0, {"age": 2}),
        ("c", "q", "Three.", 1, {"age": 3}),
    ]
    assert [load_image(r.images[0], record_id=r.id).getpixel((0, 0))[0] for r in (records[0], records[2])] == [10, 30]
    assert records.counts == LoadCounts(3, 2)
    selected = load_hub(str(hub), split="test")
    assert [load_image(r.images[0], record_id=r.id).getpixel((0, 0))[0] for r in selected] == [30, 10]
    assert [r.id for r in load_hub(str(hub), split="test", limit=1)] == ["c"]
    assert len({image.key for r in (*records, *selected) for image in r.images}) == 4


def test_a_dataset_is_listed_without_decoding_an_image(hub, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the package datasets, an optional extra, is not installed")
    dataset = datasets.load_from_disk(str(hub))["train"]
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *_, **__: pytest.fail("an image was decoded"))
    records = to_records(dataset)
    assert [len(r.images) for r in records] == [1, 0, 1]
    assert load_image(pickle.loads(pickle.dumps(records[2].images[0])), record_id="c").size == (8, 8)


def test_lists_of_images_in_a_dataset(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets, an optional extra, is not installed")
    paths = [str(film(tmp_path / f"{level}.png", level)) for level in (10, 20, 30)]
    rows = {"prompt": ["p"] * 3, "report": ["r"] * 3, "images": [paths[:2], None, paths[2:]]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("images", datasets.Sequence(datasets.Image()))
    records = to_records(dataset)
    levels = [[load_image(i, record_id=r.id).getpixel((0, 0))[0] for i in r.images] for r in records]
    assert levels == [[10, 20], [], [30]]


def test_an_image_that_is_none_among_others_is_refused_before_it_is_used(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets, an optional extra, is not installed")
    path = str(film(tmp_path / "1.png"))
    rows = {"prompt": ["p"] * 2, "report": ["r"] * 2, "images": [[path], [path, None]]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("images", datasets.Sequence(datasets.Image()))
    told(lambda: to_records(dataset), "dataset, row 1: column 'images' has an empty place among its images")


def test_what_the_hub_refuses(hub, tmp_path):
    told(lambda: load_hub(str(hub)), "split: expected one of train, test, got None")
    told(lambda: load_hub(str(hub), split="val"), "split: expected one of train, test, got 'val'")
    told(lambda: load_hub(str(hub / "train"), split="test"), "is one data set without parts; leave split out")
    told(lambda: load_hub(str(hub / "train"), report="text"), "no column 'text'")
    told(lambda: load_hub(str(tmp_path)), "path: expected a folder that save_to_disk wrote")
    told(lambda: load_hub("no/such-set"), "or a hub id that can be reached, got 'no/such-set'")
    told(lambda: load_hub(str(hub), split="train", limit=0), "limit: expected a positive number")
