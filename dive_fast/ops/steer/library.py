"""Steering as a torch operator over flat rows and stacked adapters, with its backward pass.

T rows, D hidden size, R adapter rank, A adapters.
"""

import importlib

import torch

from dive_fast.ops.backend import select_backend
from dive_fast.ops.steer.inputs import GRADIENTS, TENSOR_FIELDS, SteerInputs

BACKEND_MODULES = {"native": "dive_fast.ops.steer.native", "triton": "dive_fast.ops.steer.triton"}

LIBRARY = torch.library.Library("dive_fast", "FRAGMENT")
# The fields of SteerInputs.
TENSORS = (
    "Tensor residual, Tensor? update, Tensor? down, Tensor? up, Tensor? bias, Tensor? static_push, Tensor alpha, "
    "Tensor? gate_direction, Tensor? gate_offset, Tensor? mask, Tensor? adapter_index, Tensor? norm_weight"
)
OPTIONS = "str activation, bool normalize_input, bool preserve_norm, float norm_eps"
LIBRARY.define(
    f"steer({TENSORS}, {OPTIONS}, str? backend) -> (Tensor steered, Tensor normalized, Tensor pre_activation)"
)
LIBRARY.define(
    f"steer_backward({TENSORS}, {OPTIONS}, Tensor pre_activation, Tensor? grad_steered, Tensor? grad_normalized, "
    "str[] wanted, str? backend) -> Tensor[]"
)


def steer(*arguments):
    """The operator: the fields of SteerInputs and the backend's name.

    Returns:
        h' [T, D]; its RMSNorm [T, D], empty without norm_weight; the pre-activation [T, R], empty without `down`.
    """
    *inputs, backend = arguments
    inputs = SteerInputs(*inputs)
    steered, normalized, pre_activation = _module(backend, inputs).steer_forward(inputs)
    nothing = steered.new_empty(0)
    return (
        steered,
        nothing if normalized is None else normalized,
        steered.new_empty(0, dtype=torch.float32) if pre_activation is None else pre_activation,
    )


def fake_steer(*arguments):
    """Shapes and dtypes of the operator's results."""
    inputs = SteerInputs(*arguments[:-1])
    residual = inputs.residual
    normalized = residual.new_empty(0 if inputs.norm_weight is None else residual.shape)
    shape = (residual.shape[0], inputs.rank) if inputs.rank else (0,)
    return (
        torch.empty_like(residual, memory_format=torch.contiguous_format),
        normalized,
        residual.new_empty(shape, dtype=torch.float32),
    )


def steer_backward(*arguments):
    """The gradients named in `wanted`, in its order: residual's in its dtype, the others in float32."""
    *inputs, pre_activation, grad_steered, grad_normalized, wanted, backend = arguments
    inputs = SteerInputs(*inputs)
    saved = pre_activation if pre_activation.numel() else None
    gradients = _module(backend, inputs).steer_backward(inputs, saved, grad_steered, grad_normalized, frozenset(wanted))
    return [gradients[name] for name in wanted]


def fake_steer_backward(*arguments):
    """Shapes and dtypes of the gradients."""
    *inputs, _, _, _, wanted, _ = arguments
    inputs = SteerInputs(*inputs)
    residual = inputs.residual
    return [
        torch.empty_like(residual, memory_format=torch.contiguous_format)
        if name == "residual"
        else residual.new_empty(getattr(inputs, name).shape, dtype=torch.float32)
        for name in wanted
    ]


def _module(backend, inputs):
    return importlib.import_module(BACKEND_MODULES[select_backend("steer", backend, inputs.residual.device)])


def _setup_context(ctx, inputs, output):
    ctx.options = inputs[len(TENSOR_FIELDS) :]
    ctx.save_for_backward(*inputs[: len(TENSOR_FIELDS)], output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_steered, grad_normalized, _):
    gradients = [None] * (len(TENSOR_FIELDS) + len(ctx.options))
    if grad_steered is None and grad_normalized is None:
        return tuple(gradients)
    *tensors, pre_activation = ctx.saved_tensors
    *options, backend = ctx.options
    inputs = SteerInputs(*tensors, *options)
    if inputs.adapter_index is not None:
        raise RuntimeError("steer: rows with different adapters are for inference; adapter_index has no backward pass")
    names = {
        position: "residual" if name == "update" else name
        for position, name in enumerate(TENSOR_FIELDS)
        if ctx.needs_input_grad[position]
    }
    wanted = [name for name in GRADIENTS if name in names.values()]
    found = torch.ops.dive_fast.steer_backward(*inputs, pre_activation, grad_steered, grad_normalized, wanted, backend)
    by_name = dict(zip(wanted, found, strict=True))
    for position, name in names.items():
        gradients[position] = by_name[name].to(tensors[position].dtype)
    return tuple(gradients)


def _no_second_backward(ctx, *_):
    raise RuntimeError("steer: its backward pass has no derivative; backend='reference' has derivatives of every order")


LIBRARY.impl("steer", steer, "CompositeExplicitAutograd")
LIBRARY.impl("steer_backward", steer_backward, "CompositeExplicitAutograd")
torch.library.register_fake("dive_fast::steer", fake_steer, lib=LIBRARY)
torch.library.register_fake("dive_fast::steer_backward", fake_steer_backward, lib=LIBRARY)
torch.library.register_autograd("dive_fast::steer", _backward, setup_context=_setup_context, lib=LIBRARY)
torch.library.register_autograd("dive_fast::steer_backward", _no_second_backward, lib=LIBRARY)
