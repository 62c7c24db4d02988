"""The extension against what the operating system and torch say about the same machine."""

import ctypes
import os
import platform
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from dive_fast import native
from dive_fast.errors import InputError

# As /proc/cpuinfo names them; on x86 the extension uses the same names.
X86_FLAGS = """
    sse4_2 avx2 fma f16c avx_vnni avx512f avx512bw avx512vl avx512dq avx512_bf16 avx512_vnni amx_bf16 amx_int8
""".split()
ARM_FLAGS = {"asimd": "neon"}

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc")


@pytest.fixture(scope="module")
def extension():
    return native.load()


def cpuinfo() -> list[dict]:
    """One mapping per logical processor. The kernel lists a flag only if it also saves the registers behind it."""
    blocks = Path("/proc/cpuinfo").read_text().strip().split("\n\n")
    return [dict(re.findall(r"^(.+?)\s*:\s?(.*)$", block, re.M)) for block in blocks]


def expected_instruction_sets() -> set[str]:
    processor = cpuinfo()[0]
    if platform.machine() in ("x86_64", "i686"):
        return set(X86_FLAGS) & set(processor["flags"].split())
    return {ours for theirs, ours in ARM_FLAGS.items() if theirs in processor.get("Features", "").split()}


@linux_only
def test_instruction_sets_are_those_the_kernel_lists(extension):
    names = extension.cpu.instruction_sets()
    assert set(names) == expected_instruction_sets()
    assert len(names) == len(set(names))


@linux_only
def test_brand_is_the_kernels_model_name(extension):
    assert extension.cpu.brand() == cpuinfo()[0].get("model name", "").strip()


@linux_only
def test_cores_follow_the_affinity_mask(extension):
    allowed = os.sched_getaffinity(0)
    cores = extension.cpu.cores()
    assert cores["logical"] == len(allowed)

    here = [p for p in cpuinfo() if int(p["processor"]) in allowed]
    if all("core id" in p for p in here):
        assert cores["physical"] == len({(p["physical id"], p["core id"]) for p in here})

    seen = {}

    def pinned():  # the mask belongs to a thread, so the one that runs the tests keeps its own
        os.sched_setaffinity(0, {min(allowed)})
        seen.update(extension.cpu.cores())

    thread = threading.Thread(target=pinned)
    thread.start()
    thread.join()
    assert seen == {"logical": 1, "physical": 1}


def test_cuda_part_is_consistent(extension):
    built, archs, versions = extension.cuda.built(), extension.cuda.built_archs(), extension.cuda.versions()
    assert bool(archs) == built
    assert all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs)
    assert (versions["runtime"] > 0) == built
    assert versions["status"]["ok"] == (versions["driver"] > 0)
    assert versions["status"]["ok"] or versions["status"]["message"]


def test_devices_without_a_driver_come_back_as_a_message(extension):
    listed = extension.cuda.devices()
    device_files = list(Path("/dev").glob("nvidia[0-9]*"))
    if not extension.cuda.built() or not device_files:
        assert listed["devices"] == []
        assert not listed["status"]["ok"] and listed["status"]["message"]
    else:
        assert len(listed["devices"]) <= len(device_files)


@pytest.mark.parametrize("device", [-1, 4096])
def test_probe_of_a_device_that_is_not_there_reports_instead_of_raising(extension, device):
    result = extension.cuda.probe(device)
    assert not result["status"]["ok"] and result["status"]["message"]
    assert result["elements"] == 0


def test_import_and_query_with_every_device_hidden():
    script = (
        "from dive_fast import native; listed = native.load().cuda.devices();"
        "assert listed['devices'] == [] and listed['status']['message'], listed"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)


@linux_only
def test_the_linked_cuda_runtime_is_not_exported(extension):
    library = ctypes.CDLL(extension.__file__)
    assert library.PyInit__native
    for symbol in ("cudaGetDeviceCount", "cudaMalloc", "_ZN4dive3cpu8featuresEv"):
        with pytest.raises(AttributeError):
            getattr(library, symbol)


def test_a_missing_extension_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "dive_fast._native", None)
    with pytest.raises(InputError, match="pip install") as caught:
        native.load()
    assert isinstance(caught.value.__cause__, ImportError)


@pytest.mark.gpu
def test_devices_agree_with_torch(extension):
    devices = extension.cuda.devices()["devices"]
    assert len(devices) == torch.cuda.device_count()
    for device in devices:
        properties = torch.cuda.get_device_properties(device["index"])
        assert device["name"] == properties.name
        assert device["capability"] == (properties.major, properties.minor)
        assert device["total_memory"] == properties.total_memory
        assert device["sm_count"] == properties.multi_processor_count


@pytest.mark.gpu
def test_probe_runs_on_every_device_and_keeps_the_current_one(extension):
    current = torch.cuda.current_device()
    assert not extension.cuda.probe(4096)["status"]["ok"]  # a failure must not be left for the next launch to find
    for device in extension.cuda.devices()["devices"]:
        assert device["covered"]["ok"], device
        result = extension.cuda.probe(device["index"])
        assert result["status"]["ok"], result
        assert result["elements"] == 2**20 + 3
    assert torch.cuda.current_device() == current
