"""The Indiana University (IU) chest X-rays as Kaggle publishes them: two tables and a folder of PNG films.

"Chest X-rays (Indiana University)" by raddar; the reports are Open-i's (see `open_i`).
"""

from collections.abc import Sequence
from pathlib import Path

from dive_fast.data.counts import Records
from dive_fast.data.loading import Loading, Views, check_choice, check_split
from dive_fast.data.open_i import SPLITS, read_split
from dive_fast.data.prompt import FINDINGS_REQUEST, IMPRESSION_REQUEST, compose_prompt
from dive_fast.data.record import Record
from dive_fast.data.tables import cell_text, find_file, read_table
from dive_fast.errors import InputError

REPORTS, PROJECTIONS = "indiana_reports.csv", "indiana_projections.csv"
IMAGES = "images/images_normalized"
TARGETS = {"findings": FINDINGS_REQUEST, "impression": IMPRESSION_REQUEST}
VIEW_GROUPS = {"frontal": ("Frontal",), "lateral": ("Lateral",)}


def load_iu_kaggle(
    root: str | Path,
    *,
    split: str | None = "train",
    target: str = "findings",
    views: str | Sequence[str] | None = "frontal",
    indication: bool = True,
    image_root: str | Path | None = None,
    max_images: int | None = None,
    limit: int | None = None,
    skip_missing_images: bool = False,
    check_images: str = "ends",
) -> Records:
    """The IU chest X-rays in Kaggle's form: a study's films and indication -> one section of its report.

    Kaggle's tables have no split: R2Gen's is used, joined by study number (see `open_i`). A record's id is "CXR2384".

    Args:
        root: the folder with `indiana_reports.csv` and `indiana_projections.csv`.
        split: R2Gen's "train", "val" or "test", or None for every report, in R2Gen's split or not.
        target: "findings" or "impression".
        views: "frontal", "lateral", "all", a list of these, or None for no images.
        indication: put the indication into the prompt.
        image_root: the folder with the films; None: `images/images_normalized` under `root`.
        max_images: at most so many of a study, the preferred views first; None: all.
        limit, skip_missing_images, check_images: see `Loading`.

    Returns:
        Records in the table's order with `counts`. `meta` has split (None where R2Gen's has none), views (tuple),
        indication, tags (tuple of MeSH terms) and has_deid ("XXXX" occurs).

    Raises:
        InputError: a file or column that is missing, a uid or film that occurs twice, an unknown choice, images that
            are missing and may not be skipped, no record at all.
    """
    split = check_split(split, SPLITS)
    check_choice("target", target, TARGETS)
    choice = Views(views, VIEW_GROUPS, (), max_images)
    loading = Loading(
        f"iu_kaggle at {root}", limit=limit, skip_missing_images=skip_missing_images, check_images=check_images
    )
    table = find_file(root, REPORTS, what="Kaggle's folder of the Indiana University X-rays")
    films = _read_films(Path(root)) if choice.wanted else {}
    split_of = {study.split("_")[0]: part for study, part in read_split().items()}
    folder = Path(image_root or Path(root) / IMAGES)
    seen = set()
    for line, (uid, mesh, said, text) in read_table(table, ("uid", "MeSH", "indication", target)):
        if uid in seen:
            raise InputError(f"{table}, line {line}: the uid {uid!r} occurs twice; copy the file again")
        seen.add(uid)
        study_id = f"CXR{uid}"
        if loading.full or split not in (None, split_of.get(study_id)):
            continue
        said, text = cell_text(said), cell_text(text)
        shown = choice.choose(films.get(uid, ()))
        if not text:
            loading.drop(f"without a text in {target}")
            continue
        if choice.wanted and not shown:
            loading.drop("without a film of the views asked for")
            continue
        shown = loading.usable_films(study_id, [(view, str(folder / film)) for view, film in shown])
        if shown is None:
            continue
        meta = {
            "split": split_of.get(study_id),
            "views": tuple(view for view, _ in shown),
            "indication": said,
            "tags": tuple(tag for tag in map(cell_text, mesh.split(";")) if tag),
            "has_deid": "XXXX" in text,
        }
        prompt = compose_prompt([("Indication", said if indication else "")], TARGETS[target])
        loading.add(Record(study_id, prompt, text, tuple(path for _, path in shown), meta))
    return loading.finish()


def _read_films(root: Path) -> dict[str, list[tuple[str, str]]]:
    """uid -> its (projection, file name) pairs in the table's order."""
    table = find_file(root, PROJECTIONS, what="Kaggle's folder of the Indiana University X-rays")
    films: dict[str, list[tuple[str, str]]] = {}
    seen = set()
    for line, (uid, film, projection) in read_table(table, ("uid", "filename", "projection")):
        if film in seen:
            raise InputError(f"{table}, line {line}: the film {film!r} occurs twice; copy the file again")
        seen.add(film)
        films.setdefault(uid, []).append((projection.strip(), film))
    return films
