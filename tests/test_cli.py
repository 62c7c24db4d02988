"""The command line: exit codes, messages, what each command hands on. Models and training are stand-ins."""

import argparse
import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import dive_fast
from dive_fast import cli, cli_files, config
from dive_fast.errors import InputError
from dive_fast.predictions import record_seed
from tests.report_example import example_result

REPORTS = ["The lungs are clear.", "Small left effusion. No pneumothorax.", "Mild cardiomegaly is seen."]


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def data(tmp_path) -> Path:
    rows = [{"id": f"r{i}", "prompt": f"Case {i}", "report": text} for i, text in enumerate(REPORTS)]
    return lines(tmp_path / "data.jsonl", rows)


@pytest.fixture
def backbone(monkeypatch):
    """`load_backbone` gives a name instead of a model; returns the list of calls."""
    calls = []

    def load(name, *, dtype=None):
        calls.append((name, dtype))
        return f"model {name}", SimpleNamespace(tokenizer="tokenizer")

    monkeypatch.setattr("dive_fast.models.backbone.load_backbone", load)
    return calls


@pytest.fixture
def training(monkeypatch, backbone):
    """`train` records how it was called; `outcome` may be set to an exception."""
    seen = SimpleNamespace(calls=[], outcome=None, backbone=backbone)

    def train(model, records, output, **options):
        seen.calls.append(SimpleNamespace(model=model, records=records, output=output, **options))
        if seen.outcome is not None:
            raise seen.outcome
        return SimpleNamespace(adapter_dir=output, metrics={"train_loss": 1.25, "steps": 3}, history=[])

    monkeypatch.setattr(importlib.import_module("dive_fast.train"), "train", train)
    return seen


@pytest.fixture
def generation(monkeypatch, backbone):
    """`generate` answers each record with its prompt in capitals."""
    seen = SimpleNamespace(calls=[], adapters=[], stop_after=None)

    def generate(model, records, *, processor=None, streamer=None, **options):
        if seen.stop_after is not None and len(seen.calls) >= seen.stop_after:
            raise KeyboardInterrupt
        seen.calls.append(SimpleNamespace(model=model, records=list(records), streamer=streamer, options=options))
        texts = [record.prompt.upper() for record in records for _ in range(options["num_return_sequences"])]
        return SimpleNamespace(texts=texts, finish_reasons=["eos"] * len(texts), stats={"engine": "native"})

    def load(model, adapter):
        seen.adapters.append(adapter)
        return f"{model} + {adapter}"

    monkeypatch.setattr(dive_fast, "generate", generate)
    monkeypatch.setattr("dive_fast.predictions.generate", generate)
    monkeypatch.setattr(dive_fast, "load", load)
    return seen


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


# train


def test_train_hands_on_what_the_run_says(training, data, tmp_path, capsys):
    run = tmp_path / "run.yaml"
    unused = tmp_path / "unused"
    run.write_text(f"model: m\ndata: {data}\nsteering: {{r: 8}}\nteacher: {{shots: 1}}\noutput: {unused}\n")
    output = tmp_path / "out"
    argv = ["train", str(run), "steering.r=4", "--output", str(output), "training.max_steps=7", "dtype=bfloat16"]
    assert cli.main(argv) == 0
    (call,) = training.calls
    assert (call.model, call.output, call.resume) == ("model m", output, False)
    assert [record.id for record in call.records] == ["r0", "r1", "r2"] and call.eval_dataset is None
    assert training.backbone == [("m", "bfloat16")]
    assert call.steering.r == 4 and call.teacher.shots == 1 and call.supervision.eos_weight == 4.0
    assert call.args.max_steps == 7 and call.args.output_dir == str(output)
    stored = config.load_config(output / "run.yaml")
    assert stored.steering["r"] == 4 and stored.output == str(output) and stored.training["max_steps"] == 7
    assert "train_loss: 1.25" in capsys.readouterr().out
    assert not unused.exists()


