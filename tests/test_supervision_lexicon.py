"""The lexicon tagger against a table of invented sentences, its invariants, and what a damaged file says."""

import copy
import functools
import re
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dive_fast.errors import InputError
from dive_fast.supervision import lexicon
from dive_fast.supervision.lexicon import LexiconTagger
from dive_fast.supervision.tagger import POLARITIES

CHEXPERT_LABELS = (
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices", "No Finding",
)  # fmt: skip
SIGN = {"present": "+", "absent": "-", "uncertain": "?"}

# Sentence -> the classes a radiologist would read off it, in order: + present, - absent, ? uncertain.
SENTENCES = [
    # each finding, asserted
    ("Widened mediastinum.", "+Enlarged Cardiomediastinum"),
    ("The heart is enlarged.", "+Cardiomegaly"),
    ("Patchy opacity in the right base.", "+Lung Opacity"),
    ("A 6 mm nodule in the left upper lobe.", "+Lung Lesion"),
    ("Mild pulmonary vascular congestion.", "+Edema"),
    ("Bilateral streaky opacities and calcified granulomas.", "+Lung Opacity, +Lung Lesion"),
    ("Dense consolidation of the lingula.", "+Consolidation"),
    ("Normal in size; both costophrenic angles are blunted.", "+Pleural Effusion"),
    ("Right lower lobe pneumonia.", "+Pneumonia"),
    ("Low lung volumes with bibasilar subsegmental atelectasis.", "+Atelectasis"),
    ("Small bilateral pneumothoraces.", "+Pneumothorax"),
    ("There is a small left pleural effusion.", "+Pleural Effusion"),
    ("Blunting of the right costophrenic angle.", "+Pleural Effusion"),
    ("Biapical pleural thickening.", "+Pleural Other"),
    ("Old healed fractures of the left ribs.", "+Fracture"),
    ("Right internal jugular central venous catheter tip overlies the SVC.", "+Support Devices"),
    ("Dual-lead pacemaker and sternotomy wires are present.", "+Support Devices, +Support Devices"),
    ("Normal chest radiograph.", "+No Finding"),
    ("No acute cardiopulmonary abnormality.", "+No Finding"),
    # each finding, denied
    ("Cardiomediastinal silhouette is unremarkable.", "-Enlarged Cardiomediastinum"),
    ("The heart is not enlarged.", "-Cardiomegaly"),
    ("Heart size is normal.", "-Cardiomegaly"),
    ("The lungs are clear.", "-Lung Opacity"),
    ("No suspicious pulmonary nodules or masses are identified.", "-Lung Lesion, -Lung Lesion"),
    ("No overt edema.", "-Edema"),
    ("Pulmonary vascularity is normal.", "-Edema"),
    ("No focal airspace consolidation.", "-Consolidation"),
    ("No evidence of pneumonia.", "-Pneumonia"),
    ("Without atelectasis.", "-Atelectasis"),
    ("Negative for pneumothorax.", "-Pneumothorax"),
    ("The costophrenic angles are sharp.", "-Pleural Effusion"),
    ("No pleural plaques.", "-Pleural Other"),
    ("No acute displaced rib fractures.", "-Fracture"),
    ("The osseous structures are intact.", "-Fracture"),
    ("No acute bony abnormality.", "-Fracture"),
    ("The endotracheal tube has been removed.", "-Support Devices"),
    # uncertain, before and after
    ("Borderline cardiomegaly.", "?Cardiomegaly"),
    ("Heart size is at the upper limits of normal.", "?Cardiomegaly"),
    ("Questionable small left apical pneumothorax.", "?Pneumothorax"),
    ("Findings suggest mild interstitial edema.", "?Edema"),
    ("Pneumonia cannot be excluded.", "?Pneumonia"),
    ("Left base atelectasis versus infiltrate.", "?Atelectasis, ?Lung Opacity"),
    ("Left base atelectasis vs. infiltrate.", "?Atelectasis, ?Lung Opacity"),
    ("Patchy opacity may represent atelectasis or pneumonia.", "+Lung Opacity, ?Atelectasis, ?Pneumonia"),
    ("Dense consolidation, suspicious for pneumonia, in the lingula.", "+Consolidation, ?Pneumonia"),
    ("Multifocal consolidation is consistent with pneumonia.", "+Consolidation, +Pneumonia"),
    ("Cavitary lesion suspicious for malignancy.", "+Lung Lesion, ?Lung Lesion"),
    # negation through lists
    ("No pneumothorax, effusion or consolidation.", "-Pneumothorax, -Pleural Effusion, -Consolidation"),
    ("Neither effusion nor pneumothorax is seen.", "-Pleural Effusion, -Pneumothorax"),
    ("Effusion and pneumothorax are not seen.", "-Pleural Effusion, -Pneumothorax"),
    ("The lungs are free of focal consolidation, pleural effusion, or pneumothorax.",
     "-Consolidation, -Pleural Effusion, -Pneumothorax"),
    ("The lungs are clear bilaterally without focal consolidation, effusion, or pneumothorax.",
     "-Lung Opacity, -Consolidation, -Pleural Effusion, -Pneumothorax"),
    ("No acute cardiopulmonary disease, pleural effusion, or pneumothorax.",
     "+No Finding, -Pleural Effusion, -Pneumothorax"),
    ("The heart size and mediastinal contours are within normal limits.", "-Cardiomegaly, -Enlarged Cardiomediastinum"),
    ("Normal heart size and pulmonary vasculature.", "-Cardiomegaly, -Edema"),
    # pseudo-negations
    ("No change in the small right effusion.", "+Pleural Effusion"),
    ("No increase in the left pneumothorax.", "+Pneumothorax"),
    ("No significant interval change in bibasilar atelectasis.", "+Atelectasis"),
    # what ends the reach of a cue
    ("No pneumothorax but there is a left effusion.", "-Pneumothorax, +Pleural Effusion"),
    ("No effusion; bibasilar atelectasis.", "-Pleural Effusion, +Atelectasis"),
    ("No pneumothorax, stable cardiomegaly.", "-Pneumothorax, +Cardiomegaly"),
    ("No pneumothorax, the heart is enlarged.", "-Pneumothorax, +Cardiomegaly"),
    ("The lungs are clear except for a calcified granuloma.", "-Lung Opacity, +Lung Lesion"),
    ("A mass is noted, although no effusion.", "+Lung Lesion, -Pleural Effusion"),
    ("No pneumothorax following removal of the chest tube.", "-Pneumothorax, -Support Devices"),
    ("No pneumothorax. Pneumonia not excluded.", "-Pneumothorax, ?Pneumonia"),
    ("Mild cardiomegaly without pulmonary edema.", "+Cardiomegaly, -Edema"),
    ("Possible right lower lobe pneumonia without effusion.", "?Pneumonia, -Pleural Effusion"),
    ("There is no large effusion; a small effusion is not excluded.", "-Pleural Effusion, ?Pleural Effusion"),
    ("There is no evidence of pneumothorax, but the heart is enlarged with mild pulmonary edema.",
     "-Pneumothorax, +Cardiomegaly, +Edema"),
    ("No pneumothorax or effusion\n\nCardiomegaly", "-Pneumothorax, -Pleural Effusion, +Cardiomegaly"),
    ("Findings:\n- No effusion\n- Cardiomegaly", "-Pleural Effusion, +Cardiomegaly"),
    # resolution and comparison
    ("The pneumothorax has resolved.", "-Pneumothorax"),
    ("Interval resolution of the right pneumothorax.", "-Pneumothorax"),
    ("Airspace disease has cleared.", "-Lung Opacity"),
    ("Cardiomegaly is stable and the effusion has resolved.", "+Cardiomegaly, -Pleural Effusion"),
    ("Effusion resolved, pneumothorax persists.", "-Pleural Effusion, +Pneumothorax"),
    ("There is no longer a pneumothorax.", "-Pneumothorax"),
    ("There is no longer evidence of pulmonary edema.", "-Edema"),
    ("Cardiomegaly, and there is no longer an effusion.", "+Cardiomegaly, -Pleural Effusion"),
    ("The effusion is no longer visible, and the heart is enlarged.", "-Pleural Effusion, +Cardiomegaly"),
    ("The pneumothorax has not resolved.", "+Pneumothorax"),
    ("Effusion not resolved, edema resolved.", "+Pleural Effusion, -Edema"),
    ("The chest tube has not been removed.", "+Support Devices"),
    ("Pneumothorax has not been seen.", "-Pneumothorax"),
    ("Pneumothorax has not been excluded.", "?Pneumothorax"),
    ("There has not been any change in the effusion.", "+Pleural Effusion"),
    # contractions say what they are short for
    ("Pneumothorax isn't seen.", "-Pneumothorax"),
    ("Effusion and edema aren\N{RIGHT SINGLE QUOTATION MARK}t visible.", "-Pleural Effusion, -Edema"),
    ("There isn't an effusion or pneumothorax.", "-Pleural Effusion, -Pneumothorax"),
    ("This doesn't show edema.", "-Edema"),
    ("The effusion hasn't resolved.", "+Pleural Effusion"),
    ("There hasn't been any change in the effusion.", "+Pleural Effusion"),
    ("Pneumonia isn't excluded.", "?Pneumonia"),
    ("We can't exclude edema; pneumonia couldn't be excluded.", "?Edema, ?Pneumonia"),
    ("The heart isn't enlarged.", "-Cardiomegaly"),
    ("Heart size isn't normal.", ""),
    # doubt and normality between two findings
    ("Pneumonia possible.", "?Pneumonia"),
    ("Cardiomegaly, pulmonary venous congestion and probable mild edema.", "+Cardiomegaly, +Edema, ?Edema"),
    ("No focal opacity to suggest pneumonia.", "-Lung Opacity, -Pneumonia"),
    ("No large effusion, possible pneumonia.", "-Pleural Effusion, ?Pneumonia"),
    ("Age-indeterminate rib fracture.", "+Fracture"),
    ("Heart size is upper limits normal.", "?Cardiomegaly"),
    ("The cardiomediastinal silhouette has a normal contour.", "-Enlarged Cardiomediastinum"),
    ("There is normal size and configuration of the cardiac silhouette.", "-Cardiomegaly"),
    ("Cardiomediastinal silhouette shows normal heart size.", "-Cardiomegaly"),
    ("The mediastinum is stable and within normal limits for size and contour.", "-Enlarged Cardiomediastinum"),
    ("The lungs are low in volume but clear.", "-Lung Opacity"),
    # overlaps and word boundaries: the longest phrase wins, and only whole words count
    ("Massive right pleural effusion.", "+Pleural Effusion"),
    ("Left pleural effusion. Right lung is clear.", "+Pleural Effusion, -Lung Opacity"),
    ("Unchanged tracheostomy tube and feeding tube.", "+Support Devices, +Support Devices"),
    # de-identification marks, tokenised text, case, white space
    ("XXXX no XXXX pneumothorax or XXXX effusion XXXX.", "-Pneumothorax, -Pleural Effusion"),
    ("Comparison with ___: no pneumothorax.", "-Pneumothorax"),
    ("no pleural effusion . heart size normal . clear lungs .", "-Pleural Effusion, -Cardiomegaly, -Lung Opacity"),
    ("No XXXX acute findings.", "+No Finding"),
    ("NO PLEURAL EFFUSION.", "-Pleural Effusion"),
    ("There is no pleural\n effusion   or\n pneumothorax.", "-Pleural Effusion, -Pneumothorax"),
    ("A 1.5 cm air-space opacity.", "+Lung Opacity"),
    # nothing that the fourteen findings cover
    ("The aorta is tortuous.", ""),
    ("Degenerative changes of the thoracic spine.", ""),
    ("The heart and lungs were compared with the prior film.", ""),
    ("", ""),
]  # fmt: skip


