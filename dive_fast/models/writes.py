"""Whether a tensor was written to since it was last looked at, as far as torch knows."""

import torch


def write_count(tensor: torch.Tensor) -> int:
    """How often torch has seen `tensor` written to: not by fused optimisers, nor through `.data`. 0 for tensors of
    inference mode, which do not count."""
    return 0 if tensor.is_inference() else tensor._version