def test_train_defaults_have_no_teacher(training, data, tmp_path):
    argv = ["train", f"data={data}", f"eval_data={data}", "eval_data.limit=1", "--output", str(tmp_path / "o")]
    assert cli.main(argv) == 0
    (call,) = training.calls
    assert call.teacher is None and call.model == "model smollm2"
    assert [record.id for record in call.eval_dataset] == ["r0"]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ([], "output: expected the folder"),
        (["--output", "FULL"], "is not empty"),
        (["--output", "FILE"], "is a file"),
        (["--output", "EMPTY", "--resume"], "nothing to resume from"),
        (["--output", "FULL", "--resume"], "nothing to resume from"),
        (["--output", "FILE/new"], "no folder that may be written to"),
        (["--output", "NEW", "training.learning_rate=-1"], "learning_rate: expected a number >= 0"),
        (["--output", "NEW", "training.max_steps=0"], "max_steps: expected >= 1"),
        (["--output", "NEW", "steering.alpha=.nan"], "alpha: expected a finite number"),
        (["--output", "NEW", "steering.rank=4"], "did you mean 'r'?"),
        (["--output", "NEW", "training.learning_rate=fast"], "training.learning_rate: expected a number, got 'fast'"),
        (["--output", "NEW", "training.lr_scheduler_type=linaer"], "one of linear"),
        (["--output", "NEW", "supervision.eos_weight=-1"], "eos_weight"),
        (["--output", "NEW", "training.eval_strategy=steps"], "give them as eval_data"),
        (["--output", "NEW", "data.limit=0"], "positive number"),
        (["--output", "NEW", "data.path=none.jsonl"], "none.jsonl"),
        (["--output", "NEW", "a.yaml", "b.yaml"], "one YAML file"),
        (["--output", "NEW", "none.yaml"], "No such file"),
    ],
)
def test_train_refuses_before_it_writes(training, data, tmp_path, capsys, monkeypatch, extra, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "kept").write_text("x")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["train", f"data={data}", *extra]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and "Traceback" not in captured.err
    assert training.calls == [] and sorted(tmp_path.rglob("*")) == before


def test_a_refusal_by_train_leaves_no_folder(training, data, tmp_path, capsys):
    training.outcome = InputError("teacher: no")
    assert cli.main(["train", f"data={data}", "--output", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == "dive-fast: teacher: no\n"
    assert not (tmp_path / "new").exists()


def test_a_run_that_saved_something_keeps_its_settings(training, data, tmp_path, monkeypatch):
    output = tmp_path / "new"

    def train(model, records, folder, **options):
        (folder / "checkpoint-2").mkdir()
        raise InputError("output_dir: the disk is full")

    monkeypatch.setattr(importlib.import_module("dive_fast.train"), "train", train)
    assert cli.main(["train", f"data={data}", "--output", str(output)]) == 2
    assert (output / "run.yaml").is_file()


def test_interrupted_training_says_where_it_is_saved(training, data, tmp_path, capsys):
    training.outcome = KeyboardInterrupt()
    training.outcome.saved_to = tmp_path / "new" / "checkpoint-3"
    assert cli.main(["train", f"data={data}", "--output", str(tmp_path / "new")]) == 130
    err = capsys.readouterr().err
    assert f"saved to {training.outcome.saved_to}" in err and "--resume" in err
    training.outcome = None
    assert cli.main(["train", f"data={data}", "--output", str(tmp_path / "new"), "--resume"]) == 0
    assert training.calls[-1].resume is True


def test_list_options(capsys):
    assert cli.main(["train", "--list-options"]) == 0
    shown = capsys.readouterr().out
    assert "steering.r: a whole number, default 16" in shown
    assert all(name in shown for name in ("supervision.eos_weight", "teacher.shots", "training.max_steps"))
    assert "training.output_dir" not in shown and "peft_type" not in shown


# generate


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--prompt", " "], "--prompt: expected what the report should be about"),
        (["--data", "DATA", "--output", "DATA/p.jsonl"], "no folder that may be written to"),
    ],
)
def test_generate_refuses_before_it_loads(generation, backbone, data, capsys, extra, words):
    assert cli.main(["generate", "--model", "m", *(part.replace("DATA", str(data)) for part in extra)]) == 2
    assert words in capsys.readouterr().err and backbone == []


