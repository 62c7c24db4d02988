"""Running the suite of a checkout."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from dive_fast.errors import InputError

FILES = ("conftest.py", "measure.py", "results.py")
NEEDED = ("pytest", "pytest_benchmark", "pytest_timeout")
FAILED = 1
NOTHING = 5  # pytest's exit status where nothing was selected


def find_suite() -> Path:
    """The checkout: where `benchmarks/` lies beside the package or in the current directory.

    Raises:
        InputError: neither has one, or a package that the suite needs is missing.
    """
    places = (Path(__file__).parents[2], Path.cwd())
    root = next((place for place in places if all((place / "benchmarks" / name).is_file() for name in FILES)), None)
    if root is None:
        raise InputError(
            f"bench: no folder benchmarks/ with the suite in {' or '.join(map(str, dict.fromkeys(places)))}; it is "
            "part of the project's repository and not of the installed package: clone that, and run `dive-fast bench` "
            "in its folder"
        )
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"bench: the suite needs {', '.join(missing)}: pip install 'dive_fast[bench]'")
    return root


def run_suite(root: Path, output: Path, *, scale: str | None = None, chosen: str | None = None) -> int:
    """Runs the suite in a process of its own; results are in `output` after every measurement.

    Args:
        scale: "smoke", "laptop" or "gpu"; None leaves it to the suite.
        chosen: an expression of pytest's -k.

    Returns:
        0, or 1 where something was wrong or did not run.

    Raises:
        InputError: nothing matches `chosen`.
        KeyboardInterrupt: with `saved_to`, the results so far.
    """
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--results", str(output.absolute())]
    command += ["--scale", scale] if scale else []
    command += ["-k", chosen] if chosen else []
    with subprocess.Popen(command, cwd=root) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt as stop:
            process.wait()  # the same Ctrl-C ends it, with a summary
            stop.saved_to = output if output.is_file() else None
            raise
    if status == NOTHING:
        raise InputError(f"-k: no benchmark matches {chosen!r}; `pytest benchmarks --collect-only -q` lists them")
    return FAILED if status else 0
