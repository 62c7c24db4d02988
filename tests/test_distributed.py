"""Predictions by several workers: the same file as from one process, whatever happens to the workers."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import peft
import psutil
import pytest
import torch

import dive_fast
from dive_fast import cli, distributed
from dive_fast.data.record import Record
from dive_fast.distributed import Job, Workers, Writer, write_predictions
from dive_fast.errors import InputError
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from dive_fast.shards import Shards

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the package ray is not installed")
RECORDS = [Record(f"r{i}", f"Indication: case {i}.{' Tags: cough.' * (i % 4)}", "No effusion.") for i in range(22)]
# Sampled, so that a draw that hangs on the worker shows; long, so that a worker can be hit while it writes.
OPTIONS = {"temperature": 1.0, "seed": 5, "max_new_tokens": 300, "min_new_tokens": 300}
SPLIT = {"batch_size": 2, "shard_size": 4, "dtype": "float32", "options": OPTIONS}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, str]:
    """A tiny model and an adapter that matters, as folders."""
    folder = tmp_path_factory.mktemp("trained")
    model = tiny_llama()
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    steered = peft.get_peft_model(model, dive_fast.DiveConfig(r=4))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in steered.named_parameters():
            if "dive_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    steered.save_pretrained(folder / "adapter")
    return {"model": str(folder / "model"), "adapter": str(folder / "adapter")}


@pytest.fixture(scope="module")
def one_process(trained, tmp_path_factory) -> bytes:
    """What `dive-fast generate` without workers writes."""
    folder = tmp_path_factory.mktemp("one")
    data = folder / "data.jsonl"
    rows = [{"id": r.id, "prompt": r.prompt, "report": r.report} for r in RECORDS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["generate", "--model", trained["model"], "--adapter", trained["adapter"], "--data", str(data)]
    argv += ["--dtype", "float32", "--batch-size", "2", "--temperature", "1", "--seed", "5"]
    argv += ["--max-new-tokens", "300", "--min-new-tokens", "300", "--output", str(folder / "p.jsonl")]
    assert cli.main(argv) == 0
    return (folder / "p.jsonl").read_bytes()


@pytest.fixture(scope="module")
def cluster():
    """One Ray for all tests here; `write_predictions` uses what its caller is connected to."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=2**27)
    yield ray
    ray.shutdown()


