"""The command line: parsing, exit codes, and the commands that need neither model nor training."""

import argparse
import errno
import io
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import dive_fast
from dive_fast import cli
from dive_fast.errors import InputError
from tests.cli_doubles import REPORTS
from tests.report_example import example_result

# Parsing


def test_help_and_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dive-fast {dive_fast.__version__}\n"
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in ("train", "generate", "evaluate", "experiment", "tag", "demo", "report", "doctor"):
        assert cli.main([command, "--help"]) == 0
        own = capsys.readouterr().out
        assert f"    {command} " in shown and "Examples:\n" in own


def test_help_imports_nothing_heavy():
    code = "import sys; from dive_fast.cli import main; main(['--help']); print(sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for heavy in ("torch", "transformers", "peft", "numpy", "yaml", "rich", "matplotlib", "PIL"):
        assert f"'{heavy}'" not in done.stderr


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["evaluate"], "PREDICTIONS.jsonl"),
        (["evaluate", "a.jsonl", "b.jsonl"], "unrecognized arguments: b.jsonl"),
        (["train", "--colour"], "unrecognized arguments: --colour"),
        (["generate", "--model", "m"], "--data --prompt"),
        (["generate", "--data", "a", "--prompt", "b"], "not allowed with"),
        (["tag", "text", "--file", "f"], "not allowed with"),
        (["evaluate", "a.jsonl", "--bootstrap", "many"], "invalid int value"),
    ],
)
def test_usage_errors(capsys, argv, words):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == ""


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (InputError("size: expected a number"), 2, "dive-fast: size: expected a number\n"),
        (KeyboardInterrupt(), 130, "\ndive-fast: interrupted\n"),
        (BrokenPipeError(), 0, ""),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "dive-fast: the output: No space left on device; free disk space or write to another place\n",
        ),
        (
            PermissionError(13, "Permission denied", "locked/x"),
            2,
            "dive-fast: locked/x: Permission denied; mend its permissions or name another path\n",
        ),
    ],
)
def test_exit_codes(monkeypatch, capsys, raised, code, message):
    def run(args):
        raise raised

    monkeypatch.setattr(cli, "parse", lambda argv: argparse.Namespace(run=run))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert cli.main([]) == code
    assert capsys.readouterr().err == message


def test_a_bug_keeps_its_traceback(monkeypatch):
    def run(args):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "parse", lambda argv: argparse.Namespace(run=run))
    with pytest.raises(ZeroDivisionError):
        cli.main([])


