"""What `make gpu-check` reads from what its parts have left: pytest's XML, results files, the sanitizer's output."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is no part of the installed package

from benchmarks import gpu_findings  # noqa: E402
from benchmarks.gpu_parts import Part  # noqa: E402
from benchmarks.gpu_process import Outcome  # noqa: E402

JUNIT = """<?xml version="1.0"?><testsuites><testsuite name="pytest" tests="5">
<testcase classname="tests.test_a" name="test_one[x]" time="0.1"/>
<testcase classname="tests.test_a" name="test_two" time="0.1"><failure message="assert 1 == 2&#10;more">trace</failure></testcase>
<testcase classname="tests.test_a" name="test_three"><error message="failed on setup">trace</error></testcase>
<testcase classname="tests.test_b" name="test_four"><skipped type="pytest.skip" message="Liger is not installed"/></testcase>
<testcase classname="tests.test_b" name="test_five"><skipped message="{no_time}"/></testcase>
</testsuite></testsuites>""".replace("{no_time}", gpu_findings.NO_TIME)  # fmt: skip  # noqa: E501
PASSED = '<testsuites><testsuite><testcase classname="t" name="test_ok"/></testsuite></testsuites>'
SKIPPED = '<testsuite><testcase classname="t" name="a"><skipped message="no CUDA device"/></testcase></testsuite>'


def part_with(tmp_path, kind="tests", xml=None, name="gpu tests", content=None) -> Part:
    paths = {"xml": tmp_path / "found.xml" if kind in ("tests", "benchmark") else None, "json": tmp_path / "found.json"}
    if xml is not None:
        paths["xml"].write_text(xml)
    if content is not None:
        paths["json"].write_text(content)
    return Part(name, kind, 60, None, **paths)


def test_counts_come_from_pytests_own_file(tmp_path):
    (tmp_path / "found.xml").write_text(JUNIT)
    found = gpu_findings.read_junit(tmp_path / "found.xml")
    assert {name: found[name] for name in ("passed", "failed", "skipped", "not_run")} == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "not_run": 1,
    }
    assert found["failures"][0] == ["tests.test_a::test_two", "assert 1 == 2"]
    assert found["left"] == ["tests.test_b::test_five"]


def test_pytest_writes_what_is_read(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert False, 'wrong by 3'\n"
        f"def test_c(): pytest.skip({gpu_findings.NO_TIME!r})\ndef test_d(): pytest.skip('no Liger')\n"
        "@pytest.fixture\ndef bad(): raise RuntimeError('gone')\ndef test_e(bad): pass\n"
    )
    xml = tmp_path / "found.xml"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={xml}", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    found = gpu_findings.read_junit(xml)
    assert [found[name] for name in ("passed", "failed", "skipped", "not_run")] == [1, 2, 1, 1]
    assert "wrong by 3" in dict(found["failures"])["test_it::test_b"]


@pytest.mark.parametrize(
    ("kind", "xml", "outcome", "status", "why"),
    [
        ("tests", PASSED, Outcome(0, 5, False, "1 passed"), "passed", None),
        ("tests", SKIPPED, Outcome(0, 5, False, "1 skipped"), "failed", "no test passed"),
        ("tests", None, Outcome(4, 5, False, "ERROR: not found\n"), "failed", "exit status 4; last line: ERROR"),
        ("tests", None, Outcome(0, 5, False, "ok"), "failed", "pytest wrote no results"),
        ("tests", "<testsuite><testca", Outcome(0, 5, False, "ok"), "failed", "pytest wrote no results"),
        ("tests", PASSED, Outcome(-9, 60, True, "test_a.py::test_hang"), "failed", "ended after 60 s; last line: t"),
        ("benchmark", PASSED, Outcome(-9, 60, True, "x"), "failed", "ended after 60 s"),
        ("benchmark", SKIPPED, Outcome(0, 5, False, "1 skipped"), "unfinished", "nothing was measured"),
        ("floors", None, Outcome(0, 5, False, ""), "failed", "it measured nothing"),
        ("build", None, Outcome(1, 5, False, "nvcc fatal"), "failed", "exit status 1; last line: nvcc fatal"),
        ("sanitizer", None, Outcome(0, 5, False, "========= ERROR SUMMARY: 0 errors"), "passed", None),
        ("sanitizer", None, Outcome(9, 5, False, "========= ERROR SUMMARY: 3 errors"), "failed", "3 errors"),
        (
            "sanitizer",
            None,
            Outcome(9, 5, False, "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)"),
            "failed",
            "2 hazards",
        ),
        (
            "sanitizer",
            None,
            Outcome(0, 5, False, "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)"),
            "passed",
            None,
        ),
        ("sanitizer", None, Outcome(1, 5, False, "Device not supported"), "unfinished", "no conclusion; last line: D"),
        ("sanitizer", None, Outcome(-9, 60, True, "x"), "unfinished", "ended after 60 s"),
        ("sanitizer", None, Outcome(-9, 60, True, "========= ERROR SUMMARY: 3 errors"), "failed", "3 errors"),
        (
            "sanitizer",
            None,
            Outcome(-9, 60, True, "========= Invalid __global__ write of size 4 bytes\n=========     at kernel"),
            "failed",
            "Invalid __global__ write",
        ),
        # A child's summary says nothing of its parent, which was cut off.
        (
            "sanitizer",
            None,
            Outcome(-9, 60, True, "========= ERROR SUMMARY: 0 errors\n========= Invalid __global__ write of size 4\n"),
            "failed",
            "Invalid __global__ write",
        ),
    ],
)  # fmt: skip
def test_a_part_is_judged_by_what_it_left(tmp_path, kind, xml, outcome, status, why):
    found = gpu_findings.judge(part_with(tmp_path, kind, xml), outcome)
    assert found["status"] == status
    assert why is None and "why" not in found or why in found["why"]


@pytest.mark.parametrize(
    ("xml", "status"),
    [(PASSED, "unfinished"), (SKIPPED, "failed"), (JUNIT, "failed"), (None, "failed")],
    ids=["one passed", "none passed", "some failed", "nothing"],
)
def test_kernel_tests_that_ran_out_of_time_have_come_some_way(tmp_path, xml, status):
    """Triton compiles for minutes where it has no cache; but a kernel that hangs is a fault."""
    part = part_with(tmp_path, "tests", xml, name="kernel tests")
    assert gpu_findings.judge(part, Outcome(-9, 240, True, "x"))["status"] == status


def test_a_half_written_file_loses_only_itself(tmp_path):
    part = part_with(tmp_path, "benchmark", PASSED, content='{"records": [{"na')
    found = gpu_findings.judge(part, Outcome(-9, 60, True, "x"))
    assert "records" not in found and found["passed"] == 1 and found["status"] == "failed"
    part = part_with(tmp_path, "benchmark", "<testsuite><testca", content='{"records": [{"name": "a"}]}')
    found = gpu_findings.judge(part, Outcome(-9, 60, True, "x"))
    assert found["records"] == [{"name": "a"}] and found["status"] == "unfinished"
