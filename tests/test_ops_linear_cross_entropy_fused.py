"""The fused backends behind the public function: against float64, and inside what training wraps around them.

Triton's kernels run on the GPU where there is one and in Triton's interpreter otherwise.
"""

import itertools
import math
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from dive_fast.errors import InputError
from dive_fast.ops import TeacherStatistics, linear_cross_entropy, teacher_statistics
from dive_fast.ops.linear_cross_entropy import library, spec

pytest.importorskip("triton", reason="triton is not installed")

CUDA = torch.cuda.is_available()
DEVICES = {"native": "cpu", "triton": "cuda" if CUDA else "cpu", "triton-streaming": "cuda" if CUDA else "cpu"}
BACKENDS = tuple(DEVICES)
# The interpreter multiplies bfloat16 matrices wrongly.
DTYPES = {
    backend: (torch.float32, torch.float16) + ((torch.bfloat16,) if device == "cuda" or backend == "native" else ())
    for backend, device in DEVICES.items()
}
BACKEND_AND_DTYPE = [(backend, dtype) for backend in BACKENDS for dtype in DTYPES[backend]]
SOME_ROWS_AT_A_TIME = 2**13


def on(device, tree):
    return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, tree)


def doubled(tree):
    return tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, tree)


def pulled_back(function, inputs, options):
    """(loss, hidden's gradient) in float64 on the CPU, with a different factor per row."""
    hidden = inputs[0].clone().requires_grad_()
    loss = function((hidden, *inputs[1:]), options)
    upstream = torch.linspace(0.5, 1.5, max(loss.numel(), 1), dtype=loss.dtype, device=loss.device)
    loss.backward(upstream[: loss.numel()].reshape(loss.shape))
    return loss.detach().double().cpu(), hidden.grad.double().cpu()


def op(**fixed):
    """The public function on (inputs, options), some of its arguments fixed."""
    return lambda inputs, options: linear_cross_entropy(*inputs, **options | fixed)


def definition(dtype, reduction):
    return lambda inputs, options: spec.definition_loss(inputs, options, dtype, reduction)


def assert_as_close_as_torch(ours, truth, in_dtype, tolerance):
    for name, our, true, other in zip(("loss", "gradient"), ours, truth, in_dtype, strict=True):
        assert our.shape == true.shape
        if true.numel():
            allowed = (other - true).abs().max() + tolerance * true.abs().max().clamp(min=1)
            assert (our - true).abs().max() <= allowed, f"{name}: {(our - true).abs().max():.3e} > {allowed:.3e}"


def problem(rows=6, hidden_size=5, vocabulary=7, dtype=torch.float32, device="cpu", **case):
    return spec.make_inputs(spec.Case("test", rows, hidden_size, vocabulary, dtype, **case), device)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("option", spec.OPTIONS)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_AND_DTYPE, ids=str)
