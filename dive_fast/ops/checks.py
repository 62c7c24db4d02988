"""Argument checks that both ops need. They read shapes and dtypes only, never values, so none waits for a device."""

import torch
from torch.autograd import forward_ad

from dive_fast.errors import InputError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype of softmax, norms and sums: float64 where an input is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def has_tangent(*values) -> bool:
    """Whether a tensor among them carries a derivative forward (torch.func.jvp, torch.autograd.forward_ad)."""
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in values)


def wrong(argument: str, expected: str, got: object, remedy: str) -> InputError:
    """The error for one bad argument, to be raised by the caller."""
    return InputError(f"{argument}: expected {expected}, got {got}; {remedy}")


def check_tensor(argument: str, value: object, shape: tuple[int, ...], device: torch.device, legend: str) -> None:
    """Refuse anything but a floating tensor of `shape` on `device`; `legend` says the shape in letters."""
    if not isinstance(value, torch.Tensor):
        raise wrong(argument, f"a tensor {legend}", type(value).__name__, "pass a torch.Tensor")
    if value.dtype not in DTYPES:
        raise wrong(argument, "float16, bfloat16, float32 or float64", value.dtype, f"use {argument}.float()")
    if tuple(value.shape) != tuple(shape):
        raise wrong(argument, f"shape {legend} = {list(shape)}", list(value.shape), "make the shapes agree")
    check_device(argument, value, device)


def check_device(argument: str, value: torch.Tensor, device: torch.device) -> None:
    """Refuse a tensor that lies on another device than the op's first argument."""
    if value.device != device:
        raise wrong(argument, f"a tensor on {device}", value.device, f"move it with {argument}.to('{device}')")
