"""MIMIC-CXR: chest films and reports of Beth Israel Deaconess (Johnson et al., Scientific Data 2019), from PhysioNet.

The films are MIMIC-CXR-JPG's, the reports MIMIC-CXR's: two downloads, in one folder or in two.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dive_fast.data.counts import Records
from dive_fast.data.loading import Loading, Views, check_choice, check_split
from dive_fast.data.mimic_sections import conclusion, has_own_rule, named_sections
from dive_fast.data.prompt import FINDINGS_REQUEST, IMPRESSION_REQUEST, collapse, compose_prompt
from dive_fast.data.record import Record
from dive_fast.data.tables import find_file, read_table
from dive_fast.errors import InputError

SPLITS = ("train", "validate", "test")
TARGETS = {"findings": FINDINGS_REQUEST, "impression": IMPRESSION_REQUEST, "conclusion": IMPRESSION_REQUEST}
VIEW_GROUPS = {"frontal": ("PA", "AP"), "lateral": ("LATERAL", "LL")}
# The empty one: 4 % of the films say nothing of their view.
OTHER_VIEWS = (
    *("AP AXIAL", "AP LLD", "AP RLD", "PA LLD", "PA RLD", "XTABLE LATERAL", "SWIMMERS"),
    *("LAO", "LPO", "RAO", "RPO", "L5 S1", ""),
)


@dataclass(slots=True)
class _Study:
    subject: str
    split: str
    films: list[tuple[str, str]] = field(default_factory=list)


def load_mimic_cxr(
    root: str | Path,
    *,
    split: str | None = "train",
    target: str = "findings",
    views: str | Sequence[str] | None = "frontal",
    indication: bool = True,
    reports_root: str | Path | None = None,
    max_images: int | None = None,
    limit: int | None = None,
    skip_missing_images: bool = False,
    skip_missing_reports: bool = False,
    check_images: str = "ends",
) -> Records:
    """MIMIC-CXR(-JPG): a study's films and indication -> one part of its report.

    A record is a study, in the order of the split file; its id is the study's, "s50414267". Texts have their white
    space collapsed; the mark `___` of removed text stays. Images are paths: nothing is decoded before it is used.

    Args:
        root: the folder with `mimic-cxr-2.0.0-split.csv.gz`, `mimic-cxr-2.0.0-metadata.csv.gz` (or .csv) and
            `files/p10/p10000032/s50414267/<dicom_id>.jpg`. The metadata and films are not needed with `views=None`.
        split: the official one: "train", "validate" ("val"), "test", or None for all.
        target: "findings" or "impression", the section of that name (see `mimic_sections`; the 54 studies that the
            data set's own tools treat apart have none), or "conclusion": the impression, else the findings, the
            last paragraph or the comparison, with the rules for those 54 studies.
        views: "frontal" (PA, then AP), "lateral" (LATERAL, LL), "all", a list of these or of ViewPosition's own
            values, or None for no images.
        indication: put the indication, or else the history, into the prompt.
        reports_root: the folder with `files/p10/p10000032/s50414267.txt`, where it is not `root`.
        max_images: at most so many of a study, the preferred views first; None: all.
        limit, skip_missing_images, check_images: see `Loading`.
        skip_missing_reports: leave out studies whose report file is missing instead of raising.

    Returns:
        Records with `counts`. `meta` has patient_id, split, views (tuple), indication and has_deid.

    Raises:
        InputError: a file or column that is missing, a damaged .gz, an id that occurs twice, an unknown choice, images
            or reports that are missing and may not be skipped, no record at all.
    """
    split = check_split(split, SPLITS)
    check_choice("target", target, TARGETS)
    choice = Views(views, VIEW_GROUPS, OTHER_VIEWS, max_images)
    loading = Loading(
        f"mimic_cxr at {root}", limit=limit, skip_missing_images=skip_missing_images, check_images=check_images
    )
    studies = _studies(root, split, choice.wanted, loading)
    reports, missing = Path(reports_root or root), []
    for study_id, study in studies.items():
        if loading.full:
            break
        folder = f"files/p{study.subject[:2]}/p{study.subject}/{study_id}"
        shown = choice.choose(study.films)
        if choice.wanted and not shown:
            loading.drop("without a film of the views asked for")
            continue
        text = _read_report(reports / f"{folder}.txt")
        if text is None:
            missing.append(str(reports / f"{folder}.txt"))
            if not skip_missing_reports and len(missing) == 3:
                break
            loading.drop("without a report file")
            continue
        report, said = _target_and_indication(study_id, text, target)
        if not report:
            loading.drop(f"without a text in {target}")
            continue
        shown = loading.usable_films(study_id, [(view, f"{root}/{folder}/{film}.jpg") for view, film in shown])
        if shown is None:
            continue
        prompt = compose_prompt([("Indication", said if indication else "")], TARGETS[target])
        meta = {
            "patient_id": study.subject,
            "split": study.split,
            "views": tuple(view for view, _ in shown),
            "indication": said,
            "has_deid": "___" in report,
        }
        loading.add(Record(study_id, prompt, report, tuple(path for _, path in shown), meta))
    if missing and not skip_missing_reports:
        raise InputError(
            f"reports_root: report files are missing, the first are {', '.join(missing)}. Give the folder that "
            "holds MIMIC-CXR's `files` with the .txt reports, or leave such studies out with skip_missing_reports=True"
        )
    return loading.finish()


def _studies(root: str | Path, split: str | None, with_films: bool, loading: Loading) -> dict[str, _Study]:
    """Study id -> study with its (view, dicom id) pairs, in the order of the split file."""
    table = _table(root, "split")
    studies: dict[str, _Study] = {}
    study_of: dict[str, _Study | None] = {}
    for line, (film, number, subject, part) in read_table(table, ("dicom_id", "study_id", "subject_id", "split")):
        if part not in SPLITS:
            raise InputError(f"{table}, line {line}: split is {part!r}; expected one of {', '.join(SPLITS)}")
        if split not in (None, part):
            continue
        if film in study_of:
            raise InputError(f"{table}, line {line}: the dicom_id {film!r} occurs twice; copy the file again")
        study = studies.setdefault(f"s{number}", _Study(subject, part))
        if (study.subject, study.split) != (subject, part):
            raise InputError(
                f"{table}, line {line}: study {number} is of subject {subject} in {part}, and above of {study.subject} "
                f"in {study.split}; a study has one of each"
            )
        study_of[film] = study
    if with_films:
        _add_films(_table(root, "metadata"), study_of, loading)
    return studies


def _add_films(table: Path, study_of: dict[str, _Study | None], loading: Loading) -> None:
    # Joined by name: the two files list their ids in different orders.
    for line, (film, view) in read_table(table, ("dicom_id", "ViewPosition")):
        if film not in study_of:
            continue  # of another split
        study = study_of[film]
        if study is None:
            raise InputError(f"{table}, line {line}: the dicom_id {film!r} occurs twice; copy the file again")
        study.films.append((view.strip(), film))
        study_of[film] = None
    unknown = sum(study is not None for study in study_of.values())
    if unknown:
        loading.note("films of the split that the metadata does not have", unknown)


def _table(root: str | Path, kind: str) -> Path:
    name = f"mimic-cxr-2.0.0-{kind}.csv"
    return find_file(root, f"{name}.gz", name, what="the folder of MIMIC-CXR-JPG")


def _read_report(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"reports_root: {path} cannot be read ({error.strerror}); copy it again") from error
    except UnicodeDecodeError as error:
        raise InputError(f"reports_root: {path} is not UTF-8 text ({error}); copy it again") from error


def _target_and_indication(study: str, text: str, target: str) -> tuple[str, str]:
    sections = named_sections(text)
    said = collapse(sections.get("indication") or sections.get("history"))
    if target == "conclusion":
        return collapse(conclusion(study, text)), said
    return "" if has_own_rule(study) else collapse(sections.get(target)), said
