"""An experiment end to end on a tiny random model and invented reports: run, killed, continued, changed, refused."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from rich.console import Console

import dive_fast
from dive_fast import checkpoints, cli, measurements
from dive_fast.data.encoding import ReportEncoder
from dive_fast.errors import InputError
from dive_fast.experiment import run as loop
from dive_fast.experiment import worker
from dive_fast.experiment.inputs import load_experiment_data, training_records
from dive_fast.experiment.pieces import Folder
from dive_fast.experiment.results import finished, write_results
from dive_fast.experiment.run import ExperimentInterrupted, run
from dive_fast.experiment.scoring import Scorer
from dive_fast.experiment.settings import Evaluation, load_experiment
from dive_fast.experiment.systems import resolve
from dive_fast.likelihood import report_nll
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from tests.training_runs import FINDINGS

SYSTEMS = {
    "zero_shot": {"kind": "zero_shot"},
    "few_shot": {"kind": "few_shot"},
    "lora": {
        "kind": "lora",
        "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
        "supervision": {"pathology_weight": 0, "eos_weight": 0},
        "teacher": None,
    },
    "dive": {"kind": "steering", "label": "DIVE", "steering": {"r": 2}},
}
TRAINING = {
    "max_steps": 8,
    "per_device_train_batch_size": 1,
    "learning_rate": 0.02,
    "logging_steps": 1,
    "save_steps": 2,
}
NOT_MEASURED_TWICE = ("train_seconds", "generate_seconds", "costs")


def rows(name: str, count: int, **more) -> list[dict]:
    return [
        {"id": f"{name}{i}", "prompt": f"Indication: case {i % 7}. Tags: {i % 3}.",
         "report": f"{FINDINGS[i % 5]}. {FINDINGS[(i * 3 + len(name)) % 5]}.", **more}
        for i in range(count)
    ]  # fmt: skip


def jsonl(path: Path, lines: list[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model, reports and the experiment's file."""
    folder = tmp_path_factory.mktemp("experiment")
    tiny_llama().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    values = {
        "title": "Invented", "model": str(folder / "model"), "dtype": "float32", "seeds": [0, 1],
        "data": jsonl(folder / "train.jsonl", rows("train", 20)),
        "test": jsonl(folder / "test.jsonl", rows("te", 3) + rows("tests", 3)),
        "training": TRAINING, "teacher": {"shots": 1}, "generation": {"max_new_tokens": 6},
        "evaluation": {"metrics": ["bleu", "rouge_l", "decisive", "length"], "bootstrap": 50}, "systems": SYSTEMS,
    }  # fmt: skip
    (folder / "exp.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder


@pytest.fixture
def in_process(monkeypatch):
    """Pieces are made in this process: what is tested is the loop, not the start of an interpreter."""
    made = []

    def process(config, folder, what):
        made.append(what.get("task", "rehearsal"))
        return worker._do({"config": config.to_json(), "output": str(folder.root), **json.loads(json.dumps(what))})

    monkeypatch.setattr(loop, "_process", process)
    return made


def experiment(home: Path, *overrides: str):
    return load_experiment(home / "exp.yaml", overrides)


def result_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def without_times(result: dict) -> dict:
    systems = [{k: v for k, v in system.items() if k not in NOT_MEASURED_TWICE} for system in result["systems"]]
    return {**result, "created": None, "systems": systems}


@pytest.fixture(scope="module")
def whole(home) -> Path:
    """The folder of an experiment that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:

        def process(config, folder, what):
            return worker._do({"config": config.to_json(), "output": str(folder.root), **json.loads(json.dumps(what))})

        patch.setattr(loop, "_process", process)
        assert run(experiment(home), home / "whole", command="dive-fast experiment") == 0
    return home / "whole"


# Tests that are started in the background may have inherited that Ctrl-C is ignored.
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from dive_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(home: Path, output: Path, *more: str) -> subprocess.Popen:
    """The command itself, with as many threads as this process has, on which the last bits of sums depend."""
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "experiment", str(home / "exp.yaml"), "--output", str(output), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def wait_for_checkpoint(process: subprocess.Popen, adapter: Path) -> None:
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if checkpoints.newest_complete(adapter):
            return
        time.sleep(0.005)
    process.kill()
    pytest.fail(f"no checkpoint in {adapter}: {process.communicate()[1][-2000:]}")


def test_the_results_are_what_the_library_gives(home, whole):
    result = result_of(whole)
    assert [system["name"] for system in result["systems"]] == list(SYSTEMS) and result["seeds"] == [0, 1]
    systems = {system["name"]: system for system in result["systems"]}
    tokenizer, records = tiny_tokenizer(), dive_fast.data.load_data("json_lines", path=home / "test.jsonl")
    encoder = ReportEncoder(tokenizer)
    nll, tokens = report_nll(tiny_llama(), records, encoder)
    assert systems["zero_shot"]["perplexity"] == pytest.approx(math.exp(sum(nll) / sum(tokens)), rel=1e-6)
    assert systems["zero_shot"]["seeds"] == [{"seed": "any", "scores": systems["zero_shot"]["scores"]}]

    training = dive_fast.data.load_data("json_lines", path=home / "train.jsonl")
    for seed in (0, 1):
        pool = dive_fast.Teacher(shots=1, seed=seed).demonstration_pool(training)
        nll, tokens = report_nll(tiny_llama(), records, encoder, demonstrations=pool.for_record)
        found = systems["few_shot"]["seeds"][seed]
        assert found["seed"] == seed
        assert found["scores"]["perplexity"] == pytest.approx(math.exp(sum(nll) / sum(tokens)), rel=1e-6)
    both = [one["scores"]["perplexity"] for one in systems["few_shot"]["seeds"]]
    assert both[0] != both[1] and systems["few_shot"]["perplexity"] == pytest.approx(sum(both) / 2)


def test_an_adapter_is_the_one_that_train_gives(home, whole, tmp_path):
    """The same records, settings and seed through `dive_fast.train`; its reports are those of `generate`."""
    config = experiment(home)
    data, system = load_experiment_data(config), resolve(config)["dive"]
    met = training_records(data.train, system.training_settings(1, tmp_path), 1)
    assert len(met) == 8 < len(data.train)
    trained = dive_fast.train(
        tiny_llama(), met, tmp_path / "dive", processor=tiny_tokenizer(), steering=dive_fast.DiveConfig(r=2),
        teacher=dive_fast.Teacher(shots=1, pool=data.train, seed=1), args={**TRAINING, "seed": 1, "data_seed": 1},
    )  # fmt: skip
    piece = Folder(whole).piece("dive", 1)
    ours, theirs = (folder / "adapter_model.safetensors" for folder in (piece.adapter, tmp_path / "dive"))
    assert ours.read_bytes() == theirs.read_bytes()
    output = dive_fast.generate(trained.model, data.test, processor=tiny_tokenizer(), max_new_tokens=6)
    assert [row["prediction"] for row in piece.rows()] == output.texts
    facts = piece.read("train.json")
    assert facts["steps"] == 8 and facts["seconds"] > 0 and facts["trainable_parameters"] == 2 * (2 * 2 * 64 + 2 + 64)


def test_killed_and_continued_it_is_the_uninterrupted_experiment(home, whole, in_process):
    """SIGKILL during a training in a process of its own: the child goes too, and nothing finished is made again."""
    output = home / "cut"
    process = start(home, output, "--only", "lora")
    wait_for_checkpoint(process, output / "runs" / "lora" / "seed-0" / "adapter")
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert children and psutil.wait_procs(children, timeout=30)[1] == [], "a piece outlived its experiment"
    assert not (output / "runs" / "lora" / "seed-0" / "train.json").exists(), "killed too late"

    config = experiment(home)
    assert run(config, output, command="dive-fast experiment") == 0
    assert in_process[0] == "rehearsal" and ["train", "lora", 0] in in_process
    assert without_times(result_of(output)) == without_times(result_of(whole))
    for name in ("lora", "dive"):
        for seed in config.seeds:
            ours, theirs = (Folder(root).piece(name, seed).adapter for root in (output, whole))
            assert (ours / "adapter_model.safetensors").read_bytes() == (
                theirs / "adapter_model.safetensors"
            ).read_bytes()
    in_process.clear()
    assert run(config, output, command="again") == 0 and in_process == [], "a finished experiment only shows itself"


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(home):
    output = home / "interrupted"
    process = start(home, output, "--only", "lora", "training.max_steps=5000")
    wait_for_checkpoint(process, output / "runs" / "lora" / "seed-0" / "adapter")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"dive-fast: interrupted; saved to {output}, the same command goes on from there" in errors
    assert "Traceback" not in errors
    saved = checkpoints.newest_complete(output / "runs" / "lora" / "seed-0" / "adapter")
    state = json.loads((saved / "trainer_state.json").read_text())
    assert saved.name == f"checkpoint-{state['global_step']}" and 2 <= state["global_step"] < 5000


def test_costs_differences_and_files(home, whole):
    result = result_of(whole)
    systems = {system["name"]: system for system in result["systems"]}
    assert result["compare_with"] == "dive" and "differences" not in systems["dive"]
    for name in ("zero_shot", "few_shot", "lora"):
        found = systems[name]["differences"]["perplexity"]
        expected = systems[name]["perplexity"] - systems["dive"]["perplexity"]
        assert found["difference"] == pytest.approx(expected)
        assert found["interval"][0] <= expected <= found["interval"][1]
        assert found["clear"] == (found["interval"][0] > 0 or found["interval"][1] < 0)
    assert systems["dive"]["costs"]["teacher_seconds"] > 0 and systems["lora"]["costs"]["teacher_seconds"] is None
    assert [systems[name]["engine"] for name in ("dive", "lora")] == ["native", "transformers"]
    assert "another PEFT method" in systems["lora"]["costs"]["not_native"]
    for name, system in systems.items():
        assert system["costs"]["write_peak_bytes"] > 1e7 and system["costs"]["tokens_per_second"] > 0
        assert (system["costs"]["train_peak_bytes"] is not None) == (name in ("lora", "dive"))
        assert system["unseen"]["n"] == result["data"]["unseen"] == 3 and len(system["lengths"]) in (6, 12)
    assert len({piece.read("train.json")["steps"] for piece in (Folder(whole).piece(n, s) for n in ("lora", "dive")
                for s in (0, 1))}) == 1  # fmt: skip
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert "Differences to DIVE" in page and "Invented" in page
    assert "| DIVE |" in (whole / "table.md").read_text() and r"\begin{tabular}" in (whole / "table.tex").read_text()
    assert load_experiment(whole / "experiment.yaml") == experiment(home)
    assert cli.main(["report", str(whole / "results.json"), "--output", str(home / "again.html")]) == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["training.max_steps=9"], r"training\.max_steps: 8 there, 9 now"),
        (["test.limit=3"], r"test\.limit: null there, 3 now; test\.records: 6 there, 3 now"),
        (["systems.dive.steering.r=3"], r"systems\.dive\.adapter\.r: 2 there, 3 now"),
        (["systems.lora.lora.target_modules=[q_proj]"], r"systems\.lora\.adapter\.target_modules"),
        (
            ["generation.max_new_tokens=7", "teacher.shots=2"],
            r"generation\.max_new_tokens: 6 there, 7 now; teacher\.shots",
        ),
        (["dtype=bfloat16"], r'dtype: "float32" there, "bfloat16" now'),
    ],
)
def test_another_experiment_in_the_same_folder_is_refused(home, whole, in_process, overrides, words):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=f"output: .* holds an experiment with other settings .*{words}"):
        run(experiment(home, *overrides), whole)
    assert in_process == [] and before == {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}


def test_changed_records_are_another_experiment(home, whole, in_process, tmp_path):
    changed = jsonl(tmp_path / "test.jsonl", rows("te", 3) + rows("other", 3))
    with pytest.raises(InputError, match=r"test\.path: .*test\.sha256: "):
        run(experiment(home, f"test={changed}"), whole)


def test_a_folder_of_something_else_is_refused(home, in_process, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no experiment"):
        run(experiment(home), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_does_not_change_a_run_may_change_in_its_folder(home, in_process, tmp_path, capsys, monkeypatch):
    """More seeds, another system, other scores: what is finished stays, and only what is new is made or scored."""
    output, only = tmp_path / "out", "zero_shot,few_shot"
    run(experiment(home, "seeds=[0]"), output, only=only)
    assert "Not finished, and not in the results: lora, dive." in capsys.readouterr().out
    assert in_process == ["rehearsal", ["write", "zero_shot", "any"], ["write", "few_shot", 0]]
    in_process.clear()
    more = ["seeds=[0, 2]", "systems.near={kind: few_shot, label: Nearest, teacher: {demos: nearest}}"]
    run(experiment(home, *more), output, only=f"{only},near")
    assert in_process == ["rehearsal", ["write", "near", "any"], ["write", "few_shot", 2]]
    assert result_of(output)["seeds"] == [0, 2] and len(result_of(output)["systems"]) == 3
    scored, real = [], measurements.score
    monkeypatch.setattr(measurements, "score", lambda *a, **k: scored.append(1) or real(*a, **k))
    in_process.clear()
    assert all(system["samples"] for system in result_of(output)["systems"])
    run(experiment(home, *more, "evaluation.bootstrap=20", "evaluation.examples=0"), output, only=only)
    assert in_process == [] and scored == [], "scores that are kept are made again"
    assert result_of(output)["bootstrap"]["resamples"] == 20
    assert not any("samples" in system for system in result_of(output)["systems"])
    run(experiment(home, *more, "evaluation.metrics=[rouge_l]"), output, only=only)
    assert len(scored) == 2 * 4 and "bleu_1" not in result_of(output)["systems"][0]["scores"]
    # What has no runs yet, or none any more, may still be set otherwise.
    config = experiment(home, *more, "evaluation.metrics=[rouge_l]", "systems.dive.steering.r=3")
    Folder(output).check(config, resolve(config), load_experiment_data(config))
    config = experiment(home, *more, "systems.near.teacher.shots=2")
    with pytest.raises(
        InputError, match=r"systems\.near\.teacher\.shots: 1 there, 2 now.*once its folder in runs/ is removed"
    ):
        Folder(output).check(config, resolve(config), load_experiment_data(config))
    shutil.rmtree(output / "runs" / "near")
    Folder(output).check(config, resolve(config), load_experiment_data(config))


def test_a_dry_run_checks_and_writes_nothing(home, in_process, tmp_path, capsys):
    before = sorted(home.rglob("*"))
    argv = ["experiment", str(home / "exp.yaml"), "--output", str(tmp_path / "new"), "--dry-run"]
    assert cli.main(argv) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert in_process == ["rehearsal"]
    assert "8 of 20 records for each seed, 8 steps of 1 for every adapter" in shown
    assert "13 of 13 pieces are still to be made. Nothing was run, nothing was written." in shown
    assert "another PEFT method" in shown and "DIVE steering 644 native 0/4" in shown
    assert not (tmp_path / "new").exists() and sorted(home.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model=./none"], "model: no model at ./none"),
        (["systems.lora.lora.target_modules=[query]"], "systems.lora: steering: PEFT refuses this LORA .*query"),
        (["systems.lora.lora.target_modules=[lm_head]"], "systems.lora: steering: it adapts the head"),
        (["systems.dive.steering.layers_to_transform=[9]"], "systems.dive: layers_to_transform: 9 is out of range"),
        (["generation.engine=native"], "systems.lora: engine: 'native' cannot run this: .*another PEFT method"),
        (["generation.max_new_tokens=2040"], "generation.max_new_tokens: the prompt of test record .* do not fit"),
        (
            ["teacher.shots=15", "generation.max_new_tokens=1900"],
            "systems.few_shot: .* with the demonstrations of seed 0",
        ),
        (["teacher.shots=20"], "shots: record .* needs 20 demonstrations"),
        (["evaluation.metrics=[chexbert]", "evaluation.metric_options.chexbert.weights=/none/c.pth"], "/none/c.pth"),
    ],
)
def test_what_would_fail_later_fails_in_the_rehearsal(home, in_process, tmp_path, overrides, words):
    with pytest.raises(InputError, match=words):
        run(experiment(home, *overrides), tmp_path / "new")
    assert in_process == ["rehearsal"] and not (tmp_path / "new").exists()


def test_a_full_disk_is_seen_before_the_teacher_fills_it(home, in_process, tmp_path, monkeypatch):
    from dive_fast.experiment import rehearsal

    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(InputError, match="teacher.cache_dir: the teachers' results need about .* cache_dir: null"):
        run(experiment(home), tmp_path / "new", only="dive")
    assert run(experiment(home), tmp_path / "new", only="zero_shot") == 0


def test_a_teacher_that_keeps_nothing_runs_while_it_trains(home, in_process, tmp_path):
    config = experiment(
        home, "seeds=[0]", "systems.dive.teacher.cache_dir=null", "systems.dive.supervision.align_weight=1"
    )
    run(config, tmp_path / "out", only="dive")
    assert in_process == ["rehearsal", ["train", "dive", 0], ["write", "dive", 0]]
    (system,) = result_of(tmp_path / "out")["systems"]
    assert system["costs"]["teacher_in_training"] and system["costs"]["teacher_seconds"] is None
    assert (
        not (tmp_path / "out" / "teacher-cache").exists()
        and "in training" in (tmp_path / "out" / "table.md").read_text()
    )


def test_runs_with_other_weights_of_the_model_are_not_compared(home, in_process, tmp_path):
    output = tmp_path / "out"
    run(experiment(home), output, only="zero_shot,few_shot")
    file = output / "runs" / "few_shot" / "seed-1" / "write.json"
    checkpoints.write_json(file, json.loads(file.read_text()) | {"model_sha256": "other"})
    with pytest.raises(InputError, match="were made with different weights of the model"):
        run(experiment(home), output, only="zero_shot")


@pytest.mark.parametrize("name", ["write.json", "predictions.jsonl", "scores.json", "likelihood.json"])
def test_a_damaged_file_is_named_with_the_remedy(home, in_process, tmp_path, name):
    output = tmp_path / "out"
    run(experiment(home), output, only="zero_shot")
    (output / "runs" / "zero_shot" / "any" / name).write_text('{"cut')
    with pytest.raises(InputError, match=rf"{name} cannot be read .*remove .*zero_shot/any to make this run again"):
        run(experiment(home), output, only="zero_shot")


def test_a_piece_that_another_command_made_meanwhile_is_left_alone(home, whole):
    files = {path: path.stat().st_mtime_ns for path in (whole / "runs").rglob("*") if path.is_file()}
    for task in (["write", "zero_shot", "any"], ["train", "dive", 0], ["teacher", "dive", 0]):
        asked = {"config": experiment(home).to_json(), "output": str(whole), "task": task}
        assert worker._do(asked) == {}
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_access_tokens_are_not_stored(home, in_process, tmp_path):
    secret = ["training.hub_token=shh", "systems.lora.training.hub_token=shh"]
    run(experiment(home, *secret), tmp_path / "out", only="zero_shot")
    assert experiment(home, *secret).to_json()["training"]["hub_token"] == "shh"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and "shh" in path.read_text()]


@pytest.mark.parametrize(
    ("code", "answer", "error", "words"),
    [
        (2, '{"error": "training: the loss became nan"}', InputError, "^training: the loss became nan$"),
        (-9, "", InputError, "killed from outside, .* out of memory; give a smaller"),
        (130, '{"saved_to": "x"}', ExperimentInterrupted, "out holds what is finished"),
        (-2, "", ExperimentInterrupted, "out holds what is finished"),
        (1, "", RuntimeError, "exit code 1; its traceback is above"),
    ],
)
def test_how_a_piece_ended_is_said(code, answer, error, words):
    with pytest.raises(error, match=words):
        loop._answer(code, answer, Folder(Path("out")))


def test_a_full_disk_is_said_with_the_folder(home, whole, tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = experiment(home)
    found = finished(config, resolve(config), Folder(whole), load_experiment_data(config))
    monkeypatch.setattr(checkpoints, "write_text", full)
    asked = {"config": config.to_json(), "output": str(tmp_path), "task": ["write", "zero_shot", "any"]}
    code, answer = worker._outcome(asked)
    assert code == 2 and re.match(f"output: .*{tmp_path} cannot be made .*No space left", answer["error"])
    for _ in ("results.json", "scores.json"):
        with pytest.raises(InputError, match=f"output: {whole}.* cannot be written .No space left.* free disk space"):
            write_results(Console(quiet=True), found, Scorer(Evaluation(**config.evaluation)), "")
        monkeypatch.setattr(Scorer, "_kept", lambda *_: None)


def test_a_piece_that_fails_is_named_and_stops_no_other(home, in_process, tmp_path, monkeypatch):
    def fail(*arguments):
        raise InputError("training: the loss became nan at step 3")

    monkeypatch.setattr(worker, "_train", fail)
    with pytest.raises(InputError, match="^DIVE, seed 0: training: training: the loss became nan at step 3$"):
        run(experiment(home), tmp_path / "out", only="dive")
    assert run(experiment(home), tmp_path / "out", only="zero_shot") == 0


def test_an_error_in_a_piece_is_the_commands_error(home, tmp_path, capsys):
    """Through a real process: the message alone, exit code 2."""
    argv = ["experiment", str(home / "exp.yaml"), "--output", str(tmp_path / "new"), "--only", "zero_shot"]
    assert cli.main([*argv, "model=./none"]) == 2
    assert capsys.readouterr().err.startswith("dive-fast: model: no model at ./none")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["none.yaml"], "configuration none.yaml: No such file"),
        (["EXP"], "output: expected the folder to write to; give --output DIR, or `output:`"),
        (["EXP", "--output", "EXP"], "is a file; give another --output"),
        (["EXP", "other.yaml", "--output", "x"], "expected one YAML file and key=value options, got 'other.yaml'"),
        (["EXP", "--output", "x", "--only", "dife"], "--only: there is no system 'dife'; did you mean 'dive'?"),
        (["EXP", "--output", "x", "systems.dive.steering.rr=3"], "override systems.dive.steering.rr: unknown key"),
    ],
)
def test_the_command_refuses_before_it_starts(home, in_process, capsys, argv, words):
    assert cli.main(["experiment", *(str(home / "exp.yaml") if part == "EXP" else part for part in argv)]) == 2
    assert words in capsys.readouterr().err and in_process == []
