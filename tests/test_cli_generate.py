"""`dive-fast generate`: what it hands on, writes, streams and refuses; models are stand-ins."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import dive_fast
from dive_fast import cli, cli_files
from dive_fast.errors import InputError
from dive_fast.predictions import record_seed
from tests.cli_doubles import REPORTS, read_lines, reports_file, stand_in_for_load_backbone


@pytest.fixture
def data(tmp_path) -> Path:
    return reports_file(tmp_path)


@pytest.fixture
def backbone(monkeypatch):
    return stand_in_for_load_backbone(monkeypatch)


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
        return model + f" + {adapter}"

    monkeypatch.setattr(dive_fast, "generate", generate)
    monkeypatch.setattr("dive_fast.predictions.generate", generate)
    monkeypatch.setattr(dive_fast, "load", load)
    return seen


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--prompt", " "], "--prompt: expected what the report should be about"),
        (["--data", "DATA", "--output", "DATA/p.jsonl"], "no folder that may be written to"),
        (["--prompt", "Case", "--device", "gpu"], "device: expected a name such as 'cpu' or 'cuda:0', got 'gpu'"),
        (
            ["--data", "DATA", "--output", "p", "--device", "cpu", "--workers", "2"],
            "workers take what --worker-gpus gives",
        ),
    ],
)
def test_generate_refuses_before_it_loads(generation, backbone, data, capsys, extra, words):
    assert cli.main(["generate", "--model", "m", *(part.replace("DATA", str(data)) for part in extra)]) == 2
    assert words in capsys.readouterr().err and backbone == []


@pytest.mark.parametrize(
    ("gpu", "named", "expected"), [(True, [], "cuda"), (False, [], "cpu"), (True, ["--device", "cpu"], "cpu")]
)
def test_generate_runs_on_the_gpu_where_there_is_one(generation, monkeypatch, gpu, named, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    assert cli.main(["generate", "--model", "m", "--prompt", "Case", *named]) == 0
    assert generation.calls[0].model.device.type == expected


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


def test_generate_writes_every_result_of_a_record(generation, data, tmp_path, capsys):
    argv = ["generate", "--model", "m", "--data", str(data), "--output", str(tmp_path / "p.jsonl"), "--limit", "2"]
    search = ["--num-beams", "3", "--length-penalty", "0.5", "--num-return-sequences", "2", "--stop", "a b", "END"]
    assert cli.main([*argv, *search]) == 0
    assert f"dive-fast evaluate {tmp_path / 'p.jsonl'} --sample 0\n" in capsys.readouterr().out
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


def test_the_rows_of_a_run_that_was_cut_off_stay_until_they_are_replaced(generation, backbone, data, tmp_path, capsys):
    part = tmp_path / "p.jsonl.part"
    argv = ["generate", "--model", "m", "--data", str(data), "--batch-size", "1", "--output", str(tmp_path / "p.jsonl")]
    generation.stop_after = 2
    assert cli.main(argv) == 130 and len(kept := read_lines(part)) == 2
    backbone.clear()
    assert cli.main(argv) == 2 and backbone == []
    err = capsys.readouterr().err
    assert f"--output: {part} holds the rows of a run that was cut off; rename it" in err and "--overwrite" in err
    assert cli.main([*argv, "--overwrite"]) == 130 and read_lines(part) == kept  # stopped before its first row
    assert "saved to" not in capsys.readouterr().err
    generation.stop_after = None
    assert cli.main([*argv, "--overwrite"]) == 0
    assert len(read_lines(tmp_path / "p.jsonl")) == 3 and not part.exists()


def test_rows_do_not_replace_those_of_a_run_that_was_cut_off(tmp_path):
    part = tmp_path / "p.jsonl.part"
    part.write_text('{"id": "a"}\n')
    with pytest.raises(InputError, match="holds the rows of a run"):
        cli_files.write_rows(tmp_path / "p.jsonl", [{"id": "b"}], total=1)
    assert part.read_text() == '{"id": "a"}\n'
    part.write_text("")
    assert cli_files.write_rows(tmp_path / "p.jsonl", [{"id": "b"}], total=1) == 1 and not part.exists()


def test_generate_does_not_replace_its_data(generation, data, capsys):
    argv = ["generate", "--model", "m", "--data", str(data), "--output", str(data), "--overwrite"]
    assert cli.main(argv) == 2 and "is read by this command" in capsys.readouterr().err
    assert len(read_lines(data)) == 3 and generation.calls == []


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
        (["--data", "DATA", "--output", "p.jsonl", "--seed", "-1"], "--seed: expected a whole number >= 0, got -1"),
        (
            ["--data", "DATA", "--output", "p.jsonl", "--shard-size", "4"],
            "--shard-size: means nothing without",
        ),
        (["--data", "DATA", "--output", "p.jsonl", "--worker-gpus", "1"], "--worker-gpus: means nothing without"),
        (["--data", "DATA", "--output", "p.jsonl", "--image", "x.png"], "--image"),
        (["--data", "opn_i", "--output", "p.jsonl"], "open_i"),
        (["--prompt", "x", "--output", "p.jsonl"], "--prompt"),
        (["--prompt", "x", "--limit", "0"], "--prompt: takes no data options, --limit"),
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
