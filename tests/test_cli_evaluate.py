"""`dive-fast evaluate`: scores printed and written, references by id, two systems compared, broken files."""

import json
from pathlib import Path

import pytest

from dive_fast import cli, cli_commands, cli_files
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


def samples(path: Path, n: int) -> Path:
    """Every report n times; sample i has i words more than its reference."""
    rows = [
        {"id": f"r{i}", "prediction": text + " more" * sample, "reference": text, "sample": sample}
        for i, text in enumerate(REPORTS)
        for sample in range(n)
    ]
    return lines(path, rows)


def test_one_sample_of_each_report_is_scored(tmp_path, capsys):
    path, output = samples(tmp_path / "p.jsonl", 3), tmp_path / "s.json"
    assert cli.main(["evaluate", str(path), *CHEAP]) == 2
    assert "has several samples of 'r0'" in (err := capsys.readouterr().err) and "such as --sample 0" in err
    assert cli.main(["evaluate", str(path), *CHEAP, "--sample", "2", "--output", str(output)]) == 0
    stored = json.loads(output.read_text())
    assert stored["ids"] == ["r0", "r1", "r2"]
    assert stored["values"]["length_error"] == pytest.approx(sum(2 / len(text.split()) for text in REPORTS) / 3)
    lines(path, read_lines(path)[:-1])
    assert cli.main(["evaluate", str(path), *CHEAP, "--sample", "2"]) == 2
    assert "--sample: " in (err := capsys.readouterr().err) and "has no sample 2 of r2;" in err
    # Who chose one of each report's samples by a rule of their own has nothing left to choose.
    lines(path, [row for row in read_lines(path) if row["sample"] == int(row["id"] == "r1")])
    assert cli.main(["evaluate", str(path), *CHEAP]) == 0


def test_a_sample_is_compared_with_reports_that_were_written_once(tmp_path, capsys):
    sampled, once = samples(tmp_path / "a.jsonl", 2), predictions(tmp_path / "b.jsonl", REPORTS)
    argv = ["evaluate", str(sampled), "--against", str(once), *CHEAP, "--sample"]
    assert cli.main([*argv, "0"]) == 0
    assert cli.main([*argv, "1"]) == 2 and f"{once} has no sample 1 of r0, r1, r2;" in capsys.readouterr().err


def test_reports_cut_at_a_stop_string_ended_by_themselves(tmp_path):
    path, output = predictions(tmp_path / "p.jsonl", REPORTS), tmp_path / "s.json"
    reasons = ("stop", "cancelled", "eos")
    lines(path, [row | {"finish_reason": why} for row, why in zip(read_lines(path), reasons, strict=True)])
    assert cli.main(["evaluate", str(path), *CHEAP, "--output", str(output)]) == 0
    assert json.loads(output.read_text())["values"]["eos_rate"] == pytest.approx(2 / 3)


def test_an_id_of_null_is_no_id(tmp_path, capsys):
    path = predictions(tmp_path / "p.jsonl", REPORTS, id=None)
    assert cli.main(["evaluate", str(path), *CHEAP, "--output", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["ids"] == ["line-1", "line-2", "line-3"]
    assert cli.main(["evaluate", str(path), "--references", str(path), *CHEAP]) == 2
    assert "line 1: expected an 'id'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("p.jsonl", "is read by this command"),
        ("link.jsonl", "is read by this command"),
        ("other.jsonl", "is read by this command"),
        (".", "is a folder"),
        ("p.jsonl/s.json", "no folder that may be written to"),
        ("/dev/null", "is a device or a pipe"),
    ],
)
def test_evaluate_refuses_an_output_before_it_scores(tmp_path, capsys, monkeypatch, output, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_commands, "_scores", lambda *args: pytest.fail("scored"))
    for name in ("p.jsonl", "other.jsonl"):
        predictions(tmp_path / name, REPORTS)
    (tmp_path / "link.jsonl").symlink_to("p.jsonl")
    before = read_lines(tmp_path / "p.jsonl")
    assert cli.main(["evaluate", "p.jsonl", "--against", "other.jsonl", *CHEAP, "--output", output]) == 2
    assert words in capsys.readouterr().err
    assert read_lines(tmp_path / "p.jsonl") == read_lines(tmp_path / "other.jsonl") == before


def test_scores_are_written_though_the_reader_has_gone(tmp_path, monkeypatch):
    path, part = predictions(tmp_path / "p.jsonl", REPORTS), tmp_path / "s.json.part"
    part.write_text("rows of an interrupted run\n")

    def gone(table):
        raise BrokenPipeError

    monkeypatch.setattr(cli_files, "show_table", gone)
    monkeypatch.setattr("sys.stdout", None)
    assert cli.main(["evaluate", str(path), *CHEAP, "--output", str(tmp_path / "s.json")]) == 0
    assert "values" in json.loads((tmp_path / "s.json").read_text())
    assert part.read_text() == "rows of an interrupted run\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_tables_shorten_nothing(terminal, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "30")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    names = ["chexbert_micro_f1_14", "chexbert_micro_f1_5"]
    table = cli_files.table("scores", "Score", "A", "B", "95 % paired interval")
    for name in names:
        table.add_row(name, "0.1234", "0.2345", "-0.3456 to -0.4567")
    cli_files.show_table(table)
    shown = capsys.readouterr().out
    assert "…" not in shown and all(shown.count(text) == 2 for text in ("0.1234", "0.2345", "-0.3456", "-0.4567"))
    assert all(name in shown for name in names)
    assert ("-0.3456 to -0.4567" in shown) == (not terminal)  # a terminal's cells are wrapped, between words
