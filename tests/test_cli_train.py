"""`dive-fast train`: what it hands on, what it refuses and what it leaves behind; training is a stand-in."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from dive_fast import cli, config
from dive_fast.errors import InputError
from tests.cli_doubles import reports_file, stand_in_for_load_backbone


@pytest.fixture
def data(tmp_path) -> Path:
    return reports_file(tmp_path)


@pytest.fixture
def backbone(monkeypatch):
    return stand_in_for_load_backbone(monkeypatch)


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


def test_a_refused_resume_leaves_no_settings_beside_the_run_of_others(training, data, tmp_path):
    """They would be taken for that run's: `generate --adapter` reads the model's name there."""
    output = tmp_path / "theirs"
    output.mkdir()
    for name in ("dive_setup.json", "adapter_config.json"):
        (output / name).write_text("{}")
    training.outcome = InputError("resume: the run had other settings")
    assert cli.main(["train", f"data={data}", "model=other", "--output", str(output), "--resume"]) == 2
    assert sorted(path.name for path in output.iterdir()) == ["adapter_config.json", "dive_setup.json"]


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
