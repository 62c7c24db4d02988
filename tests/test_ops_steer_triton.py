"""The Triton kernels of steer against the reference in float64: interpreted on a CPU, as they are on a GPU.

T rows, D hidden size, R adapter rank, A stacked adapters.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from dive_fast.ops.steer import reference, spec
from dive_fast.ops.steer.inputs import SteerInputs
from dive_fast.ops.steer.triton import steer_backward, steer_forward
from dive_fast.ops.steer.triton_backward import steer_bwd_kernel
from dive_fast.ops.steer.triton_forward import steer_fwd_kernel
from dive_fast.ops.steer.triton_parameters import steer_bwd_parameters_kernel
from dive_fast.ops.steer.triton_parts import blocks_for, parameter_blocks_for
from tests.triton_resources import SHARED_MEMORY_LIMITS, Request, measure, skip_unless_pinned

pytestmark = pytest.mark.usefixtures("poisoned_empty")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's products of bfloat16 are wrong.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())

PARAMETERS = ("down", "up", "bias", "static", "alpha", "gate_direction", "gate_offset")
FLAGS = {"activation": "silu", "normalize_input": True, "preserve_norm": False, "norm_eps": 1e-6}

METHODS = {
    "lowrank": {},
    "fixed": {"rank": 0, "options": {"alpha": 0.1, "preserve_norm": True}},
    "gated": {"rank": 0, "gate": True},
    "reft": {"static": False, "options": {"activation": "identity", "normalize_input": False}},
    "gated_lowrank": {"gate": True},
    "preserving_lowrank": {"options": {"preserve_norm": True}},
    "relu": {"options": {"activation": "relu"}},
    "gelu": {"options": {"activation": "gelu"}},
    "tanh": {"options": {"activation": "tanh", "alpha": 2.0}},
}
CONTEXTS = {
    "plain": {},
    "masked": {"masked": 0.5},
    "alone": {"update": False},
    "next_norm": {"norm": True},
    "masked_norm": {"masked": 0.5, "norm": True},
}
# 19 rows are a block and a part of one; without a low-rank part a program owns one row.
METHOD_CASES = [
    spec.Case(f"{method}-{context}-{str(dtype)[6:]}", 19, 40, dtype=dtype, **{"rank": 5, **settings, **changed})
    for (method, settings), (context, changed), dtype in itertools.product(METHODS.items(), CONTEXTS.items(), DTYPES)
    if dtype == torch.float32 or context in ("plain", "masked_norm")
]
# Fewer rows than tensor cores take, more than a block; one dimension; more than a piece of columns or of ranks.
SHAPES = [(1, 24, 3), (3, 65, 1), (33, 1, 16), (33, 129, 20), (16, 65, 70), (2, 129, 70), (18, 24, 300), (70, 24, 1)]
EVERYTHING = spec.OPTIONS["everything"]
SHAPE_CASES = [
    spec.Case(f"{rows}x{hidden_size}-r{rank}-{option}-{str(dtype)[6:]}", rows, hidden_size, rank, dtype, **settings)
    for (rows, hidden_size, rank), dtype in itertools.product(SHAPES, DTYPES)
    for option, settings in {"lowrank": {}, "everything": EVERYTHING}.items()
    if dtype == torch.float32 or option == "everything"
]
SHAPE_CASES += [
    spec.Case(f"5x{hidden_size}-{option}", 5, hidden_size, **spec.OPTIONS[option])
    for hidden_size, option in itertools.product((1, 65, 8200), ("fixed", "gated"))
]


def make(case, seed=0):
    """residual, update, the parameters as stacks of one, mask, norm_weight, flags; a loss's two gradients."""
    (residual, update), options = spec.make_inputs(case, DEVICE, seed)
    direction, offset = options.pop("gate", (None, None))
    options |= {"gate_direction": direction, "gate_offset": offset}
    options["alpha"] = torch.tensor(options.get("alpha", 1.0), device=DEVICE)
    parameters = {name: options.pop(name, None) for name in PARAMETERS}
    parameters = {name: None if x is None else x[None] for name, x in parameters.items()}
    mask, norm_weight = options.pop("mask", None), options.pop("norm_weight", None)
    upstream = torch.linspace(0.5, 1.5, residual.numel(), device=DEVICE).reshape(residual.shape).to(case.dtype)
    upstream = [upstream, 2 - upstream if case.norm else None]
    return residual, update, parameters, mask, norm_weight, FLAGS | options, upstream


