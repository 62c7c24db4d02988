"""The file of annotations: what it keeps, and what it survives."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dive_fast.clinical.annotation_store import HEADER, AnnotationStore
from dive_fast.errors import InputError

ROOT = Path(__file__).parents[1]


def filled(path, count=3):
    store = AnnotationStore(path)
    for i in range(count):
        store[f"key {i}"] = {"entities": {"1": {"tokens": f"é{i}"}}}
    return store


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_is_put_in_comes_out(tmp_path, on_disk):
    store = filled(tmp_path / "a.jsonl" if on_disk else None)
    for again in (store, AnnotationStore(tmp_path / "a.jsonl")) if on_disk else (store,):
        assert [again[f"key {i}"]["entities"]["1"]["tokens"] for i in range(3)] == ["é0", "é1", "é2"]
        assert "key 3" not in again


def test_the_file_is_plain_json_lines(tmp_path):
    filled(tmp_path / "a.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows[0] == {"format": "dive_fast annotations 1"}
    assert [row["key"] for row in rows[1:]] == ["key 0", "key 1", "key 2"]


def test_every_cut_leaves_a_prefix_and_a_file_that_goes_on(tmp_path):
    filled(tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for length in range(len(whole)):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(whole[:length])
        store = AnnotationStore(path)
        kept = [i for i in range(3) if f"key {i}" in store]
        # A line that lacks nothing but its end is whole.
        ends = [len(HEADER) + sum(map(len, whole[len(HEADER) :].splitlines(True)[: i + 1])) - 1 for i in range(3)]
        assert kept == [i for i in range(3) if length >= ends[i]]
        store["new"] = {"entities": {}}
        again = AnnotationStore(path)
        assert "new" in again and [i for i in range(3) if f"key {i}" in again] == kept
        assert all(again[f"key {i}"]["entities"]["1"]["tokens"] == f"é{i}" for i in kept)


def test_a_killed_process_leaves_a_file_that_reads(tmp_path):
    path = tmp_path / "a.jsonl"
    script = (
        "from dive_fast.clinical.annotation_store import AnnotationStore\n"
        f"store = AnnotationStore({str(path)!r})\n"
        "i = 0\n"
        "while True:\n"
        "    store[str(i)] = {'entities': {str(j): {'tokens': 'x' * 50} for j in range(200)}}\n"
        "    i += 1\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while not path.exists() or path.stat().st_size < 200_000:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = AnnotationStore(path)
    count = next(i for i in range(10**6) if str(i) not in store)
    assert count > 10 and all(len(store[str(i)]["entities"]) == 200 for i in range(count))


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    stores = [AnnotationStore(path) for _ in range(4)]

    def write(number):
        for i in range(100):
            stores[number][f"{number} {i}"] = {"entities": {"1": {"tokens": "word " * 50, "number": number}}}

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = AnnotationStore(path)
    assert all(again[f"{n} {i}"]["entities"]["1"]["number"] == n for n in range(4) for i in range(100))
    assert all(stores[n][f"{n} {i}"]["entities"]["1"]["number"] == n for n in range(4) for i in range(100))


@pytest.mark.parametrize("content", ["some report\n", '{"id": 1}\n', "\x00\x01" * 50])
def test_another_file_is_never_written_to(tmp_path, content):
    path = tmp_path / "reports.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="reports.jsonl holds something else than annotations; name another file"):
        AnnotationStore(path)
    assert path.read_text() == content


def test_a_path_that_cannot_be_a_file(tmp_path):
    with pytest.raises(InputError, match="cannot be used as a file .*directory"):
        AnnotationStore(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used as a file"):
        AnnotationStore(tmp_path / "file" / "a.jsonl")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without space")
def test_a_full_disk_is_an_error_with_a_remedy(tmp_path):
    store = AnnotationStore(tmp_path / "a.jsonl")
    store.path = Path("/dev/full")
    with pytest.raises(InputError, match="free disk space"):
        store["key"] = {}
