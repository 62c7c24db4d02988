"""The benchmark suite as a process of its own, for its tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What shares its cores with others takes a multiple of the suite's minute.
SUITE_SECONDS = 900


def run(*command: str, **variables: str) -> subprocess.CompletedProcess:
    # Triton's interpreter is for tests; a benchmark measures compiled kernels.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SUITE_SECONDS)


def run_suite(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = (sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-p", "no:cacheprovider")
    return run(*command, *arguments, **variables)
