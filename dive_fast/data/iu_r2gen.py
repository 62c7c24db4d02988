"""The Indiana University (IU) chest X-rays as R2Gen publishes them: annotation.json and a folder of images.

Chen et al., "Generating Radiology Reports via Memory-driven Transformer" (EMNLP 2020). Its annotation.json of MIMIC-CXR
has the same layout and loads as well.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from dive_fast.data.counts import Records
from dive_fast.data.loading import Loading, check_count, check_split
from dive_fast.data.prompt import FINDINGS_REQUEST, collapse
from dive_fast.data.record import Record
from dive_fast.data.tables import find_file
from dive_fast.errors import InputError

SPLITS = ("train", "val", "test")
ANNOTATION = "annotation.json"
FIELDS = ("id", "report", "image_path")


def load_iu_r2gen(
    root: str | Path,
    *,
    split: str | None = "train",
    images: bool = True,
    image_root: str | Path | None = None,
    max_images: int | None = None,
    limit: int | None = None,
    skip_missing_images: bool = False,
    check_images: str = "ends",
) -> Records:
    """The IU chest X-rays in R2Gen's form: a study's images -> its findings.

    Args:
        root: the folder with `annotation.json`, {train, val, test: [{id, report, image_path: [...], split}]}.
        split: "train", "val", "test", or None for all.
        images: False leaves them out.
        image_root: the folder that image_path starts from; None: `images` under `root`.
        max_images: at most so many of a study, the file's first; None: all.
        limit, skip_missing_images, check_images: see `Loading`.

    Returns:
        Records in the file's order with `counts`. `meta` has split and the file's further fields; a `subject_id`
        (MIMIC-CXR's annotation has it) is the patient_id.

    Raises:
        InputError: no such file, not JSON in that layout, an id that occurs twice, images that are missing and may not
            be skipped, no record at all.
    """
    split = check_split(split, SPLITS)
    check_count("max_images", max_images)
    loading = Loading(
        f"iu_r2gen at {root}", limit=limit, skip_missing_images=skip_missing_images, check_images=check_images
    )
    path = find_file(root, ANNOTATION, what="R2Gen's folder of the Indiana University X-rays")
    folder = Path(image_root or Path(root) / "images")
    for part, item in _items(path, split):
        if loading.full:
            break
        report = collapse(item["report"])
        if not report:
            loading.drop("without a text in report")
            continue
        films = [str(folder / film) for film in item["image_path"][:max_images]] if images else []
        shown = loading.usable(str(item["id"]), films)
        if shown is None:
            continue
        meta = {name: value for name, value in item.items() if name not in FIELDS} | {"split": part}
        if "subject_id" in item:
            meta["patient_id"] = str(item["subject_id"])
        loading.add(Record(str(item["id"]), FINDINGS_REQUEST, report, shown, meta))
    return loading.finish()


def _items(path: Path, split: str | None) -> Iterator[tuple[str, dict]]:
    """(split, item) of the parts asked for; each item has been checked."""
    try:
        parts = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}; copy it again"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); copy it again") from error
    if not isinstance(parts, dict) or not all(isinstance(parts.get(name), list) for name in SPLITS):
        got = ", ".join(map(str, parts)) if isinstance(parts, dict) else type(parts).__name__
        raise InputError(f"{path}: expected an object with the lists {', '.join(SPLITS)}, got {got or 'nothing in it'}")
    for name in SPLITS if split is None else (split,):
        for index, item in enumerate(parts[name]):
            where = f"{path}, {name}[{index}]"
            missing = [field for field in FIELDS if not isinstance(item, dict) or field not in item]
            if missing:
                raise InputError(f"{where}: expected an object with {', '.join(FIELDS)}; it lacks {', '.join(missing)}")
            if not isinstance(item["report"], str):
                raise InputError(f"{where}: report must be a text, got {type(item['report']).__name__}")
            films = item["image_path"]
            if not isinstance(films, list) or not all(isinstance(film, str) for film in films):
                raise InputError(f"{where}: image_path must be a list of paths, got {films!r}")
            yield name, item
