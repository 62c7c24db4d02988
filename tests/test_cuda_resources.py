"""What the compiler made of the engine's CUDA kernels, for every architecture of the build: registers, stack, spills.

A kernel that spills, or takes more registers than its blocks per multiprocessor leave it, is slow on every device; so
the compiler's own figures, which the build keeps (csrc/cuda/keep_resource_usage.py), are held to limits without a GPU.
"""

import re
from pathlib import Path

import pytest

from dive_fast import native

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
REGISTERS = 65536  # of a multiprocessor

# Kernel -> (threads of a block, blocks that must fit on a multiprocessor).
BLOCKS = {
    "add_norm_kernel": (256, 4),
    "advance_kernel": (1024, 1),
    "arrive_kernel": (256, 2),
    "attention_kernel": (128, 4),
    "begin_kernel": (256, 4),
    "copy_heads_kernel": (256, 4),
    "finish_kernel": (256, 4),
    "probe_fill_kernel": (256, 4),
    "project_float_kernel": (256, 4),
    "project_gated_float_kernel": (256, 4),
    "project_gated_kernel": (256, 2),
    "project_kernel": (256, 2),
    "steer_down_kernel": (256, 4),
    "steer_up_kernel": (256, 4),
}
# Bytes, with the reason why it is not worth mending.
SPILLS = {
    "arrive_kernel": 24,  # two registers of one form, for 100a
    "attention_kernel": 80,  # six numbers that are needed once a tile or once a block, of the forms for many heads
}
# Forms that have fewer blocks: of attention, those for eight heads and in float32.
FORMS_OF_THREE_BLOCKS = re.compile(r"attention_kernel.*(Li8E|DTypeE0E)")
# With 64 rows the sums of a product alone are 32 or 64 registers; so many rows are seldom.
FORMS_OF_ONE_BLOCK = re.compile(r"project_(gated_)?kernel.*Li8E")


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    """One entry for each kernel, form of it and architecture: name, form, arch, registers, stack, spills, shared."""
    if not native.load().cuda.built():
        pytest.skip("the extension was built without CUDA (no nvcc)")
    files = newest([*ROOT.glob("build/**/*.cu.o.resources")])
    if sorted(files) != SOURCES:
        pytest.skip("the extension was not built in this checkout, so that the compiler's figures are not here")
    found = []
    for file in files.values():
        found += entries(file.read_text())
    return found


def newest(paths: list[Path]) -> dict[str, Path]:
    """Source -> the figures of its latest compilation."""
    return {
        path.name.removesuffix(".o.resources"): path for path in sorted(paths, key=lambda path: path.stat().st_mtime)
    }


def entries(text: str) -> list[dict]:
    found = []
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            form = match[1]
            name = next(name for name in sorted(BLOCKS, key=len, reverse=True) if f"{len(name)}{name}" in form)
            found.append({"name": name, "form": form, "arch": match[2], "shared": 0})
        elif match := re.match(r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            # Those of functions that a kernel calls come behind its own.
            found[-1].setdefault("stack", int(match[1]))
            found[-1].setdefault("spills", int(match[2]) + int(match[3]))
        elif match := re.search(r"Used (\d+) registers", line):
            found[-1]["registers"] = int(match[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                found[-1]["shared"] = int(shared[1])
    return found


def test_every_kernel_is_there_for_every_architecture_of_the_build(kernels):
    archs = {kernel["arch"] for kernel in kernels}
    assert archs == {f"sm_{arch}" for arch in native.load().cuda.built_archs()}
    for arch in archs:
        assert {kernel["name"] for kernel in kernels if kernel["arch"] == arch} == set(BLOCKS)


def test_blocks_fit_on_a_multiprocessor(kernels):
    for kernel in kernels:
        threads, blocks = BLOCKS[kernel["name"]]
        for forms, fewer in ((FORMS_OF_THREE_BLOCKS, 3), (FORMS_OF_ONE_BLOCK, 1)):
            blocks = fewer if forms.search(kernel["form"]) else blocks
        # Registers are given to warps in portions of 8 for each of 32 lanes.
        own = -(-kernel["registers"] // 8) * 8 * threads
        assert own * blocks <= REGISTERS, kernel


def test_next_to_nothing_is_spilled(kernels):
    for kernel in kernels:
        most = SPILLS.get(kernel["name"], 0)
        assert kernel["spills"] <= most and kernel["stack"] <= most, kernel


def test_static_shared_memory_is_not_used(kernels):
    # CUDA on the host (csrc/tests/cuda_on_host) has one copy of it for all blocks.
    assert not [kernel for kernel in kernels if kernel["shared"]]
