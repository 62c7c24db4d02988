"""Data sets of invented studies in exactly the published layouts, built into a folder; no text or film of them is real.

python tests/data_fixtures.py FOLDER    # writes all of them, to look at or to try the command line on
"""

import csv
import gzip
import json
import sys
from pathlib import Path

from PIL import Image

MIMIC_SPLIT = ("dicom_id", "study_id", "subject_id", "split")
MIMIC_METADATA = (
    *("dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns"),
    *("StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning"),
    "PatientOrientationCodeSequence_CodeMeaning",
)
CHEXPERT_COLUMNS = (
    *("", "path_to_image", "path_to_dcm", "frontal_lateral", "ap_pa", "deid_patient_id", "patient_report_date_order"),
    *("report", "section_narrative", "section_clinical_history", "section_history", "section_comparison"),
    *("section_technique", "section_procedure_comments", "section_findings", "section_impression"),
    *("section_end_of_impression", "section_summary", "section_accession_number", "age", "sex", "race", "ethnicity"),
    *("interpreter_needed", "insurance_type", "recent_bmi", "deceased", "split"),
)
KAGGLE_REPORTS = ("uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression")
KAGGLE_PROJECTIONS = ("uid", "filename", "projection")
PADCHEST_COLUMNS = (
    *("", "ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth", "PatientSex_DICOM"),
    *("ViewPosition_DICOM", "Projection", "MethodProjection", "Pediatric", "Modality_DICOM", "Manufacturer_DICOM"),
    *("PhotometricInterpretation_DICOM", "PixelRepresentation_DICOM", "PixelAspectRatio_DICOM"),
    *("SpatialResolution_DICOM", "BitsStored_DICOM", "WindowCenter_DICOM", "WindowWidth_DICOM", "Rows_DICOM"),
    *("Columns_DICOM", "XRayTubeCurrent_DICOM", "Exposure_DICOM", "ExposureInuAs_DICOM", "ExposureTime"),
    *("RelativeXRayExposure_DICOM", "ReportID", "Report", "MethodLabel", "Labels", "Localizations"),
    *("LabelsLocalizationsBySentence", "labelCUIS", "LocalizationsCUIS"),
)


