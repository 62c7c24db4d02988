"""Programs under a deadline: one that hangs is ended with its children, and one that can still speak is heard."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no part of the installed package

from benchmarks import gpu_process  # noqa: E402


def test_a_program_that_overruns_ends_with_its_children(tmp_path):
    pids = tmp_path / "pids"
    script = f"sleep 60 & echo $! >{pids}; trap '' INT; sleep 60 & echo $! >>{pids}; echo working; wait; sleep 60"
    start = time.monotonic()
    outcome = gpu_process.run(["bash", "-c", script], seconds=1.5, log=tmp_path / "log", cwd=tmp_path, grace=0.5)
    assert time.monotonic() - start < 10 and outcome.overran and outcome.returncode == -signal.SIGKILL
    assert outcome.output == "working\n" and "$ bash -c" in (tmp_path / "log").read_text()
    assert_gone(pids)


def test_what_a_program_leaves_behind_is_ended_too(tmp_path):
    pids = tmp_path / "pids"
    script = f"sleep 60 & echo $! >{pids}; exit 3"
    outcome = gpu_process.run(["bash", "-c", script], seconds=30, log=tmp_path / "log", cwd=tmp_path)
    assert outcome.returncode == 3 and not outcome.overran and outcome.seconds < 20
    assert_gone(pids)


def assert_gone(pids: Path) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not any(running(int(pid)) for pid in pids.read_text().split()):
            return
        time.sleep(0.05)
    pytest.fail("a child is still running")


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("caller", [signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def test_an_interrupted_program_has_time_to_write_what_it_has(tmp_path, caller):
    before = signal.signal(signal.SIGINT, caller)
    script = textwrap.dedent(
        """
        import pathlib, time
        try:
            print("ready", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            pathlib.Path("found").write_text("kept")
            raise SystemExit(2)
        """
    )
    command = [sys.executable, "-c", script]
    try:
        outcome = gpu_process.run(command, seconds=8, log=tmp_path / "log", cwd=tmp_path, grace=5)
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.overran and outcome.returncode == 2 and (tmp_path / "found").read_text() == "kept"


def test_ctrl_c_and_termination_end_the_program_and_reach_the_caller(tmp_path):
    script = textwrap.dedent(
        f"""
        import pathlib, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        from benchmarks import gpu_process
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        here = pathlib.Path({str(tmp_path)!r})
        command = ["bash", "-c", "echo $$ >pids; exec sleep 60"]
        try:
            gpu_process.run(command, seconds=50, log=here / "log", cwd=here, grace=1)
        except KeyboardInterrupt:
            print("caught")
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pids = tmp_path / "pids"
    deadline = time.monotonic() + 30
    while not (pids.exists() and pids.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "caught\n"
    assert_gone(pids)


def test_a_deadline_only_shrinks():
    deadline = gpu_process.Deadline(0.05)
    assert 0 < deadline.left() <= 0.05
    time.sleep(0.06)
    assert deadline.left() == 0
