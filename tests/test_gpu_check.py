"""`make gpu-check` without a GPU: what it refuses, what it keeps, and that nothing it started outlives it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package

from benchmarks import (  # noqa: E402
    gpu_check,
    gpu_device,
    gpu_findings,
    gpu_kernels,
    gpu_parts,
    gpu_process,
    gpu_summary,
)
from benchmarks.gpu_process import Outcome  # noqa: E402

FACTS = {
    "missing": [],
    "torch": "2.11.0",
    "error": None,
    "device": "NVIDIA H100 80GB HBM3",
    "capability": [9, 0],
    "memory": 85 * 10**9,
    "compute_sanitizer": "/usr/bin/compute-sanitizer",
    "xdist": True,
    "machine": {"python": "3.12.3", "torch": "2.11.0", "gpu driver_version": "580.159.04"},
}
FLOORS = {
    "copy": {"median": 3000.0, "low": 2950.0, "high": 3010.0, "rounds": 30, "unit": "gigabytes_per_second"},
    "read": {"median": 2900.0, "low": 2890.0, "high": 2910.0, "rounds": 30, "unit": "gigabytes_per_second"},
    "product": {"median": 750.0, "low": 740.0, "high": 760.0, "rounds": 30, "unit": "teraflops_per_second"},
    "state": {"before": {}, "behind the product": {"clocks.sm": "1755 MHz"}},
}
RECORD = {
    "name": "test_loss_ratios[mistral]",
    "group": "loss ratios",
    "seconds": {"median": 0.004, "iqr": 0.0001, "min": 0.0039, "mean": 0.004, "stddev": 0.0001, "rounds": 50},
    "gflops_per_second": 375e3,
    "share_of_floor": 0.9,
    "ratios": {"Liger": {"median": 0.5, "low": 0.49, "high": 0.51, "rounds": 50}},
}
STEP = {
    "name": "mistral-7b-bfloat16-B1-unsteered",
    "steps": 15,
    "microseconds": 4200.0,
    "kernels": [{"name": "project_kernel<1, 1, 1> [256, 1, 1]", "a_step": 64, "added": 19, "own": 37, "early": 16}],
}
JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest" tests="5">
<testcase classname="tests.test_a" name="test_one[x]" time="0.1"/>
<testcase classname="tests.test_a" name="test_two" time="0.1"><failure message="assert 1 == 2&#10;more">trace</failure></testcase>
<testcase classname="tests.test_a" name="test_three"><error message="failed on setup">trace</error></testcase>
<testcase classname="tests.test_b" name="test_four"><skipped type="pytest.skip" message="Liger is not installed"/></testcase>
<testcase classname="tests.test_b" name="test_five"><skipped message="{no_time}"/></testcase>
</testsuite></testsuites>""".replace("{no_time}", gpu_findings.NO_TIME)  # fmt: skip  # noqa: E501
PASSED = '<testsuites><testsuite><testcase classname="t" name="test_ok"/></testsuite></testsuites>'


