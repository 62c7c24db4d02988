"""The CPU kernels of steer against float64 autograd through the reference, at every level this machine can run."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dive_fast import native
from dive_fast.ops.steer import reference, spec
from dive_fast.ops.steer.inputs import SteerInputs
from dive_fast.ops.steer.native import steer_backward, steer_forward

LEVELS = native.load().cpu.kernel_levels()
ADAPTER = ("down", "up", "bias", "static", "alpha", "gate_direction", "gate_offset")
# T, D, R around the widths of vectors, blocks of rows and panels of columns; from 48 rows on `up` is transposed.
SHAPES = [(1, 64, 16), (3, 65, 3), (33, 129, 20), (50, 24, 65), (7, 1, 1), (19, 576, 16)]

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def make(shape, dtype=torch.float32, option="lowrank", seed=0, **changes):
    """Stream, adapter and settings of one of spec.OPTIONS: (residual, update), tensors by name, keyword arguments."""
    rows, hidden_size, rank = shape
    case = spec.Case(option, rows, hidden_size, dtype=dtype, **{"rank": rank, **spec.OPTIONS[option], **changes})
    stream, options = spec.make_inputs(case, seed=seed)
    gate = options.pop("gate", (None, None))
    tensors = {name: options.pop(name, None) for name in (*ADAPTER, "mask", "norm_weight")}
    tensors["alpha"] = torch.tensor(1.0 if tensors["alpha"] is None else tensors["alpha"])
    tensors["gate_direction"], tensors["gate_offset"] = gate
    keywords = {"activation": "silu", "normalize_input": True, "preserve_norm": False, "norm_eps": 1e-6} | options
    return stream, tensors, keywords


def inputs_of(stream, tensors, keywords, **changes):
    """The kernels' inputs, with the adapter as a stack of one."""
    adapter = {name: None if tensors[name] is None else tensors[name].unsqueeze(0) for name in ADAPTER}
    rows = {name: tensors[name] for name in ("mask", "norm_weight")}
    return SteerInputs(*stream, **{"adapter_index": None} | adapter | rows | keywords | changes)


def with_reference(h, tensors, keywords):
    """The reference's outputs for the stream h, as a tuple."""
    named = {name: tensors[name] for name in ("down", "up", "bias", "static", "alpha", "mask", "norm_weight")}
    gate = None if tensors["gate_direction"] is None else (tensors["gate_direction"], tensors["gate_offset"])
    outputs = reference.steer(h, None, **named, gate=gate, **keywords)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def upstream_of(outputs):
    """Gradients that lean towards the outputs, lest alpha's, one sum over all of them, cancel to rounding errors."""
    return [x * torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype) for x in outputs]