def ours(residual, update, parameters, mask, norm_weight, flags, upstream, wanted=None):
    """Outputs and gradients by name."""
    inputs = SteerInputs(residual, update, *parameters.values(), mask, None, norm_weight, **flags)
    steered, normalized, pre = steer_forward(inputs)
    names = {name for name, x in parameters.items() if x is not None} | {"residual"}
    names |= {"norm_weight"} if norm_weight is not None else set()
    wanted = frozenset(names if wanted is None else wanted)
    gradients = steer_backward(inputs, pre, *upstream, wanted)
    assert gradients.keys() == wanted
    return {"steered": steered} | ({} if norm_weight is None else {"normalized": normalized}) | gradients


def by_autograd(residual, update, parameters, mask, norm_weight, flags, upstream, dtype=None, terms=False):
    """The same from the reference, with everything in `dtype` from the rounded sum on; None leaves the dtypes.

    With `terms`, the gradients of the numbers alpha and gate_offset are not yet summed: [T, D] and [T].
    """

    def leaf(x):
        return None if x is None else x.detach().to(dtype or x.dtype).clone().requires_grad_()

    h = leaf(residual if update is None else residual + update)
    shapes = {"alpha": h.shape, "gate_offset": h.shape[:1]} if terms else {}
    leaves = {
        name: None if x is None else leaf(x[0].expand(shapes.get(name, x[0].shape))) for name, x in parameters.items()
    }
    weight = leaf(norm_weight)
    values = dict(leaves)
    gate = (values.pop("gate_direction"), values.pop("gate_offset"))
    outputs = reference.steer(
        h, None, **values, gate=None if gate[0] is None else gate, mask=mask, norm_weight=weight, **flags
    )
    outputs = (outputs,) if weight is None else outputs
    wanted = {"residual": h} | {n: x for n, x in (leaves | {"norm_weight": weight}).items() if x is not None}
    pulled = torch.autograd.grad(
        outputs, list(wanted.values()), [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=False)],
        allow_unused=True,
    )  # fmt: skip
    gradients = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(wanted.items(), pulled, strict=True)}
    return dict(zip(("steered", "normalized"), outputs, strict=False)) | gradients


def assert_as_close_as_torch(got, arguments, dtype):
    truth, in_dtype = by_autograd(*arguments, dtype=torch.float64, terms=True), by_autograd(*arguments)
    assert got.keys() == truth.keys()
    residual, update, parameters, _, _, flags, _ = arguments
    for name, true in truth.items():
        size, weight = true.abs().max(), 1.0
        if name in ("alpha", "gate_offset"):
            # One number, the sum of up to T * D terms of both signs. Where it comes out near 0, the roundings of its
            # terms are no smaller, and there are no other elements to show how large they are: torch is then off by
            # 5e-6 as a rule and by 2e-7 by luck. Roundings add up as the squares of the terms do.
            size = torch.maximum(true.norm(), true.sum().abs())
            true = true.sum()
        elif name == "residual" and parameters["down"] is not None and flags["normalize_input"]:
            # The input's normalization divides a row's gradient by the row's rms, and the roundings with it; of rows
            # with one dimension some are near 0.
            h = (residual if update is None else residual + update).double()
            weight = h.square().mean(-1, keepdim=True).sqrt().clamp(max=1)
            size = (weight * true).abs().max()
        mine = got[name].double().reshape(true.shape)
        error_of_torch = (weight * (in_dtype[name] - true)).abs().max()
        # Written so that a NaN fails.
        assert (weight * (mine - true)).abs().max() <= error_of_torch + spec.TOLERANCES[dtype] * size.clamp(min=1), name


