"""Open-i: the Indiana University chest X-ray reports, read from the installed torchxrayvision wheel.

Demner-Fushman et al., "Preparing a collection of radiology examinations for distribution and retrieval" (JAMIA 2016).
The texts are under CC BY-NC-ND 4.0: they are read where they are installed and never copied.
"""

import csv
import importlib.util
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from dive_fast.data.counts import Records
from dive_fast.data.prompt import FINDINGS_REQUEST, IMPRESSION_REQUEST, collapse, compose_prompt
from dive_fast.data.record import Record
from dive_fast.errors import InputError

SPLITS = ("train", "val", "test")
SECTIONS = {"findings": FINDINGS_REQUEST, "impression": IMPRESSION_REQUEST}
INSTALL = "pip install --no-deps torchxrayvision==1.5.7"
SPLIT_FILE = Path(__file__).parent / "splits" / "open_i_r2gen.csv"


class _Report(NamedTuple):
    study: str
    tags: tuple[str, ...]
    indication: str
    text: str


def load_open_i(
    split: str | None = "train", *, section: str = "findings", archive: str | Path | None = None
) -> Records:
    """The Open-i reports as a text-conditioned report task: tags and indication -> one section.

    The wheel has no films, so the MeSH tags stand in for the image: annotators wrote them after reading the report.
    Scores on this task say how a method works, not how well a model reads films.

    The split is R2Gen's (Chen et al., EMNLP 2020): the 2955 studies that have a FINDINGS section and two films or more,
    2069/296/590. A record's id is R2Gen's: the study's first image id without its last part, "CXR2_IM-0652".

    Args:
        split: "train", "val", "test", or None for every report with a text in `section`, in R2Gen's split or not.
        section: "findings" or "impression".
        archive: an NLMCXR_reports.tgz; by default the one inside the installed torchxrayvision.

    Returns:
        Records by study number, with `counts`. `meta` has tags (tuple), indication, split ("train" | "val" | "test" |
        None), has_deid (the de-identification mark "XXXX" occurs in the report) and unseen_text: False if the report's
        text occurs verbatim in the training part, as 274 of the 590 test findings do; None for training records.

    Raises:
        InputError: unknown split or section, torchxrayvision not installed, archive missing, damaged or without XML.
    """
    if split is not None and split not in SPLITS:
        raise InputError(f"split: expected one of {', '.join(SPLITS)} or None for all, got {split!r}")
    if section not in SECTIONS:
        raise InputError(f"section: expected one of {', '.join(SECTIONS)}, got {section!r}")
    path = _installed_archive() if archive is None else Path(archive)
    reports = sorted(_read_archive(path, section), key=_study_order)
    split_of = read_split()
    training_texts = {report.text for report in reports if split_of.get(report.study) == "train"}
    asked = [report for report in reports if split is None or split_of.get(report.study) == split]
    records = Records(
        _record(report, split_of.get(report.study), section, training_texts) for report in asked if report.text
    )
    if len(records) < len(asked):
        records.counts.dropped[f"without a text in {section}"] = len(asked) - len(records)
    return records


def _record(report: _Report, split: str | None, section: str, training_texts: set[str]) -> Record:
    parts = [("Tags", "; ".join(report.tags)), ("Indication", report.indication)]
    meta = {
        "tags": report.tags,
        "indication": report.indication,
        "split": split,
        "unseen_text": None if split == "train" else report.text not in training_texts,
        "has_deid": "XXXX" in report.text,
    }
    return Record(report.study, compose_prompt(parts, SECTIONS[section]), report.text, meta=meta)


def _study_order(report: _Report) -> tuple[int, str]:
    number = report.study.removeprefix("CXR").split("_")[0]
    return (int(number) if number.isdigit() else 0, report.study)


def read_split() -> dict[str, str]:
    with SPLIT_FILE.open(newline="", encoding="utf-8") as file:
        return {row["id"]: row["split"] for row in csv.DictReader(file)}


def _installed_archive() -> Path:
    # find_spec on a top-level name locates the package without running it: its import needs torchvision and pandas.
    spec = importlib.util.find_spec("torchxrayvision")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "data set open_i: its reports come with the package torchxrayvision, which is not installed. "
            f"Run `{INSTALL}`, or give `archive=` the path of an NLMCXR_reports.tgz"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "NLMCXR_reports.tgz"


def _read_archive(path: Path, section: str) -> list[_Report]:
    if not path.is_file():
        raise InputError(f"archive: expected an NLMCXR_reports.tgz, there is no file {path}. Get it with `{INSTALL}`")
    try:
        reports = [_parse(xml, section) for xml in _xml_files(path)]
    except (tarfile.TarError, EOFError, OSError, zlib.error, ElementTree.ParseError) as error:
        raise InputError(
            f"archive: {path} cannot be read as a .tgz of XML reports ({type(error).__name__}: {error}). "
            f"It may be cut short; reinstall with `{INSTALL} --force-reinstall`"
        ) from error
    if not reports:
        raise InputError(f"archive: expected a .tgz of Open-i XML reports, {path} holds no .xml file")
    return reports


def _xml_files(path: Path) -> Iterator[ElementTree.Element]:
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".xml"):
                yield ElementTree.parse(archive.extractfile(member)).getroot()


def _parse(root: ElementTree.Element, section: str) -> _Report:
    sections = {part.get("Label"): collapse("".join(part.itertext())) for part in root.iter("AbstractText")}
    tags = tuple(tag for tag in (collapse(major.text) for major in root.iterfind("MeSH/major")) if tag)
    image, uid = root.find("parentImage[@id]"), root.find("uId[@id]")
    if image is not None:
        study = image.get("id").rsplit("-", 1)[0]
    elif uid is not None:
        study = uid.get("id")
    else:
        raise ElementTree.ParseError("a report without the id of a <parentImage> or <uId>")
    return _Report(study, tags, sections.get("INDICATION", ""), sections.get(section.upper(), ""))
