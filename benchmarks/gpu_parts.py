"""The parts of `gpu_check`, most important first: what runs, for how long, and where it leaves what it found."""

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_process import until_interrupted

ROOT = Path(__file__).parents[1]
# They provoke waiting on purpose, compile dozens of kernels, which takes minutes under the sanitizer, or run torch's.
NOT_SANITIZED = "not nothing_waits and not does_nothing and not test_train_gpu"


@dataclass(frozen=True)
class Part:
    """One program of the check.

    Attributes:
        name: shown, and what --only takes.
        kind: "build", "tests", "sanitizer", "floors", "benchmark" or "kernels".
        seconds: the most it may take.
        quick: the same with --quick; None: it is left out there.
        command: `{seconds}` in it stands for the seconds after which it is interrupted.
        env: added to the environment.
        missing: why it cannot run on this machine, or None.
        xml, json: what the command writes: pytest's results, other figures.
    """

    name: str
    kind: str
    seconds: float
    quick: float | None
    command: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    missing: str | None = None
    xml: Path | None = None
    json: Path | None = None

    def most_seconds(self, quick: bool) -> float:
        return self.quick if quick and self.quick is not None else self.seconds

    def command_within(self, seconds: float) -> list[str]:
        last = f"{until_interrupted(seconds):.0f}"
        return [last if word == "{seconds}" else word for word in self.command]


def parts(facts: dict, nvcc: str, folder: Path) -> list[Part]:
    """All of them; `folder` is where they leave their files."""
    return [*build_parts(facts["capability"], nvcc), *_others(facts, folder)]


def _others(facts: dict, folder: Path) -> list[Part]:
    def tests(name: str, seconds: float, quick: float | None, *arguments: str) -> Part:
        xml = folder / f"{name.replace(' ', '-')}.xml"
        # Without the extension some files cannot be imported; the others' tests count all the same.
        options = ("-v", "--continue-on-collection-errors", f"--junitxml={xml}")
        return Part(name, "tests", seconds, quick, (*PYTEST, *options, *arguments), xml=xml)

    # Most of a test's time is its process's and its compiler's, on the host.
    workers = ("-n", str(max(1, min(14, (os.cpu_count() or 2) - 2)))) if facts["xdist"] else ()

    def benchmark(name: str, seconds: float, quick: float | None, *arguments: str) -> Part:
        stem = folder / name.replace(" ", "-")
        xml, json = stem.with_suffix(".xml"), stem.with_suffix(".json")
        options = ("--benchmark-only", "--scale", "gpu", "--deadline", "{seconds}", "--results", str(json))
        command = (*PYTEST, *options, f"--junitxml={xml}", *arguments)
        return Part(name, "benchmark", seconds, quick, command, xml=xml, json=json)

    def sanitizer(tool: str, chosen: str, seconds: float) -> Part:
        path = facts["compute_sanitizer"]
        # A test asks for a device that does not exist, so the API's own errors are no finding. What torch keeps to
        # itself to serve later allocations would hide reads beyond an allocation's end.
        options = ("--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9", "--target-processes", "all")
        program = (*PYTEST, "--continue-on-collection-errors", "-m", "gpu and not alone", "-k", chosen)
        command = (path or "compute-sanitizer", *options, *program, *files_marked("gpu"))
        missing = None if path else "compute-sanitizer is not installed"
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Part(tool, "sanitizer", seconds, None, command, env=env, missing=missing)

    floors, kernels = folder / "floors.json", folder / "kernels.json"
    decode = "benchmarks/test_decode.py::"
    decode_tests = tuple(decode + name for name in ("test_steering_overhead", "test_decode", "test_decode_ratios"))
    return [
        tests("gpu tests", 90, 60, "-m", "gpu and not alone", *workers, *files_marked("gpu")),
        tests("gpu tests of memory", 40, None, "-m", "gpu and alone", *files_marked("alone")),
        Part("floors", "floors", 60, 30, (sys.executable, "-m", "benchmarks.gpu_device", "floors", str(floors)),
             json=floors),
        benchmark("loss ratios", 100, 75, "benchmarks/test_loss.py", "-k", "ratios"),
        benchmark("steer", 50, 45, "benchmarks/test_steer.py"),
        benchmark("decode mistral", 170, 60, *decode_tests, "-k", "mistral"),
        Part("kernels of a step", "kernels", 60, None,
             (sys.executable, "-m", "benchmarks.gpu_kernels", str(kernels), "--seconds", "{seconds}"), json=kernels),
        sanitizer("memcheck", NOT_SANITIZED, 90),
        benchmark("decode qwen", 140, None, *decode_tests, "-k", "qwen"),
        benchmark("decode gemma", 140, None, *decode_tests, "-k", "gemma"),
        # cuBLAS and Triton have their own ways to order accesses, which racecheck does not know; ours are these.
        sanitizer("racecheck", f"(native or engine or cuda_step) and {NOT_SANITIZED}", 90),
        # Not marked gpu, since without one they run in Triton's interpreter.
        tests("kernel tests", 240, None, *KERNEL_TESTS, *workers),
        benchmark("loss", 300, None, "benchmarks/test_loss.py::test_loss", "-k", "T4096 and valid30"),
        benchmark("train step", 200, None, "benchmarks/test_train_step.py"),
    ]  # fmt: skip