@pytest.mark.parametrize("shown", ["print('No effusion.')", "Console().print('No effusion.')"])
@pytest.mark.parametrize(("reader", "code"), [("gone", 0), ("/dev/full", 2)])
def test_output_that_nobody_takes(shown, reader, code):
    if reader == "gone":
        read, write = os.pipe()
        os.close(read)
    elif os.path.exists(reader):
        write = os.open(reader, os.O_WRONLY)
    else:
        pytest.skip(f"no {reader} here")
    program = (
        "import argparse, sys; from rich.console import Console; from dive_fast import cli\n"
        f"cli.parse = lambda argv: argparse.Namespace(run=lambda args: {shown})\nsys.exit(cli.main())"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == code
    assert done.stderr == "" if code == 0 else done.stderr.startswith("dive-fast: the output: No space left")


def test_errors_of_the_system_that_are_no_full_disk_are_bugs(monkeypatch):
    def run(args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(cli, "parse", lambda argv: argparse.Namespace(run=run))
    with pytest.raises(OSError, match="Input/output"):
        cli.main([])


# tag


def test_tag_from_argument_file_and_pipe(tmp_path, capsys, monkeypatch):
    assert cli.main(["tag", REPORTS[1]]) == 0
    shown = capsys.readouterr().out
    assert "Pleural Effusion" in shown and "Pneumothorax" in shown
    (tmp_path / "report.txt").write_text(REPORTS[1] + "\n")
    assert cli.main(["tag", "--file", str(tmp_path / "report.txt")]) == 0
    assert capsys.readouterr().out == shown
    monkeypatch.setattr(sys, "stdin", io.StringIO(REPORTS[1] + "\n"))
    assert cli.main(["tag"]) == 0
    assert capsys.readouterr().out == shown


def test_tag_takes_a_report_as_text_not_as_markup(capsys):
    assert cli.main(["tag", "[bold]No effusion.[/bold] :heart:"]) == 0
    assert "[bold]" in capsys.readouterr().out


def test_tag_shows_what_tokens_weigh(monkeypatch, capsys):
    class Words:
        """A tokenizer of words, as far as offsets go."""

        is_fast, eos_token_id, chat_template = True, 0, None

        def __call__(self, text, **options):
            offsets = [(m.start(), m.end()) for m in re.finditer(r"\S+", text)]
            return {"input_ids": list(range(len(offsets))), "offset_mapping": offsets}

    monkeypatch.setattr("dive_fast.models.backbone.load_backbone", lambda name, dtype=None: (None, Words()))
    # The weights 1 + 3 on one word of three and 1 + 1 on the end: 4 / (4 + 1 + 1 + 2) = 50 %, the end 25 %.
    argv = ["tag", "Cardiomegaly, two views.", "--model", "m", "--pathology-weight", "3", "--eos-weight", "1"]
    assert cli.main(argv) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "a decisive token weighs 4, the end of the report 2" in shown
    assert "carry 50% of the weight (25% of the tokens), the end 25%" in shown
    assert cli.main([*argv, "--pathology-weight", "-3"]) == 2
    found = capsys.readouterr()
    assert "pathology_weight: expected a" in found.err and not found.out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["", "--model", "m"], "only white space"),
        (["--file", "none.txt"], "No such file"),
        (["No effusion.", "--lexicon", "none.yaml"], "none.yaml"),
        (["No effusion.", "--eos-weight", "2"], "add --model"),
    ],
)
def test_tag_refuses(argv, words, capsys):
    assert cli.main(["tag", *argv]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_tag_refuses_bytes_that_are_no_text(errors, monkeypatch, capsys):
    latin = io.TextIOWrapper(io.BytesIO(b"No \xe9panchement."), encoding="utf-8", errors=errors)
    monkeypatch.setattr(sys, "stdin", latin)
    assert cli.main(["tag"]) == 2
    assert "TEXT: expected a report in UTF-8" in capsys.readouterr().err


# demo, doctor, report


def test_demo_and_doctor_get_their_options(monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, "dive_fast.demo", SimpleNamespace(main=lambda *a, **k: seen.append((a, k)) or 5))
    argv = ["demo", "--output", "d", "--quick", "--steps", "3", "--eval-reports", "4", "--seed", "2"]
    argv += ["--dtype", "float32"]
    assert cli.main(argv) == 5
    assert seen.pop() == (("d",), {"quick": True, "steps": 3, "eval_reports": 4, "seed": 2, "dtype": "float32"})
    monkeypatch.setattr("dive_fast.doctor.main", lambda json, probe: seen.append((json, probe)) or 1)
    assert cli.main(["doctor", "--json"]) == 1 and seen == [(True, False)]


def test_report_writes_the_page(tmp_path, capsys):
    (tmp_path / "result.json").write_text(json.dumps({**example_result(), "title": "Ours & theirs"}))
    assert cli.main(["report", str(tmp_path / "result.json"), "--output", str(tmp_path / "a" / "page.html")]) == 0
    assert "<h1>Ours &amp; theirs</h1>" in (tmp_path / "a" / "page.html").read_text(encoding="utf-8")
    (tmp_path / "result.json").write_text("{}")
    assert cli.main(["report", str(tmp_path / "result.json"), "--output", str(tmp_path / "b.html")]) == 2
    assert '"systems"' in capsys.readouterr().err and not (tmp_path / "b.html").exists()
    (tmp_path / "result.json").write_text('{\n"a": }')
    assert cli.main(["report", str(tmp_path / "result.json")]) == 2 and "line 2: not JSON" in capsys.readouterr().err


def test_report_does_not_replace_its_result(tmp_path, capsys):
    result = tmp_path / "result.json"
    result.write_text(json.dumps(example_result()))
    assert cli.main(["report", str(result), "--output", f"{tmp_path}/./result.json"]) == 2
    assert "is read by this command" in capsys.readouterr().err and json.loads(result.read_text()) == example_result()