class FakeMachine:
    """Runs nothing: answers with what a GPU machine's programs would have left, by part.

    Args:
        answers: words of a command -> its outcome, a text for its XML or an exception; the first that occurs counts.
    """

    def __init__(self, **answers):
        self.answers, self.commands = answers, []

    def __call__(self, command, *, seconds, log, cwd, env=None):
        text = " ".join(command)
        self.commands.append(text)
        answer = next((answer for words, answer in self.answers.items() if words in text), PASSED)
        if isinstance(answer, BaseException):
            raise answer
        if "gpu_device facts" in text:
            Path(command[-1]).write_text(json.dumps(self.answers.get("facts", FACTS)))
            return Outcome(0, 1.0, False, "")
        for word in command:
            if word.startswith("--junitxml=") and isinstance(answer, str):
                Path(word.partition("=")[2]).write_text(answer)
        if "--results" in command:
            path = Path(command[command.index("--results") + 1])
            path.write_text(json.dumps({"scale": "gpu", "machine": {}, "records": [RECORD]}))
        if "gpu_kernels" in text:
            Path(command[command.index("benchmarks.gpu_kernels") + 1]).write_text(json.dumps({"kernels": [STEP]}))
        if "gpu_device floors" in text:
            Path(command[-1]).write_text(json.dumps({"floors": FLOORS, "machine": FACTS["machine"]}))
        if isinstance(answer, Outcome):
            return answer
        return Outcome(0, 1.0, False, "========= ERROR SUMMARY: 0 errors\n1 passed")


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A compiler that only tells its version."""
    path = tmp_path / "nvcc"
    path.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.48'\n")
    path.chmod(0o755)
    monkeypatch.setattr(gpu_parts, "find_nvcc", lambda: str(path))
    return path


def check(tmp_path, machine, *arguments) -> tuple[int, dict, str]:
    """(exit status, results, page)."""
    out = tmp_path / "out"
    status = gpu_check.main(["--out", str(out), *arguments], run=machine)
    [path] = out.glob("*.json")
    return status, json.loads(path.read_text()), path.with_suffix(".md").read_text()


# -- a whole run


def test_all_is_well_with_every_part(tmp_path, nvcc, capsys):
    machine = FakeMachine()
    status, results, page = check(tmp_path, machine)
    assert status == 0 and results["check"]["verdict"] == "All is well"
    names = [part["name"] for part in results["check"]["parts"]]
    assert names[0].startswith("build") and names[1:4] == ["gpu tests", "gpu tests of memory", "floors"]
    assert all(part["status"] == "passed" for part in results["check"]["parts"])
    assert results["scale"] == "gpu" and results["machine"]["gpu driver_version"] == "580.159.04"
    # 375 of 750 TFLOP/s, from the floors of the same run.
    assert results["records"][0]["share_of_product"] == pytest.approx(0.5)
    assert "| test_loss_ratios[mistral] | 4.000 (0.100) | 90% | 50% of product | Liger 0.500 |" in page
    assert results["check"]["kernels"] == [STEP] and "mistral-7b-bfloat16-B1-unsteered: 4200 µs a step" in page
    assert "| `project_kernel<1, 1, 1> [256, 1, 1]` | 64 | 19.0 | 37.0 | 16.0 | 1216.0 |" in page
    assert "copy 3000 (2950 to 3010) GB/s" in page and "nvcc 13.0" in page and "1755 MHz" in page
    assert "gpu-check: results in" in capsys.readouterr().out


def test_what_failed_is_on_the_page_and_in_the_exit_status(tmp_path, nvcc):
    status, results, page = check(tmp_path, FakeMachine(**{"gpu and not alone": JUNIT}), "--only", "gpu tests,floors")
    assert status == 1 and "**Failed: gpu tests**" in page
    assert "`tests.test_a::test_two`: assert 1 == 2" in page and "`tests.test_a::test_three`: failed on setup" in page
    assert "- 1 x Liger is not installed" in page and "`tests.test_b::test_five`: the time was up" in page
    assert results["check"]["parts"][0]["failed"] == 2


def test_a_group_that_dies_costs_only_itself(tmp_path, nvcc):
    died = Outcome(-9, 30.0, False, "torch.OutOfMemoryError: CUDA out of memory")
    status, results, page = check(tmp_path, FakeMachine(mistral=died))
    assert status == 1 and "exit status -9; last line: torch.OutOfMemoryError" in page
    by_name = {part["name"]: part["status"] for part in results["check"]["parts"]}
    assert by_name["decode mistral"] == "failed" and by_name["decode gemma"] == "passed"


def test_ctrl_c_keeps_what_was_measured(tmp_path, nvcc):
    status, results, page = check(tmp_path, FakeMachine(test_steer=KeyboardInterrupt()))
    assert status == 1 and "interrupted" in results["check"]["verdict"]
    assert len(results["records"]) >= 1 and results["check"]["floors"] == FLOORS
    assert ["decode mistral", "interrupted"] in results["check"]["not_run"] and "decode mistral: interrupted" in page


def test_what_there_was_no_time_for_is_listed(tmp_path, nvcc, monkeypatch):
    machine = FakeMachine()
    # Enough for the facts and for the tests, which are two parts.
    monkeypatch.setattr(gpu_process.Deadline, "left", lambda self: 500.0 if len(machine.commands) < 3 else 3.0)
    status, results, page = check(tmp_path, machine, "--only", "gpu tests,floors,steer")
    assert ["steer", "3 s were left"] in results["check"]["not_run"] and "- steer: 3 s were left" in page
    # Measuring less is no fault; not testing is.
    assert status == 0 and results["check"]["verdict"] == "Nothing failed; not finished: floors, steer"
    machine.commands.clear()
    monkeypatch.setattr(gpu_process.Deadline, "left", lambda self: 3.0)
    assert gpu_check.main(["--out", str(tmp_path / "again"), "--only", "gpu tests"], run=machine) == 1
    [path] = (tmp_path / "again").glob("*.md")
    assert "**Failed: gpu tests was not run, gpu tests of memory was not run**" in path.read_text()


def test_a_results_file_is_never_overwritten(tmp_path):
    first, second = (gpu_check.claim(tmp_path, "NVIDIA H100 80GB HBM3") for _ in range(2))
    assert first.name.startswith("nvidia-h100-80gb-hbm3-2") and second.stem == f"{first.stem}-2"
    (tmp_path / "file").touch()
    with pytest.raises(gpu_check.CannotRun, match="--out: .*file is no folder"):
        gpu_check.claim(tmp_path / "file", "gpu")
    with pytest.raises(gpu_check.CannotRun, match="--out: .* cannot be written"):
        gpu_check.claim(tmp_path / "file" / "below", "gpu")


# -- refusals and arguments


@pytest.mark.parametrize(
    ("facts", "complaint"),
    [
        (FACTS | {"error": "torch is not installed"}, "no usable CUDA device: torch is not installed"),
        (FACTS | {"missing": ["peft", "pytest-timeout"]}, "pip install peft pytest-timeout"),
    ],
)
def test_it_ends_at_once_where_it_cannot_run(tmp_path, nvcc, capsys, facts, complaint):
    machine = FakeMachine(facts=facts)
    assert gpu_check.main(["--out", str(tmp_path / "out")], run=machine) == 2
    assert complaint in capsys.readouterr().err
    assert len(machine.commands) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("left", [None, '{"devi'])
def test_a_look_that_was_cut_off_is_told(tmp_path, nvcc, capsys, left):
    def killed(command, *, seconds, log, cwd, env=None):
        if left:
            Path(command[-1]).write_text(left)
        return Outcome(-9, 60.0, True, "importing torch\n")

    assert gpu_check.main(["--out", str(tmp_path / "out")], run=killed) == 2
    assert "could not say what device there is: importing torch" in capsys.readouterr().err


def test_a_missing_compiler_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_parts, "find_nvcc", lambda: None)
    assert gpu_check.main(["--out", str(tmp_path)], run=FakeMachine()) == 2
    assert "nvcc is missing" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_this_machine_without_a_gpu_is_refused(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(tmp_path / "out")]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert outcome.returncode == 2 and "no usable CUDA device" in outcome.stderr
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_every_command_and_runs_none(capsys, tmp_path):
    machine = FakeMachine()
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path / "out")], run=machine) == 0
    printed = capsys.readouterr().out
    assert machine.commands == [] and not (tmp_path / "out").exists()
    for words in (
        "gpu and not alone",
        "gpu_kernels",
        "gpu_device floors",
        "--scale gpu",
        "--tool memcheck",
        "test_decode.py",
        "DIVE_CUDA",
    ):
        assert words in printed
    assert "{seconds}" not in printed


@pytest.mark.parametrize(
    "arguments", [["--minutes", "0"], ["--minutes", "nan"], ["--minutes", "soon"], ["--slow"]], ids=" ".join
)
def test_bad_arguments_end_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(arguments, run=FakeMachine())
    assert ended.value.code == 2 and "usage" in capsys.readouterr().err


def test_parts_are_chosen_by_name(tmp_path):
    every = gpu_parts.parts(FACTS, "nvcc", tmp_path)
    assert len({part.name for part in every}) == len(every)
    assert [part.name for part in gpu_check.choose(every, "steer, memcheck", quick=True)] == ["steer", "memcheck"]
    with pytest.raises(gpu_check.CannotRun, match=r"--only: no part is called \['sneer'\]; there are \['build"):
        gpu_check.choose(every, "sneer,floors", quick=False)
    with pytest.raises(gpu_check.CannotRun, match="--only: no part is called ' , '"):
        gpu_check.choose(every, " , ", quick=False)


def test_the_first_parts_fit_into_the_time(tmp_path):
    """Most take far less than they may; but the tests, the floors and the first figures must come to their turn."""
    every = gpu_parts.parts(FACTS, "nvcc", tmp_path)
    first = [part.name for part in every].index("decode mistral") + 1
    assert sum(part.seconds for part in every[:first]) <= 660
    assert sum(part.quick for part in every if part.quick and part.kind in ("tests", "floors", "build")) <= 190


def test_builds_are_for_the_device_at_hand():
    named = {(8, 0): "80-real", (8, 9): "89-real", (9, 0): "90a-real", (10, 0): "100a-real", (12, 0): "120-real"}
    assert {capability: gpu_parts.architecture(capability) for capability in named} == named


def test_without_pip_the_build_is_cmakes_own(monkeypatch):
    monkeypatch.setattr(gpu_parts, "_externally_managed", lambda: True)
    names = [part.name for part in gpu_parts.build_parts([9, 0], "/cuda/nvcc")]
    assert names == ["build: configure", "build by CMake", "build: install"]
    configure = gpu_parts.build_parts([9, 0], "/cuda/nvcc")[0].command
    assert "-DCMAKE_CUDA_ARCHITECTURES=90a-real" in configure and "-DCMAKE_CUDA_COMPILER=/cuda/nvcc" in configure
    [folder] = [word.partition("=")[2] for word in configure if word.startswith("-Dpybind11_DIR=")]
    assert (Path(folder) / "pybind11Config.cmake").exists()


# -- the page


@pytest.mark.parametrize(
    ("record", "share"),
    [
        ({"share_of_floor": 0.9}, 0.9),
        ({"share_of_floor": {"median": 0.8, "low": 0.7, "high": 0.9}}, 0.8),
        ({"ratios": {"copy of the same bytes": {"median": 1.25}}}, 0.8),
        ({"ratios": {"Liger": {"median": 1.25}}}, None),
        ({}, None),
    ],
)
def test_every_groups_share_of_its_floor(record, share):
    assert gpu_summary.share_of_floor(record) == share


# -- the device's part, on this processor


def test_floors_are_work_over_time():
    found = gpu_device.floors("cpu", copy_bytes=2**16, side=64, rounds=5)
    for name, unit in (("copy", "gigabytes"), ("read", "gigabytes"), ("product", "teraflops")):
        assert found[name]["unit"] == f"{unit}_per_second" and found[name]["rounds"] == 5
        assert 0 < found[name]["low"] <= found[name]["median"] <= found[name]["high"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_facts_say_why_there_is_no_device():
    found = gpu_device.facts()
    assert found["torch"] == torch.__version__ and found["missing"] == []
    assert found["error"] and "\n" not in found["error"]
    assert "device" not in found


# -- where a step's time goes


def kernel(name, begin, end, grid=(1, 1, 1)) -> dict:
    return {"cat": "kernel", "name": name, "ts": begin, "dur": end - begin, "args": {"grid": list(grid)}}


BEGIN = "void dive::cuda::(anonymous namespace)::begin_kernel<(dive::cpu::DType)1>(dive::cuda::Begin)"
PROJECT = (
    "void dive::cuda::(anonymous namespace)::project_kernel<(dive::cpu::DType)1, 4, 2>"
    "(dive::cuda::(anonymous namespace)::Product)"
)


def test_a_kernel_adds_what_is_between_the_ends():
    # A step takes 30 us: 3 of the beginning, then 20 of a product that begins early, then 7 of another one.
    events = [{"cat": "gpu_memcpy", "name": "Memcpy", "ts": 0.0, "dur": 5.0}]
    for step in range(3):
        t = 100.0 + 30 * step
        events.append(kernel(BEGIN, t, t + 3))
        events.append(kernel(PROJECT, t + 1, t + 23, (256, 1, 1)))
        events.append(kernel("dive::cuda::(anonymous namespace)::finish_kernel(dive::cuda::Finish)", t + 20, t + 30))
        events.append(kernel("void at::native::vectorized_elementwise_kernel<4>()", t + 24, t + 25))
    found = gpu_kernels.of_trace(list(reversed(events)))
    assert found["steps"] == 2 and found["microseconds"] == 30
    figures = {row["name"]: (row["a_step"], row["added"], row["own"], row["early"]) for row in found["kernels"]}
    assert figures == {
        "project_kernel<1, 4, 2> [256, 1, 1]": (1, 20, 22, 2),
        "finish_kernel [1, 1, 1]": (1, 7, 10, 3),
        "begin_kernel<1> [1, 1, 1]": (1, 3, 3, 0),
    }
    assert [row["name"].split("_")[0] for row in found["kernels"]] == ["project", "finish", "begin"]
    with pytest.raises(ValueError, match="holds 1 steps of the engine"):
        gpu_kernels.of_trace(events[:4])


def test_steps_of_every_model_are_looked_at():
    names = [name for name, _ in gpu_kernels.decodings()]
    assert names[:2] == ["mistral-7b-bfloat16-B1-unsteered", "mistral-7b-bfloat16-B1-lowrank-r64"]
    assert len(names) == len(set(names)) == 10 and sum("gemma3-4b" in name for name in names) == 2
