"""Films: the drawn ones say what they show, the folder's round trip, patients stay whole, damaged images are named."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dive_fast.data import generated_films, load_films, load_image, split_by_patient
from dive_fast.data.films import SIDES, ZONES
from dive_fast.data.record import Record
from dive_fast.errors import InputError

PAIRS = Path(__file__).parents[2] / "shared" / "data" / "cxr_pairs"
COLUMNS = "image,report_id,patient_id,projection,finding,text,film_text,licence,source_repo,source_path".split(",")


def read_film(film):
    """What a reader sees, from the pixels alone: {phrase: whether it is there}."""
    gray = np.asarray(film, dtype=float)
    size = len(gray)

    def bright(x, y, half_width, half_height, level):
        rows = slice(round((y - half_height) * size), round((y + half_height) * size) + 1)
        columns = slice(round((x - half_width) * size), round((x + half_width) * size) + 1)
        return np.median(gray[rows, columns]) > level

    # Patient's right at the image's left; zones from top to bottom; sizes as fractions of the film's side.
    xs, ys = {"right": 0.27, "left": 0.73}, {"upper": 0.24, "middle": 0.45, "lower": 0.66}
    seen = set()
    for side in SIDES:
        for zone in ZONES:
            if bright(xs[side], ys[zone], 0.02, 0.02, 180):
                # Only a round opacity reaches 5 % of the side above its centre.
                shape = "round" if bright(xs[side], ys[zone] - 0.055, 0.02, 0.005, 180) else "band"
                seen.add(f"{shape} opacity in the {side} {zone} zone.")
        if bright(xs[side], 0.86, 0.1, 0.03, 200):
            seen.add(f"{side} pleural effusion.")
    # A heart that reaches 13 % of the side to the left of its centre is enlarged.
    seen.add("the heart is enlarged." if bright(0.40, 0.70, 0.005, 0.03, 115) else "heart size is normal.")
    return seen


def phrases(report):
    return {sentence + "." for sentence in report.rstrip(".").split(". ")} - {"no effusion.", "no focal opacity."}


@pytest.mark.parametrize("size", [64, 96, 128])
def test_report_states_what_the_film_shows(size):
    for record in generated_films(60, seed=3, size=size):
        film = record.images[0]
        assert film.size == (size, size) and film.mode == "L"
        assert read_film(film) == phrases(record.report), record.report


def test_generated_films_vary_and_repeat():
    records = generated_films(200, seed=1)
    assert len({record.report for record in records}) > 40
    assert len({record.id for record in records}) == 200
    assert Counter(Counter(r.meta["patient_id"] for r in records).values()) == {2: 100}
    for ours, again in zip(generated_films(5, seed=1), records, strict=False):
        assert ours.report == again.report and ours.images[0].tobytes() == again.images[0].tobytes()
    assert [r.report for r in generated_films(20, seed=2)] != [r.report for r in records[:20]]
    for arguments in ({"n": 0}, {"n": 1, "size": 16}):
        with pytest.raises(InputError, match="n >= 1 films of size >= 32"):
            generated_films(**arguments)


def write_pairs(root, records):
    (root / "images").mkdir(parents=True)
    with (root / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for record in records:
            image = f"images/{record.id}.png"
            record.images[0].save(root / image)
            writer.writerow({
                "image": image, "report_id": record.id, "patient_id": record.meta["patient_id"], "projection": "PA",
                "finding": "invented", "text": record.report, "licence": "CC0", "source_repo": "", "source_path": "",
            })  # fmt: skip
    return root


def test_folder_round_trip(tmp_path):
    drawn = generated_films(6)
    records = load_films(write_pairs(tmp_path / "pairs", drawn))
    for ours, original in zip(records, drawn, strict=True):
        assert (ours.id, ours.report) == (original.id, original.report)
        assert ours.prompt == "Projection: PA\nDescribe the chest X-ray."
        assert ours.meta["patient_id"] == original.meta["patient_id"] and ours.meta["licence"] == "CC0"
        assert load_image(ours.images[0], record_id=ours.id) == original.images[0].convert("RGB")


def test_folder_of_pairs_of_any_origin(tmp_path):
    root = PAIRS if PAIRS.is_dir() else write_pairs(tmp_path / "pairs", generated_films(40))
    records = load_films(root)
    assert len(records) == len({record.id for record in records}) >= 40
    assert all(record.report and record.meta["licence"] and record.meta["patient_id"] for record in records)
    kept, held_out = split_by_patient(records, 0.25, seed=1)
    assert abs(len(held_out) - 0.25 * len(records)) <= 2
    assert not {r.meta["patient_id"] for r in kept} & {r.meta["patient_id"] for r in held_out}
    film = load_image(records[0].images[0], record_id=records[0].id)
    assert film.mode == "RGB" and min(film.size) > 16


def test_folder_errors(tmp_path):
    with pytest.raises(InputError, match="root: .*pairs.csv"):
        load_films(tmp_path)
    root = write_pairs(tmp_path / "pairs", generated_films(2))
    (root / "images" / "generated-0-1.png").unlink()
    with pytest.raises(InputError, match="record 'generated-0-1': image file not found"):
        load_films(root)
    table = (root / "pairs.csv").read_text()
    (root / "pairs.csv").write_text(table.replace("licence", "license", 1))
    with pytest.raises(InputError, match="lacks the columns licence"):
        load_films(root)


def film_records(sizes):
    return [Record(f"{p}-{i}", "p", "r", meta={"patient_id": str(p)}) for p, n in enumerate(sizes) for i in range(n)]


@pytest.mark.parametrize("sizes", [[1, 1], [50, 1, 1, 1], [3] * 20, [1, 2, 3, 4, 5, 6, 7]])
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_split_by_patient_keeps_patients_whole(sizes, fraction):
    records = film_records(sizes)
    for seed in range(5):
        kept, held_out = split_by_patient(records, fraction, seed)
        assert kept and held_out and sorted(r.id for r in kept + held_out) == sorted(r.id for r in records)
        assert not {r.meta["patient_id"] for r in kept} & {r.meta["patient_id"] for r in held_out}
        again = split_by_patient(records[::-1], fraction, seed)
        assert {r.id for r in again[1]} == {r.id for r in held_out}


def test_split_by_patient_errors():
    with pytest.raises(InputError, match="'x' has no meta"):
        split_by_patient([*film_records([1]), Record("x", "p", "r")])
    with pytest.raises(InputError, match="two patients or more, got 1"):
        split_by_patient(film_records([4]))
    for fraction in (0, 1, -0.1):
        with pytest.raises(InputError, match="fraction"):
            split_by_patient(film_records([2, 2]), fraction)


def test_damaged_images_are_named(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 50).save(whole)
    cut, text, png = tmp_path / "cut.jpg", tmp_path / "text.png", tmp_path / "broken.png"
    cut.write_bytes(whole.read_bytes()[:600])
    text.write_text("no image")
    Image.effect_noise((64, 64), 50).save(png)
    data = bytearray(png.read_bytes())
    data[60:200] = bytes(140)
    png.write_bytes(data)
    for path, message in ((cut, "does not decode"), (text, "not an image PIL can read"), (png, "does not decode")):
        with pytest.raises(InputError, match=f"record 'r7': image .*{path.name}.*{message}"):
            load_image(path, record_id="r7")
    with pytest.raises(InputError, match="record 'r7': .*none.png: no such file"):
        load_image(str(tmp_path / "none.png"), record_id="r7")
    with pytest.raises(InputError, match="record 'r7': image .*does not decode"):
        load_image(tmp_path, record_id="r7")
    with pytest.raises(InputError, match="record 'r7': expected a path or a PIL image, got int"):
        load_image(3, record_id="r7")


def test_sixteen_bit_gray_is_scaled(tmp_path):
    levels = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    film = load_image(tmp_path / "deep.png", record_id="a")
    assert film.mode == "RGB"
    assert np.asarray(film)[0, :, 0].tolist() == [0, 1, 128, 255]
