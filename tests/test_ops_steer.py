"""steer against its formula in float64, finite differences, and the norms of the decoders it is fused with."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dive_fast.errors import InputError
from dive_fast.ops import steer
from dive_fast.ops.steer import spec

PHI = {"silu": F.silu, "identity": torch.nn.Identity(), "relu": torch.relu, "gelu": F.gelu, "tanh": torch.tanh}


def formula(inputs, options, dtype):
    """The public docstring's lines over whole rows, every operation after the residual add in `dtype`."""
    options = tree_map(lambda x: x.to(dtype) if is_floating(x) else x, dict(options))
    residual, update = inputs
    h = (residual if update is None else residual + update).to(dtype)
    x = h
    if options.get("normalize_input", True):
        x = h / (h.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    push = 0
    if options.get("down") is not None:
        push = PHI[options.get("activation", "silu")](x @ options["down"].T + options.get("bias", 0)) @ options["up"].T
    push = push + options.get("static", 0)
    if options.get("gate") is not None:
        push = push * torch.sigmoid(h @ options["gate"][0] + options["gate"][1]).unsqueeze(-1)
    moved = h + options.get("alpha", 1.0) * push
    if options.get("preserve_norm"):
        moved = moved * h.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)
    if options.get("mask") is not None:
        moved = torch.where(options["mask"].unsqueeze(-1), moved, h)
    if options.get("norm_weight") is None:
        return moved
    rms = (moved.square().mean(-1, keepdim=True) + options.get("norm_eps", 1e-6)).sqrt()
    return moved, moved / rms * options["norm_weight"]