def test_every_option_is_as_close_to_float64_as_torch(backend, dtype, option, reduction):
    case = spec.Case(option, 21, 24, 101, dtype, **spec.OPTIONS[option])
    inputs, options = spec.make_inputs(case)
    truth = pulled_back(definition(torch.float64, reduction), *doubled((inputs, options)))
    in_dtype = pulled_back(definition(dtype, reduction), inputs, options)
    inputs, options = on(DEVICES[backend], (inputs, options))
    for budget in (2**29, SOME_ROWS_AT_A_TIME):
        run = op(reduction=reduction, max_workspace_bytes=budget, backend=backend)
        ours = pulled_back(run, inputs, options)
        assert_as_close_as_torch(ours, truth, in_dtype, spec.TOLERANCES[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("option", ["plain", "all_hidden", "all_statistics"])
def test_listed_rows_are_the_rows_that_are_found(backend, option):
    case = spec.Case(option, 19, 8, 33, **spec.OPTIONS[option])
    inputs, options = on(DEVICES[backend], spec.make_inputs(case))
    hidden, weight, targets, weights = inputs
    rows = (targets != -100).nonzero().squeeze(1)
    taught = options.get("teacher")
    listed = dict(options, rows=rows)
    if taught is not None:
        short = [x[rows] for x in taught] if isinstance(taught, tuple) else taught[rows]
        listed["teacher"] = TeacherStatistics(*short) if isinstance(taught, tuple) else short
    for reduction in ("mean", "none"):
        run = op(reduction=reduction, backend=backend)
        found, given_ = (pulled_back(run, inputs, o) for o in (options, listed))
        reference = pulled_back(op(reduction=reduction, backend="reference"), inputs, listed)
        for a, b, c in zip(found, given_, reference, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, c, rtol=2e-5, atol=2e-6)
    # Rows left out of the list are left out of the loss, whatever they hold.
    if taught is None:
        hidden = hidden.clone()
        hidden[rows[3:]] = math.nan
        loss, gradient = pulled_back(
            op(backend=backend),
            (hidden, weight, targets, weights),
            dict(options, rows=rows[:3]),
        )
        assert loss.isfinite() and gradient.isfinite().all() and not gradient[rows[3:].cpu()].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_do_not_count_pass_no_nan(backend):
    """Listed or not: ignored targets, weights of 0, and a teacher that holds NaN there."""
    (hidden, weight, targets, weights), options = problem(8, 6, 11, ignored=0.0, teacher="hidden")
    options["kl_weight"] = 0.5
    hidden[[0, 3]] = math.nan
    options["teacher"][[0, 3]] = math.nan
    targets[0], weights[3] = -100, 0.0
    inputs, options = on(DEVICES[backend], ((hidden, weight, targets, weights), options))
    keep = torch.tensor([1, 2, 4, 5, 6, 7])
    for rows in (None, torch.arange(8, device=DEVICES[backend])):
        loss, gradient = pulled_back(op(backend=backend), inputs, dict(options, rows=rows))
        assert loss.isfinite() and gradient.isfinite().all()
        assert not gradient[[0, 3]].any() and gradient[keep].abs().sum(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 5])
def test_no_row_counts_is_zero_with_zero_gradient(backend, reduction, rows):
    inputs, options = on(DEVICES[backend], problem(rows, 6, 11, ignored=1.0, teacher="hidden"))
    options["kl_weight"] = 0.5
    for extra in ({}, {"rows": torch.arange(rows, device=DEVICES[backend])}):
        for denominator in (None, (0.0, 0.0)) if reduction == "mean" else (None,):
            run = op(reduction=reduction, denominator=denominator, backend=backend)
            loss, gradient = pulled_back(run, inputs, options | extra)
            assert loss.isfinite().all() and not loss.any() and gradient.shape == (rows, 6) and not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_stats_equal_the_definition(backend):
    case = spec.Case("stats", 30, 16, 7, **spec.OPTIONS["kl_hidden"])
    inputs, options = spec.make_inputs(case)
    truth = spec.definition_rows(*doubled((inputs, options)), torch.float64)
    counted = truth["counted"]
    inputs, options = on(DEVICES[backend], (inputs, options))
    for kl_weight in (0.5, 0.0):
        _, stats = linear_cross_entropy(
            *inputs, return_stats=True, backend=backend, **options | {"kl_weight": kl_weight}
        )
        for ours, name in ((stats.lse, "lse"), (-stats.log_prob, "nll"), (stats.entropy, "entropy"), (stats.kl, "kl")):
            expected = torch.where(counted, truth[name], 0)
            torch.testing.assert_close(ours.cpu().double(), expected, rtol=1e-5, atol=2e-6)
        correct = counted & (truth["z"].argmax(-1) == inputs[2].cpu())
        assert torch.equal(stats.correct.cpu(), correct) and correct.any() and not correct.all()
        assert torch.equal(stats.counted.cpu(), counted)
    _, stats = linear_cross_entropy(*inputs, return_stats=True, backend=backend)
    assert stats.kl is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_one_hot_rows_and_a_teacher_equal_to_the_student(backend):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 4, generator=generator)
    weight = torch.randn(9, 4, generator=generator) * 3000  # logits up to about 1e4: the softmax is one-hot
    targets = torch.tensor([0, 1, 2, 3, 4, 5])
    targets[:3] = (hidden[:3] @ weight.T).argmax(-1)  # p_y = 1 in these rows
    statistics = teacher_statistics(hidden, weight)
    inputs = on(DEVICES[backend], (hidden, weight, targets))
    for teacher, kl_weight in ((None, 0.0), (hidden, 1.0), (statistics, 1.0)):
        extra = {"teacher": on(DEVICES[backend], teacher), "kl_weight": kl_weight}
        truth = pulled_back(
            lambda i, o: F.cross_entropy(i[0] @ i[1].T, i[2], reduction="none"), doubled((hidden, weight, targets)), {}
        )
        loss, gradient = pulled_back(op(reduction="none", backend=backend), inputs, extra)
        # Logits of 1e4 carry 1e-3 of rounding in float32; the divergence from itself adds nothing.
        torch.testing.assert_close(loss, truth[0], rtol=1e-6, atol=5e-3)
        torch.testing.assert_close(gradient, truth[1], rtol=1e-4, atol=1e-1)
        assert not loss[:3].abs().gt(5e-3).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", [None, "hidden", "statistics"])
