"""How the benchmark suite measures: in pairs, in turns, without what prepares a run, with memory at its peak."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is no part of the installed package

from benchmarks import measure  # noqa: E402


def test_drift_cancels_in_a_ratio_of_pairs():
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]
    ratio = measure.ratio([0.5 * x for x in drift], drift)
    assert ratio == (0.5, 0.5, 0.5, 5)
    noisy = measure.ratio([1.0, 1.1, 0.9, 1.2, 1.05], [1.0] * 5)
    assert noisy.median == pytest.approx(1.05)
    assert 0.9 <= noisy.low < 1.05 < noisy.high <= 1.2


def test_paired_runs_take_turns():
    calls = []

    class Fixture:
        stats = None

        def pedantic(self, function, setup, rounds):
            for _ in range(rounds):
                setup()
                function()

    scale = measure.Scale(0.0, 3, 3, 60.0)
    others = {"b": lambda: calls.append("b"), "c": lambda: calls.append("c")}
    measure.paired(Fixture(), lambda: calls.append("a"), others, "cpu", scale)
    assert "".join(calls) == "abc" + "bca" * 3


def test_preparations_are_not_timed():
    calls = []

    class Function:
        def prepare(self):
            calls.append("prepare")

        def __call__(self):
            calls.append("run")

    class Fixture:
        stats = None

        def pedantic(self, function, setup, rounds):
            for _ in range(rounds):
                setup()
                calls.append("start")
                function()

    measure.paired(Fixture(), Function(), {"b": lambda: calls.append("b")}, "cpu", measure.Scale(0.0, 2, 2, 60.0))
    assert calls == ["prepare", "run", "b"] + ["prepare", "b", "start", "run"] * 2


def test_peak_memory_sees_what_was_freed_again():
    def step():
        torch.ones(16 * 2**20)
        return (torch.ones(2**20),)

    memory, _ = measure.peak_memory(step, "cpu")
    assert 63 <= memory.peak / 2**20 < 80  # the kernel counts pages in batches
    assert memory.kept < 8 * 2**20


def test_patience_limits_the_rounds():
    quick, slow = measure.Scale(0.0, 5, 30, 60.0), measure.Scale(0.0, 5, 30, 1e-9)
    assert measure.rounds([lambda: None], "cpu", quick) == 5
    assert measure.rounds([lambda: None], "cpu", slow) == 2


def test_an_event_clock_waits_only_at_the_end(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = measure.EventClock()
    for _ in range(2):
        start = clock()
        assert clock() - start == pytest.approx(0.25)
    assert log == ["record", "record", "wait"] * 2
