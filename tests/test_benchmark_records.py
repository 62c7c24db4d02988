"""Which records the benchmark suite keeps, and by whose clock: whatever ends a test costs no other test its figures."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is no part of the installed package

from benchmarks.gpu_findings import NO_TIME  # noqa: E402
from tests.benchmark_runs import ROOT, SUITE_SECONDS, run, run_suite  # noqa: E402

pytestmark = pytest.mark.timeout(SUITE_SECONDS + 60)


def test_results_are_written_as_they_come(tmp_path):
    """So that a benchmark that takes its process with it costs no figures but its own."""
    plugin = tmp_path / "dies.py"
    plugin.write_text("import os\ndef pytest_runtest_protocol(item, nextitem):\n    if nextitem is None: os._exit(7)\n")
    results = tmp_path / "results.json"
    chosen = "test_steer and float32 and reference"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    outcome = run_suite("--scale", "smoke", "-p", "dies", "-k", chosen, "--results", str(results), PYTHONPATH=path)
    assert outcome.returncode == 7
    assert len(json.loads(results.read_text())["records"]) == 1


FAILS_IN_A_ROUND = """
import sys, pytest
from benchmarks import loss_peers

calls = []

def fails(inputs):
    calls.append(inputs)
    if len(calls) > 3:  # checked, warmed up, and one round
        raise RuntimeError("in a timed round")
    return loss_peers.eager(inputs)

change = lambda peer: peer._replace(make=lambda: fails) if peer.name == "eager valid rows" else peer
loss_peers.PEERS = tuple(map(change, loss_peers.PEERS))
files = "benchmarks/test_loss.py::test_loss_ratios", "benchmarks/test_decode_kernels.py"
chosen = "-k", "cpu-smoke or bfloat16-K64-B1", "--benchmark-only", "--scale", "smoke"
sys.exit(pytest.main([*files, *chosen, "--results", sys.argv[1]]))
"""


def test_a_test_that_fails_in_a_round_costs_no_other_its_record(tmp_path):
    done = run(sys.executable, "-c", FAILS_IN_A_ROUND, str(tmp_path / "results.json"))
    assert done.returncode == 1 and "1 failed" in done.stdout and "error" not in done.stdout.splitlines()[-1], (
        done.stdout
    )
    records = json.loads((tmp_path / "results.json").read_text())["records"]
    assert records and "loss ratios" not in {record["group"] for record in records}


def test_what_is_left_when_the_time_is_up_says_so():
    outcome = run_suite("--scale", "smoke", "--deadline", "0", "-k", "test_steer and float32")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert NO_TIME in outcome.stdout and " passed" not in outcome.stdout


@pytest.mark.parametrize("chosen", ["test_steer and float32 and reference", "test_loss and cpu and reference and mean"])
def test_times_are_taken_by_the_clock_of_the_device(tmp_path, chosen):
    """A GPU's clock that is not asked for leaves the host's, which sees launches alone."""
    (tmp_path / "clocked.py").write_text(
        "from benchmarks import measure\n"
        "class Clock:\n"
        "    __name__, now = 'a thousand seconds a reading', 0.0\n"
        "    def __call__(self):\n"
        "        Clock.now += 1000.0\n"
        "        return Clock.now\n"
        "measure.clock = lambda device: Clock()\n"
    )
    path, results = os.pathsep.join([str(ROOT), str(tmp_path)]), tmp_path / "results.json"
    outcome = run_suite(
        "--scale",
        "smoke",
        "-p",
        "clocked",
        "-k",
        f"{chosen} and not ratios",
        "--results",
        str(results),
        PYTHONPATH=path,
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    records = json.loads(results.read_text())["records"]
    assert records and {record["seconds"]["median"] for record in records} == {1000.0}
    assert all(record["group"].startswith(("steer-op", "loss ")) for record in records)