def test_generate_says_that_a_folder_holds_no_adapter(tmp_path, data, capsys):
    argv = ["generate", "--adapter", str(tmp_path / "none"), "--data", str(data), "--output", str(tmp_path / "p")]
    assert cli.main(argv) == 2
    assert "--adapter: no adapter in" in capsys.readouterr().err


@pytest.mark.parametrize("written", [0, 2])
def test_a_refusal_while_generating_names_what_is_written(tmp_path, written):
    def rows():
        yield from ({"id": str(i)} for i in range(written))
        raise InputError("record 'x': does not decode")

    with pytest.raises(InputError, match="does not decode" + (". The first 2 predictions are in " if written else "$")):
        cli_files.write_rows(tmp_path / "p.jsonl", rows(), total=9)
    assert [path.name for path in tmp_path.iterdir()] == (["p.jsonl.part"] if written else [])


def test_files_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli_files.os, "replace", full)
    with pytest.raises(InputError, match="--output: .*s.json cannot be written .No space left on device"):
        cli_files.write_text(tmp_path / "s.json", "{}")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="--output: .*p.jsonl cannot be written"):
        cli_files.write_rows(tmp_path / "p.jsonl", [{"id": "a"}], total=1)


def test_generate_writes_predictions(generation, data, tmp_path, capsys):
    output = tmp_path / "sub" / "p.jsonl"
    argv = ["generate", "--model", "m", "--adapter", "a", "--data", str(data), "--output", str(output), "--limit", "2"]
    assert cli.main([*argv, "--batch-size", "1", "--temperature", "0.5", "--top-k", "3", "--seed", "4"]) == 0
    assert [list(row.values()) for row in read_lines(output)] == [
        ["r0", "Case 0", "CASE 0", REPORTS[0], "eos", "native"],
        ["r1", "Case 1", "CASE 1", REPORTS[1], "eos", "native"],
    ]
    assert list(read_lines(output)[0]) == ["id", "prompt", "prediction", "reference", "finish_reason", "engine"]
    assert [len(call.records) for call in generation.calls] == [1, 1]
    assert generation.adapters == ["a"] and generation.calls[0].model == "model m + a"
    options = generation.calls[0].options
    assert (options["temperature"], options["top_k"], options["engine"]) == (0.5, 3, None)
    seeds = [seed for call in generation.calls for seed in call.options["seed"]]
    assert seeds == [record_seed(4, "r0"), record_seed(4, "r1")] and seeds[0] != seeds[1]
    assert [path.name for path in output.parent.iterdir()] == ["p.jsonl"]
    assert cli.main(argv) == 2 and "--overwrite" in capsys.readouterr().err
    assert cli.main([*argv, "--overwrite", "--limit", "3"]) == 0 and len(read_lines(output)) == 3


def test_generate_writes_every_result_of_a_record(generation, data, tmp_path):
    argv = ["generate", "--model", "m", "--data", str(data), "--output", str(tmp_path / "p.jsonl"), "--limit", "2"]
    search = ["--num-beams", "3", "--length-penalty", "0.5", "--num-return-sequences", "2", "--stop", "a b", "END"]
    assert cli.main([*argv, *search]) == 0
    assert [(row["id"], row["sample"]) for row in read_lines(tmp_path / "p.jsonl")] == [
        ("r0", 0), ("r0", 1), ("r1", 0), ("r1", 1)
    ]  # fmt: skip
    options = generation.calls[0].options
    assert (options["num_beams"], options["length_penalty"], options["stop"]) == (3, 0.5, ["a b", "END"])


