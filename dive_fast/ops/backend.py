"""Which implementation of an op runs: one table, one function."""

import torch

from dive_fast.errors import InputError

# Usable backends by op and device type, best first. The plain PyTorch reference runs on every device torch knows.
BACKENDS = {
    ("linear_cross_entropy", "cpu"): ("reference",),
    ("linear_cross_entropy", "cuda"): ("reference",),
    ("steer", "cpu"): ("reference",),
    ("steer", "cuda"): ("reference",),
}
ANY_DEVICE = ("reference",)


def select_backend(op: str, requested: str | None, device: torch.device) -> str:
    """The backend that runs `op` on `device`: `requested`, or the best one for None.

    Raises:
        InputError: the backend asked for does not exist or does not run there; another one never takes its place.
    """
    usable = BACKENDS.get((op, device.type), ANY_DEVICE)
    if requested is None:
        return usable[0]
    if requested not in usable:
        names = ", ".join(repr(name) for name in usable)
        raise InputError(
            f"backend: expected None or one usable for {op} on {device.type} ({names}), got {requested!r}; "
            "leave it None to take the best one"
        )
    return requested
