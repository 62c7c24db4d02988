"""What every test stands on: no network, fixed seeds, two threads, tests of GPU and Java only where these are."""

import os

# Before the first import of huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Where pytest-xdist runs the tests, a pytest that a test starts is none of its workers, which would not measure.
os.environ.pop("PYTEST_XDIST_WORKER", None)

import random  # noqa: E402
import shutil  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(2)

# Convolutions of float32, such as a vision tower's patches, in float32: cuDNN rounds their inputs to tf32 by default.
torch.backends.cudnn.allow_tf32 = False

if not torch.cuda.is_available():
    # Triton decides when a kernel is defined whether it will be interpreted, so before the first import of triton.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty():
    """Uninitialised tensors come filled with NaN (integers with their largest value), so a hole in an output shows."""
    was_on = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = was_filling
    torch.use_deterministic_algorithms(was_on, warn_only=was_warn_only)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Unless a test is one for a GPU, what it trains stays on the CPU, also in programs that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        if "gpu" not in item.keywords:
            patch.setenv("ACCELERATE_USE_CPU", "true")
        return (yield)


def pytest_collection_modifyitems(items):
    missing = {
        "gpu": None if torch.cuda.is_available() else "no CUDA device",
        "java": None if shutil.which("java") else "no Java runtime, which METEOR and the protocol ptb run on",
    }
    for item in items:
        for marker, reason in missing.items():
            if marker in item.keywords and reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