@pytest.mark.parametrize("option", [["--num-beams", "2"], ["--stop", "x"], ["--num-return-sequences", "2"]])
def test_a_report_that_cannot_be_streamed_is_printed_at_its_end(generation, option, capsys):
    assert cli.main(["generate", "--model", "m", "--prompt", "Findings?", *option]) == 0
    assert generation.calls[0].streamer is None and "FINDINGS?" in capsys.readouterr().out


def test_generate_knows_what_the_adapter_was_trained_on(generation, backbone, data, tmp_path, capsys):
    adapter = tmp_path / "run" / "checkpoint-2"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    argv = ["generate", "--adapter", str(adapter), "--data", str(data), "--output", str(tmp_path / "p.jsonl")]
    assert cli.main(argv) == 2 and "add --model" in capsys.readouterr().err
    (tmp_path / "run" / "run.yaml").write_text("model: my/base\n")
    assert cli.main(argv) == 0
    assert backbone == [("my/base", None)]


def test_generate_keeps_what_there_is_when_interrupted(generation, data, tmp_path, capsys):
    generation.stop_after = 1
    argv = ["generate", "--model", "m", "--data", str(data), "--batch-size", "2"]
    assert cli.main([*argv, "--output", str(tmp_path / "p.jsonl")]) == 130
    err = capsys.readouterr().err
    assert f"saved to {tmp_path / 'p.jsonl.part'}" in err and "--resume" not in err
    assert len(read_lines(tmp_path / "p.jsonl.part")) == 2 and not (tmp_path / "p.jsonl").exists()


def test_generate_takes_data_options(generation, data, tmp_path, capsys):
    argv = ["generate", "--model", "m", "--data", str(data), "--output", str(tmp_path / "p.jsonl")]
    assert cli.main([*argv, "prompt=report"]) == 0
    assert read_lines(tmp_path / "p.jsonl")[0]["prompt"] == REPORTS[0]
    assert cli.main([*argv, "--overwrite", "shade=3"]) == 2
    assert "shade" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data", "DATA"], "--output: expected a file"),
        (["--data", "DATA", "--output", "p.jsonl", "--batch-size", "0"], "--batch-size"),
        (["--data", "DATA", "--output", "."], "is a folder"),
        (["--data", "DATA", "--output", "p.jsonl", "--image", "x.png"], "--image"),
        (["--data", "opn_i", "--output", "p.jsonl"], "open_i"),
        (["--prompt", "x", "--output", "p.jsonl"], "--prompt"),
    ],
)
def test_generate_refuses(generation, data, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(data.parent)
    assert cli.main(["generate", "--model", "m", *[str(data) if part == "DATA" else part for part in argv]]) == 2
    assert words in capsys.readouterr().err and generation.calls == []


def test_generate_one_prompt_streams(generation, monkeypatch, capsys):
    monkeypatch.setattr("transformers.TextStreamer", lambda tokenizer, **options: (tokenizer, options))
    assert cli.main(["generate", "--model", "m", "--prompt", "Case", "--image", "a.png", "b.png"]) == 0
    (call,) = generation.calls
    assert call.streamer == ("tokenizer", {"skip_prompt": True, "skip_special_tokens": True})
    assert call.records[0].prompt == "Case" and call.records[0].images == ("a.png", "b.png")
    assert cli.main(["generate", "--prompt", "Case"]) == 2 and "--model" in capsys.readouterr().err


# evaluate


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


# demo, doctor, report


def test_demo_and_doctor_get_their_options(monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, "dive_fast.demo", SimpleNamespace(main=lambda *a, **k: seen.append((a, k)) or 5))
    argv = ["demo", "--output", "d", "--quick", "--steps", "3", "--eval-reports", "4", "--seed", "2"]
    assert cli.main(argv) == 5
    assert seen.pop() == (("d",), {"quick": True, "steps": 3, "eval_reports": 4, "seed": 2})
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