def test_denominators_make_micro_batches_add_up_to_the_whole(backend, teacher):
    inputs, options = on(DEVICES[backend], problem(11, 6, 13, teacher=teacher))
    options["kl_weight"] = 0.7 * bool(teacher)
    hidden, weight, targets, weights = inputs
    counted = targets != -100
    total = weights[counted].sum()
    run = op(backend=backend)
    whole = pulled_back(run, inputs, options)
    parts = []
    for rows in (slice(0, 2), slice(2, 5), slice(5, 11)):  # the first holds ignored rows alone
        part = dict(options, denominator=(total, float(counted.sum())) if teacher else total.item())
        if teacher == "hidden":
            part["teacher"] = options["teacher"][rows]
        elif teacher:
            part["teacher"] = TeacherStatistics(*(x[rows] for x in options["teacher"]))
        parts.append(pulled_back(run, (hidden[rows], weight, targets[rows], weights[rows]), part))
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in parts]), whole[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_is_bit_equal_and_so_is_a_second_backward(backend):
    inputs, options = on(DEVICES[backend], problem(29, 16, 70, teacher="hidden", options={"kl_weight": 0.5}))
    results = []
    for _ in range(2):
        hidden = inputs[0].clone().requires_grad_()
        loss = linear_cross_entropy(hidden, *inputs[1:], backend=backend, **options)
        first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(loss, hidden)[0])
        results.append((loss.detach(), first))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_is_computed_where_none_is_wanted(backend):
    inputs, options = on(DEVICES[backend], problem())
    hidden = inputs[0].requires_grad_()
    with torch.no_grad():
        assert not linear_cross_entropy(*inputs, backend=backend, **options).requires_grad
    arguments = (*inputs, *(None,) * 3, [], None, None, -100, 0.0, 0.0, None, 0.0, "mean", torch.float32, 2**29, True)
    loss, gradient, *_ = torch.ops.dive_fast.linear_cross_entropy(*arguments, False, False, backend)
    assert gradient.shape[0] == 0
    with pytest.raises(RuntimeError, match="needs_gradient=False"):
        loss.backward()
    assert hidden.grad is None


def test_autocast_changes_nothing():
    inputs, options = problem(20, 16, 40)
    exact = pulled_back(op(backend="native"), inputs, options)
    with torch.autocast("cpu", torch.bfloat16):
        ours = pulled_back(op(backend="native"), inputs, options)
    assert all(map(torch.equal, ours, exact))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape_weights_and_ignored_rows(backend, data):
    rows, hidden_size, vocabulary = (data.draw(st.integers(low, high)) for low, high in ((0, 9), (1, 40), (1, 50)))
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.0]), min_size=rows, max_size=rows))
    targets = data.draw(st.lists(st.integers(-1, vocabulary - 1), min_size=rows, max_size=rows))
    options = {name: data.draw(st.sampled_from([0.0, 0.3])) for name in ("label_smoothing", "z_loss")}
    budget = data.draw(st.sampled_from([2**29, 4 * vocabulary * 3, 1]))
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    hidden, weight = (torch.randn(n, hidden_size, generator=generator) for n in (rows, vocabulary))
    targets = torch.tensor([t if t >= 0 else -100 for t in targets], dtype=torch.int64)
    inputs = (hidden, weight, targets, torch.tensor(weights))
    truth = pulled_back(definition(torch.float64, reduction), *doubled((inputs, options)))
    in_dtype = pulled_back(definition(torch.float32, reduction), inputs, options)
    run = op(reduction=reduction, max_workspace_bytes=budget, backend=backend)
    ours = pulled_back(run, on(DEVICES[backend], inputs), options)
    assert_as_close_as_torch(ours, truth, in_dtype, spec.TOLERANCES[torch.float32])