@pytest.mark.parametrize("case", METHOD_CASES + SHAPE_CASES, ids=lambda case: case.name)
def test_outputs_and_gradients_are_as_close_to_float64_as_torch(case):
    arguments = make(case)
    got = ours(*arguments)
    assert got["steered"].dtype == got["residual"].dtype == case.dtype
    for name, value in arguments[2].items():
        assert value is None or (got[name].dtype == torch.float32 and got[name].shape == value.shape)
    assert_as_close_as_torch(got, arguments, case.dtype)


@pytest.mark.parametrize("adapter", [torch.float16, torch.bfloat16])
def test_an_adapter_and_norm_weight_of_another_dtype(adapter):
    residual, update, parameters, mask, norm_weight, flags, upstream = make(spec.Case("", 18, 40, 5, **EVERYTHING))
    parameters = {name: x if name == "alpha" else x.to(adapter) for name, x in parameters.items()}
    arguments = (residual, update, parameters, mask, norm_weight.to(adapter), flags, upstream)
    got = ours(*arguments)
    assert got["down"].dtype == got["norm_weight"].dtype == torch.float32
    rounded = by_autograd(*arguments)
    for name in ("steered", "normalized", "residual"):
        torch.testing.assert_close(got[name], rounded[name], rtol=1e-5, atol=1e-5)
    for name in ("down", "up", "norm_weight"):
        # Autograd rounds these to the adapter's dtype, the kernels do not.
        mine = got[name].reshape(rounded[name].shape).to(adapter)
        torch.testing.assert_close(mine, rounded[name], rtol=2e-2, atol=1e-2)


def test_the_next_norm_multiplies_in_the_wider_dtype():
    case = spec.Case("", 18, 40, 0, torch.float16, static=False, norm=True)
    residual, update, parameters, mask, norm_weight, flags, _ = make(case)
    for weight in (norm_weight, norm_weight.float() + 1e-3):
        outputs = steer_forward(SteerInputs(residual, update, *parameters.values(), mask, None, weight, **flags))
        expected = reference._rms_norm(outputs[0], weight, flags["norm_eps"], torch.float32)
        # Roundings land on the other side where the two sums of squares differ in the last place.
        assert (outputs[1] != expected).float().mean() < 0.01
        torch.testing.assert_close(outputs[1], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("option", ["lowrank", "everything"])
def test_repetition_changes_no_bit_and_strides_change_roundings_only(option):
    arguments = make(spec.Case("", 21, 40, 5, **spec.OPTIONS[option] | {"gate": True}))
    residual, update, parameters, mask, norm_weight, flags, upstream = arguments
    expected = ours(*arguments)
    again = ours(*arguments)
    # Rows of a wider buffer, transposed matrices, every other element of a vector.
    rows = [torch.cat([x, x], 1)[:, :40] for x in (residual, update)]
    spaced = {n: x.repeat_interleave(2, -1)[..., ::2] for n, x in parameters.items()}
    for name in ("down", "up"):
        spaced[name] = parameters[name].mT.contiguous().mT
    pulled = [x if x is None else x.repeat_interleave(2, 1)[:, ::2] for x in upstream]
    arguments = (*rows, spaced, mask, norm_weight, flags, pulled)
    strided = ours(*arguments)
    assert_as_close_as_torch(strided, arguments, torch.float32)
    for name, value in expected.items():
        assert torch.equal(again[name], value), name
        # Compiled, loads are as wide as the strides allow, and which values a thread holds is the order they add up in.
        assert DEVICE == "cuda" or torch.equal(strided[name], value), name


@pytest.mark.parametrize(
    ("option", "rows"), [("lowrank", 3), ("fixed", 3), ("gated", 3), ("everything", 3), ("everything", 17)]
)
def test_what_is_not_wanted_is_not_computed_and_changes_nothing(option, rows):
    arguments = make(spec.Case("", rows, 24, **{"rank": 5, **spec.OPTIONS[option]}))
    expected = ours(*arguments)
    for name in expected.keys() - {"steered", "normalized"}:
        assert torch.equal(ours(*arguments, wanted={name})[name], expected[name]), name
    ours(*arguments, wanted=set())


def test_one_upstream_gradient_alone():
    *arguments, (first, second) = make(spec.Case("", 18, 24, 5, **EVERYTHING))
    zero = torch.zeros_like(first)
    for given, full in (((None, second), (zero, second)), ((first, None), (first, zero))):
        got, expected = ours(*arguments, given), ours(*arguments, full)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6, msg=name)
    neither = ours(*arguments, (None, None))
    assert not any(value.any() for name, value in neither.items() if name not in ("steered", "normalized"))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    ("option", "rows", "poison"),
    [(option, rows, math.nan) for option in ("lowrank", "fixed", "gated", "reft") for rows in (4, 20)]
    + [("everything", rows, poison) for rows in (4, 20) for poison in (math.nan, math.inf)],
)
def test_masked_rows_stay_as_they_are_and_reach_nothing(option, rows, poison):
    case = spec.Case("", rows, 24, **{"rank": 5, **spec.OPTIONS[option], "masked": 0.5})
    residual, update, parameters, mask, norm_weight, flags, upstream = make(case)
    clean = ours(residual, update, parameters, mask, norm_weight, flags, upstream)
    hidden = ~mask[:, None]
    residual = residual.masked_fill(hidden, poison)
    # A loss that skips padding may still send NaN there.
    upstream = [x if x is None else x.masked_fill(hidden, poison) for x in upstream]
    got = ours(residual, update, parameters, mask, norm_weight, flags, upstream)
    h = residual if update is None else residual + update
    assert torch.equal(got["steered"][~mask].view(torch.int32), h[~mask].view(torch.int32))
    for name in ("steered", "normalized", "residual"):
        assert name not in got or torch.equal(got[name][mask], clean[name][mask])
    for name in PARAMETERS:
        assert name not in got or torch.equal(got[name], clean[name]), name