@functools.cache
def shipped():
    return LexiconTagger()


@pytest.fixture
def tagger():
    return shipped()


def classes(tagger, text):
    return ", ".join(SIGN[span.label[1]] + span.label[0] for span in tagger(text))


@pytest.mark.parametrize(("sentence", "expected"), SENTENCES)
def test_sentence(tagger, sentence, expected):
    assert classes(tagger, sentence) == expected


def test_spans_are_the_words_that_decide(tagger):
    text = "Heart size and mediastinal contours are\nnormal. No left pleural  effusion."
    assert [text[s.start : s.end] for s in tagger(text)] == [
        "Heart size", "mediastinal contours are\nnormal", "pleural  effusion"]  # fmt: skip


def test_the_table_covers_every_finding_with_every_polarity_that_occurs():
    seen = {name for _, expected in SENTENCES for name in expected.split(", ") if name}
    assert {f"{sign}{label}" for label in CHEXPERT_LABELS[:-1] for sign in "+-"} | {"+No Finding"} <= seen
    assert sum(name.startswith("?") for name in seen) >= 7


def test_findings_are_the_chexpert_labels_in_order(tagger):
    assert tagger.findings == CHEXPERT_LABELS


words = st.sampled_from(
    "no without possible pleural effusion pneumothorax and or , . ; but heart size is normal enlarged lungs are clear "
    "XXXX ___ cannot be excluded not seen opacity é µ İ 🫁 Straße ( ) - change in acute cardiopulmonary disease".split()
)