def is_floating(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def doubled(tree):
    return tree_map(lambda x: x.double() if is_floating(x) else x, tree)


def with_gradients(function, inputs, options):
    """Outputs and the gradients of all floating inputs, in float64, pulled back with a different factor per element."""
    inputs, options = tree_map(lambda x: x.clone().requires_grad_() if is_floating(x) else x, (inputs, options))
    outputs = tree_leaves(function(inputs, options))
    upstream = [torch.linspace(0.5, 1.5, x.numel()).reshape(x.shape).to(x.dtype) for x in outputs]
    gradients = torch.autograd.grad(outputs, [x for x in tree_leaves((inputs, options)) if is_floating(x)], upstream)
    return [x.double() for x in (*outputs, *gradients)]


@pytest.mark.parametrize("case", spec.TEST_CASES, ids=lambda case: case.name)
def test_outputs_and_gradients_are_as_close_to_float64_as_torch(case):
    inputs, options = spec.make_inputs(case)
    options["alpha"] = torch.tensor(options.get("alpha", 1.0))
    # The stream is added in its own dtype by definition, so truth starts from that sum.
    stream = (inputs[0] if inputs[1] is None else inputs[0] + inputs[1], None)
    ours = with_gradients(lambda i, o: steer(*i, **o), inputs, options)
    truth = with_gradients(lambda i, o: formula(i, o, torch.float64), *doubled((stream, options)))
    in_dtype = with_gradients(lambda i, o: formula(i, o, case.dtype), stream, options)
    if inputs[1] is not None:
        # residual and update have one gradient, that of their sum.
        position = 2 if case.norm else 1
        assert torch.equal(ours[position], ours[position + 1])
        del ours[position + 1]
    assert len(ours) == len(truth)
    for mine, true, torchs in zip(ours, truth, in_dtype, strict=True):
        assert mine.shape == true.shape
        if true.numel():
            allowed = (torchs - true).abs().max() + spec.TOLERANCES[case.dtype] * true.abs().max().clamp(min=1)
            assert (mine - true).abs().max() <= allowed


@pytest.mark.parametrize("option", spec.OPTIONS)
def test_gradcheck(option):
    case = spec.Case(option, 3, 4, dtype=torch.float64, **{"rank": 2, **spec.OPTIONS[option]})
    inputs, options = doubled(spec.make_inputs(case))
    options["alpha"] = torch.tensor(options.get("alpha", 1.0), dtype=torch.float64)
    names = [name for name, value in options.items() if is_floating(value)]
    gate = list(options.get("gate", ()))
    values = [*inputs[: 1 + case.update], *(options[name] for name in names), *gate]

    def function(residual, *rest):
        update, rest = (rest[0], rest[1:]) if case.update else (None, rest)
        changed = dict(zip(names, rest, strict=False))
        return steer(residual, update, **options | changed | ({"gate": tuple(rest[-2:])} if gate else {}))

    assert torch.autograd.gradcheck(function, [value.requires_grad_() for value in values])


def test_hand_calculation():
    # rms([3, 4]) = sqrt(12.5); down reads the first dimension, up writes 2 into the second.
    residual, update = torch.tensor([[1.0, 4.0]]), torch.tensor([[2.0, 0.0]])
    low_rank = {"down": torch.tensor([[1.0, 0.0]]), "up": torch.tensor([[0.0], [2.0]]), "activation": "relu"}
    moved = steer(residual, update, **low_rank, static=torch.tensor([1.0, 0.0]), alpha=0.5)
    torch.testing.assert_close(moved, torch.tensor([[3.5, 4 + 3 / math.sqrt(12.5)]]))
    # Norm 5 is kept: (3, 4) + (3, 4) = (6, 8) is scaled back.
    static = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(steer(residual, update, static=static, preserve_norm=True), static[None])
    # A gate of sigmoid(0) halves the push.
    half = steer(residual, update, static=static, gate=(torch.zeros(2), 0.0))
    torch.testing.assert_close(half, 1.5 * static[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("preserve_norm", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_an_untrained_adapter_is_an_exact_no_op(gated, preserve_norm, dtype):
    case = spec.Case("untrained", 50, 24, 5, dtype, gate=gated, options={"preserve_norm": preserve_norm})
    (residual, update), options = spec.make_inputs(case)
    h = residual + update
    options |= {"up": torch.zeros(24, 5), "static": torch.zeros(24)}
    assert torch.equal(steer(residual, update, **options), h)
    assert torch.equal(steer(h, **options | {"down": None, "up": None, "bias": None}), h)
    empty = {"down": torch.zeros(0, 24), "up": torch.zeros(24, 0), "bias": torch.zeros(0), "static": None}
    assert torch.equal(steer(residual, update, **options | empty), h)
    alone = steer(h)
    assert torch.equal(alone, h) and alone.data_ptr() != h.data_ptr()
    assert steer(residual, update, **options).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_norm_is_bit_equal_to_the_decoders(dtype):
    (residual, update), options = spec.make_inputs(spec.Case("norm", 20, 48, 4, dtype))
    weight = torch.randn(48).to(dtype)
    llama, gemma = LlamaRMSNorm(48, eps=1e-5).to(dtype), Gemma3RMSNorm(48, eps=1e-6).to(dtype)
    options = options | {"backend": "reference"}
    with torch.no_grad():
        llama.weight.copy_(weight)
        gemma.weight.copy_(weight)
        stream, normed = steer(residual, update, **options, norm_weight=weight, norm_eps=1e-5)
        assert torch.equal(stream, steer(residual, update, **options))
        assert torch.equal(normed, llama(stream))
        _, normed = steer(residual, update, **options, norm_weight=1 + weight.float(), norm_eps=1e-6)
        assert torch.equal(normed, gemma(stream))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("option", ["lowrank", "fixed", "gated", "everything"])
def test_masked_rows_stay_as_they_are_whatever_they_hold(option, poison):
    settings_ = {"rank": 3, **spec.OPTIONS[option], "masked": 0.5, "norm": False}
    (residual, update), options = spec.make_inputs(spec.Case(option, 12, 8, **settings_))
    mask = options.pop("mask")
    options["alpha"] = torch.tensor(0.7)
    parameters = [x.requires_grad_() for x in tree_leaves(options) if is_floating(x)]

    clean = steer(residual[mask], None if update is None else update[mask], **options)
    expected = torch.autograd.grad(clean.square().sum(), parameters)
    residual = residual.masked_fill(~mask.unsqueeze(1), poison).requires_grad_()
    out = steer(residual, update, mask=mask, **options)
    h = residual if update is None else residual + update
    assert torch.equal(out[~mask].view(torch.int32), h[~mask].view(torch.int32))
    torch.testing.assert_close(out[mask], clean, rtol=1e-6, atol=1e-6)
    # Upstream gradients of padding may be NaN as well; a loss that skips it sends zeros.
    for upstream in (0.0, math.nan):
        pulled = torch.autograd.grad(
            out, [residual, *parameters], torch.where(mask[:, None], 2 * out.detach(), upstream), retain_graph=True
        )
        assert pulled[0][mask].isfinite().all()
        for got, want in zip(pulled[1:], expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(pulled[0][~mask].isnan(), torch.ones_like(residual[~mask], dtype=torch.bool))


def test_zero_rows_and_cancelled_rows_have_no_nan():
    static = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    residual = torch.stack([torch.zeros(3), -static.detach(), torch.ones(3)]).requires_grad_()
    down, up = torch.ones(2, 3, requires_grad=True), torch.zeros(3, 2, requires_grad=True)
    for normalize_input in (True, False):
        out, normed = steer(
            residual,
            down=down,
            up=up,
            static=static,
            preserve_norm=True,
            normalize_input=normalize_input,
            norm_weight=torch.ones(3),
        )
        # A zero row has norm 0 to keep; a row moved to exactly 0 has no direction to be scaled along.
        assert not out[:2].any() and out[2].norm().item() == pytest.approx(math.sqrt(3))
        gradients = torch.autograd.grad(out.sum() + normed.sum(), (residual, down, up, static))
        assert all(gradient.isfinite().all() for gradient in gradients)
    static_zero = torch.zeros(3, requires_grad=True)
    out = steer(torch.zeros(2, 3, requires_grad=True), static=static_zero, preserve_norm=True)
    assert not out.any() and torch.autograd.grad(out.sum(), static_zero)[0].isfinite().all()


def test_leading_shapes_strides_and_scalars_do_not_matter():
    (residual, update), options = spec.make_inputs(spec.Case("shapes", 12, 10, 3, gate=True, masked=0.3))
    expected = steer(residual, update, **options)
    shaped = [x.reshape(3, 4, *x.shape[1:]).transpose(0, 1) for x in (residual, update, options["mask"])]
    strided = {name: options[name].repeat_interleave(2, -1)[..., ::2] for name in ("down", "up", "bias", "static")}
    assert not any(x.is_contiguous() for x in (*shaped, *strided.values()))
    out = steer(shaped[0], shaped[1], **options | strided | {"mask": shaped[2]})
    torch.testing.assert_close(out.transpose(0, 1).reshape(12, 10), expected, rtol=1e-6, atol=1e-6)
    row = int(options["mask"].nonzero()[0])
    single = steer(residual[row], update[row], **options | {"mask": torch.tensor(True)})
    torch.testing.assert_close(single, expected[row], rtol=1e-6, atol=1e-6)
    scalars = {"alpha": torch.tensor(1.0, dtype=torch.float64), "gate": (options["gate"][0], options["gate"][1].item())}
    torch.testing.assert_close(steer(residual, update, **options | scalars), expected, rtol=1e-6, atol=1e-6)


def test_results_are_tensors_of_their_own():
    """Hooks on a layer's output, and what a decoder does to it in place, must mean the tensor that comes out."""
    residual, norm = torch.randn(2, 3, 8, requires_grad=True), torch.ones(8)
    for results in ((steer(residual, static=torch.ones(8)),), steer(residual, static=torch.ones(8), norm_weight=norm)):
        assert all(result._base is None and result.shape == residual.shape for result in results)


def test_a_second_backward_and_autocast_change_nothing():
    (residual, update), options = spec.make_inputs(spec.Case("again", 6, 8, 3, gate=True))
    parameters = [x.requires_grad_() for x in tree_leaves(options) if is_floating(x)]
    out = steer(residual, update, **options)
    first = torch.autograd.grad(out.sum(), parameters, retain_graph=True)
    second = torch.autograd.grad(out.sum(), parameters)
    with torch.autocast("cpu", torch.bfloat16):
        cast = steer(residual, update, **options)
    third = torch.autograd.grad(cast.sum(), parameters)
    assert torch.equal(cast, out)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_and_options(data):
    leading = data.draw(st.lists(st.integers(0, 4), max_size=2))
    hidden_size, rank = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    options = {
        "normalize_input": data.draw(st.booleans()),
        "preserve_norm": data.draw(st.booleans()),
        "activation": data.draw(st.sampled_from(sorted(PHI))),
        "alpha": data.draw(st.sampled_from([-1.0, 0.3])),
    }
    if data.draw(st.booleans()):
        options |= {"down": normal(rank, hidden_size), "up": normal(hidden_size, rank)}
    if data.draw(st.booleans()):
        options["static"] = normal(hidden_size)
    if data.draw(st.booleans()):
        options["mask"] = torch.rand(leading, generator=generator) < 0.5
    if data.draw(st.booleans()):
        options["gate"] = (normal(hidden_size), normal())
    residual = normal(*leading, hidden_size)
    update = normal(*leading, hidden_size) if data.draw(st.booleans()) else None
    expected = formula((residual, update), options, torch.float64)
    torch.testing.assert_close(steer(residual, update, **options), expected, rtol=1e-10, atol=1e-12)


LOW_RANK = {"down": torch.zeros(2, 3), "up": torch.zeros(3, 2)}
BAD_ARGUMENTS = [
    ({"residual": [1.0]}, "residual: expected a floating tensor of 16 to 64 bits, got list"),
    ({"residual": torch.zeros(4, 3, dtype=torch.int64)}, "residual: expected a floating tensor"),
    ({"residual": torch.zeros(4, 0)}, "residual: expected shape [..., D] with D >= 1"),
    ({"residual": torch.zeros(())}, "residual: expected shape"),
    ({"update": torch.zeros(3)}, "update: expected shape of residual = [4, 3], got [3]"),
    ({"update": torch.zeros(4, 3).half()}, "update: expected residual's torch.float32"),
    ({"update": torch.zeros(4, 3, device="meta")}, "update: expected a tensor on cpu, got meta"),
    ({"down": torch.zeros(2, 3)}, "up: expected down and up together"),
    ({"up": torch.zeros(3, 2)}, "down: expected down and up together"),
    (LOW_RANK | {"down": torch.zeros(2, 4)}, "down: expected shape [r, D] = [2, 3], got [2, 4]"),
    (LOW_RANK | {"down": torch.zeros(3)}, "down: expected shape [r, D]"),
    (LOW_RANK | {"down": "w"}, "down: expected a tensor [r, D], got str"),
    (LOW_RANK | {"up": torch.zeros(2, 3)}, "up: expected shape [D, r] = [3, 2]"),
    (LOW_RANK | {"up": torch.zeros(3, 2, dtype=torch.int8)}, "up: expected float16"),
    (LOW_RANK | {"bias": torch.zeros(3)}, "bias: expected shape [r] = [2]"),
    ({"bias": torch.zeros(2)}, "bias: expected None without down"),
    ({"static": torch.zeros(1)}, "static: expected shape [D] = [3], got [1]"),
    ({"static": torch.zeros(3, device="meta")}, "static: expected a tensor on cpu"),
    ({"alpha": "1"}, "alpha: expected a number or a floating 0-d tensor"),
    ({"alpha": torch.ones(1)}, "alpha: expected a number or a floating 0-d tensor"),
    ({"activation": "swish"}, "activation: expected one of 'silu', 'identity', 'relu', 'gelu', 'tanh', got 'swish'"),
    ({"gate": torch.zeros(3)}, "gate: expected a pair (g [D], c)"),
    ({"gate": (torch.zeros(2), 0.0)}, "gate[0]: expected shape [D]"),
    ({"gate": (torch.zeros(3), torch.zeros(1))}, "gate[1]: expected a number"),
    ({"mask": torch.ones(4)}, "mask: expected a bool tensor, got torch.float32"),
    ({"mask": [True] * 4}, "mask: expected a bool tensor, got list"),
    ({"mask": torch.ones(4, 1, dtype=torch.bool)}, "mask: expected shape residual.shape[:-1] = [4]"),
    ({"mask": torch.ones(4, dtype=torch.bool, device="meta")}, "mask: expected a tensor on cpu"),
    ({"norm_weight": torch.ones(4)}, "norm_weight: expected shape [D] = [3]"),
    ({"norm_eps": 0.0}, "norm_eps: expected a number > 0"),
    ({"backend": "cuda"}, "backend: expected None or one usable for steer on cpu ('native', 'reference'), got 'cuda'"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS, ids=[m for _, m in BAD_ARGUMENTS])
def test_bad_arguments_are_named(change, message):
    sound = {"residual": torch.zeros(4, 3), "backend": "reference"}
    steer(**sound)
    with pytest.raises(InputError, match=re.escape(message)):
        steer(**sound | change)


@pytest.mark.gpu
def test_cuda_agrees_with_float64():
    (residual, update), options = spec.make_inputs(spec.Case("cuda", 13, 40, 5, gate=True, masked=0.5))
    truth = formula((residual, update), options, torch.float64)
    options = tree_map(lambda x: x.cuda() if isinstance(x, torch.Tensor) else x, options)
    out = steer(residual.cuda(), update.cuda(), **options).cpu().double()
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)
