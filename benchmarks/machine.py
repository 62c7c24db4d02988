"""The machine, the versions and the commit that a result was made with."""

import functools
import importlib.metadata
import os
import shutil
import subprocess
from pathlib import Path

import torch

from dive_fast import doctor, native
from dive_fast.errors import InputError

ROOT = Path(__file__).parents[1]
PEERS = ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "llama-cpp-python", "pycocoevalcap")
# What pins OpenMP's threads; which processors they may use at all, `affinity` says.
PINNING = ("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
QUOTA = Path("/sys/fs/cgroup/cpu.max")


@functools.cache
def facts() -> dict[str, str]:
    """Label -> text."""
    found = doctor.environment() | {name: _version(name) for name in PEERS}
    found["threads"] = str(torch.get_num_threads())
    found |= _processors()
    found["kernel level"] = _kernel_level()
    found["torch build"] = torch.__version__
    found |= _commit()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found |= _clocks()
    return {label: text for label, text in found.items() if text}


def _processors() -> dict[str, str]:
    """Which processors this process may use and at what clock, and how busy they were when it began."""
    found = {name: os.environ.get(name, "") for name in PINNING}
    if hasattr(os, "sched_getaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        found["affinity"] = f"{_ranges(allowed)} ({len(allowed)} of {os.cpu_count()} logical processors)"
    if hasattr(os, "getloadavg"):
        found["load before"] = f"{os.getloadavg()[0]:.2f}"
    for name, path in (("governor", GOVERNOR), ("processor quota", QUOTA)):
        found[name] = path.read_text().strip() if path.is_file() else ""
    return found


def _kernel_level() -> str:
    """Which of this project's kernels the processor runs: its name often does not tell."""
    try:
        return native.load().cpu.kernel_levels()[-1]
    except InputError:
        return ""


def _ranges(numbers: list[int]) -> str:
    """0-3,6 for 0, 1, 2, 3, 6."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> dict[str, str]:
    """The commit, marked where files differ from it; nothing outside a checkout."""
    if shutil.which("git") is None:
        return {}
    commit, changed = (
        subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)
        for command in (("rev-parse", "HEAD"), ("status", "--porcelain"))
    )
    if commit.returncode:
        return {}
    return {"commit": commit.stdout.strip() + (" with changes" if changed.stdout.strip() else "")}


def _clocks() -> dict[str, str]:
    """Driver and clocks, from nvidia-smi where it is installed."""
    if shutil.which("nvidia-smi") is None:
        return {}
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        return {}
    return {f"gpu {field}": text.strip() for field, text in zip(fields, answer.stdout.split(","), strict=True)}
