"""The machine, the versions and the commit that a result was made with."""

import functools
import importlib.metadata
import shutil
import subprocess
from pathlib import Path

import torch

from dive_fast import doctor

ROOT = Path(__file__).parents[1]
PEERS = ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "llama-cpp-python")


@functools.cache
def facts() -> dict[str, str]:
    """Label -> text."""
    found = doctor.environment() | {name: _version(name) for name in PEERS}
    found["threads"] = str(torch.get_num_threads())
    found["torch build"] = torch.__version__
    found |= _commit()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found |= _clocks()
    return {label: text for label, text in found.items() if text}


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
