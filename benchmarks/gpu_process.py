"""Programs under a deadline: one that overruns is ended with everything that it has started."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# Seconds that a program has, once it was interrupted, to write down what it has found.
GRACE = 8.0
# A process that hangs inside the driver can outlive even SIGKILL for a while; nobody waits longer for it.
LAST_WAIT = 5.0


class Deadline:
    """A moment that nothing may pass."""

    def __init__(self, seconds: float):
        self.seconds, self._end = seconds, time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until then, never below 0."""
        return max(0.0, self._end - time.monotonic())


class Outcome(NamedTuple):
    """What became of a program.

    Attributes:
        returncode: its exit status, negative for a signal; None where it could not be ended.
        seconds: that it took.
        overran: it was still running when its time was up.
        output: what it has printed, standard error included.
    """

    returncode: int | None
    seconds: float
    overran: bool
    output: str


def run(
    command: Sequence[str],
    *,
    seconds: float,
    log: Path,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    grace: float = GRACE,
) -> Outcome:
    """Runs `command` for at most `seconds`; what it prints is appended to `log`.

    It is interrupted (SIGINT to its process group) early enough to end by itself within its time, then killed.

    Raises:
        KeyboardInterrupt: Ctrl-C came while it ran; it has been ended.
        OSError: it cannot be started.
    """
    start = time.monotonic()
    with log.open("ab") as out:
        out.write(f"\n$ {' '.join(command)}\n".encode())
        out.flush()
        begin = out.tell()
        with _interruptible_children():
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | dict(env or {}),
                start_new_session=True,
            )
        overran = False
        try:
            process.wait(until_interrupted(seconds, grace))
        except subprocess.TimeoutExpired:
            overran = True
        finally:
            _end(process, grace)
    with log.open("rb") as written:
        written.seek(begin)
        output = written.read().decode(errors="replace")
    return Outcome(process.returncode, time.monotonic() - start, overran, output)


@contextlib.contextmanager
def _interruptible_children():
    """A shell lets its background jobs ignore SIGINT, and they would hand that on to whatever they start."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def until_interrupted(seconds: float, grace: float = GRACE) -> float:
    """When a program that has `seconds` is interrupted, so that it has some of them to end by itself."""
    return max(seconds - grace, seconds / 2)


def _end(process: subprocess.Popen, grace: float) -> None:
    """The program and whatever of its group is left, also where it ended by itself."""
    try:
        if process.poll() is None:
            _signal_group(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
    finally:
        _signal_group(process, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WAIT)


def _signal_group(process: subprocess.Popen, number: int) -> None:
    # Its own session makes the program the leader of a group of its number.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