@settings(deadline=None, max_examples=200)
@given(st.one_of(st.lists(words).map(" ".join), st.text()), st.text(" \n\t", max_size=4), st.text(" \n\t", max_size=4))
def test_spans_lie_inside_sorted_disjoint_and_ignore_surrounding_white_space(text, before, after):
    tagger = shipped()
    spans = tagger(text)
    assert all(0 <= s.start < s.end <= len(text) for s in spans)
    assert all(left.end <= right.start for left, right in zip(spans, spans[1:], strict=False))
    assert all(s.label[0] in tagger.findings and s.label[1] in POLARITIES for s in spans)
    assert all(text[s.start : s.end].strip() == text[s.start : s.end] for s in spans)
    shifted = tagger(before + text + after)
    assert [(s.start - len(before), s.end - len(before), s.label) for s in shifted] == [tuple(s) for s in spans]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([s for s, _ in SENTENCES if "\n" not in s]),
    st.sampled_from([str.lower, str.upper]),
    st.sampled_from(["\n ", "  "]),
)
def test_case_and_inner_white_space_change_nothing(sentence, change_case, gap):
    tagger = shipped()
    assert classes(tagger, change_case(re.sub(" ", gap, sentence))) == classes(tagger, sentence)


def test_three_thousand_reports_take_seconds(tagger):
    report = " ".join(sentence for sentence, _ in SENTENCES[:8])
    assert 35 < len(report.split()) < 60
    start = time.perf_counter()
    for _ in range(3000):
        tagger(report)
    assert time.perf_counter() - start < 5