def film(path: Path, level: int = 90) -> Path:
    """A small gray film in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), level).save(path)
    return path


def table(path: Path, columns, rows, *, bom: bool = False, newline: str = "\r\n") -> Path:
    """A CSV file, gzipped where its name ends in .gz, from dicts that may leave columns out."""
    opener = gzip.open if path.name.endswith(".gz") else open
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wt", encoding="utf-8-sig" if bom else "utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator=newline)
        writer.writeheader()
        writer.writerows(rows)
    return path


def mimic_text(*sections: tuple[str, str], title: str = "FINAL REPORT") -> str:
    """A report as MIMIC-CXR sets it: the title padded, every later line after one blank, blank lines one blank."""
    lines = [f"{title:>45}"]
    for header, body in sections:
        first, *rest = body.split("\n")
        lines += [f" {header}:  {first}" if header else f" {first}", *(f" {line}" for line in rest), " "]
    return "\n".join(lines)


MIMIC_STUDIES = {
    # study: (subject, split, [(dicom id, view)], report)
    "50000001": (
        *("10000001", "train", [("a1", "LATERAL"), ("a2", "AP"), ("a3", "PA")]),
        mimic_text(
            ("INDICATION", "___F with an invented\ncough."),
            ("COMPARISON", "None."),
            ("FINDINGS", "Invented nodule,\nas of ___.\n\nHeart is normal."),
            ("IMPRESSION", "One invented nodule."),
        ),
    ),
    # two findings sections of which the last counts, and one name in other words
    "50000002": (
        *("10000001", "train", [("b1", "AP")]),
        mimic_text(
            ("REASON FOR EXAM", "Line placed."),
            ("FINDINGS", "Superseded text."),
            ("FINDINGS", "Line ends at the cavoatrial junction."),
            ("FINDINGS AND IMPRESSION", "Line as wanted."),
        ),
    ),
    # view title as header, findings below it; the view is one that only "all" has, the other is not known
    "50000003": (
        *("11000002", "train", [("c1", "LL"), ("c2", "")]),
        mimic_text(("CHEST, AP PORTABLE", "Invented haze."), ("HISTORY", "Fall.")),
    ),
    # no findings and no impression: the last section is cut at the blank line
    "50000004": (
        *("12000003", "train", [("d1", "PA")]),
        mimic_text(("HISTORY", "Invented fever.\n\nLungs are clear.\n\nNo more."), title="WET READ"),
    ),
    # no sections at all
    "50000005": ("13000004", "train", [("e1", "PA")], "Invented text without any header.\n It goes on."),
    "50000006": (
        *("14000005", "validate", [("f1", "AP")]),
        mimic_text(("FINDINGS", "Held out."), ("IMPRESSION", " ")),
    ),
    "50000007": ("15000006", "test", [("g1", "PA")], mimic_text(("IMPRESSION", "Only an impression."))),
}


def write_mimic_cxr(root: Path, studies=MIMIC_STUDIES, *, reports: Path | None = None) -> Path:
    """MIMIC-CXR-JPG's tables and films under `root`, MIMIC-CXR's reports there or under `reports`."""
    split, metadata = [], []
    for study, (subject, part, films, text) in studies.items():
        folder = Path("files") / f"p{subject[:2]}" / f"p{subject}"
        report = (reports or root) / folder / f"s{study}.txt"
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(text, encoding="utf-8")
        for dicom, view in films:
            film(root / folder / f"s{study}" / f"{dicom}.jpg")
            ids = {"dicom_id": dicom, "study_id": study, "subject_id": subject}
            split.append({**ids, "split": part})
            metadata.append({**ids, "ViewPosition": view, "Rows": "8", "Columns": "8", "StudyDate": "21800506"})
    table(root / "mimic-cxr-2.0.0-split.csv.gz", MIMIC_SPLIT, split, newline="\n")
    # Another order than the split file's, as in the real files.
    metadata.sort(key=lambda row: row["dicom_id"], reverse=True)
    table(root / "mimic-cxr-2.0.0-metadata.csv.gz", MIMIC_METADATA, metadata, newline="\n")
    return root


def chexpert_row(path: str, **cells) -> dict:
    patient = path.split("/")[1]
    lateral = "lateral" in path
    return {
        "path_to_image": path,
        "path_to_dcm": path.replace(".jpg", ".dcm"),
        "frontal_lateral": "Lateral" if lateral else "Frontal",
        "ap_pa": "" if lateral else "AP",
        "deid_patient_id": patient,
        "patient_report_date_order": "1",
        "split": path.split("/")[0],
        **cells,
    }


CHEXPERT_ROWS = [
    chexpert_row(
        "train/patient00001/study1/view1_frontal.jpg",
        section_clinical_history="61 years old,\ninvented dyspnea",
        section_findings="\n1. Invented\r\n effusion.  ",
        section_impression="1.  Effusion.",
    ),
    # section_findings missing in two ways; the second film of the first study comes later
    chexpert_row("train/patient00001/study2/view1_frontal.jpg", section_findings="", section_impression="Unchanged."),
    chexpert_row(
        "train/patient00002/study1/view1_frontal.jpg",
        ap_pa="PA",
        section_history="Invented trauma",
        section_findings="nan",
        section_impression="No fracture.",
    ),
    chexpert_row(
        "train/patient00001/study1/view2_lateral.jpg",
        section_clinical_history="61 years old,\ninvented dyspnea",
        section_findings="\n1. Invented\r\n effusion.  ",
        section_impression="1.  Effusion.",
    ),
    chexpert_row(
        "valid/patient00003/study1/view1_frontal.jpg",
        section_findings="Invented valid text.",
        section_impression="nan",
    ),
]


def write_chexpert_plus(root: Path, rows=CHEXPERT_ROWS, *, place: str = "", suffix: str = ".jpg") -> Path:
    for row in rows:
        film((root / place / row["path_to_image"]).with_suffix(suffix))
    table(root / "df_chexpert_plus_240401.csv", CHEXPERT_COLUMNS, [{"": i, **row} for i, row in enumerate(rows)])
    return root


# R2Gen's split has CXR1_1_IM-0001 and CXR5_IM-2117 in train, CXR4_IM-2050 in val, CXR2_IM-0652 in test, no CXR3.
KAGGLE_ROWS = [
    {"uid": "5", "MeSH": "Nodule/lung;Opacity", "indication": "Invented pain", "findings": "Invented nodule, XXXX."},
    {"uid": "1", "MeSH": "normal", "indication": "", "findings": "Two lungs.", "impression": "Normal."},
    {"uid": "2", "MeSH": "normal", "indication": "Cough", "findings": "", "impression": "Clear."},
    {"uid": "3", "MeSH": "normal", "findings": "No film of this one.", "impression": "None."},
    {"uid": "4", "MeSH": "normal", "findings": "Two lungs.", "impression": "Normal."},
]
KAGGLE_FILMS = [
    ("4", "4_IM-2050-1001.dcm.png", "Frontal"),
    ("5", "5_IM-2117-1004002.dcm.png", "Lateral"),
    ("5", "5_IM-2117-1003002.dcm.png", "Frontal"),
    ("1", "1_IM-0001-3001.dcm.png", "Lateral"),
    ("2", "2_IM-0652-1001.dcm.png", "Frontal"),
]


def write_iu_kaggle(root: Path, rows=KAGGLE_ROWS, films=KAGGLE_FILMS) -> Path:
    table(root / "indiana_reports.csv", KAGGLE_REPORTS, rows, bom=True)
    projections = [dict(zip(KAGGLE_PROJECTIONS, cells, strict=True)) for cells in films]
    table(root / "indiana_projections.csv", KAGGLE_PROJECTIONS, projections)
    for _, name, _ in films:
        film(root / "images" / "images_normalized" / name)
    return root


def r2gen_item(study: str, part: str, report: str, films: int = 2) -> dict:
    return {"id": study, "report": report, "image_path": [f"{study}/{i}.png" for i in range(films)], "split": part}


R2GEN_ITEMS = [
    r2gen_item("CXR2384_IM-0942", "train", "Invented heart .\n Invented lungs ."),
    r2gen_item("CXR5_IM-2117", "train", " "),
    r2gen_item("CXR4_IM-2050", "val", "Two lungs ."),
    r2gen_item("CXR2_IM-0652", "test", "Two lungs ."),
]


def write_iu_r2gen(root: Path, items=R2GEN_ITEMS) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    parts = {part: [item for item in items if item["split"] == part] for part in ("train", "val", "test")}
    (root / "annotation.json").write_text(json.dumps(parts), encoding="utf-8")
    for item in items:
        for path in item["image_path"]:
            film(root / "images" / path)
    return root


def padchest_row(image: str, study: str, patient: str, projection: str, report: str, labels: str, **cells) -> dict:
    ids = {"ImageID": f"{image}.png", "ImageDir": "7", "StudyID": study, "PatientID": patient}
    return {**ids, "Projection": projection, "Report": report, "Labels": labels, "MethodLabel": "Physician", **cells}


# sha256 of the patients' names mod 10: "p2" 9, "p3" 3 (train), "p5" 1 (val), "p13" 0 (test).
PADCHEST_ROWS = [
    padchest_row("i1", "s1", "p2", "L", " nodul invent  pulmon .", "['nodule', 'normal ']"),
    padchest_row("i2", "s1", "p2", "PA", " nodul invent  pulmon .", "['nodule', 'normal ']"),
    padchest_row("i3", "s2", "p3", "AP_horizontal", "nan", "['cardiomegaly']", MethodLabel="RNN_model"),
    padchest_row("i4", "s3", "p5", "COSTAL", " sin hallazg .", "nan"),
    padchest_row("i5", "s4", "p13", "PA", " sin hallazg .", "[]"),
    padchest_row("i6", "s5", "p2", "PA", " derram .", "['pleural effusion']"),
    padchest_row("i7", "s5", "p3", "L", " derram .", "['pleural effusion']"),
]


def write_padchest(root: Path, rows=PADCHEST_ROWS, *, flat: bool = False) -> Path:
    for row in rows:
        film(root / ("" if flat else row["ImageDir"]) / row["ImageID"])
    name = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"
    table(root / name, PADCHEST_COLUMNS, [{"": i, **row} for i, row in enumerate(rows)])
    return root


WRITERS = {
    "mimic_cxr": write_mimic_cxr,
    "chexpert_plus": write_chexpert_plus,
    "iu_kaggle": write_iu_kaggle,
    "iu_r2gen": write_iu_r2gen,
    "padchest": write_padchest,
}


if __name__ == "__main__":
    for name, write in WRITERS.items():
        print(f"dive-fast data inspect {name} --root {write(Path(sys.argv[1]) / name)}")
