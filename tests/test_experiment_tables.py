"""Tables of an experiment: numbers where they were measured, dashes elsewhere, and every text escaped."""

import copy
import re

import pytest

from dive_fast.experiment import tables
from dive_fast.report import write_report
from dive_fast.report_assets import charts
from dive_fast.report_assets.numbers import COLUMNS, finding, show_signed, size
from dive_fast.report_assets.sections import differences as difference_section
from tests.report_example import example_result


def compared() -> dict:
    """An example with seeds, costs, and differences to its best adapter."""
    result = copy.deepcopy(example_result())
    result |= {"seeds": [0, 1], "compare_with": "lowrank", "bootstrap": {"resamples": 500, "seed": 0}}
    ours = result["systems"][-1]
    for index, system in enumerate(result["systems"]):
        system["costs"] = {
            "teacher_seconds": 120.5 if index > 1 else None, "teacher_in_training": system["name"] == "fixed",
            "train_peak_bytes": 1.5e9 if index > 1 else None, "tokens_per_second": 1234.5, "write_peak_bytes": 4.2e8,
            "memory": "resident set", "not_native": None,
        }  # fmt: skip
        if system is not ours:
            for part, other in ((system, ours), (system["unseen"], ours["unseen"])):
                part["differences"] = {
                    key: {"difference": value - other["scores"][key], "interval": [value - other["scores"][key] - 0.01,
                          value - other["scores"][key] + 0.01], "clear": key != "cider"}
                    for key, value in part["scores"].items()
                } | {"perplexity": {"difference": part["perplexity"] - other["perplexity"], "interval": [0.1, 9.0],
                                    "clear": index < 3}}  # fmt: skip
    return result


def table(text: str, title: str) -> dict[str, list[str]]:
    """label -> cells of the Markdown table under a heading."""
    block = text.split(f"## {title}")[1].split("\n## ")[0]
    rows = [re.split(r" *(?<!\\)\| *", line.strip("| ")) for line in block.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


def test_markdown_has_values_intervals_and_marks():
    result = compared()
    text = tables.markdown(result)
    scores = table(text, "Scores, mean over 2 seeds")
    assert scores["DIVE low-rank"][0] == "**10.1** (9.4 to 10.8)"
    assert scores["Zero-shot"][0] == "47.1† (43.8 to 50.4)" and scores["LoRA"][0] == "11.2 (10.4 to 12.0)"
    assert list(scores) == [system["label"] for system in result["systems"]]
    unseen = table(text, "The same on the 36 reports whose text does not occur in training")
    assert unseen["DIVE low-rank"][0] == "**10.1** (9.4 to 10.8)"
    difference = table(text, "Difference to DIVE low-rank, paired")
    assert "DIVE low-rank" not in difference
    assert difference["Zero-shot"][0] == "**+37.0** (+0.1 to +9.0)" and difference["LoRA"][0] == "+1.1 (+0.1 to +9.0)"
    costs = table(text, "Costs, mean over seeds")
    assert costs["Zero-shot"] == ["0", "–", "–", "–", "42 s", "1,234", "420 MB", "native"]
    assert costs["Fixed vectors"][1:4] == ["in training", "2 min 20 s", "1.50 GB"]
    assert "2 seeds" in text and "95 % intervals over documents and seeds, from 500 bootstrap resamples" in text


def test_what_was_not_measured_is_a_dash():
    result = compared()
    del result["systems"][1]["scores"]["cider"], result["systems"][0]["differences"]["bleu_1"]
    result["systems"][2]["perplexity"] = float("nan")
    result["systems"][3]["costs"] = None
    text = tables.markdown(result)
    head = [line for line in text.splitlines() if line.startswith("| | Perplexity")][0].split(" | ")
    cider = next(i for i, name in enumerate(head) if name.startswith("CIDEr")) - 1
    assert table(text, "Scores, mean")["4-shot teacher"][cider] == "–"
    assert table(text, "Scores, mean")["Fixed vectors"][0] == "–"
    assert table(text, "Difference to")["Zero-shot"][1] == "–"
    assert table(text, "Costs")["LoRA"][1] == "–" and "nan" not in text and "None" not in text


def test_a_column_that_reads_alike_has_no_best():
    result = compared()
    for system, value in zip(result["systems"], (0.0, 1e-9, 2e-9, 0.0, 0.0), strict=True):
        system["scores"]["bleu_4"], system["intervals"]["bleu_4"] = value, [0.0, 0.0]
    assert not re.search(r"\*\*0\.000\*\*", tables.markdown(result))
    for system in result["systems"][:2]:
        system["scores"]["bleu_4"] = 0.5001 if system is result["systems"][0] else 0.5002
    scores = table(tables.markdown(result), "Scores, mean")
    assert [sum("**0.500**" in cell for cell in cells) for cells in scores.values()] == [1, 1, 0, 0, 0]


ODD = r"A & B_1 {50 %} #2 $x$ \n ~ ^ | <b> `c` *d* [e](f)"


def test_texts_are_escaped_in_markdown_and_latex():
    result = compared()
    result["title"] = result["systems"][0]["label"] = ODD
    markdown, latex = tables.markdown(result), tables.latex(result)
    label = [line for line in markdown.splitlines() if line.startswith(r"| A & B\_1")][0]
    cells = re.split(r"(?<!\\)\|", label)
    assert r"\|" in label and r"\<b\>" in label and r"\`c\` \*d\* \[e\](f)" in label
    columns = [line for line in markdown.splitlines() if line.startswith("| | Perplexity")][0].count("|")
    assert len(cells) - 1 == columns
    expected = r"A \& B\_1 \{50 \%\} \#2 \$x\$ \textbackslash{}n \textasciitilde{} \textasciicircum{} \textbar{} "
    assert expected + r"\textless{}b\textgreater{}" in latex


def test_latex_is_balanced_and_every_row_has_its_columns():
    text = tables.latex(compared())
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == len(tables.grids(compared()))
    for block in re.findall(r"\\begin\{tabular\}\{(l r*|lr*)\}(.*?)\\end\{tabular\}", text, re.S):
        columns = len(block[0])
        rows = [line for line in block[1].strip().splitlines() if line.endswith(r"\\")]
        assert len(rows) >= 2 and all(len(re.findall(r"(?<!\\)&", row)) == columns - 1 for row in rows)
    stripped = re.sub(r"\\[{}]", "", text)
    assert stripped.count("{") == stripped.count("}")
    assert r"\textbf{10.1} {\scriptsize(9.4 to 10.8)}" in text and r"47.1$^\dagger$" in text
    assert "%" not in re.sub(r"\\%", "", re.sub(r"(?m)^%.*$", "", text)), "a bare % would comment a row out"
    assert "−" not in re.sub(r"(?m)^%.*$", "", text)


def test_a_result_without_seeds_or_differences_makes_tables_too():
    text = tables.markdown(example_result())
    assert "Scores, mean over 1 seed\n" in text and "Difference" not in text and "†" not in text


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0214, "+0.021"), (-0.0214, "−0.021"), (0.0004, "0.000"), (-0.0004, "0.000"), (-2, "−2.000")]
)
def test_differences_have_a_sign_where_there_is_one(value, shown):
    assert show_signed(value, next(column for column in COLUMNS if column.key == "bleu_4")) == shown