def files_marked(name: str) -> list[str]:
    """Test files with that mark: to import all files, as each worker would, takes as long as the tests themselves."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if f"mark.{name}" in file.read_text(encoding="utf-8")]


PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
KERNEL_TESTS = (
    "tests/test_ops_steer_triton.py",
    "tests/test_ops_linear_cross_entropy_triton.py",
    "tests/test_ops_linear_cross_entropy_fused.py",
    "tests/test_ops_linear_cross_entropy_inputs.py",
)


def build_parts(capability: Sequence[int], nvcc: str) -> list[Part]:
    """By pip where it may install and scikit-build-core is there, else by CMake; for this device's architecture."""
    defines = {
        "DIVE_CUDA": "ON",
        "CMAKE_CUDA_ARCHITECTURES": architecture(capability),
        "CMAKE_CUDA_COMPILER": nvcc,
    }
    name, seconds, quick = "build", 150, 100
    if importlib.util.find_spec("pybind11") is None:
        return [Part(name, "build", seconds, quick, missing="pybind11 is not installed: pip install 'pybind11>=3,<4'")]
    if importlib.util.find_spec("pip") and importlib.util.find_spec("scikit_build_core") and not _externally_managed():
        options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "-v")
        settings = (word for key, value in defines.items() for word in ("-C", f"cmake.define.{key}={value}"))
        command = (sys.executable, "-m", "pip", "install", *options, *settings, "-e", str(ROOT))
        return [Part(f"{name} by pip", "build", seconds, quick, command)]
    cmake = shutil.which("cmake")
    if cmake is None:
        missing = "neither scikit-build-core with pip nor CMake is installed"
        return [Part(name, "build", seconds, quick, missing=missing)]
    build = ROOT / "build" / "gpu-check" / "cmake"
    defines |= {
        "CMAKE_BUILD_TYPE": "Release",
        "SKBUILD_PROJECT_VERSION": _version(),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": _pybind11(),
    }
    configure = [cmake, "-S", str(ROOT), "-B", str(build), *(f"-D{key}={value}" for key, value in defines.items())]
    return [
        Part(f"{name}: configure", "build", 60, 40, tuple(configure)),
        Part(f"{name} by CMake", "build", seconds, quick,
             (cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 2))),
        Part(f"{name}: install", "build", 30, 15, (cmake, "--install", str(build), "--prefix", str(ROOT))),
    ]  # fmt: skip


def _externally_managed() -> bool:
    """Whether pip refuses to install into this Python, which its distribution looks after (PEP 668)."""
    marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    return sys.prefix == sys.base_prefix and marker.exists()


def architecture(capability: Sequence[int]) -> str:
    """As CMake names it; the data-centre parts from Hopper on have a feature set of their own."""
    major, minor = capability
    return f"{major}{minor}{'a' if (major, minor) in ((9, 0), (10, 0)) else ''}-real"


def _version() -> str:
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def _pybind11() -> str:
    spec = importlib.util.find_spec("pybind11")
    return str(Path(spec.submodule_search_locations[0]) / "share" / "cmake" / "pybind11")


def find_nvcc() -> str | None:
    """Where CMake would look for it, and where the toolkit is installed by default."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