def writers(state: str = "") -> set[int]:
    """Process ids of this process's workers; Ray calls one that is writing ray::Writer.write."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(f"ray::Writer{state}"):
                found.add(process.pid)
    return found


# Without Ray


def test_a_writer_gives_any_shard_the_rows_of_one_process(trained, one_process, tmp_path):
    job = Job(**trained, dtype="float32", batch_size=2, options=OPTIONS, device="cpu")
    shards = Shards(tmp_path / "p.jsonl", RECORDS, 4, {"options": OPTIONS})
    workers = [Writer(job, 1), Writer(job, None)]
    assert workers[0].load() == os.getpid() and workers[0].loaded is not None
    for index in shards.unfinished()[::-1]:
        shards.save(index, workers[index % 2].write(shards.shards[index]))
    shards.join()
    assert (tmp_path / "p.jsonl").read_bytes() == one_process


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Workers(0), "--workers: expected a whole number >= 1, got 0"),
        (lambda: Workers(True), "--workers: expected a whole number"),
        (lambda: Workers(2, cpus=0), "--worker-cpus: expected a number > 0, got 0"),
        (lambda: Workers(2, cpus=float("nan")), "--worker-cpus: expected a number > 0, got nan"),
        (lambda: Workers(2, gpus=-1), "--worker-gpus: expected 0, a part of a GPU such as 0.5"),
        (lambda: Workers(2, gpus=1.5), "--worker-gpus: expected 0, a part of a GPU such as 0.5, or a whole number"),
    ],
)
def test_workers_that_cannot_be_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize(
    ("records", "options", "words"),
    [
        (RECORDS, {"shard_size": 5}, r"--shard-size: expected a multiple of the batch size \(2\), got 5"),
        (RECORDS, {"shard_size": 0}, "--shard-size: expected a multiple"),
        (RECORDS, {"options": {"temperature": 0.5}}, "--seed: with workers, sampling needs one"),
        ([], {}, "--data: expected at least one record to write about, got none"),
    ],
)
def test_what_would_not_be_the_same_as_one_process_is_refused(tmp_path, records, options, words):
    with pytest.raises(InputError, match=words):
        write_predictions(records, tmp_path / "p.jsonl", Workers(2), model="m", **(SPLIT | options))
    assert not list(tmp_path.iterdir())


def test_without_ray_the_pip_command_is_named(tmp_path, monkeypatch, trained):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"--workers: needs Ray, .*pip install 'dive_fast\[ray\]'"):
        write_predictions(RECORDS, tmp_path / "p.jsonl", Workers(2), **trained, **SPLIT)
    assert not list(tmp_path.iterdir())


def test_workers_belong_to_a_data_set(capsys):
    assert cli.main(["generate", "--model", "m", "--prompt", "Findings?", "--workers", "2"]) == 2
    assert "--prompt: takes no data options, --limit, --output or --workers" in capsys.readouterr().err


# With Ray


@contextmanager
def hunting(kills: float) -> Iterator[list[int]]:
    """Kill workers while they write, so many at most; gives the process ids of the dead."""
    dead, over = [], threading.Event()

    def hunt() -> None:
        while len(dead) < kills and not over.wait(0.002):
            for pid in sorted(writers(".write"))[:1]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    dead.append(pid)

    hunter = threading.Thread(target=hunt)
    hunter.start()
    try:
        yield dead
    finally:
        over.set()
        hunter.join()


@needs_ray
@pytest.mark.parametrize("count", [2, 1])
def test_a_killed_worker_is_replaced_and_the_file_is_that_of_one_process(
    trained, one_process, cluster, tmp_path, count
):
    """With one worker nothing but its replacement can have written the rest."""
    with hunting(kills=1) as dead:
        rows = write_predictions(RECORDS, tmp_path / "p.jsonl", Workers(count, cpus=1), **trained, **SPLIT)
    assert len(dead) == 1
    assert rows == len(RECORDS) and (tmp_path / "p.jsonl").read_bytes() == one_process
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


class Stop(Exception):
    pass


@needs_ray
def test_a_rerun_computes_only_what_is_missing(trained, one_process, cluster, tmp_path):
    output = tmp_path / "p.jsonl"

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        write_predictions(RECORDS, output, Workers(2), **trained, **SPLIT, on_shard=stop)
    folder = tmp_path / "p.jsonl.shards"
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*.jsonl")}
    assert len(kept) == 2 and not output.exists()
    other = SPLIT | {"options": OPTIONS | {"seed": 6}}
    with pytest.raises(InputError, match=r"other settings \(options.seed: 5 there, 6 now\)"):
        write_predictions(RECORDS, output, Workers(2), **trained, **other)
    with pytest.raises(InputError, match="other settings .data.sha256: "):
        write_predictions([*RECORDS[:-1], Record("r21", "Other.", "")], output, Workers(2), **trained, **SPLIT)
    with pytest.raises(InputError, match="other settings .adapter: [0-9a-f]{8} there, null now"):
        write_predictions(RECORDS, output, Workers(2), model=trained["model"], **SPLIT)
    seen = []
    write_predictions(
        RECORDS, output, Workers(1), **trained, **SPLIT, on_shard=lambda done, total: seen.append((done, total))
    )
    assert seen == [(3, 6), (4, 6), (5, 6), (6, 6)]
    assert output.read_bytes() == one_process and not folder.exists()


@needs_ray
def test_a_shard_that_kills_every_worker_ends_the_run_and_keeps_the_rest(trained, cluster, tmp_path):
    output = tmp_path / "p.jsonl"

    def stop(done: int, total: int) -> None:
        if done == total - 1:
            raise Stop

    with pytest.raises(Stop):
        write_predictions(RECORDS[:12], output, Workers(1), **trained, **SPLIT, on_shard=stop)
    with hunting(kills=math.inf), pytest.raises(InputError) as caught:
        write_predictions(RECORDS[:12], output, Workers(1), **trained, **SPLIT)
    words = str(caught.value)
    assert "--workers: shard 2 (records r8 to r11) ended 3 workers (" in words and "fewer workers" in words
    assert "2 of 3 shards are kept in" in words and "the same command goes on from there" in words
    assert len(list((tmp_path / "p.jsonl.shards").glob("shard-*.jsonl"))) == 2


class DiesLoading(Writer):
    def load(self) -> int:
        os.kill(os.getpid(), signal.SIGKILL)


@needs_ray
def test_a_model_that_no_worker_survives_ends_the_run(trained, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "Writer", DiesLoading)
    with pytest.raises(InputError, match="--workers: loading the model ended 3 workers .* memory ran out"):
        write_predictions(RECORDS, tmp_path / "p.jsonl", Workers(1), **trained, **SPLIT)


@needs_ray
def test_a_workers_refusal_is_the_users_message(trained, cluster, tmp_path):
    with pytest.raises(InputError, match="^model: no model at /nowhere .there is no config.json in it.; give a folder"):
        write_predictions(RECORDS, tmp_path / "p.jsonl", Workers(1), model="/nowhere", **SPLIT)
    options = OPTIONS | {"max_new_tokens": 5000}
    with pytest.raises(InputError, match="^max_new_tokens: a prompt of .* tokens leaves"):
        write_predictions(RECORDS, tmp_path / "p.jsonl", Workers(1), **trained, **(SPLIT | {"options": options}))


@needs_ray
def test_more_than_there_is_is_refused(trained, cluster, tmp_path):
    with pytest.raises(InputError, match="--workers: 4 workers need 4 CPUs .1 each., and Ray has 2; lower --workers"):
        write_predictions(RECORDS, tmp_path / "p.jsonl", Workers(4), **trained, **SPLIT)
    with pytest.raises(
        InputError, match="2 workers need 6 CPUs .3 each., and Ray has 2; lower --workers or --worker-c"
    ):
        write_predictions(RECORDS, tmp_path / "p.jsonl", Workers(2, cpus=3), **trained, **SPLIT)
    with pytest.raises(InputError, match="need 1 GPUs .0.5 each., and Ray has 0; lower --workers or --worker-gpus"):
        write_predictions(RECORDS, tmp_path / "p.jsonl", Workers(2, gpus=0.5), **trained, **SPLIT)


def command(trained, tmp_path, shard_size: int) -> subprocess.Popen:
    """`dive-fast generate` with a worker, in a process of its own that starts its own Ray."""
    data = tmp_path / "data.jsonl"
    rows = [{"id": r.id, "prompt": r.prompt, "report": r.report} for r in RECORDS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["generate", "--model", "model", "--adapter", "adapter", "--data", str(data), "--dtype", "float32"]
    argv += ["--batch-size", "2", "--temperature", "1", "--seed", "5", "--max-new-tokens", "300"]
    argv += ["--min-new-tokens", "300", "--output", str(tmp_path / "p.jsonl")]
    argv += ["--workers", "1", "--shard-size", str(shard_size)]
    code = f"import sys; from dive_fast.cli import main; sys.exit(main({argv!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(trained["model"]).parent,
        env={**os.environ, "PYTHONPATH": str(Path(dive_fast.__file__).parents[1])},
    )


@needs_ray
def test_the_command_starts_and_ends_a_ray_of_its_own(trained, one_process, tmp_path):
    run = command(trained, tmp_path, shard_size=12)
    shown, said = run.communicate()
    assert run.returncode == 0, said[-2000:]
    assert "22 predictions in" in shown and "2 of 2 shards" in said
    assert (tmp_path / "p.jsonl").read_bytes() == one_process


@needs_ray
def test_a_killed_command_goes_on_from_its_finished_shards(trained, one_process, tmp_path):
    folder, shards = tmp_path / "p.jsonl.shards", []
    run = command(trained, tmp_path, shard_size=2)
    while len(shards) < 2 and run.poll() is None:
        shards = list(folder.glob("shard-*.jsonl"))
        time.sleep(0.005)
    run.kill()
    run.communicate()
    assert not (tmp_path / "p.jsonl").exists()
    kept = len(list(folder.glob("shard-*.jsonl")))
    assert 2 <= kept < 11
    run = command(trained, tmp_path, shard_size=2)
    _, said = run.communicate()
    assert run.returncode == 0, said[-2000:]
    told = [line for line in said.splitlines() if line.endswith(" shards")]
    assert told == [f"{done} of 11 shards" for done in range(kept + 1, 12)]
    assert (tmp_path / "p.jsonl").read_bytes() == one_process
