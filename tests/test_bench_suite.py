"""Running a suite: what its end means, and Ctrl-C. The suite is a stand-in; `test_benchmarks.py` runs the real one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dive_fast import cli
from dive_fast.bench.suite import run_suite
from dive_fast.errors import InputError

CONFTEST = """
from pathlib import Path

def pytest_addoption(parser):
    parser.addoption("--scale")
    parser.addoption("--results", type=Path)

def pytest_configure(config):
    config.option.results.write_text(config.option.scale or "none")
"""
TESTS = """
import time

def test_quick(benchmark):
    benchmark(lambda: None)

def test_wrong(benchmark):
    benchmark(lambda: 1 / 0)

def test_slow(benchmark):
    time.sleep(60)
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "conftest.py").write_text(CONFTEST)
    (tmp_path / "benchmarks" / "test_some.py").write_text(TESTS)
    return tmp_path


@pytest.mark.parametrize(("chosen", "status"), [("quick", 0), ("wrong", 1)])
def test_what_its_end_means(checkout, chosen, status):
    results = checkout / "results.json"
    assert run_suite(checkout, results, scale="smoke", chosen=chosen) == status
    assert results.read_text() == "smoke"


def test_an_expression_that_nothing_matches(checkout):
    with pytest.raises(InputError, match="-k: no benchmark matches 'nothing'"):
        run_suite(checkout, checkout / "results.json", chosen="nothing")


@pytest.mark.parametrize(("measured", "status"), [(True, 0), (False, 1)])
def test_a_run_that_measured_nothing_has_failed(tmp_path, monkeypatch, capsys, measured, status):
    def run(root, output, **options):
        if measured:
            output.write_text("{}")
        return 0

    monkeypatch.setattr("dive_fast.bench.suite.find_suite", lambda: tmp_path)
    monkeypatch.setattr("dive_fast.bench.suite.run_suite", run)
    assert cli.main(["bench", "--output", str(tmp_path / "results.json")]) == status
    assert ("nothing was measured" in capsys.readouterr().err) == (not measured)


def test_ctrl_c_waits_for_the_suite_and_says_where_its_results_are(checkout):
    results = checkout / "results.json"
    script = f"""
import signal, sys
from pathlib import Path
from dive_fast import cli
from dive_fast.bench import suite
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
suite.find_suite = lambda: Path({str(checkout)!r})
sys.exit(cli.main(["bench", "-k", "slow", "--output", {str(results)!r}]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 60
    while not results.exists() and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(1.0)
    # As a terminal does: to everything in the foreground.
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"interrupted; saved to {results}" in err
    assert "KeyboardInterrupt" in out, "pytest has ended by itself, with its summary"
