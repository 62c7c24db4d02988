"""CheXpert Plus: chest films and reports of Stanford (Chambon et al., arXiv:2405.19538, 2024), one row per film."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from dive_fast.data.counts import Records
from dive_fast.data.loading import Loading, Views, check_choice, check_split
from dive_fast.data.prompt import FINDINGS_REQUEST, IMPRESSION_REQUEST, compose_prompt
from dive_fast.data.record import Record
from dive_fast.data.tables import cell_text, find_file, read_table
from dive_fast.errors import InputError

TABLE = "df_chexpert_plus_240401.csv"
SPLITS = ("train", "valid")
TARGETS = {"findings": FINDINGS_REQUEST, "impression": IMPRESSION_REQUEST}
VIEW_GROUPS = {"frontal": ("PA", "AP", "Frontal"), "lateral": ("Lateral",)}
COLUMNS = ("path_to_image", "split", "deid_patient_id", "frontal_lateral", "ap_pa")
HISTORY = ("section_clinical_history", "section_history")


@dataclass(slots=True)
class _Study:
    patient: str
    split: str
    report: str
    history: str
    films: list[tuple[str, str]] = field(default_factory=list)


def load_chexpert_plus(
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
    """CheXpert Plus, its rows grouped to studies: a study's films and clinical history -> one section of its report.

    A record is a study, in the order of the table; its id is "patient00001/study1". Texts are those of its first row
    that has one, with their white space collapsed; a section that is empty or "nan" is none. Images are paths: nothing
    is decoded before it is used.

    Args:
        root: the folder with `df_chexpert_plus_240401.csv` (or .csv.gz).
        split: the official one: "train", "valid" ("val"), or None for both.
        target: "findings" (missing in most reports) or "impression".
        views: "frontal" (PA, AP, then those that do not say), "lateral", "all", a list of these or of PA, AP, Frontal
            and Lateral, or None for no images.
        indication: put the clinical history, or else the history, into the prompt.
        image_root: the folder that the column path_to_image starts from, where it is not `root`. Films are looked for
            as the column names them (.jpg), with the suffix .png, and as .png under `PNG/`.
        max_images: at most so many of a study, the preferred views first; None: all.
        limit, skip_missing_images, check_images: see `Loading`.

    Returns:
        Records with `counts`. `meta` has patient_id, split, views (tuple) and indication.

    Raises:
        InputError: a file or column that is missing, a film that occurs twice, a study of two patients or splits, an
            unknown choice, images that are missing and may not be skipped, no record at all.
    """
    split = check_split(split, SPLITS)
    check_choice("target", target, TARGETS)
    choice = Views(views, VIEW_GROUPS, (), max_images)
    loading = Loading(
        f"chexpert_plus at {root}", limit=limit, skip_missing_images=skip_missing_images, check_images=check_images
    )
    table = find_file(root, TABLE, f"{TABLE}.gz", what="the folder of CheXpert Plus")
    films = _Films(Path(image_root or root))
    for study_id, study in _studies(table, split, f"section_{target}", loading).items():
        if loading.full:
            break
        shown = choice.choose(study.films)
        if choice.wanted and not shown:
            loading.drop("without a film of the views asked for")
            continue
        if not study.report:
            loading.drop(f"without a text in {target}")
            continue
        shown = loading.usable_films(study_id, [(view, films.find(path)) for view, path in shown])
        if shown is None:
            continue
        prompt = compose_prompt([("Indication", study.history if indication else "")], TARGETS[target])
        meta = {
            "patient_id": study.patient,
            "split": study.split,
            "views": tuple(view for view, _ in shown),
            "indication": study.history,
        }
        loading.add(Record(study_id, prompt, study.report, tuple(path for _, path in shown), meta))
    return loading.finish()


def _studies(table: Path, split: str | None, section: str, loading: Loading) -> dict[str, _Study]:
    studies: dict[str, _Study] = {}
    seen: set[str] = set()
    for line, cells in read_table(table, (*COLUMNS, section, *HISTORY)):
        path, part, patient, position, view, report, history, older_history = cells
        if part not in SPLITS:
            raise InputError(f"{table}, line {line}: split is {part!r}; expected one of {', '.join(SPLITS)}")
        if split not in (None, part):
            continue
        if path in seen:
            raise InputError(f"{table}, line {line}: the film {path!r} occurs twice; copy the file again")
        seen.add(path)
        folders = PurePosixPath(path).parts[-3:-1]
        if len(folders) < 2:
            raise InputError(
                f"{table}, line {line}: path_to_image is {path!r}; expected such as "
                "train/patient00001/study1/view1_frontal.jpg"
            )
        report, history = cell_text(report), cell_text(history) or cell_text(older_history)
        study_id = "/".join(folders)
        study = studies.setdefault(study_id, _Study(patient, part, report, history))
        if (study.patient, study.split) != (patient, part):
            raise InputError(
                f"{table}, line {line}: study {study_id} is of patient {patient} in {part}, and above of "
                f"{study.patient} in {study.split}; a study has one of each"
            )
        study.report, study.history = study.report or report, study.history or history
        if report not in ("", study.report):
            loading.note("rows with another text than their study's first, which counts")
        study.films.append((view if position == "Frontal" and view in ("AP", "PA") else position, path))
    return studies


class _Films:
    """Where films lie: the place where the last one was is tried first."""

    def __init__(self, root: Path):
        self._root, self._places = root, [self._as_named, self._as_png, self._under_png]

    def find(self, path: str) -> str:
        """The film's file, or where it would be expected first."""
        for index, place in enumerate(self._places):
            found = place(path)
            if found.is_file():
                if index:
                    self._places.insert(0, self._places.pop(index))
                return str(found)
        return str(self._places[0](path))

    def _as_named(self, path: str) -> Path:
        return self._root / path

    def _as_png(self, path: str) -> Path:
        return (self._root / path).with_suffix(".png")

    def _under_png(self, path: str) -> Path:
        return (self._root / "PNG" / path).with_suffix(".png")
