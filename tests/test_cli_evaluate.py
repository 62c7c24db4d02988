"""`dive-fast evaluate`: scores printed and written, references by id, two systems compared, broken files."""

import json
from pathlib import Path

import pytest

from dive_fast import cli
from tests.cli_doubles import REPORTS, lines, read_lines


def predictions(path: Path, texts: list[str], **more) -> Path:
    rows = zip(texts, REPORTS, strict=True)
    return lines(path, [{"id": f"r{i}", "prediction": p, "reference": r, **more} for i, (p, r) in enumerate(rows)])


CHEAP = ["--metrics", "length", "--bootstrap", "20"]


def test_evaluate_prints_and_writes(tmp_path, capsys):
    path = predictions(tmp_path / "p.jsonl", REPORTS, finish_reason="eos")
    assert cli.main(["evaluate", str(path), *CHEAP, "--output", str(tmp_path / "s" / "scores.json")]) == 0
    shown = capsys.readouterr().out
    assert "length_ratio" in shown and "1.0000 to 1.0000" in shown and "eos_rate" in shown
    stored = json.loads((tmp_path / "s" / "scores.json").read_text())
    assert stored["values"]["length_error"] == 0.0 and stored["ids"] == ["r0", "r1", "r2"]


def test_evaluate_joins_references_by_id(tmp_path, capsys):
    references = lines(tmp_path / "r.jsonl", [{"id": f"r{i}", "report": REPORTS[i]} for i in (2, 1, 0)] + [
        {"id": "other", "report": "Nothing."}])  # fmt: skip
    path = lines(tmp_path / "p.jsonl", [{"id": f"r{i}", "prediction": REPORTS[i]} for i in range(3)])
    output = tmp_path / "scores.json"
    assert cli.main(["evaluate", str(path), "--references", str(references), *CHEAP, "--output", str(output)]) == 0
    assert json.loads(output.read_text())["values"]["length_error"] == 0.0
    assert "1 references have no prediction" in capsys.readouterr().err


def test_evaluate_against(tmp_path, capsys):
    first = predictions(tmp_path / "a.jsonl", REPORTS)
    second = predictions(tmp_path / "b.jsonl", [text + " And more words." for text in REPORTS])
    lines(second, read_lines(second)[::-1])
    output = tmp_path / "s.json"
    assert cli.main(["evaluate", str(first), "--against", str(second), *CHEAP, "--output", str(output)]) == 0
    assert "leaves out 0" in capsys.readouterr().out
    stored = json.loads(output.read_text())
    expected = -sum(3 / len(text.split()) for text in REPORTS) / 3
    assert stored["a_minus_b"]["length_error"]["difference"] == pytest.approx(expected)
    assert stored["b"]["ids"] == ["r0", "r1", "r2"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file is empty"),
        ("{\n", "line 1: not JSON"),
        ("[1]\n", "line 1: expected an object"),
        ('{"id": "a", "reference": "x"}\n', "line 1: expected 'prediction' with a text; the line has id, reference"),
        ('{"id": "a", "prediction": "x"}\n', "'reference' or 'report'"),
        ('{"id": "a", "prediction": 3, "reference": "x"}\n', "'prediction' with a text"),
        ('{"id": "a", "prediction": "x", "reference": "y"}\n' * 2, "line 2: the id 'a' occurs twice"),
    ],
)
def test_evaluate_refuses_broken_files(tmp_path, capsys, text, words):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    assert cli.main(["evaluate", str(path), *CHEAP]) == 2
    assert words in capsys.readouterr().err


def test_evaluate_refuses_other_reports(tmp_path, capsys):
    first = predictions(tmp_path / "a.jsonl", REPORTS)
    second = lines(tmp_path / "b.jsonl", read_lines(first)[:2])
    assert cli.main(["evaluate", str(first), "--against", str(second), *CHEAP]) == 2
    assert "no prediction for r2" in capsys.readouterr().err
    assert cli.main(["evaluate", str(second), "--against", str(first), *CHEAP]) == 2
    assert "does not have: r2" in capsys.readouterr().err
    unnamed = lines(tmp_path / "c.jsonl", [{"prediction": "x"}])
    assert cli.main(["evaluate", str(unnamed), "--references", str(first), *CHEAP]) == 2
    assert "expected an 'id'" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path / "none.jsonl")]) == 2
    assert "No such file" in capsys.readouterr().err
