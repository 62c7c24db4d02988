"""PadChest: chest films with Spanish reports of the Hospital San Juan de Alicante (Bustos et al., arXiv:1901.07441).

The published table has the reports stemmed and without accents, and labels in English. The wheel of torchxrayvision
carries that table, without films: `table` takes it.
"""

import ast
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dive_fast.data.counts import Records
from dive_fast.data.loading import Loading, Views, check_choice, check_split
from dive_fast.data.prompt import compose_prompt
from dive_fast.data.record import Record
from dive_fast.data.tables import cell_text, find_file, read_table
from dive_fast.errors import InputError

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
SPLITS = ("train", "val", "test")
TARGETS = {
    "report": "Describe the findings of the chest X-ray in Spanish.",
    "labels": "Name the findings of the chest X-ray.",
}
VIEW_GROUPS = {"frontal": ("PA", "AP", "AP_horizontal"), "lateral": ("L",)}
OTHER_VIEWS = ("COSTAL", "EXCLUDE", "UNK")
COLUMNS = ("ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "MethodLabel", "Report", "Labels")


@dataclass(slots=True)
class _Study:
    patient: str
    report: str
    labels: tuple[str, ...]
    method: str
    films: list[tuple[str, str]] = field(default_factory=list)


def load_padchest(
    root: str | Path | None = None,
    *,
    split: str | None = "train",
    target: str = "report",
    views: str | Sequence[str] | None = "frontal",
    table: str | Path | None = None,
    max_images: int | None = None,
    limit: int | None = None,
    skip_missing_images: bool = False,
    check_images: str = "ends",
) -> Records:
    """PadChest, its rows grouped to studies: a study's films -> its report or its labels.

    There is no official split. This one is by patient, from sha256(PatientID) mod 10: 0 is "test", 1 is "val", the
    rest "train". A record's id is the StudyID; studies whose films name several patients are left out (there is one).

    Args:
        root: the folder with the table (.csv or .csv.gz) and the films, as `<ImageDir>/<ImageID>` or all in one
            folder; may be None with `table` and `views=None`.
        split: "train", "val", "test", or None for all.
        target: "report", the stemmed Spanish text, or "labels", the English labels joined by "; ".
        views: "frontal" (PA, AP, AP_horizontal), "lateral" (L), "all", a list of these or of Projection's own values,
            or None for no images.
        table: the table, where it is not in `root`.
        max_images: at most so many of a study, the preferred views first; None: all.
        limit, skip_missing_images, check_images: see `Loading`.

    Returns:
        Records in the table's order with `counts`. `meta` has patient_id, split, views (tuple), labels (tuple) and
        method ("Physician" or "RNN_model": who labelled).

    Raises:
        InputError: a file or column that is missing, a film that occurs twice, Labels that are no list, an unknown
            choice, images that are missing and may not be skipped, no record at all.
    """
    split = check_split(split, SPLITS)
    check_choice("target", target, TARGETS)
    choice = Views(views, VIEW_GROUPS, OTHER_VIEWS, max_images)
    if root is None and (table is None or choice.wanted):
        raise InputError("root: expected the folder with PadChest's films; only `table=` with `views=None` needs none")
    loading = Loading(
        f"padchest at {root or table}", limit=limit, skip_missing_images=skip_missing_images, check_images=check_images
    )
    for study_id, study in _studies(_table(root, table), split, loading).items():
        if loading.full:
            break
        shown = choice.choose(study.films)
        if choice.wanted and not shown:
            loading.drop("without a film of the views asked for")
            continue
        text = study.report if target == "report" else "; ".join(study.labels)
        if not text:
            loading.drop(f"without a text in {target}")
            continue
        shown = loading.usable_films(study_id, [(view, _film(root, path)) for view, path in shown])
        if shown is None:
            continue
        meta = {
            "patient_id": study.patient,
            "split": _split_of(study.patient),
            "views": tuple(view for view, _ in shown),
            "labels": study.labels,
            "method": study.method,
        }
        images = tuple(path for _, path in shown)
        loading.add(Record(study_id, compose_prompt([], TARGETS[target]), text, images, meta))
    return loading.finish()


def _table(root: str | Path | None, table: str | Path | None) -> Path:
    if table is not None:
        return find_file(Path(table).parent, Path(table).name, what="PadChest's table", argument="table")
    return find_file(root, TABLE, f"{TABLE}.gz", what="the folder of PadChest")


def _studies(table: Path, split: str | None, loading: Loading) -> dict[str, _Study]:
    studies: dict[str, _Study] = {}
    seen: set[str] = set()
    torn: set[str] = set()
    for line, (film, folder, number, patient, view, method, report, labels) in read_table(table, COLUMNS):
        if film in seen:
            raise InputError(f"{table}, line {line}: the ImageID {film!r} occurs twice; copy the file again")
        seen.add(film)
        study = studies.get(number)
        if study is None:
            names = _labels(labels, table, line)
            study = studies[number] = _Study(patient, cell_text(report), names, method)
        elif study.patient != patient:
            torn.add(number)
        study.films.append((view, f"{folder}/{film}"))
    for number in torn:
        del studies[number]
        loading.drop("with films of several patients")
    return {number: study for number, study in studies.items() if split in (None, _split_of(study.patient))}


def _labels(cell: str, table: Path, line: int) -> tuple[str, ...]:
    if not cell_text(cell):
        return ()
    try:
        names = ast.literal_eval(cell)
        if not isinstance(names, list):
            raise TypeError(f"{type(names).__name__} is no list")
        return tuple(name for name in (cell_text(name) for name in names) if name)
    except (ValueError, SyntaxError, TypeError, AttributeError) as error:
        raise InputError(f"{table}, line {line}: Labels must be a list such as ['normal'], got {cell!r}") from error


def _split_of(patient: str) -> str:
    digest = hashlib.sha256(patient.encode()).digest()
    return {0: "test", 1: "val"}.get(int.from_bytes(digest, "big") % 10, "train")


def _film(root: str | Path, path: str) -> str:
    """Under its ImageDir, where the archives are unpacked one by one, or in the folder itself."""
    sorted_in, flat = Path(root) / path, Path(root) / Path(path).name
    return str(flat if flat.is_file() and not sorted_in.is_file() else sorted_in)
