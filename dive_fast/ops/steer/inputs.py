"""What the steering kernels take: flat rows, and the adapters as stacks.

T rows, D hidden size, R adapter rank, A adapters.
"""

from typing import NamedTuple

import torch

GRADIENTS = ("residual", "down", "up", "bias", "static", "alpha", "gate_direction", "gate_offset", "norm_weight")
"""The names of the gradients there are; update's is residual's, since the two enter as their sum."""


class SteerInputs(NamedTuple):
    """The operator's arguments, in its order; the formula is that of `dive_fast.ops.steer`.

    Attributes:
        residual, update: [T, D] of any row stride and unit inner stride, float32, bfloat16 or float16.
        down: [A, R, D]; up: [A, D, R]; bias: [A, R]; static, gate_direction: [A, D]; alpha, gate_offset: [A].
        mask: bool [T]; False leaves a row as it is, bit for bit.
        adapter_index: int32 [T], forward only; None takes adapter 0 everywhere, -1 leaves a row as it is.
        norm_weight: [D]; with it, the RMSNorm of h' is wanted too.
    """

    residual: torch.Tensor
    update: torch.Tensor | None
    down: torch.Tensor | None
    up: torch.Tensor | None
    bias: torch.Tensor | None
    static: torch.Tensor | None
    alpha: torch.Tensor
    gate_direction: torch.Tensor | None
    gate_offset: torch.Tensor | None
    mask: torch.Tensor | None
    adapter_index: torch.Tensor | None
    norm_weight: torch.Tensor | None
    activation: str
    normalize_input: bool
    preserve_norm: bool
    norm_eps: float

    @property
    def rank(self) -> int:
        """R, 0 without a low-rank part."""
        return 0 if self.down is None else self.down.shape[1]

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """residual to norm_weight."""
        return self[: len(TENSOR_FIELDS)]

    def for_kernels(self) -> "SteerInputs":
        """The same with contiguous vectors, and without a low-rank part of rank 0."""
        down, up, bias = (self.down, self.up, self.bias) if self.rank else (None, None, None)
        names = ("static", "alpha", "gate_direction", "gate_offset", "mask", "adapter_index", "norm_weight")
        vectors = {name: _contiguous(getattr(self, name)) for name in names}
        return self._replace(down=down, up=up, bias=_contiguous(bias), **vectors)


TENSOR_FIELDS = SteerInputs._fields[: SteerInputs._fields.index("activation")]


def _contiguous(tensor):
    return tensor if tensor is None else tensor.contiguous()