@pytest.mark.parametrize("option", ["lowrank", "fixed", "gated", "reft", "everything"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_batch_take_their_own_adapters(option, dtype):
    settings = {"rank": 20, "dtype": dtype, **spec.OPTIONS[option]}
    residual, update, first, mask, norm_weight, flags, _ = make(spec.Case("", 12, 65, **settings))
    others = [make(spec.Case("", 12, 65, **settings), seed)[2] for seed in (1, 2)]
    stack = {n: None if x is None else torch.cat([x, *(other[n] for other in others)]) for n, x in first.items()}
    stack["alpha"] = torch.tensor([0.5, -1.0, 2.0], device=DEVICE)
    index = torch.tensor([0, 2, -1, 1, 1, 0, -1, 2, 2, 1, 0, -1], dtype=torch.int32, device=DEVICE)
    inputs = SteerInputs(residual, update, *stack.values(), mask, index, norm_weight, **flags)
    steered, normalized, _ = steer_forward(inputs)
    h = residual if update is None else residual + update
    assert torch.equal(steered[index < 0], h[index < 0])
    for row, adapter in enumerate(index.tolist()):
        one = {n: None if x is None or adapter < 0 else x[adapter, None] for n, x in stack.items()}
        one["alpha"] = stack["alpha"][adapter, None]
        here = slice(row, row + 1)
        arguments = (h[here], None, one, None if mask is None else mask[here], norm_weight, flags)
        upstream = [torch.zeros_like(h[here])] * 2
        truth = by_autograd(*arguments, upstream, dtype=torch.float64)
        for name, mine in (("steered", steered), ("normalized", normalized)):
            if name in truth:
                bound = 2 * spec.TOLERANCES[dtype] * truth[name].abs().max().clamp(min=1)
                assert (mine[here] - truth[name]).abs().max() <= bound, (name, row)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preserve_norm", [False, True])
@pytest.mark.parametrize("rows", [5, 17])
def test_an_untrained_adapter_is_an_exact_no_op(rows, preserve_norm, dtype):
    for rank, gate in ((0, True), (5, False), (5, True)):
        case = spec.Case("", rows, 65, rank, dtype, gate=gate, options={"preserve_norm": preserve_norm})
        residual, update, parameters, mask, norm_weight, flags, _ = make(case)
        for name in ("up", "static"):
            parameters[name] = None if parameters[name] is None else torch.zeros_like(parameters[name])
        h = residual + update
        inputs = SteerInputs(residual, update, *parameters.values(), mask, None, norm_weight, **flags)
        steered, _, pre = steer_forward(inputs)
        assert torch.equal(steered, h)
        assert (pre is None) == (rank == 0)
    nothing = dict.fromkeys(inputs._fields[: len(inputs.tensors)])
    alone, _, _ = steer_forward(SteerInputs(**nothing | {"residual": h, "alpha": parameters["alpha"]}, **flags))
    assert torch.equal(alone, h) and alone.data_ptr() != h.data_ptr()


def test_the_pre_activation_is_saved_in_float32():
    residual, update, parameters, *_ = make(spec.Case("", 18, 40, 20, torch.float16))
    _, _, pre = steer_forward(SteerInputs(residual, update, *parameters.values(), None, None, None, **FLAGS))
    h = (residual + update).double()
    n = h / (h.square().mean(-1, keepdim=True) + reference.INPUT_RMS_EPS).sqrt()
    truth = n @ parameters["down"][0].double().T + parameters["bias"][0]
    assert pre.dtype == torch.float32 and (pre - truth).abs().max() <= 1e-5


@pytest.mark.parametrize("rank", [0, 2])
def test_zero_rows_and_cancelled_rows_have_no_nan(rank):
    case = spec.Case("", 3, 24, rank, update=False, norm=True, options={"preserve_norm": True})
    residual, _, parameters, mask, norm_weight, flags, upstream = make(case)
    if rank:
        parameters["up"] = torch.zeros_like(parameters["up"])
    residual[0], residual[1] = 0.0, -parameters["static"][0]
    got = ours(residual, None, parameters, mask, norm_weight, flags, upstream)
    assert not got["steered"][:2].any() and all(value.isfinite().all() for value in got.values())
    parameters["static"] = torch.zeros_like(parameters["static"])
    got = ours(torch.zeros_like(residual), None, parameters, mask, norm_weight, flags, upstream)
    assert not got["steered"].any() and all(value.isfinite().all() for value in got.values())


@pytest.mark.parametrize("option", ["lowrank", "fixed", "everything"])
def test_no_rows(option):
    case = spec.Case("", 0, 24, **{"rank": 5, **spec.OPTIONS[option]})
    arguments = make(case)
    got = ours(*arguments)
    assert got["steered"].shape == got["residual"].shape == (0, 24)
    for name, value in arguments[2].items():
        assert value is None or (got[name].shape == value.shape and not got[name].any())


KERNELS = {"forward": steer_fwd_kernel, "backward": steer_bwd_kernel, "parameters": steer_bwd_parameters_kernel}
STREAM = {"residual", "update", "steered", "normalized", "norm_weight"}
STREAM |= {"grad_steered", "grad_normalized", "grad_residual"}


def compilation(kernel, rank, dtype, everything, capability, rows=4096, mixed=False) -> Request:
    """A launch at D = 4096 with a float32 adapter: plain low rank, or with gate, mask, preserve_norm and next norm."""
    if kernel == "parameters":
        blocks = parameter_blocks_for(rows, 4096, rank, dtype)._asdict()
        del blocks["splits"], blocks["split_rows"]
    else:
        blocks = blocks_for(rows, 4096, rank, dtype, mixed=mixed, backward=kernel == "backward")._asdict()
    num_warps, num_stages = blocks.pop("num_warps"), blocks.pop("num_stages")
    stream = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
    flags = {name for name in KERNELS[kernel].arg_names if name.startswith(("HAS_", "WANT_"))}
    optional = {"HAS_GATE", "HAS_MASK", "HAS_NORM", "WANT_GATE", "WANT_SCALE", "WANT_WEIGHT"}
    constexprs = {name: everything or name not in optional for name in flags}
    constexprs |= {"ACTIVATION": "silu", "NORMALIZE_INPUT": True, "PRESERVE_NORM": everything} | blocks
    constexprs |= {name: rank > 0 for name in ("HAS_BIAS", "WANT_PRE", "WANT_UP", "WANT_DOWN")}
    constexprs |= {"ROUND_BEFORE_WEIGHT": True, "HAS_INDEX": mixed, "stride_dd": 1, "stride_ur": 1}
    absent = set() if everything else {"gate", "offset", "mask", "norm_weight", "normalized", "grad_normalized"}
    absent |= set() if mixed else {"index"}
    absent |= {"down", "up", "bias", "pre", "grad_pre"} if rank == 0 else set()
    signature = {}
    for name in KERNELS[kernel].arg_names:
        if not name.endswith("_ptr"):
            integer = name in ("T", "D", "R", "split_rows") or name.startswith("stride")
            signature |= {name: "fp32" if name == "norm_eps" else "i32"} if integer or name == "norm_eps" else {}
        elif name[:-4] in absent:
            constexprs[name] = None
        elif name == "mask_ptr":
            signature[name] = "*i1"
        elif name == "index_ptr":
            signature[name] = "*i32"
        else:
            from_stream = name[:-4] in STREAM or (name == "grad_moved_ptr" and not everything)
            signature[name] = stream if from_stream else "*fp32"
    constexprs = {name: value for name, value in constexprs.items() if name in KERNELS[kernel].arg_names}
    signature = {name: type_ for name, type_ in signature.items() if name not in constexprs}
    divisible = [name for name, type_ in signature.items() if type_ == "i32" and name != "T"]
    return Request(KERNELS[kernel], signature, constexprs, num_warps, num_stages, capability, divisible)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_fit_a_multiprocessor_without_spilling(capability):
    plain_or_everything = (False, True) if capability == 90 else (True,)
    cases = list(itertools.product(KERNELS, (16, 64, 256), [torch.bfloat16], plain_or_everything))
    requests = [compilation(*case, capability) for case in cases]
    if capability == 90:
        more = [(kernel, 256, torch.float32, True, 90) for kernel in KERNELS]
        more += [(kernel, 0, torch.bfloat16, True, 90) for kernel in ("forward", "backward")]
        # A decoding step of mixed adapters; a short training batch.
        more += [("forward", rank, torch.bfloat16, True, 90, 8, True) for rank in (0, 16, 256)]
        more += [(kernel, 64, torch.bfloat16, True, 90, 512) for kernel in ("forward", "backward")]
        cases, requests = cases + more, requests + [compilation(*case) for case in more]
        # What launches turn into constants, and the other activations.
        [request] = [r for c, r in zip(cases, requests, strict=True) if c == ("backward", 16, torch.bfloat16, False)]
        for constants in ({"R": 1}, {"D": 1, "R": 1}, {"ACTIVATION": "gelu"}, {"ACTIVATION": "tanh"}):
            signature = {name: type_ for name, type_ in request.signature.items() if name not in constants}
            divisible = [name for name in request.divisible if name not in constants]
            constexprs = {**request.constexprs, **constants}
            cases.append(constants)
            requests.append(replace(request, signature=signature, constexprs=constexprs, divisible=divisible))
    measured = list(zip(cases, measure(requests), strict=True))
    for case, resources in measured:
        assert resources.deferred_sums == 0, (case, resources)
        assert resources.shared_bytes <= SHARED_MEMORY_LIMITS[capability], (case, resources)
    skip_unless_pinned()
    for case, resources in measured:
        # A stack of two registers appears at 72 registers as well as at 255: it is not what a full file spills.
        assert resources.spill_bytes <= 16, (case, resources)
        assert resources.shared_bytes <= SHARED_MEMORY_LIMITS[capability] / 2, (case, resources)
