"""The sections of a MIMIC-CXR report, cut the way the data set's own tools cut them.

The rules, the spellings and the two tables of single studies are facts about the data, taken from
github.com/MIT-LCP/mimic-cxr (txt/section_parser.py and txt/create_section_files.py, MIT licence).
"""

import re

_HEADER = re.compile(r"\n ([A-Z ()/,-]+):\s")
_BLANK_LINE = "\n \n"

# A header is one of these after lower-casing, or contains one of _CONTAINED, or names a view and so begins findings.
_SPELLINGS = {
    "impression": (
        "impression",
        "conclusion",
        "findings and impression",
        "findings/impression",
        "findings/ impression",
        "ndication",
        *("impresson", "imprression", "imoression", "impressoin", "imprssion", "impresion", "imperssion"),
        *("mpression", "impession"),
    ),
    "findings": (
        *("findings", "chest, two views", "finding", "findins", "findindgs", "findgings", "findngs", "findnings"),
        *("finidngs", "reference findings"),
    ),
    "indication": (*("indication", "reason for examination", "reason for exam", "clinical indication", "idication"),),
    "comparison": (
        *("comparison", "comparisons", "reference exam", "comparison exam", "comparison film", "comparision"),
        *("comparsion", "comparrison", "comparisions"),
    ),
    "history": ("history", "clinical history", "clinical information", "patient history", "pfi"),
    "examination": ("examination", "exam", "type of examination"),
    "recommendations": ("recommendation(s)", "recommendations", "recommendation"),
    "wet read": ("wet read", "wetread"),
    **{name: (name,) for name in ("preamble", "technique", "notification", "addendum", "date", "comment")},
}
_NAME_OF = {spelling: name for name, spellings in _SPELLINGS.items() for spelling in spellings}
_CONTAINED = ("impression", "findings", "history", "comparison", "addendum")
_VIEWS = re.compile(
    "chest|portable|pa and lateral|lateral and pa|ap and lateral|lateral and ap|frontal and|two views|frontal view|"
    "pa view|ap view|one view|lateral view|bone window|frontal upright|frontal semi-upright|ribs|pa and lat"
)

CONCLUSION_PRIORITY = ("impression", "findings", "last_paragraph", "comparison")

# Studies whose conclusion stands in another section.
_CONCLUSION_IN = {
    "recommendations": "50913680 59768032 59067458 59087630 58157373 56482935 58375018",
    "examination": "59363654 53356173 50743547 59215320 55157853",
    "technique": "59279892 53202765 50808053",
    "indication": "57936451 50058765 51966317 55124749 54365831 54654948",
    "note": "56451190",
    "history": "51491012",
}
_SECTION_OF_STUDY = {f"s{study}": name for name, studies in _CONCLUSION_IN.items() for study in studies.split()}

# Studies whose conclusion is the characters [start, end) of the report; (0, 0): they have none.
_SLICE_OF_STUDY = {
    **{"s50525523": (201, 349), "s57564132": (233, 554), "s59982525": (313, 717), "s53488209": (149, 475)},
    **{"s54875119": (234, 988), "s50196495": (59, 399), "s56579911": (59, 218), "s52648681": (292, 631)},
    **{"s59889364": (172, 453), "s53514462": (73, 377), "s59505494": (59, 450), "s53182247": (59, 412)},
    **{"s51410602": (47, 320), "s56412866": (522, 822), "s54986978": (59, 306), "s59003148": (262, 505)},
    **{"s57150433": (61, 394), "s56760320": (219, 457), "s59562049": (158, 348), "s52674888": (145, 296)},
    **{"s55258338": (192, 568), "s59330497": (140, 655), "s52119491": (179, 454)},
    **{"s58235663": (0, 0), "s50798377": (0, 0), "s54168089": (0, 0), "s53071062": (0, 0)},
    **{"s56724958": (0, 0), "s54231141": (0, 0), "s53607029": (0, 0), "s52035334": (0, 0)},
}


def split_sections(text: str) -> list[tuple[str, str]]:
    """(name, text) of a report's sections in their order; a name may occur several times, texts are not stripped.

    A header is a line of capitals after one blank and before a colon. What stands before the first is "preamble", a
    text without headers "full report". Findings and impressions without a text are dropped; where neither is left, the
    last section is cut at its first blank line, and what follows is "last_paragraph".
    """
    header = _HEADER.search(text)
    if header is None:
        sections = [("full report", text)]
    else:
        sections = [("preamble", text[: header.start(1)])]
        while header:
            # The rest of a header's own line is its section's, even where it looks like another header.
            line_end = text.find("\n", header.end())
            following = _HEADER.search(text, line_end if line_end != -1 else header.end())
            end = following.start() if following else len(text)
            sections.append((section_name(header[1]), text[header.end() : end]))
            header = following
    sections = [(n, body) for n, body in sections if n not in ("impression", "findings") or body.strip()]
    if not any(n in ("impression", "findings") for n, _ in sections):
        name, body = sections[-1]
        first, cut, rest = body.partition(_BLANK_LINE)
        if cut:
            sections[-1:] = [(name, first), ("last_paragraph", rest)]
    return sections


def section_name(header: str) -> str:
    """A header's section: its usual name, or the header itself in small letters."""
    header = header.lower().strip()
    if header in _NAME_OF:
        return _NAME_OF[header]
    contained = next((name for name in _CONTAINED if name in header), None)
    return contained or ("findings" if _VIEWS.search(header) else header)


def named_sections(text: str) -> dict[str, str]:
    """name -> stripped text; the last section of a name wins."""
    return {name: body.strip() for name, body in split_sections(text)}


def has_own_rule(study: str) -> bool:
    """Whether the study ("s50414267") is one of those whose sections are known to be misnamed."""
    return study in _SECTION_OF_STUDY or study in _SLICE_OF_STUDY


def conclusion(study: str, text: str) -> str:
    """The one text that concludes a report: impression, else findings, else last paragraph, else comparison.

    Studies with a rule of their own follow it. "" where there is none.
    """
    if study in _SLICE_OF_STUDY:
        start, end = _SLICE_OF_STUDY[study]
        return text[start:end].strip()
    sections = named_sections(text)
    if study in _SECTION_OF_STUDY:
        return sections.get(_SECTION_OF_STUDY[study], "")
    return next((sections[name] for name in CONCLUSION_PRIORITY if name in sections), "")
