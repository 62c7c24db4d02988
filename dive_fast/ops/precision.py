"""Mixed precision ends where an op begins."""

import functools

import torch


def own_precision(function):
    """`function` without the autocast around it, which would narrow the products inside; its arguments come as they
    are, and what it gives has the dtypes it documents."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        device = next((tensor.device.type for tensor in tensors), None)
        if device is None or not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return call
