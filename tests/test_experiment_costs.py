"""What a piece of an experiment notes of its costs: the peak of memory, the time of a teacher's passes."""

import json
from types import SimpleNamespace

import pytest
import torch

from dive_fast.experiment import worker
from dive_fast.experiment.memory import PeakMemory


def test_one_peak_does_not_inherit_another():
    before = PeakMemory(torch.device("cpu"))
    large = torch.ones(60_000_000)
    assert before.bytes() > large.numel() * 4
    del large
    first, after = before.bytes(), PeakMemory(torch.device("cpu"))
    if after.kind != "resident set":
        pytest.skip("the kernel does not let a process reset its peak of memory")
    assert after.bytes() < first - 1e8


def test_a_teacher_pass_that_was_cut_off_counts_what_it_noted(tmp_path, monkeypatch):
    """Ten passes; the first process noted its first eight and was killed after nine."""
    runner = type("Runner", (), {"passes": 0})()
    clock = [0.0]
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def passes(notes, records):
        for _ in notes.track(runner, records):
            runner.passes += 1
            clock[0] += 0.01

    first = worker._Notes(tmp_path / "seed-0.part")
    passes(first, range(9))
    second = worker._Notes(tmp_path / "seed-0.part")
    assert (second.passes, second.seconds) == (8, json.loads((tmp_path / "seed-0.part").read_text())["seconds"])
    passes(second, range(1))
    assert second.passes == 9 and second.seconds == pytest.approx(0.09)