def reference_results(h, tensors, keywords, dtype, upstream):
    """Outputs and gradients by name with the stream and its weight in `dtype`, the adapter at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {"residual": h.to(dtype).requires_grad_()}
    for name in (*ADAPTER, "norm_weight"):
        if tensors[name] is not None:
            leaves[name] = tensors[name].to(dtype if name == "norm_weight" else wide).requires_grad_()
    outputs = with_reference(leaves["residual"], tensors | leaves, keywords)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [x.to(dtype) for x in upstream], allow_unused=True)
    found = dict(zip(leaves, gradients, strict=True))
    return dict(zip(("steered", "normalized"), outputs, strict=False)) | {f"grad_{k}": v for k, v in found.items()}


def native_results(stream, upstream, tensors, keywords, **where):
    inputs = inputs_of(stream, tensors, keywords)
    outputs = steer_forward(inputs, **where)
    wanted = {"residual"} | {name for name in (*ADAPTER, "norm_weight") if tensors[name] is not None}
    grad_normalized = upstream[1] if len(upstream) == 2 else None
    gradients = steer_backward(inputs, outputs[2], upstream[0], grad_normalized, wanted, **where)
    assert gradients.keys() == wanted
    results = {"steered": outputs[0]} | ({} if inputs.norm_weight is None else {"normalized": outputs[1]})
    for name, gradient in gradients.items():
        assert gradient.dtype == (stream[0].dtype if name == "residual" else torch.float32)
        results[f"grad_{name}"] = gradient.squeeze(0) if name in ADAPTER else gradient
    return results


def moves(h, doubles, keywords, upstream, truth):
    """How far each exact result moves, at the most, where every input moves by float32's last place.

    Where a push nearly cancels a row, the next norm's gradient multiplies roundings by hundreds, and no order of
    float32's additions is the right one.
    """
    found = dict.fromkeys(truth, 0.0)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)

        def nudged(x):
            if x is None or not x.is_floating_point():
                return x
            return x * (1 + 2**-23 * torch.randint(-1, 2, x.shape, generator=generator))  # noqa: B023

        nearby = {name: nudged(x) for name, x in doubles.items()}
        results = reference_results(nudged(h.double()), nearby, keywords, torch.float64, upstream)
        for name, true in truth.items():
            if true is not None and true.numel():
                found[name] = max(found[name], (results[name] - true).detach().abs().max().item())
    return found


def check_against_float64(shape, dtype, level, stream, tensors, keywords, leave_out=(), drawn=False):
    """As close to float64 as torch is in `dtype`; a drawn case may be ill-conditioned, and moves as much besides."""
    h = stream[0] if stream[1] is None else stream[0] + stream[1]
    doubles = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in tensors.items()}
    upstream = [x.to(dtype) for x in upstream_of(with_reference(h.double(), doubles, keywords))]
    truth = reference_results(h, doubles, keywords, torch.float64, upstream)
    torchs = reference_results(h, tensors, keywords, dtype, upstream)
    moved = moves(h, doubles, keywords, upstream, truth) if drawn else dict.fromkeys(truth, 0.0)
    ours = native_results(stream, upstream, tensors, keywords, isa=level, threads=2)
    assert ours.keys() == truth.keys()
    for name in truth.keys() - {f"grad_{name}" for name in leave_out}:
        true = torch.zeros(ours[name].shape) if truth[name] is None else truth[name]
        in_dtype = true if torchs[name] is None else torchs[name]
        assert ours[name].shape == true.shape, name
        if true.numel():
            # Sums are taken and returned in float32, whatever the stream's dtype.
            tolerance = spec.TOLERANCES[dtype]
            allowed = (in_dtype - true).abs().max() + moved[name] + tolerance * true.abs().max().clamp(min=1)
            assert (ours[name] - true).abs().max() <= allowed, (name, shape)


@pytest.mark.parametrize("dtype", spec.DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("option", spec.OPTIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_outputs_and_every_gradient_are_as_close_to_float64_as_torch(level, option, dtype):
    for shape in SHAPES:
        check_against_float64(shape, dtype, level, *make(shape, dtype, option))


@pytest.mark.parametrize("level", LEVELS)
def test_a_weight_wider_than_the_stream_multiplies_before_rounding(level):
    stream, tensors, keywords = make((9, 65, 3), torch.bfloat16, "next_norm")
    for weight_dtype in (torch.float32, torch.float16):
        weight = torch.randn(65).to(weight_dtype)
        inputs = inputs_of(stream, tensors, keywords, mask=None, norm_weight=weight)
        steered, normalized, _ = steer_forward(inputs, isa=level)
        expected = reference._rms_norm(steered, weight, keywords["norm_eps"], torch.float32)
        different = normalized != expected
        # Only where a float32 sum in another order falls on the other side of a tie.
        assert different.float().mean() < 0.01
        torch.testing.assert_close(normalized, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", spec.DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("level", LEVELS)
def test_an_untrained_adapter_is_an_exact_no_op(level, dtype):
    for shape in SHAPES:
        for preserve_norm in (False, True):
            stream, tensors, keywords = make(shape, dtype, gate=True)
            stream[0][0] = stream[1][0] = -0.0
            tensors |= {"up": torch.zeros_like(tensors["up"]), "static": torch.zeros_like(tensors["static"])}
            keywords["preserve_norm"] = preserve_norm
            h = sum(stream[1:], start=stream[0])
            alone = {"mask": None, "norm_weight": None}
            steered = steer_forward(inputs_of(stream, tensors, keywords, **alone), isa=level)[0]
            assert same_bits(steered, h)
            tiny = h * 2**-14 * (1e-20 if dtype != torch.float16 else 1)
            steered = steer_forward(inputs_of((tiny, None), tensors, keywords, **alone), isa=level)[0]
            assert same_bits(steered, tiny)
            nothing = dict.fromkeys(ADAPTER) | {"alpha": torch.ones(1)}
            inputs = inputs_of(stream, tensors, keywords, **alone, **nothing)
            assert same_bits(steer_forward(inputs, isa=level)[0], h)


def same_bits(a, b):
    return a.shape == b.shape and torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", spec.DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("level", LEVELS)
def test_masked_rows_stay_as_they_are_and_reach_nothing(level, dtype, poison):
    for option in ("lowrank", "fixed", "gated", "reft", "everything"):
        (residual, _), tensors, keywords = make((37, 65, 20), dtype, option, masked=0.5, norm=False)
        mask = tensors["mask"]
        clean = (residual[mask].clone(), None)
        upstream = upstream_of([residual])[0]
        expected = native_results(clean, [upstream[mask]], tensors | {"mask": None}, keywords, isa=level)
        residual = residual.masked_fill(~mask.unsqueeze(1), poison)
        upstream = upstream.masked_fill(~mask.unsqueeze(1), math.nan)
        found = native_results((residual, None), [upstream], tensors, keywords, isa=level)
        assert same_bits(found["steered"][~mask], residual[~mask])
        assert found["grad_residual"][~mask].isnan().all()
        for name, value in expected.items():
            got = found[name][mask] if name in ("steered", "grad_residual") else found[name]
            torch.testing.assert_close(got, value, rtol=0, atol=0)
        update = torch.ones_like(residual)
        steered = steer_forward(inputs_of((residual, update), tensors, keywords, norm_weight=None), isa=level)[0]
        assert torch.equal(steered[~mask].isnan(), (residual + update)[~mask].isnan())


@pytest.mark.parametrize("dtype", spec.DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [5, 300])
def test_every_row_gets_its_own_adapter(rows, level, dtype):
    shape = (rows, 65, 20)
    stream, tensors, keywords = make(shape, dtype, "everything", masked=0.2)
    adapters = [tensors] + [make(shape, dtype, "everything", seed=seed)[1] for seed in (1, 2)]
    index = torch.arange(rows, dtype=torch.int32) * 7 % 4 - 1
    stacks = {name: torch.stack([adapter[name] for adapter in adapters]) for name in ADAPTER}
    mask = tensors["mask"]
    inputs = inputs_of(stream, tensors, keywords, adapter_index=index, **stacks)
    found = steer_forward(inputs, isa=level, threads=2)
    h = stream[0] + stream[1]
    alone = (index == -1) | ~mask
    assert alone.any() and same_bits(found[0][alone], h[alone])
    assert not found[2][alone].any()
    for row in range(rows):
        here = {"mask": (~alone)[row : row + 1], "norm_weight": tensors["norm_weight"]}
        own = adapters[max(int(index[row]), 0)] | here
        doubles = {k: v.double() if v.is_floating_point() else v for k, v in own.items()}
        truth = with_reference(h[row : row + 1].double(), doubles, keywords)
        in_dtype = with_reference(h[row : row + 1], own, keywords)
        for ours, torchs, true in zip(found, in_dtype, truth, strict=False):
            allowed = (torchs - true).abs().max() + spec.TOLERANCES[dtype] * true.abs().max().clamp(min=1)
            assert (ours[row] - true).abs().max() <= allowed


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_results_depend_neither_on_threads_nor_on_the_call(level, dtype):
    # Enough rows for several chunks, and enough work for three threads.
    stream, tensors, keywords = make((700, 129, 20), dtype, "everything")
    upstream = [torch.randn(700, 129).to(dtype) for _ in range(2)]
    expected = native_results(stream, upstream, tensors, keywords, isa=level, threads=1)
    for threads in (1, 2, 3):
        found = native_results(stream, upstream, tensors, keywords, isa=level, threads=threads)
        for name, value in expected.items():
            assert same_bits(found[name], value), (name, threads)


def test_strides_do_not_matter():
    stream, tensors, keywords = make((33, 65, 20), option="everything")
    upstream = [torch.randn(33, 65) for _ in range(2)]
    expected = native_results(stream, upstream, tensors, keywords)
    wide = [torch.full((33, 80), math.nan) for _ in range(4)]
    for target, source in zip(wide, (*stream, *upstream), strict=True):
        target[:, 7:72] = source
    views = [x[:, 7:72] for x in wide]
    apart = {
        name: x.repeat_interleave(2, -1)[..., ::2] if x is not None and x.dim() and name != "mask" else x
        for name, x in tensors.items()
    }
    found = native_results(views[:2], views[2:], apart, keywords)
    for name, value in expected.items():
        assert same_bits(found[name], value), name
    ones = torch.ones(33, 65)
    broadcast = native_results(stream, [torch.ones(()).expand(33, 65)] * 2, tensors, keywords)
    for name, value in native_results(stream, [ones, ones], tensors, keywords).items():
        assert same_bits(broadcast[name], value), name


@pytest.mark.parametrize("level", LEVELS)
def test_only_what_is_wanted_is_computed(level):
    stream, tensors, keywords = make((20, 24, 3), option="everything")
    upstream = [torch.randn(20, 24) for _ in range(2)]
    expected = native_results(stream, upstream, tensors, keywords, isa=level)
    inputs = inputs_of(stream, tensors, keywords)
    saved = steer_forward(inputs, isa=level)[2]
    for name in ("residual", *ADAPTER, "norm_weight"):
        (found,) = steer_backward(inputs, saved, *upstream, {name}, isa=level).items()
        assert found[0] == name
        assert torch.equal(found[1].reshape(expected[f"grad_{name}"].shape), expected[f"grad_{name}"])
    assert steer_backward(inputs, saved, *upstream, set(), isa=level) == {}
    # A missing gradient stands for zeros.
    zeros = torch.zeros(20, 24)
    for some in ((upstream[0], zeros), (zeros, upstream[1])):
        absent = [None if x is zeros else x for x in some]
        for name in ("residual", "down", "norm_weight"):
            full = steer_backward(inputs, saved, *some, {name}, isa=level)[name]
            torch.testing.assert_close(steer_backward(inputs, saved, *absent, {name}, isa=level)[name], full)


@pytest.mark.parametrize("level", LEVELS)
def test_no_rows(level):
    stream, tensors, keywords = make((0, 65, 3), option="everything")
    found = native_results(stream, [stream[0]] * 2, tensors, keywords, isa=level)
    assert found["steered"].shape == found["normalized"].shape == (0, 65)
    assert not any(value.any() for name, value in found.items())


@pytest.mark.parametrize("level", LEVELS)
def test_zero_rows_and_cancelled_rows_have_no_nan(level):
    _, tensors, keywords = make((3, 24, 3), option="everything", gate=False, masked=None)
    tensors |= {"up": torch.zeros(24, 3), "alpha": torch.tensor(1.0)}
    rows = torch.stack([torch.zeros(24), -tensors["static"], torch.ones(24)])
    for normalize_input in (True, False):
        keywords["normalize_input"] = normalize_input
        check_against_float64((3, 24, 3), torch.float32, level, (rows, None), tensors, keywords)
        inputs = inputs_of((rows, None), tensors, keywords, mask=None, norm_weight=None)
        found = steer_forward(inputs, isa=level)[0]
        assert not found[:2].any()


def test_what_cannot_run_says_so():
    stream, tensors, keywords = make((4, 8, 2))
    inputs = inputs_of(stream, tensors, keywords, mask=None, norm_weight=None)
    index = torch.tensor([0, 0, 1, 0], dtype=torch.int32)
    with pytest.raises(IndexError, match="adapter_index: expected -1 to 0, got 1 in row 2"):
        steer_forward(inputs._replace(adapter_index=index))
    with pytest.raises(ValueError, match="isa: expected one of .*portable.*, got sse9"):
        steer_forward(inputs, isa="sse9")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    # Not D = 1: the normalized row is then 1 or -1, so that its gradient is nothing but rounding errors.
    shape = tuple(data.draw(st.integers(low, high)) for low, high in ((1, 70), (2, 150), (0, 40)))
    option = data.draw(st.sampled_from(sorted(spec.OPTIONS)))
    dtype, level = data.draw(st.sampled_from(spec.DTYPES)), data.draw(st.sampled_from(LEVELS))
    changes = {"update": data.draw(st.booleans()), "norm": data.draw(st.booleans())}
    rank = {"rank": shape[2]} if spec.OPTIONS[option].get("rank") != 0 else {}
    made = make(shape, dtype, option, data.draw(st.integers(0, 99)), **changes, **rank)
    # Two gradients are single sums over T and D, which random draws cancel down to their rounding errors.
    check_against_float64(shape, dtype, level, *made, leave_out=("alpha", "gate_offset"), drawn=True)
