"""Steering as a torch operator over flat rows and stacked adapters, with its backward pass.

T rows, D hidden size, R adapter rank, A adapters.
"""

import importlib

import torch

from dive_fast.ops.backend import select_backend

BACKEND_MODULES = {"native": "dive_fast.ops.steer.native", "triton": "dive_fast.ops.steer.triton"}

LIBRARY = torch.library.Library("dive_fast", "FRAGMENT")
ADAPTER = (
    "Tensor? down, Tensor? up, Tensor? bias, Tensor? static_push, Tensor alpha, Tensor? gate_direction, "
    "Tensor? gate_offset, Tensor? mask"
)
OPTIONS = "str activation, bool normalize_input, bool preserve_norm, float norm_eps, str? backend"
LIBRARY.define(
    f"steer(Tensor residual, Tensor? update, {ADAPTER}, Tensor? adapter_index, Tensor? norm_weight, {OPTIONS}) "
    "-> (Tensor steered, Tensor normalized, Tensor pre_activation)"
)
LIBRARY.define(
    "steer_backward(Tensor? grad_steered, Tensor? grad_normalized, Tensor residual, Tensor? update, "
    f"Tensor pre_activation, {ADAPTER}, Tensor? norm_weight, {OPTIONS}, str[] wanted) -> Tensor[]"
)

# The operator's inputs that may get a gradient, by position; update's is residual's.
DIFFERENTIABLE = {
    0: "residual",
    1: "residual",
    2: "down",
    3: "up",
    4: "bias",
    5: "static",
    6: "alpha",
    7: "gate_direction",
    8: "gate_offset",
    11: "norm_weight",
}


def steer(residual, update, *arguments):
    """The operator: residual, update [T, D]; down [A, R, D], up [A, D, R], bias [A, R], static, gate_direction [A, D],
    alpha, gate_offset [A]; mask [T] bool; adapter_index [T] int32, -1 for none; norm_weight [D].

    Returns:
        h' [T, D]; its RMSNorm [T, D], empty without norm_weight; the pre-activation [T, R], empty without `down`.
    """
    *tensors, activation, normalize_input, preserve_norm, norm_eps, backend = arguments
    down, up, bias, static, alpha, gate_direction, gate_offset, mask, adapter_index, norm_weight = tensors
    steered, normalized, pre_activation = _module(backend, residual).steer_forward(
        residual,
        update,
        down,
        up,
        bias,
        static,
        alpha,
        gate_direction,
        gate_offset,
        mask,
        adapter_index,
        norm_weight,
        activation=activation,
        normalize_input=normalize_input,
        preserve_norm=preserve_norm,
        norm_eps=norm_eps,
    )
    nothing = residual.new_empty(0)
    return (
        steered,
        nothing if normalized is None else normalized,
        residual.new_empty(0, dtype=torch.float32) if pre_activation is None else pre_activation,
    )


def fake_steer(residual, update, down, *arguments):
    """Shapes and dtypes of the operator's results."""
    norm_weight = arguments[-6]
    normalized = residual.new_empty(0 if norm_weight is None else residual.shape)
    rank = 0 if down is None else down.shape[1]
    shape = (residual.shape[0], rank) if rank else (0,)
    return (
        torch.empty_like(residual, memory_format=torch.contiguous_format),
        normalized,
        residual.new_empty(shape, dtype=torch.float32),
    )


def steer_backward(grad_steered, grad_normalized, residual, update, pre_activation, *arguments):
    """The gradients named in `wanted`, in its order: residual's in its dtype, the others in float32."""
    *tensors, activation, normalize_input, preserve_norm, norm_eps, backend, wanted = arguments
    gradients = _module(backend, residual).steer_backward(
        grad_steered,
        grad_normalized,
        residual,
        update,
        pre_activation if pre_activation.numel() else None,
        *tensors,
        activation=activation,
        normalize_input=normalize_input,
        preserve_norm=preserve_norm,
        norm_eps=norm_eps,
        wanted=frozenset(wanted),
    )
    return [gradients[name] for name in wanted]


def fake_steer_backward(grad_steered, grad_normalized, residual, update, pre_activation, *arguments):
    """Shapes and dtypes of the gradients."""
    names = ("down", "up", "bias", "static", "alpha", "gate_direction", "gate_offset", "mask", "norm_weight")
    given = dict(zip(names, arguments, strict=False))
    return [
        torch.empty_like(residual, memory_format=torch.contiguous_format)
        if name == "residual"
        else residual.new_empty(given[name].shape, dtype=torch.float32)
        for name in arguments[-1]
    ]


def _module(backend, residual):
    return importlib.import_module(BACKEND_MODULES[select_backend("steer", backend, residual.device)])


def _setup_context(ctx, inputs, output):
    *tensors, activation, normalize_input, preserve_norm, norm_eps, backend = inputs
    ctx.options = (activation, normalize_input, preserve_norm, norm_eps, backend)
    ctx.mixed = tensors[10] is not None
    ctx.save_for_backward(*tensors[:10], tensors[11], output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_steered, grad_normalized, _):
    gradients = [None] * (12 + len(ctx.options))
    if grad_steered is None and grad_normalized is None:
        return tuple(gradients)
    if ctx.mixed:
        raise RuntimeError("steer: rows with different adapters are for inference; adapter_index has no backward pass")
    *tensors, norm_weight, pre_activation = ctx.saved_tensors
    residual, update, *adapter = tensors
    wanted = list(dict.fromkeys(name for i, name in DIFFERENTIABLE.items() if ctx.needs_input_grad[i]))
    found = torch.ops.dive_fast.steer_backward(
        grad_steered, grad_normalized, residual, update, pre_activation, *adapter, norm_weight, *ctx.options, wanted
    )
    by_name = dict(zip(wanted, found, strict=True))
    for position, name in DIFFERENTIABLE.items():
        if ctx.needs_input_grad[position]:
            owner = norm_weight if name == "norm_weight" else tensors[position]
            gradients[position] = by_name[name].to(owner.dtype)
    return tuple(gradients)


LIBRARY.impl("steer", steer, "CompositeExplicitAutograd")
LIBRARY.impl("steer_backward", steer_backward, "CompositeExplicitAutograd")
torch.library.register_fake("dive_fast::steer", fake_steer, lib=LIBRARY)
torch.library.register_fake("dive_fast::steer_backward", fake_steer_backward, lib=LIBRARY)
torch.library.register_autograd("dive_fast::steer", _backward, setup_context=_setup_context, lib=LIBRARY)