def test_bytes_are_for_people():
    assert [size(value) for value in (4.2e8, 1.53e9, None)] == ["420 MB", "1.53 GB", "–"]


def test_the_page_shows_differences_and_costs(tmp_path):
    source = write_report(compared(), tmp_path / "page.html").read_text(encoding="utf-8")
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", source)
    assert headings[:2] == ["Scores", "Differences to DIVE low-rank"] and source.count("<caption>") == 5
    assert "<b>+37.0</b><small>+0.1 … +9.0</small>" in source and "means over 2 seeds" in source
    assert "1,234" in source and "420 MB" in source and "in training" in source
    assert difference_section(example_result()) == ""


def test_the_finding_is_about_the_reference_and_paired():
    result = compared()
    text = finding(result)
    assert text.startswith("DIVE low-rank reaches a perplexity of 10.1, down from the 47.1 of Zero-shot")
    assert text.endswith("No other adapter is clearly lower.")
    result["systems"][3]["differences"]["perplexity"] = {"difference": -1.0, "interval": [-2, -0.5], "clear": True}
    result["systems"][0]["differences"]["perplexity"]["clear"] = False
    text = finding(result)
    assert "not clearly different from the 47.1 of Zero-shot (the paired interval includes 0)" in text
    assert text.endswith("Clearly lower: LoRA (11.2).")
    result["compare_with"] = "zero-shot"  # differences that are not to the adapter say nothing about it
    assert "down from the 47.1 of Zero-shot" in finding(result) and "Clearly lower" not in finding(result)


def test_a_dozen_adapters_look_different():
    adapters = [{"name": str(i), "role": "adapter", "perplexity": 10.0 + i} for i in range(12)]
    assert len(set(charts.styles(adapters))) == 12
