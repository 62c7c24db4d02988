"""Chest films with text: a folder of pairs, and invented films drawn in memory."""

import csv
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

from dive_fast.data.counts import Records
from dive_fast.data.images import pillow
from dive_fast.data.json_lines import check_records
from dive_fast.data.prompt import collapse, compose_prompt
from dive_fast.data.record import Record
from dive_fast.errors import InputError

FILM_REQUEST = "Describe the chest X-ray."
PAIR_COLUMNS = ("image", "report_id", "patient_id", "projection", "text", "licence")
SIDES = ("right", "left")
ZONES = ("upper", "middle", "lower")


def load_films(root: str | Path) -> Records:
    """Films with their notes from `root/pairs.csv`, which names files under `root`; rows without text are left out.

    Columns: image, report_id, patient_id, projection, text, licence; `meta` has all but image, report_id and text, and
    any further ones. The record's id is its report_id, its report the text. Split such records with `split_by_patient`.

    Raises:
        InputError: no pairs.csv, a column missing, a report_id twice, an image file missing.
    """
    root = Path(root)
    table = root / "pairs.csv"
    if not table.is_file():
        raise InputError(f"root: expected a folder with pairs.csv and its images, there is no {table}")
    with table.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [column for column in PAIR_COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise InputError(f"root: {table} lacks the columns {', '.join(missing)}; it has {reader.fieldnames}")
        rows = list(reader)
    records = Records(_film_record(row, root) for row in rows if collapse(row["text"]))
    check_records(records, str(table))
    if len(records) < len(rows):
        records.counts.dropped["without a text"] = len(rows) - len(records)
    return records


def _film_record(row: dict, root: Path) -> Record:
    meta = {column: value for column, value in row.items() if column not in ("image", "report_id", "text")}
    prompt = compose_prompt([("Projection", collapse(row["projection"]).strip("?"))], FILM_REQUEST)
    return Record(row["report_id"], prompt, collapse(row["text"]), (str(root / row["image"]),), meta)


def split_by_patient(
    records: Sequence[Record], fraction: float = 0.2, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """(kept, held out): about `fraction` of the records held out, no patient on both sides, in the given order.

    Patients are drawn in the order of a hash of (seed, patient), so the draw does not depend on the records' order.

    Raises:
        InputError: a fraction outside (0, 1), a record without meta["patient_id"], or too few patients for two parts.
    """
    if not 0 < fraction < 1:
        raise InputError(f"fraction: expected a number between 0 and 1, got {fraction}")
    counts: dict[str, int] = {}
    for record in records:
        patient = record.patient
        if patient is None:
            raise InputError(f"records: {record.id!r} has no meta['patient_id'], which a split by patient needs")
        counts[patient] = counts.get(patient, 0) + 1
    if len(counts) < 2:
        raise InputError(f"records: splitting by patient needs two patients or more, got {len(counts)}")
    order = sorted(counts, key=lambda patient: hashlib.sha256(f"{seed}:{patient}".encode()).digest())
    held_out = {order[0]}
    size = counts[order[0]]
    for patient in order[1:-1]:
        # Taken only where that brings the size nearer to what was asked: a patient with many films cannot overshoot.
        if abs(size + counts[patient] - fraction * len(records)) < abs(size - fraction * len(records)):
            held_out.add(patient)
            size += counts[patient]
    kept = [record for record in records if record.patient not in held_out]
    return kept, [record for record in records if record.patient in held_out]


def generated_films(n: int, seed: int = 0, size: int = 64) -> list[Record]:
    """`n` invented gray films, each with a report that states what is drawn on it; for tests and examples without data.

    A film shows two dark lungs, a heart that is normal or enlarged, and perhaps a round or band-like opacity in one of
    six zones and an effusion on one side. As on a real film, the patient's right is at the left of the image. Record i
    depends on (seed, i, size) alone. `meta` has patient_id (two films each) and what was drawn: heart, opacity (shape,
    side, zone) or None, effusion (side) or None.
    """
    if n < 1 or size < 32:
        raise InputError(f"n, size: expected n >= 1 films of size >= 32, got n={n}, size={size}")
    return [_generated_record(index, seed, size) for index in range(n)]


def _generated_record(index: int, seed: int, size: int) -> Record:
    rng = random.Random(f"film:{seed}:{index}")
    heart = rng.choice(("normal", "enlarged"))
    opacity = (rng.choice(("round", "band")), rng.choice(SIDES), rng.choice(ZONES)) if rng.random() < 0.7 else None
    effusion = rng.choice(SIDES) if rng.random() < 0.3 else None
    sentences = [
        "heart size is normal." if heart == "normal" else "the heart is enlarged.",
        f"{opacity[0]} opacity in the {opacity[1]} {opacity[2]} zone." if opacity else "no focal opacity.",
        f"{effusion} pleural effusion." if effusion else "no effusion.",
    ]
    meta = {"patient_id": f"generated-{index // 2}", "heart": heart, "opacity": opacity, "effusion": effusion}
    film = _draw_film(rng, size, heart, opacity, effusion)
    return Record(f"generated-{seed}-{index}", FILM_REQUEST, " ".join(sentences), (film,), meta)


def zone_center(side: str, zone: str, size: int) -> tuple[float, float]:
    """(x, y) in pixels of a lung zone's centre on a generated film."""
    return size * (0.27 if side == "right" else 0.73), size * (0.24, 0.45, 0.66)[ZONES.index(zone)]


def _draw_film(rng: random.Random, size: int, heart: str, opacity: tuple | None, effusion: str | None):
    Image, ImageDraw = pillow().Image, pillow().ImageDraw
    film = Image.new("L", (size, size), 150)
    draw = ImageDraw.Draw(film)

    def ellipse(x: float, y: float, half_width: float, half_height: float, gray: int):
        draw.ellipse((x - half_width, y - half_height, x + half_width, y + half_height), fill=gray)

    for side in SIDES:
        ellipse(zone_center(side, "middle", size)[0], 0.47 * size, 0.19 * size, 0.40 * size, 40 + rng.randrange(20))
    ellipse(0.53 * size, 0.68 * size, (0.10 if heart == "normal" else 0.19) * size, 0.13 * size, 170)
    if opacity:
        x, y = zone_center(*opacity[1:], size)
        if opacity[0] == "round":
            ellipse(x, y, 0.08 * size, 0.08 * size, 230)
        else:
            draw.rectangle((x - 0.13 * size, y - 0.03 * size, x + 0.13 * size, y + 0.03 * size), fill=230)
    if effusion:
        x = zone_center(effusion, "lower", size)[0]
        draw.rectangle((x - 0.19 * size, 0.80 * size, x + 0.19 * size, 0.92 * size), fill=245)
    noise = Image.frombytes("L", (size, size), rng.randbytes(size * size))
    return Image.blend(film, noise, 0.06)
