"""What compiled Triton kernels take of a streaming multiprocessor: registers, spills, shared memory. Needs no GPU.

    [plain] = measure([Request(kernel, {"x_ptr": "*fp32", "size": "i32"}, {"BLOCK": 1024}, capability=90)])
    assert plain.spill_bytes == 0

Compilation happens in a subprocess without TRITON_INTERPRET, since triton decides at import whether kernels are
interpreted. As a script it reads the requests as JSON from its input and prints the resources as JSON.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

# The most shared memory one block may ask for, in bytes (CUDA C++ Programming Guide, "Technical Specifications").
SHARED_MEMORY_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Request:
    """One compilation.

    Attributes:
        kernel: a function decorated with `triton.jit` at the top level of a module, or "module:name".
        signature: argument name -> type as triton writes it ("*bf16", "i32", "i64", "fp32", "i1"), without constexprs;
            "constexpr" with a value in `constexprs` for an argument that is None or a constant at launch.
        constexprs: argument name -> a number, bool, str or None.
        capability: 80, 90 or 100.
        divisible: integer arguments known to be divisible by 16, as launches find out; pointers always are.
        maxnreg: the launch's bound on registers, None for none.
    """

    kernel: object
    signature: Mapping[str, str]
    constexprs: Mapping[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    capability: int = 90
    divisible: Sequence[str] = ()
    maxnreg: int | None = None


@dataclass(frozen=True)
class Resources:
    """Per thread: registers, spill_bytes (stack and local memory). Per block: shared_bytes. And deferred_sums.

    deferred_sums counts a loop's accumulators that Triton replaced by parts a thread, to be added up after the loop
    (its pass OptimizeThreadLocality): in Triton 3.6 and 3.7 what reads one of them in the loop gets its start instead.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    deferred_sums: int


def measure(requests: Sequence[Request]) -> list[Resources]:
    """The resources of each request, in order; one subprocess compiles them all."""
    entries = [vars(request) | {"kernel": _name(request.kernel)} for request in requests]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(entries),
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise RuntimeError(f"compilation failed:\n{result.stderr}")
    return [Resources(**entry) for entry in json.loads(result.stdout)]


def skip_unless_pinned() -> None:
    """Skip the limits that follow: how a compiler spends registers is held for the pinned version alone."""
    [pinned] = re.findall(r"^triton==(\S+)$", (Path(__file__).parents[1] / "constraints.txt").read_text(), re.MULTILINE)
    found = version("triton")
    if found != pinned:
        pytest.skip(f"the limits are for the compiler of Triton {pinned}, this is {found}")


def _name(kernel) -> str:
    return kernel if isinstance(kernel, str) else f"{kernel.fn.__module__}:{kernel.fn.__name__}"


def _compile(entry) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = entry["kernel"].split(":")
    kernel = getattr(import_module(module), name)
    constants, given = entry["constexprs"], entry["signature"]
    # In the order of the kernel's arguments, because attributes are keyed by position.
    signature = {name: given.get(name, "constexpr") for name in kernel.arg_names}
    missing = [name for name in kernel.arg_names if signature[name] == "constexpr" and name not in constants]
    unknown = (given.keys() | constants.keys()) - set(kernel.arg_names)
    if missing or unknown:
        raise ValueError(f"{entry['kernel']}: arguments missing {missing}, unknown {sorted(unknown)}")
    divisible = [
        position
        for position, (name, type_) in enumerate(signature.items())
        if type_.startswith("*") or name in entry["divisible"]
    ]
    source = ASTSource(kernel, signature, constants, {(position,): [["tt.divisibility", 16]] for position in divisible})
    options = {name: entry[name] for name in ("num_warps", "num_stages", "maxnreg")}
    compiled = triton.compile(source, target=GPUTarget("cuda", entry["capability"], 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    return Resources(
        usage["REG"],
        usage["STACK"] + usage["LOCAL"],
        max(usage["SHARED"], compiled.metadata.shared),
        # The pass marks the views that it splits the summed dimension with.
        compiled.asm["ttgir"].count("efficient_layout"),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton.backends.nvidia

    cuobjdump = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    [usage] = [line for line in text.splitlines() if "REG:" in line]
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}


if __name__ == "__main__":
    print(json.dumps([asdict(_compile(entry)) for entry in json.load(sys.stdin)]))
