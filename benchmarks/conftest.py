"""What every group of the suite shares: the scale, the results file and who may run where."""

import os
import time
from pathlib import Path

START = time.monotonic()
# Before the first import of huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from benchmarks import machine, measure, results  # noqa: E402
from benchmarks.gpu_findings import NO_TIME  # noqa: E402

RECORDS = pytest.StashKey[list]()
# Seconds that must be left to begin a measurement: of an op, of a model, which is made, checked and asked for a first
# token before, of several in turn, and of something that compiles for a while.
LEAST_LEFT, LEAST_LEFT_MODEL, LEAST_LEFT_RATIOS, LEAST_LEFT_COMPILING = 10.0, 30.0, 40.0, 60.0
# Seconds; one measurement of the largest size, its float64 check included.
TIMEOUT = 1800


def pytest_addoption(parser):
    group = parser.getgroup("dive_fast benchmarks")
    group.addoption(
        "--scale", choices=list(measure.SCALES), help="sizes and rounds; default: gpu where there is CUDA, else laptop"
    )
    group.addoption("--results", type=Path, metavar="FILE", help="also write compact results to this JSON file")
    group.addoption("--deadline", type=float, metavar="SECONDS", help="begin only what is likely to end by then")


def pytest_configure(config):
    config.stash[RECORDS] = []
    if config.option.scale is None:
        config.option.scale = "gpu" if torch.cuda.is_available() else "laptop"


def pytest_report_header(config):
    return f"benchmarks: scale {config.option.scale}, {torch.get_num_threads()} threads"


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.timeout(TIMEOUT))
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        device = getattr(parameters.get("problem"), "device", None) or parameters.get("device")
        if device is not None:
            # Only one mark counts, the first.
            own = item.get_closest_marker("benchmark")
            options = ({} if own is None else own.kwargs) | {"timer": measure.clock(device)}
            item.add_marker(pytest.mark.benchmark(**options), append=False)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["dive_fast"] = machine.facts()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    deadline = item.config.option.deadline
    if deadline is None:
        return
    chosen = getattr(item, "callspec", None) and item.callspec.params.get("implementation")
    compiles = getattr(chosen, "slow_start", False) or getattr(chosen, "compiles", False)
    left = deadline - (time.monotonic() - START)
    wanted = LEAST_LEFT_MODEL if item.module.__name__.endswith("test_decode") else LEAST_LEFT
    if "ratios" in item.originalname:
        wanted = LEAST_LEFT_RATIOS
    if left < (LEAST_LEFT_COMPILING if compiles else wanted):
        pytest.skip(NO_TIME)


@pytest.fixture
def scale(request) -> measure.Scale:
    """How long to measure."""
    return measure.SCALES[request.config.option.scale]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Every finished measurement goes to the results; one whose test did not pass lacks what the test says of it."""
    report = yield
    fixture = (item.funcargs or {}).get("benchmark") if report.when == "call" and report.passed else None
    if fixture is not None and fixture.stats is not None:
        records, path = item.config.stash[RECORDS], item.config.option.results
        records.append(results.record(fixture))
        # Now rather than at the end: what runs next may take this process with it.
        if path is not None:
            results.write(path, records, item.config.option.scale, machine.facts())
    return report


def pytest_terminal_summary(terminalreporter, config):
    noise = results.content(config.stash[RECORDS], config.option.scale, machine.facts())["noise"]
    if noise["records"]:
        terminalreporter.section(f"noise: intervals wider than {noise['wider_than']:.0%} of the figure")
        count = f"{len(noise['records'])} of {len(config.stash[RECORDS])} records"
        terminalreporter.write_line(f"{count}: {', '.join(noise['records'])}")
    compared = [record for record in config.stash[RECORDS] if "ratios" in record]
    if not compared:
        return
    terminalreporter.section("ratios, paired: time (95 % interval) and peak memory")
    for record in compared:
        for other, ratio in record["ratios"].items():
            time = f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}, {ratio['rounds']} rounds)"
            memory = f"memory {ratio['peak_memory']:.3f}" if "peak_memory" in ratio else ""
            terminalreporter.write_line(f"{record['name']}  {record['implementation']} : {other}  {time}  {memory}")