# -- what wraps the op -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", [None, "hidden", "statistics"])
@pytest.mark.parametrize("listed", [False, True])
def test_opcheck(teacher, listed):
    (hidden, weight, targets, weights), options = problem(9, 6, 13, teacher=teacher)
    taught = options.get("teacher")
    taught = [] if taught is None else list(taught) if isinstance(taught, tuple) else [taught]
    rows = None
    if listed:
        rows = (targets != -100).nonzero().squeeze(1)
        taught = [x[rows] for x in taught]
    for reduction, stats in itertools.product(("mean", "none"), (False, True)):
        arguments = (hidden.clone().requires_grad_(), weight, targets, weights, rows, None, None, taught, None, None)
        options_ = (-100, 0.1, 0.0, None, 0.5 * bool(taught), reduction, torch.float32, 2**29, True, True, stats)
        torch.library.opcheck(torch.ops.dive_fast.linear_cross_entropy.default, (*arguments, *options_, "native"))
    gradient, scale = torch.randn(6, 5), torch.rand(6)
    backward = torch.ops.dive_fast.linear_cross_entropy_backward.default
    torch.library.opcheck(backward, (gradient, scale, torch.tensor(2.0), torch.tensor([0, 2, 3, 5, 7, 8]), 9))
    torch.library.opcheck(backward, (gradient, scale, torch.rand(6), None, 6))


@pytest.mark.parametrize("case", ["plain", "kl_statistics", "kl_hidden", "listed"])
def test_compiles_as_one_graph(case):
    inputs, options = problem(12, 6, 13, **spec.OPTIONS.get(case, {}))
    if case == "listed":
        options["rows"] = (inputs[2] != -100).nonzero().squeeze(1)

    def function(i, o):
        states = torch.tanh(i[0])
        return linear_cross_entropy(
            states, *i[1:], denominator=(3.0, 4.0) if o.get("teacher") is not None else 3.0, **o
        )

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager = pulled_back(function, inputs, options)
    for ignored in (0, 5):  # other rows count at the second call
        inputs[2][:ignored] = -100 if case != "listed" else inputs[2][:ignored]
        eager = pulled_back(function, inputs, options)
        assert all(map(torch.equal, pulled_back(compiled, inputs, options), eager))


