"""Where a model runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dive_fast.errors import InputError

if TYPE_CHECKING:
    import torch


def torch_device(name: str | None) -> torch.device:
    """The device of that name; for None the current GPU where torch sees one with CUDA, else the CPU.

    Raises:
        InputError: no such device here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device: expected a name such as 'cpu' or 'cuda:0', got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(f"device: {name!r} is not here, torch sees {count} CUDA devices; use 'cpu' or leave it out")
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what a torch built without it raises
        why = str(error).split(". ")[0]
        raise InputError(f"device: {name!r} is not usable here ({why}); use 'cpu' or leave it out") from error
    return device


def is_spread(model) -> bool:
    """Whether it is a model whose parameters lie on several devices, as with device_map="auto"."""
    return hasattr(model, "parameters") and len({parameter.device for parameter in model.parameters()}) > 1


def sum_dtype(device: torch.device) -> torch.dtype:
    """The widest dtype that it adds up in: float64, which Apple's GPUs have not."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def on_device(model, device: torch.device):
    """`model`, moved there.

    Raises:
        InputError: no room on the device.
    """
    import torch

    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        needed = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / 2**30
        free = torch.cuda.mem_get_info(device)[0] / 2**30
        raise InputError(
            f"device: the model's weights take {needed:.1f} GiB, and {device} has {free:.1f} GiB left; free some, "
            "choose another device, or load the weights in fewer bits (dtype)"
        ) from error