SMALL = {
    "words": {"be": ["is", "are"]},
    "findings": {
        "Pleural Effusion": {
            "mention": ["(pleural) (effusion(s)|fluid( s ))", "collection(|\n s)"], "anatomy": ["costophrenic angle(s)"]
        },
        "Cardiomegaly": {"present": ["heart <be> (mildly|) enlarged"], "absent": ["small heart"]},
    },
    "cues": {
        "absent_before": ["no"], "absent_after": ["not seen"], "uncertain_before": ["possible"],
        "uncertain_after": ["not excluded"], "normal_before": ["normal"], "normal_after": ["(<be>) normal"],
        "pseudo": ["no change in"], "terminators": [".", "but"], "joiners": [",", "or"],
    },
}  # fmt: skip


def write(tmp_path, content, name="mine.yaml"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def changed(**sections):
    content = copy.deepcopy(SMALL)
    for section, value in sections.items():
        content[section] = {**content.get(section, {}), **value} if isinstance(value, dict) else value
    return content


def test_own_lexicon_and_every_part_of_the_notation(tmp_path):
    tagger = LexiconTagger(write(tmp_path, SMALL))
    assert tagger.findings == ("Pleural Effusion", "Cardiomegaly")
    for text, expected in [
        ("Pleural effusions.", "+Pleural Effusion"), ("No fluid.", "-Pleural Effusion"),
        ("pleural.", ""), ("Effusion not seen.", "-Pleural Effusion"), ("heart are enlarged", "+Cardiomegaly"),
        ("heart is mildly enlarged", "+Cardiomegaly"),
        ("pleural fluids", "+Pleural Effusion"),
        ("collections", "+Pleural Effusion"), ("small heart", "-Cardiomegaly"),
        ("costophrenic angles are normal", "-Pleural Effusion"), ("no change in fluid", "+Pleural Effusion"),
    ]:  # fmt: skip
        assert classes(tagger, text) == expected, text


def test_fingerprint_follows_the_content_and_not_its_layout(tmp_path):
    first = LexiconTagger(write(tmp_path, SMALL))
    reordered = changed(cues={"terminators": ["but", "."]})
    same = LexiconTagger(write(tmp_path, "# a remark\n" + yaml.safe_dump(reordered, sort_keys=False, indent=6)))
    other = LexiconTagger(write(tmp_path, changed(cues={"absent_before": ["no", "without"]})))
    assert re.fullmatch("[0-9a-f]{64}", first.fingerprint)
    assert first.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize(("content", "parts"), [
    (changed(findngs={}), ["findngs", "findings"]),
    (changed(cues={"absent_befor": ["none"]}), ["cues", "absent_befor", "absent_before"]),
    (changed(findings={"Fracture": {"mentions": ["fracture"]}}), ["Fracture", "mentions", "mention"]),
    (changed(findings={"Fracture": {"mention": "fracture"}}), ["Fracture", "mention", "list"]),
    (changed(findings={"Fracture": ["fracture"]}), ["Fracture", "list", "mapping"]),
    (changed(findings={"Fracture": {}}), ["Fracture", "phrase"]),
    (changed(findings={"Fracture": {"mention": [""]}}), ["Fracture", "mention", "empty"]),
    (changed(findings={"Fracture": {"mention": ["(fracture)"]}}), ["Fracture", "(fracture)", "empty"]),
    (changed(findings={"Fracture": {"mention": [12]}}), ["Fracture", "12", "text"]),
    (changed(cues={"absent_before": [False]}), ["absent_before", "quotes"]),
    (changed(findings={"Fracture": {"mention": ["broken (rib"]}}), ["Fracture", "broken (rib", ")"]),
    (changed(findings={"Fracture": {"mention": ["broken rib)"]}}), ["Fracture", "broken rib)", "("]),
    (changed(findings={"Fracture": {"mention": ["broken | rib"]}}), ["Fracture", "broken | rib", "|"]),
    (changed(findings={"Fracture": {"mention": ["rib <bee> broken"]}}), ["Fracture", "<bee>", "be"]),
    (changed(findings={"Fracture": {"mention": ["rib <be broken"]}}), ["Fracture", "rib <be broken", "<"]),
    (changed(findings={"Fracture": {"mention": ["effusions"]}}), ["effusions", "Fracture", "Pleural Effusion"]),
    (changed(words={"be": ["is <be>"]}), ["words", "be", "is <be>"]),
    (changed(findings={"Fracture": {"mention": ["(a|b|c|d|e|f|g|h)" * 6]}}), ["Fracture", "variants"]),
    ({"findings": SMALL["findings"]}, ["cues", "missing"]),
    (changed(findings=[]), ["findings", "mapping"]),
        ({**SMALL, "findings": {}}, ["findings", "at least one"]),
        (changed(cues={"pseudo": ["no"]}), ["no", "pseudo", "absent_before"]),
    ("- just\n- a list\n", ["mapping", "list"]),
    ("findings: [unclosed\n", ["YAML", "line"]),
    ("findings:\n  A: {mention: [x]}\n  A: {mention: [y]}\n", ["twice", "A"]),
    ("findings: {A: {mention: [2024-13-45]}}\ncues: {}\n", ["YAML", "month", "quotes"]),
    (f"findings: {'[' * 1500}\n", ["nested too deeply"]),
    (changed(findings={"A": {"mention": ["(" * 1500]}}), ["nested too deeply"]),
])  # fmt: skip
def test_a_damaged_file_is_explained(tmp_path, content, parts):
    path = write(tmp_path, content)
    with pytest.raises(InputError) as error:
        LexiconTagger(path)
    for part in [str(path), *parts]:
        assert part in str(error.value)


def test_a_missing_file_is_explained(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        LexiconTagger(tmp_path / "nowhere.yaml")


def test_text_must_be_text(tagger):
    with pytest.raises(InputError, match="text"):
        tagger(None)


def test_shipped_lexicon_has_its_instructions_on_top():
    top = (Path(lexicon.__file__).parent / "lexicons" / "chest.yaml").read_text().split("\nwords:")[0]
    assert all(word in top for word in ["mention", "anatomy", "optional", "<", "quotes"])