def test_compiles_with_changing_numbers_of_rows():
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (12, 7, 30):
        inputs, options = problem(rows, 6, 13)
        ours = pulled_back(lambda i, o: compiled(*i, **o), inputs, options)
        assert all(map(torch.equal, ours, pulled_back(op(), inputs, options)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_works_under_activation_checkpointing(reentrant):
    inputs, options = problem(12, 6, 13)

    def function(hidden, wrap):
        return wrap(lambda h: linear_cross_entropy(torch.tanh(h), *inputs[1:], **options), hidden)

    wrapped = partial(checkpoint, use_reentrant=reentrant)
    plain = pulled_back(lambda i, o: function(i[0], lambda f, h: f(h)), inputs, options)
    assert all(map(torch.equal, pulled_back(lambda i, o: function(i[0], wrapped), inputs, options), plain))


class Steered(nn.Module):
    """A trained layer under a frozen head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(6, 6)
        self.lm_head = nn.Linear(6, 13, bias=False).requires_grad_(False)

    def forward(self, x, targets, denominator):
        return linear_cross_entropy(self.layer(x), self.lm_head.weight, targets, denominator=denominator)


def _train_share(rank, world, wrap, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        x, targets, denominator = _shared_batch()
        model = Steered()
        if wrap == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (world,))
            if wrap == "fsdp2":  # the head stays replicated: only the trained layer is sharded
                fully_shard(model.layer, mesh=mesh)
            else:
                fully_shard(model.lm_head, mesh=mesh)
        rows = slice(rank * 4, rank * 4 + 4)
        if wrap == "sharded head":
            try:
                model(x[rows], targets[rows], denominator)
            except InputError as error:
                results[rank] = str(error)
            return
        # Both average the gradients over the processes.
        (world * model(x[rows], targets[rows], denominator)).backward()
        layer = model.module.layer if wrap == "ddp" else model.layer
        gradient = layer.weight.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        results[rank] = gradient.clone()
    finally:
        dist.destroy_process_group()


def _shared_batch():
    generator = torch.Generator().manual_seed(0)
    x, targets = torch.randn(8, 6, generator=generator), torch.randint(13, (8,), generator=generator)
    targets[[0, 1, 2, 6]] = -100  # one process has a single row that counts
    return x, targets, 4.0


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2", "sharded head"])
def test_data_parallel_training(wrap, unused_port):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_train_share, (2, wrap, unused_port, results), nprocs=2)
        results = dict(results)
    if wrap == "sharded head":
        assert all("weight: expected a plain tensor, got a sharded DTensor" in results[rank] for rank in (0, 1))
        return
    alone = Steered()
    alone(*_shared_batch()).backward()
    for rank in (0, 1):
        torch.testing.assert_close(results[rank], alone.layer.weight.grad, rtol=1e-5, atol=1e-7)


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


# -- which backend -----------------------------------------------------------------------------------------------------


def test_the_budget_selects_the_form_on_a_gpu(monkeypatch):
    monkeypatch.setattr(library, "select_backend", lambda op, requested, device: requested or "triton")
    hidden, vocabulary = torch.zeros(1, 4), 1000
    choose = partial(library._choose_backend, None, hidden)
    assert choose(10_000, 4 * vocabulary * 128, vocabulary) == "triton"
    assert choose(10_000, 4 * vocabulary * 127, vocabulary) == "triton-streaming"
    assert choose(100, 4 * vocabulary * 100, vocabulary) == "triton"  # all rows fit
    assert library._choose_backend(None, hidden.double(), 10_000, 1, vocabulary) == "triton"
    assert library._choose_backend("triton", hidden, 10_000, 1, vocabulary) == "triton"


def test_a_trained_head_goes_to_the_reference_and_the_others_refuse_it():
    (hidden, weight, targets, weights), _ = problem()
    weight.requires_grad_()
    linear_cross_entropy(hidden, weight, targets, weights).backward()
    assert weight.grad is not None
    with pytest.raises(InputError, match="frozen head"):
        linear_cross_entropy(hidden, weight, targets, weights, backend="native")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "triton-streaming"])
@pytest.mark.parametrize("option", ["plain", "all_hidden", "all_statistics"])
def test_nothing_waits_for_the_gpu(backend, option):
    case = spec.Case(option, 300, 64, 1000, torch.bfloat16, **spec.OPTIONS[option])
    (hidden, weight, targets, weights), options = spec.make_inputs(case)
    rows = (targets != -100).nonzero().squeeze(1)
    taught = options.get("teacher")
    if taught is not None:
        options["teacher"] = (
            TeacherStatistics(*(x[rows] for x in taught)) if isinstance(taught, tuple) else taught[rows]
        )
    hidden, weight, targets, weights, rows, options = on("cuda", (hidden, weight, targets, weights, rows, options))
    hidden.requires_grad_()

    def step():
        linear_cross_entropy(hidden, weight, targets, weights, rows=rows, backend=backend, **options).backward()

    step()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        with pytest.raises(RuntimeError):  # the check itself works: without the list the op has to wait
            linear_cross_entropy(hidden, weight, targets, weights, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_values_on_a_gpu_are_looked_at_only_when_asked():
    (hidden, weight, targets, weights), _ = on("cuda", problem(ignored=0.0))
    targets[2] = 7
    assert linear_cross_entropy(hidden, weight, targets, weights).isnan()
    with pytest.raises(InputError, match="got 7 in row 2"):
        linear_cross_entropy(hidden, weight, targets, weights, check_values=True)
