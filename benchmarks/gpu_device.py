"""What a CUDA device is and can at most do; run in a process of its own, `python -m benchmarks.gpu_device facts FILE`.

So `gpu_check` itself never holds a context on the device, and a driver that hangs costs one part.
"""

import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# What the tests and benchmarks import; the pip name where it differs.
NEEDED = {
    "numpy": "numpy",
    "transformers": "transformers",
    "peft": "peft",
    "accelerate": "accelerate",
    "safetensors": "safetensors",
    "yaml": "pyyaml",
    "rich": "rich",
    "PIL": "pillow",
    "psutil": "psutil",
    "triton": "triton",
    "pytest": "pytest",
    "pytest_benchmark": "pytest-benchmark",
    "pytest_timeout": "pytest-timeout",
    "hypothesis": "hypothesis",
}
# Bytes of each buffer: 40 times an H100's L2 cache. Side of the product: where a H100's tensor cores are saturated.
COPY_BYTES, PRODUCT_SIDE = 2 * 2**30, 8192
WARM_UPS, ROUNDS = 5, 30
STATE = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu", "pstate")


def facts() -> dict:
    """The device as torch sees it, and what is not installed.

    Returns:
        "missing": pip names; "torch": its version or None; "error": why there is no CUDA device, or None; and where
        there is one "device", "capability", "memory" (bytes), "compute_sanitizer" (its path or None), "xdist",
        "machine" (`machine.facts`).
    """
    missing = [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]
    if importlib.util.find_spec("torch") is None:
        return {"missing": ["torch", *missing], "torch": None, "error": "torch is not installed"}
    import torch

    found = {"missing": missing, "torch": torch.__version__, "error": _no_device(torch)}
    if found["error"] or missing:
        return found
    from benchmarks import machine

    properties = torch.cuda.get_device_properties(0)
    return found | {
        "device": properties.name,
        "capability": [properties.major, properties.minor],
        "memory": properties.total_memory,
        "compute_sanitizer": _tool("compute-sanitizer"),
        "xdist": importlib.util.find_spec("xdist") is not None,
        "machine": machine.facts(),
    }


def _no_device(torch) -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return None


def _tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, on PATH or where it is installed by default."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def floors(device: str = "cuda", copy_bytes: int = COPY_BYTES, side: int = PRODUCT_SIDE, rounds: int = ROUNDS) -> dict:
    """The speeds that nothing passes, on random data.

    Returns:
        "copy": device to device, bytes read and written, "read": a sum, bytes read, both in gigabytes_per_second;
        "product": of bfloat16 matrices [side, side], in teraflops_per_second. Each {"median", "low", "high"} (the
        quartiles), "rounds" and "unit". "state": nvidia-smi before and directly behind the product.
    """
    import torch

    source = torch.empty(copy_bytes // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    found = {"state": {"before": state()}}
    found["copy"] = _speed(lambda: target.copy_(source), 2 * source.nbytes / 1e9, device, rounds)
    found["read"] = _speed(source.sum, source.nbytes / 1e9, device, rounds)
    a, b = (torch.empty(side, side, dtype=torch.bfloat16, device=device).normal_() for _ in range(2))
    out = torch.empty_like(a)
    found["product"] = _speed(lambda: torch.mm(a, b, out=out), 2 * side**3 / 1e12, device, rounds)
    found["state"]["behind the product"] = state()
    for name in ("copy", "read"):
        found[name]["unit"] = "gigabytes_per_second"
    found["product"]["unit"] = "teraflops_per_second"
    return found


def _speed(function: Callable[[], object], work: float, device: str, rounds: int) -> dict:
    from benchmarks import measure

    for _ in range(WARM_UPS):
        function()
    speeds = [work / measure.seconds(function, device) for _ in range(rounds)]
    low, median, high = statistics.quantiles(speeds, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "rounds": rounds}


def state() -> dict[str, str]:
    """Clocks, power and temperature, from nvidia-smi where it is installed."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"error": str(error)}
    values = [value.strip() for value in answer.stdout.split(",")]
    if answer.returncode or len(values) != len(STATE):
        return {"error": (answer.stderr or answer.stdout).strip()}
    return dict(zip(STATE, values, strict=True))


def measured_floors() -> dict:
    """The floors, and the machine now that the extension is built."""
    from benchmarks import machine

    return {"floors": floors(), "machine": machine.facts()}


if __name__ == "__main__":
    wanted, path = sys.argv[1:]
    Path(path).write_text(json.dumps({"facts": facts, "floors": measured_floors}[wanted]()))
