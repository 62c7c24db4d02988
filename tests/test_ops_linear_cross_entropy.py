"""linear_cross_entropy and teacher_statistics against float64 formulas, torch's own losses, and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from dive_fast.ops import LossStats, TeacherStatistics, linear_cross_entropy, teacher_statistics
from dive_fast.ops.linear_cross_entropy import spec

ONE_ROW_AT_A_TIME = 1
SOME_ROWS_AT_A_TIME = 2**14


def leaves(inputs, options):
    """Copies of inputs and options that require gradients where the op gives them (a frozen head with statistics)."""
    frozen = isinstance(options.get("teacher"), TeacherStatistics)
    hidden, weight = inputs[0].clone().requires_grad_(), inputs[1].clone().requires_grad_(not frozen)
    options = dict(options)
    wanted = {"hidden": hidden} | ({} if frozen else {"weight": weight})
    if options.get("bias") is not None:
        options["bias"] = options["bias"].clone().requires_grad_(not frozen)
        wanted |= {} if frozen else {"bias": options["bias"]}
    return (hidden, weight, *inputs[2:]), options, wanted


def loss_and_gradients(function, inputs, options):
    """{"loss", "hidden", "weight", "bias"} in float64, the loss pulled back with a different factor per row."""
    inputs, options, wanted = leaves(inputs, options)
    loss = function(inputs, options)
    upstream = torch.linspace(0.5, 1.5, max(loss.numel(), 1), dtype=loss.dtype)[: loss.numel()].reshape(loss.shape)
    gradients = torch.autograd.grad(loss, list(wanted.values()), upstream)
    return {"loss": loss.double()} | {name: g.double() for name, g in zip(wanted, gradients, strict=True)}


def assert_as_close_as_torch(ours, truth, torch_in_dtype, tolerance):
    """|ours - float64| <= |torch in that dtype - float64| + tolerance, at the largest element."""
    for name, true in truth.items():
        if true.numel() == 0:
            assert ours[name].shape == true.shape
            continue
        allowed = (torch_in_dtype[name] - true).abs().max() + tolerance * true.abs().max().clamp(min=1)
        error = (ours[name] - true).abs().max()
        assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}"


def doubled(*trees):
    """The same numbers in float64."""
    return tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, trees)


def problem(rows=6, hidden_size=5, vocabulary=7, dtype=torch.float32, **case):
    return spec.make_inputs(spec.Case("test", rows, hidden_size, vocabulary, dtype, **case))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", spec.TEST_CASES, ids=lambda case: case.name)
def test_loss_and_gradients_are_as_close_to_float64_as_torch(case, reduction):
    inputs, options = spec.make_inputs(case)
    # Truth and torch see the same rounded inputs as the op; only the arithmetic differs.
    truth = loss_and_gradients(
        lambda i, o: spec.definition_loss(i, o, torch.float64, reduction), *doubled(inputs, options)
    )
    in_dtype = loss_and_gradients(lambda i, o: spec.definition_loss(i, o, case.dtype, reduction), inputs, options)
    for budget in (2**29, SOME_ROWS_AT_A_TIME):
        ours = loss_and_gradients(
            lambda i, o, b=budget: linear_cross_entropy(*i, reduction=reduction, max_workspace_bytes=b, **o),
            inputs,
            options,
        )
        assert_as_close_as_torch(ours, truth, in_dtype, spec.TOLERANCES[case.dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_logits_dtype_decides_the_error_of_half_precision(dtype):
    inputs, options = problem(40, 64, 300, dtype)
    truth = spec.definition_rows(inputs, options, torch.float64)
    true_rows = torch.where(truth["counted"], truth["w"] * truth["ce"], 0)
    options = options | {"reduction": "none", "backend": "reference"}
    rows = linear_cross_entropy(*inputs, **options)
    half = linear_cross_entropy(*inputs, logits_dtype=dtype, **options)
    assert rows.dtype == half.dtype == torch.float32
    assert (rows - true_rows).abs().max() < 1e-5 < (half - true_rows).abs().max()


def test_a_trained_half_precision_head_rounds_its_gradient_once():
    inputs, options = problem(300, 8, 5, torch.bfloat16)
    truth = loss_and_gradients(lambda i, o: spec.definition_loss(i, o, torch.float64, "sum"), *doubled(inputs, options))
    ours = loss_and_gradients(
        lambda i, o: linear_cross_entropy(*i, reduction="sum", max_workspace_bytes=ONE_ROW_AT_A_TIME, **o),
        inputs,
        options,
    )
    # bfloat16 has 8 significant bits: rounding once moves a value by at most 2**-8 of itself.
    torch.testing.assert_close(ours["weight"], truth["weight"], rtol=1.01 * 2**-8, atol=1e-4)
    mixed = linear_cross_entropy(inputs[0], inputs[1].float(), *inputs[2:], reduction="sum")
    torch.testing.assert_close(mixed.double(), truth["loss"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("token_weights", [None, "ones"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(1, 8, 5), (37, 64, 1001), (300, 96, 515), (2000, 16, 50)], ids=str)
def test_equals_torch_cross_entropy_to_the_last_bit(shape, reduction, token_weights):
    rows, hidden_size, vocabulary = shape
    (hidden, weight, targets, _), _ = problem(rows, hidden_size, vocabulary, ignored=0.0)
    weights = None if token_weights is None else torch.ones(rows)
    for bias in (None, torch.linspace(-1, 1, vocabulary)):
        ours_in, theirs_in = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
        ours = linear_cross_entropy(*ours_in, targets, weights, bias=bias, reduction=reduction, backend="reference")
        head = theirs_in[0] @ theirs_in[1].T if bias is None else F.linear(*theirs_in, bias)
        theirs = F.cross_entropy(head, targets, reduction=reduction)
        assert torch.equal(ours, theirs)
        ours.sum().backward()
        theirs.sum().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours_in, theirs_in, strict=True))


def test_ignored_rows_and_smoothing_agree_with_torch():
    (hidden, weight, targets, _), _ = problem(50, 16, 33, torch.float64, ignored=0.4)
    for reduction in ("mean", "sum", "none"):
        settings_ = {"label_smoothing": 0.2, "reduction": reduction}
        ours = linear_cross_entropy(hidden, weight, targets, **settings_)
        torch.testing.assert_close(ours, F.cross_entropy(hidden @ weight.T, targets, **settings_), rtol=1e-13, atol=0)
    # A class of the vocabulary may serve as ignore_index.
    targets = targets.clamp(min=0)
    ours = linear_cross_entropy(hidden, weight, targets, ignore_index=3)
    torch.testing.assert_close(ours, F.cross_entropy(hidden @ weight.T, targets, ignore_index=3), rtol=1e-13, atol=0)


def test_hand_calculation():
    # Two tokens with logits (0, log 3): probabilities 1/4 and 3/4; weights 1 and 3.
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    hidden = torch.ones(2, 1, dtype=torch.float64)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 1]), torch.tensor([1.0, 3.0]), z_loss=0.5)
    z = 0.5 * math.log(4) ** 2
    assert loss.item() == pytest.approx((math.log(4) + 3 * math.log(4 / 3)) / 4 + z, rel=1e-15)


@pytest.mark.parametrize(("reduction", "budget"), [("mean", ONE_ROW_AT_A_TIME), ("none", 2**29)], ids=["mean", "none"])
@pytest.mark.parametrize("option", spec.OPTIONS)
def test_gradcheck(option, reduction, budget):
    case = spec.Case(option, 4, 3, 5, torch.float64, **spec.OPTIONS[option])
    inputs, options, wanted = leaves(*spec.make_inputs(case))
    if options.get("teacher") is not None:
        # Finite differences in the head would move the teacher too, through which no gradient flows.
        wanted = {"hidden": wanted["hidden"]}

    def function(hidden, weight=inputs[1], *bias):
        extra = {"bias": bias[0]} if bias else {}
        return linear_cross_entropy(
            hidden, weight, *inputs[2:], reduction=reduction, max_workspace_bytes=budget, **options | extra
        )

    assert torch.autograd.gradcheck(function, tuple(wanted.values()))


@pytest.mark.parametrize("how", ["target", "weight"])
@pytest.mark.parametrize("option", ["plain", "all_hidden", "all_statistics"])
def test_rows_that_do_not_count_may_hold_nan(option, how):
    case = spec.Case(option, 8, 6, 11, ignored=0.0, **spec.OPTIONS[option])
    (hidden, weight, targets, weights), options = spec.make_inputs(case)
    teacher = options.get("teacher")
    keep = torch.tensor([False, True, True, False, True, False, True, True])
    short = {}
    if teacher is not None:
        short["teacher"] = type(teacher)(*(x[keep] for x in teacher)) if option == "all_statistics" else teacher[keep]
    expected = linear_cross_entropy(hidden[keep], weight, targets[keep], weights[keep], **options | short)
    hidden, weight = hidden.clone().masked_fill(~keep[:, None], math.nan).requires_grad_(), weight.clone()
    weight.requires_grad_(option != "all_statistics")
    if teacher is not None:
        for poisoned in teacher if isinstance(teacher, tuple) else (teacher,):
            poisoned[~keep] = math.nan if poisoned.is_floating_point() else 0
    if how == "target":
        targets = targets.masked_fill(~keep, -100)
    else:
        weights = weights.masked_fill(~keep, 0.0)
    loss, stats = linear_cross_entropy(hidden, weight, targets, weights, return_stats=True, **options)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert torch.equal(stats.counted, keep)
    assert all(not figure[~keep].any() for figure in stats if figure is not None)
    assert not hidden.grad[~keep].any() and hidden.grad[keep].abs().sum(-1).all()
    assert weight.grad is None or weight.grad.isfinite().all()


@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("option", ["plain", "all_hidden"])
def test_no_row_counts_is_zero_with_zero_gradients(option, reduction, rows):
    case = spec.Case(option, rows, 6, 11, ignored=1.0, **spec.OPTIONS[option])
    inputs, options, wanted = leaves(*spec.make_inputs(case))
    for extra in ({}, {"denominator": (0, 0) if option == "all_hidden" else 0} if reduction == "mean" else {}):
        loss, stats = linear_cross_entropy(*inputs, reduction=reduction, return_stats=True, **options, **extra)
        assert loss.requires_grad and loss.shape == (() if reduction != "none" else (rows,)) and not loss.any()
        gradients = torch.autograd.grad(loss.sum(), list(wanted.values()))
        assert all(torch.equal(g, torch.zeros_like(x)) for g, x in zip(gradients, wanted.values(), strict=True))
        assert not stats.counted.any()


def test_leading_shapes_and_strides_do_not_matter():
    (hidden, weight, targets, weights), options = problem(12, 6, 11, bias=True)
    expected = linear_cross_entropy(hidden, weight, targets, weights, reduction="none", **options)
    shaped = [x.reshape(3, 4, *x.shape[1:]).transpose(0, 1) for x in (hidden, targets, weights)]
    strided_weight = torch.randn(6, 22)[:, ::2].copy_(weight.T).T
    strided_bias = torch.randn(22)[::2].copy_(options["bias"])
    assert not any(x.is_contiguous() for x in (*shaped, strided_weight, strided_bias))
    rows, stats = linear_cross_entropy(
        shaped[0], strided_weight, shaped[1], shaped[2], bias=strided_bias, reduction="none", return_stats=True
    )
    assert rows.shape == (4, 3) and all(figure is None or figure.shape == (4, 3) for figure in stats)
    torch.testing.assert_close(rows.transpose(0, 1).reshape(-1), expected, rtol=1e-6, atol=1e-6)
    single = linear_cross_entropy(hidden[9], weight, targets[9], weights[9], reduction="none", **options)
    assert single.shape == ()
    torch.testing.assert_close(single, expected[9], rtol=1e-6, atol=1e-6)


def test_statistics_and_both_kl_forms_agree_with_kl_div():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 9, 12, dtype=torch.float64)
    weight, bias = torch.randn(31, 12, dtype=torch.float64), torch.randn(31, dtype=torch.float64)
    targets = torch.randint(31, (2, 9))
    for b in (None, bias, bias.clone().index_fill_(0, torch.tensor([4, 30]), -math.inf)):
        if b is not None and b.isinf().any():
            targets = torch.full((2, 9), 7)
        log_p, log_q = (F.linear(x, weight, b).log_softmax(-1) for x in (student, teacher))
        seen = torch.ones(31, dtype=torch.bool) if b is None else b.isfinite()
        expected = F.kl_div(log_p[..., seen], log_q[..., seen], log_target=True, reduction="none").sum(-1)
        cached = teacher_statistics(teacher, weight, bias=b, top_k=0, max_workspace_bytes=3 * 31 * 8 * 4)
        assert isinstance(cached, TeacherStatistics)
        torch.testing.assert_close(cached.tail_mean_weight, log_q.exp() @ weight, rtol=1e-12, atol=1e-13)
        some, every = (teacher_statistics(teacher, weight, bias=b, top_k=k) for k in (4, 64))
        assert some.top_indices.shape == (2, 9, 4) and every.top_indices.shape == (2, 9, 31)
        assert torch.equal(some.top_indices.long(), log_q.topk(4).indices) and not every.tail_mean_weight.any()
        gradients = []
        for form in (teacher, cached, some, every):
            h = student.clone().requires_grad_()
            settings_ = {"bias": b, "teacher": form, "kl_weight": 0.5, "return_stats": True}
            _, stats = linear_cross_entropy(h, weight, targets, **settings_)
            torch.testing.assert_close(stats.kl, expected, rtol=1e-12, atol=1e-13)
            loss = linear_cross_entropy(h, weight, targets, **settings_ | {"return_stats": False})
            gradients.append(torch.autograd.grad(loss, h)[0])
            nll = F.cross_entropy(F.linear(student, weight, b).flatten(0, 1), targets.flatten())
            torch.testing.assert_close(loss, nll + 0.5 * expected.mean(), rtol=1e-12, atol=0)
        for gradient in gradients[1:]:
            torch.testing.assert_close(gradients[0], gradient, rtol=1e-11, atol=1e-13)
        assert stats.entropy.isfinite().all()


def test_teacher_gets_no_gradient_and_itself_has_no_divergence():
    (hidden, weight, targets, _), _ = problem(6, 5, 7, ignored=0.0)
    teacher = hidden.flip(0).requires_grad_()
    weight.requires_grad_()
    plain = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), weight)[0]
    loss = linear_cross_entropy(hidden, weight, targets, teacher=teacher, kl_weight=1.0)
    pulled = torch.autograd.grad(loss, (weight, teacher), allow_unused=True)
    assert pulled[1] is None and not torch.allclose(pulled[0], plain)
    _, stats = linear_cross_entropy(hidden, weight, targets, teacher=hidden, return_stats=True)
    assert not stats.kl.any()
    assert teacher_statistics(hidden.bfloat16(), weight.bfloat16()).tail_mean_weight.dtype == torch.float32
    assert not any(figure.requires_grad for figure in teacher_statistics(teacher, weight))


def test_stats_are_the_rows_figures():
    inputs, options = problem(30, 16, 3, torch.float64, teacher="hidden", options={"softcap": 5.0})
    rows = spec.definition_rows(inputs, options, torch.float64)
    for budget in (2**29, ONE_ROW_AT_A_TIME):
        _, stats = linear_cross_entropy(*inputs, return_stats=True, max_workspace_bytes=budget, **options)
        assert isinstance(stats, LossStats)
        counted = rows["counted"]
        for ours, true in ((stats.lse, "lse"), (-stats.log_prob, "nll"), (stats.entropy, "entropy"), (stats.kl, "kl")):
            torch.testing.assert_close(ours, torch.where(counted, rows[true], 0), rtol=1e-12, atol=1e-12)
        assert torch.equal(stats.correct, counted & (rows["z"].argmax(-1) == inputs[2])) and stats.correct.any()
        assert torch.equal(stats.counted, counted)
    hidden = inputs[0].clone().requires_grad_()
    _, stats = linear_cross_entropy(hidden, *inputs[1:], return_stats=True)
    assert stats.kl is None and not any(x.requires_grad for x in stats if x is not None)


@pytest.mark.parametrize("teacher", [None, "hidden", "statistics"])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_denominators_make_micro_batches_add_up_to_the_whole(teacher, kind):
    inputs, options = problem(11, 6, 13, torch.float64, teacher=teacher, options={"kl_weight": 0.7 * bool(teacher)})
    hidden, weight, targets, weights = inputs
    counted = (targets != -100) & (weights > 0)
    denominator = kind(weights[counted].sum().item())
    if teacher:
        denominator = (denominator, kind(float(counted.sum())))
    whole = loss_and_gradients(lambda i, o: linear_cross_entropy(*i, **o), inputs, options)
    parts = []
    # The first part holds ignored rows alone.
    for rows in (slice(0, 2), slice(2, 5), slice(5, 11)):
        part = dict(options, denominator=denominator)
        if teacher == "hidden":
            part["teacher"] = options["teacher"][rows]
        elif teacher:
            part["teacher"] = TeacherStatistics(*(x[rows] for x in options["teacher"]))
        cut = (hidden[rows], weight, targets[rows], weights[rows])
        parts.append(loss_and_gradients(lambda i, o: linear_cross_entropy(*i, **o), cut, part))
    torch.testing.assert_close(sum(p["loss"] for p in parts), whole["loss"], rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([p["hidden"] for p in parts]), whole["hidden"], rtol=1e-12, atol=1e-15)
    if teacher != "statistics":
        torch.testing.assert_close(sum(p["weight"] for p in parts), whole["weight"], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("budget", [2**29, ONE_ROW_AT_A_TIME])
def test_a_second_backward_gives_the_same_gradients(budget):
    inputs, options = problem(9, 6, 13, bias=True, teacher="hidden", options={"kl_weight": 0.5, "z_loss": 0.1})
    inputs, options, wanted = leaves(inputs, options)
    loss = linear_cross_entropy(*inputs, max_workspace_bytes=budget, **options)
    first = torch.autograd.grad(loss, list(wanted.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(wanted.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_frozen_head_gets_no_gradient_and_autocast_does_not_round():
    (hidden, weight, targets, weights), _ = problem()
    hidden.requires_grad_()
    exact = linear_cross_entropy(hidden, weight, targets, weights, max_workspace_bytes=ONE_ROW_AT_A_TIME)
    (gradient,) = torch.autograd.grad(exact, hidden)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, weights, max_workspace_bytes=ONE_ROW_AT_A_TIME)
    loss.backward()
    assert torch.equal(loss, exact) and torch.equal(hidden.grad, gradient) and weight.grad is None


class LiveBuffers(TorchDispatchMode):
    """The largest, and the most bytes alive at once, among tensors whose last dimension is the vocabulary."""

    def __init__(self, vocabulary, head):
        super().__init__()
        self.vocabulary, self.head = vocabulary, head.untyped_storage().data_ptr()
        self.alive, self.peak, self.most_rows = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[-1] == self.vocabulary:
                storage = value.untyped_storage()
                if storage.data_ptr() != self.head:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self.most_rows = max(self.most_rows, value.shape[0])
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@pytest.mark.parametrize("option", spec.OPTIONS)
def test_live_vocabulary_buffers_fit_the_budget(option):
    rows, vocabulary, budget = 256, 500, 2**17
    case = spec.Case(option, rows, 4, vocabulary, ignored=0.0, **spec.OPTIONS[option])
    (hidden, weight, *rest), options = spec.make_inputs(case)
    hidden.requires_grad_()
    for extra in ({}, {"return_stats": True, "label_smoothing": 0.1}):
        with LiveBuffers(vocabulary, weight) as live:
            loss = linear_cross_entropy(
                hidden, weight, *rest, max_workspace_bytes=budget, backend="reference", **options | extra
            )
            (loss if isinstance(loss, torch.Tensor) else loss[0]).backward()
        assert 0 < live.most_rows < rows / 4
        # At least a quarter used: a budget that is met by working row by row would be no achievement.
        assert budget / 4 < live.peak <= budget
    with LiveBuffers(vocabulary, weight) as live:
        teacher_statistics(hidden, weight, max_workspace_bytes=budget)
    assert budget / 4 < live.peak <= budget


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_weights_and_ignored_rows(data):
    rows, hidden_size, vocabulary = (data.draw(st.integers(low, high)) for low, high in ((0, 9), (1, 6), (1, 12)))
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.0]), min_size=rows, max_size=rows))
    targets = data.draw(st.lists(st.integers(-1, vocabulary - 1), min_size=rows, max_size=rows))
    options = {name: data.draw(st.sampled_from([0.0, 0.3])) for name in ("label_smoothing", "z_loss")}
    budget = data.draw(st.sampled_from([2**29, 8 * vocabulary * 3 * 4, ONE_ROW_AT_A_TIME]))
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    hidden, weight = (torch.randn(n, hidden_size, generator=generator, dtype=torch.float64) for n in (rows, vocabulary))
    targets = torch.tensor([t if t >= 0 else -100 for t in targets], dtype=torch.int64)
    inputs = (hidden, weight, targets, torch.tensor(weights, dtype=torch.float64))
    truth = loss_and_gradients(lambda i, o: spec.definition_loss(i, o, torch.float64, reduction), inputs, options)
    ours = loss_and_gradients(
        lambda i, o: linear_cross_entropy(*i, reduction=reduction, max_workspace_bytes=budget, **o), inputs, options
    )
    for name, true in truth.items():
        torch.testing.assert_close(ours[name], true, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.gpu
def test_cuda_agrees_with_float64_and_poisons_bad_rows():
    inputs, options = problem(37, 24, 101, bias=True, teacher="hidden", options={"kl_weight": 0.5})
    truth = spec.definition_loss(inputs, options, torch.float64, "none")
    inputs = [x.cuda() for x in inputs]
    options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    rows = linear_cross_entropy(*inputs, reduction="none", **options)
    torch.testing.assert_close(rows.cpu().double(), truth, rtol=1e-5, atol=1e-5)
    inputs[2][-1] = 101
    assert linear_cross_entropy(*inputs, **options).isnan()
