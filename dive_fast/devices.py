"""Where a model runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dive_fast.errors import InputError

if TYPE_CHECKING:
    import torch

AUTO = "auto"
"""A model over as many GPUs as it takes."""
_ONE_GPU = 0.8
"""Of a GPU's free memory a model may take so much before it is given others too: the rest is for caches."""


def placement(name: str | None) -> torch.device | str:
    """Where `on_device` puts a model: as `torch_device`, but that "auto" stays itself where there are several GPUs, and
    is what None is elsewhere.

    Raises:
        InputError: no such device here.
    """
    import torch

    if name != AUTO:
        return torch_device(name)
    return AUTO if torch.cuda.device_count() > 1 else torch_device(None)


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


def on_device(model, device: torch.device | str):
    """`model`, moved there; with "auto" to the current GPU if it fits well into it, else over all of them.

    Raises:
        InputError: no room on the device, or on all GPUs together.
    """
    import torch

    if device == AUTO:
        return _over_gpus(model)
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        free = torch.cuda.mem_get_info(device)[0]
        raise InputError(
            f"device: the model's weights take {_gib(_bytes(model))}, and {device} has {_gib(free)} left; free some, "
            "choose another device ('auto' takes all GPUs), or load the weights in fewer bits (dtype)"
        ) from error


def _over_gpus(model):
    import torch
    from accelerate import dispatch_model

    free = {index: torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())}
    current = torch.cuda.current_device()
    if _bytes(model) <= _ONE_GPU * free[current]:
        return on_device(model, torch.device("cuda", current))
    return dispatch_model(model, device_map(model, free))


def device_map(model, free: dict[int, int]) -> dict[str, int]:
    """Module name -> GPU, about as many bytes on each as there is room; a decoder layer stays on one GPU.

    Args:
        free: GPU -> bytes.

    Raises:
        InputError: no room on all of them together.
    """
    from accelerate import infer_auto_device_map

    whole = sorted(getattr(model, "_no_split_modules", None) or ())
    # A part of the model that does not fit into what is left of a GPU's share goes to the next one, so shares have room
    # for the largest part beyond what each is to take.
    largest = max(_bytes(part) for part in model.modules() if type(part).__name__ in whole or not list(part.children()))
    share = _bytes(model) / sum(free.values())
    room = {gpu: int(min(size, share * size + largest)) for gpu, size in free.items()}
    found = infer_auto_device_map(model, max_memory={**room, "cpu": 0}, no_split_module_classes=whole)
    if not set(found.values()) <= set(free):
        left = ", ".join(_gib(size) for size in free.values())
        raise InputError(
            f"device: the model's weights take {_gib(_bytes(model))}, and the GPUs have {left} left; free some, or "
            "load the weights in fewer bits (dtype)"
        )
    return found


def _bytes(model) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
