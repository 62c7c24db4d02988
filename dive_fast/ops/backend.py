"""Which implementation of an op runs: one table, one function."""

import importlib.util
import sys
from collections.abc import Mapping

import torch

from dive_fast import native
from dive_fast.errors import InputError

# Backends by op and device type, best first. The plain PyTorch reference runs on every device torch knows.
BACKENDS = {
    ("linear_cross_entropy", "cpu"): ("native", "reference"),
    ("linear_cross_entropy", "cuda"): ("triton", "triton-streaming", "reference"),
    ("steer", "cpu"): ("native", "reference"),
    ("steer", "cuda"): ("triton", "reference"),
}
ANY_DEVICE = ("reference",)


def select_backend(op: str, requested: str | None, device: torch.device, unfit: Mapping[str, str] | None = None) -> str:
    """The backend that runs `op` on `device`: `requested`, or the best usable one for None.

    Args:
        unfit: backend -> why it cannot take this call's arguments.

    Raises:
        InputError: the backend asked for does not exist or is not usable here; another one never takes its place.
    """
    names = BACKENDS.get((op, device.type), ANY_DEVICE)
    unfit = unfit or {}
    if requested is None:
        return next(name for name in names if name not in unfit and _missing(name) is None)
    if requested not in names and not (requested.startswith("triton") and _interpreting()):
        listed = ", ".join(repr(name) for name in names)
        raise InputError(
            f"backend: expected None or one usable for {op} on {device.type} ({listed}), got {requested!r}; "
            "leave it None to take the best one"
        )
    reason = unfit.get(requested) or _missing(requested)
    if reason is not None:
        raise InputError(f"backend: {requested!r} cannot run this {op}: {reason}; leave it None to take the best one")
    return requested


def _missing(backend: str) -> str | None:
    """Why `backend` is not installed here, or None. While a graph is traced, what is missing shows when it runs."""
    if backend == "reference" or torch.compiler.is_compiling():
        return None
    if backend == "native":
        try:
            native.load()
        except InputError as error:
            return str(error)
    elif importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None


def _interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, which takes tensors of any device: for tests."""
    triton = sys.modules.get("triton")
    return triton is not None and bool(triton.knobs.runtime.interpret)
