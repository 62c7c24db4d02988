"""The CPU kernels of linear_cross_entropy, at every level this machine runs, against float64 formulas."""

import math
import multiprocessing
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dive_fast import native
from dive_fast.ops import TeacherStatistics
from dive_fast.ops.linear_cross_entropy import spec
from dive_fast.ops.linear_cross_entropy.native import row_figures
from dive_fast.ops.linear_cross_entropy.types import RowInputs

ISAS = native.load().cpu.kernel_levels()
ROOMY = 2**30
ONE_PANEL = 1


def make(case, seed=0):
    """(hidden, weight, targets, rows, ce_share, kl_share), options: the rows that count, with shares of both signs."""
    (hidden, weight, targets, _), options = spec.make_inputs(case, seed=seed)
    rows = (targets != -100).nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(seed)
    ce_share = torch.randn(len(rows), generator=generator)
    kl_share = torch.randn(len(rows), generator=generator) if "teacher" in options else None
    options.pop("kl_weight", None)
    return (hidden, weight, targets[rows], rows, ce_share, kl_share), options


def figures(inputs, options, *, isa=ISAS[-1], threads=2, budget=ROOMY, gradient=True, stats=True):
    defaults = {"bias": None, "class_weights": None, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None}
    teacher = {"teacher": None, "teacher_rows": inputs[3] if "teacher" in options else None}
    problem = RowInputs(
        *inputs,
        **(defaults | teacher | options),
        logits_dtype=torch.float32,
        max_workspace_bytes=budget,
        gradient=gradient,
        stats=stats,
    )
    return row_figures(problem, isa=isa, threads=threads)


def definition(inputs, options, dtype):
    """Every figure by `spec.definition_rows` in `dtype` and autograd."""
    hidden, weight, targets, rows, ce_share, kl_share = inputs
    teacher = options.get("teacher")
    if isinstance(teacher, TeacherStatistics):
        options = options | {"teacher": TeacherStatistics(*(x[rows] for x in teacher))}
    elif teacher is not None:
        options = options | {"teacher": teacher[rows]}
    counted = hidden[rows].to(dtype).requires_grad_()
    figures = spec.definition_rows((counted, weight, targets, None), options, dtype)
    loss = (figures["ce"] * ce_share.to(dtype)).sum()
    if kl_share is not None:
        loss = loss + (figures["kl"] * kl_share.to(dtype)).sum()
    (gradient,) = torch.autograd.grad(loss, counted)
    found = {name: figures[name].detach() for name in ("ce", "kl", "lse", "entropy")}
    found["log_prob"] = -figures["nll"].detach()
    return found | {"gradient": gradient, "z": figures["z"].detach()}


def check(inputs, options, **how):
    """|ours - float64| <= |torch in that dtype - float64| + tolerance; row figures are float32 for every dtype."""
    ours = figures(inputs, options, **how)
    dtype = inputs[0].dtype
    truth, in_dtype, in_float32 = (definition(inputs, options, d) for d in (torch.float64, dtype, torch.float32))
    for name in ("ce", "kl", "lse", "log_prob", "entropy", "gradient"):
        if name == "kl" and "teacher" not in options:
            assert ours.kl is None
            continue
        true = truth[name]
        by_torch, tolerance = in_float32[name], spec.TOLERANCES[torch.float32]
        if name == "gradient":
            by_torch, tolerance = in_dtype[name], spec.TOLERANCES[dtype]
            assert ours.gradient.dtype == dtype
        error = (getattr(ours, name).double() - true).abs().max()
        allowed = (by_torch.double() - true).abs().max() + tolerance * true.abs().max().clamp(min=1)
        assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}"
    # Where the two largest logits are as good as equal, rounding may choose.
    two = truth["z"].topk(min(2, truth["z"].shape[1]), -1).values
    clear = two[:, 0] - two[:, -1] > 1e-4 * two[:, 0].abs() if two.shape[1] == 2 else two[:, 0].isfinite()
    assert torch.equal(ours.correct[clear], (truth["z"].argmax(-1) == inputs[2])[clear])
    return ours


def test_the_level_for_bfloat16_is_the_one_that_is_quick_at_it():
    level = native.load().cpu.linear_cross_entropy_level
    float32, bfloat16, float16 = range(3)
    for pair in ((float32, float32), (bfloat16, float32), (float32, bfloat16), (float16, float16)):
        assert level(*pair) == ISAS[-1]
    # AMD's processors multiply pairs of bfloat16 as fast as float32, Intel's in twice the time, unless they have AMX.
    in_pairs = "AMD" in native.load().cpu.brand()
    assert level(bfloat16, bfloat16) == ("avx512" if ISAS[-1] == "avx512_bf16" and not in_pairs else ISAS[-1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", spec.DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("option", spec.OPTIONS)
def test_every_option(option, dtype, isa, poisoned_empty):
    check(*make(spec.Case("", 41, 24, 101, dtype, **spec.OPTIONS[option])), isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("option", ["plain", "all_hidden", "all_statistics"])
@pytest.mark.parametrize("dtype", spec.DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    "rows, hidden_size, vocabulary",
    [(1, 1, 1), (2, 3, 2), (33, 3, 17), (5, 1, 2), (64, 7, 769), (3, 1301, 31), (70, 700, 600)],
)
def test_odd_shapes(rows, hidden_size, vocabulary, dtype, option, isa):
    case = spec.Case("", rows, hidden_size, vocabulary, dtype, ignored=0.0, **spec.OPTIONS[option])
    check(*make(case), isa=isa, threads=3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_dtype", spec.DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dtype", spec.DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_hidden_and_weight_of_different_dtypes(dtype, weight_dtype, isa):
    (hidden, weight, *rest), options = make(spec.Case("", 20, 33, 70, torch.float32, teacher="hidden", bias=True))
    options["teacher"] = options["teacher"].to(dtype)
    options["bias"] = options["bias"].half()
    check((hidden.to(dtype), weight.to(weight_dtype), *rest), options, isa=isa)


@given(
    rows=st.integers(1, 70),
    hidden_size=st.integers(1, 40),
    vocabulary=st.integers(1, 420),
    option=st.sampled_from(sorted(spec.OPTIONS)),
    dtype=st.sampled_from(spec.DTYPES),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 4),
    budget=st.sampled_from([ONE_PANEL, 2**16, ROOMY]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(rows, hidden_size, vocabulary, option, dtype, isa, threads, budget, seed):
    case = spec.Case("", rows, hidden_size, vocabulary, dtype, ignored=0.0, **spec.OPTIONS[option])
    check(*make(case, seed), isa=isa, threads=threads, budget=budget)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_many_blocks_chunks_and_threads(dtype, isa):
    case = spec.Case("", 300, 40, 1500, dtype, ignored=0.1, **spec.OPTIONS["all_statistics"])
    inputs, options = make(case)
    alone = check(inputs, options, isa=isa, threads=1)
    for threads, budget in ((2, ROOMY), (3, ONE_PANEL)):
        again = check(inputs, options, isa=isa, threads=threads, budget=budget)
        torch.testing.assert_close(again, alone)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("option", ["all_hidden", "all_statistics"])
def test_equal_bits_twice(option, threads, isa):
    inputs, options = make(spec.Case("", 70, 24, 1000, torch.bfloat16, **spec.OPTIONS[option]))
    first, second = (figures(inputs, options, isa=isa, threads=threads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("isa", ISAS)
def test_no_rows(isa):
    case = spec.Case("", 7, 24, 101, ignored=1.0, **spec.OPTIONS["all_hidden"])
    ours = figures(*make(case), isa=isa)
    assert ours.gradient.shape == (0, 24)
    assert all(figure.shape[0] == 0 for figure in ours)


def test_only_what_was_asked_for():
    inputs, options = make(spec.Case("", 20, 24, 101))
    ours = figures(inputs, options, gradient=False, stats=False)
    assert ours[1:] == (None,) * 6
    full = figures(inputs, options)
    assert torch.equal(ours.ce, full.ce)
    without_shares = figures((*inputs[:4], None, None), options)
    assert not without_shares.gradient.any()


@pytest.mark.parametrize("isa", ISAS)
def test_rows_with_gaps_and_strides(isa):
    (hidden, weight, targets, _, ce_share, _), options = make(spec.Case("", 9, 30, 50, ignored=0.0))
    wide_hidden, wide_weight = torch.full((9, 40), math.nan), torch.full((50, 37), math.nan)
    wide_hidden[:, 3:33], wide_weight[:, 2:32] = hidden, weight
    rows = torch.tensor([8, 0, 3, 3])
    inputs = (wide_hidden[:, 3:33], wide_weight[:, 2:32], targets[rows], rows, ce_share[:4], None)
    check(inputs, options, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("teacher", ["hidden", "statistics"])
def test_teacher_rows_of_their_own(teacher, isa):
    inputs, options = make(spec.Case("", 40, 24, 101, ignored=0.0, teacher=teacher))
    shuffled = torch.randperm(40)
    moved = options["teacher"]
    moved = type(moved)(*(x[shuffled] for x in moved)) if teacher == "statistics" else moved[shuffled]
    ours = figures(inputs, options | {"teacher": moved, "teacher_rows": shuffled.argsort()}, isa=isa)
    expected = figures(inputs, options, isa=isa)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", spec.DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_large_logits(dtype, isa):
    """About 1e4, and sums of eighths, so that no dtype rounds them: what is left is the softmax's own error."""
    hidden = torch.randint(-150, 151, (40, 24)).float()
    hidden[:, 0] = 1.0
    weight = torch.randint(-64, 65, (700, 24)) / 8
    weight[350:, 1:] = weight[:350, 1:]
    teacher = hidden.clone()
    teacher[:, 0] = -1.0
    logits = hidden @ weight.T
    assert logits.abs().max() > 7e3
    targets = torch.where(torch.arange(40) % 2 == 0, logits.argmax(-1), logits.argmin(-1))
    shares = torch.randn(2, 40)
    inputs = (hidden.to(dtype), weight.to(dtype), targets, torch.arange(40), *shares)
    check(inputs, {"teacher": teacher.to(dtype)}, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("option", ["bias", "kl_hidden", "kl_statistics"])
def test_tokens_that_the_bias_takes_out(option, isa):
    inputs, options = make(spec.Case("", 40, 24, 500, ignored=0.0, **spec.OPTIONS[option] | {"bias": True}))
    options["bias"] = options["bias"].clone()
    options["bias"][torch.randperm(500)[:200]] = -math.inf
    options["bias"][:150] = -math.inf
    options["bias"][inputs[2]] = 0.5
    teacher = options.get("teacher")
    if isinstance(teacher, TeacherStatistics):
        states = torch.randn(40, 24)
        options["teacher"] = spec.statistics(states, inputs[1], options["bias"])
    ours = figures(inputs, options, isa=isa)
    kept = options["bias"] > -math.inf
    position = kept.cumsum(0) - 1
    smaller = dict(options, bias=options["bias"][kept])
    if isinstance(teacher, TeacherStatistics):
        top = options["teacher"].top_indices.long()
        smaller["teacher"] = options["teacher"]._replace(top_indices=position[top].int())
    truth = definition((inputs[0], inputs[1][kept], position[inputs[2]], *inputs[3:]), smaller, torch.float64)
    for name in ("ce", "lse", "entropy", "gradient") + (("kl",) if teacher is not None else ()):
        torch.testing.assert_close(getattr(ours, name).double(), truth[name], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_equal_teacher_has_no_divergence(isa):
    inputs, options = make(spec.Case("", 40, 24, 500, ignored=0.0, teacher="hidden", bias=True))
    hidden, weight, targets, rows, _, kl_share = inputs
    options["teacher"] = hidden.clone()
    ours = figures((hidden, weight, targets, rows, None, kl_share), options, isa=isa)
    assert ours.kl.abs().max() == 0
    assert ours.gradient.abs().max() < 1e-6


@pytest.mark.parametrize("isa", ISAS)
def test_one_hot_rows(isa):
    hidden, weight = torch.eye(8) * 1000, torch.eye(8)
    inputs = (hidden, weight, torch.arange(8), torch.arange(8), torch.ones(8), None)
    ours = figures(inputs, {}, isa=isa)
    assert not ours.ce.any() and not ours.entropy.any() and not ours.gradient.any() and ours.correct.all()
    wrong = figures((hidden, weight, (torch.arange(8) + 1) % 8, *inputs[3:]), {}, isa=isa)
    assert torch.equal(wrong.ce, torch.full((8,), 1000.0)) and not wrong.correct.any()


@pytest.mark.parametrize("isa", ISAS)
def test_first_of_equal_logits_is_the_prediction(isa):
    weight = torch.ones(200, 4)
    targets = torch.tensor([0, 1, 199])
    ours = figures((torch.ones(3, 4), weight, targets, torch.arange(3), torch.ones(3), None), {}, isa=isa, threads=3)
    assert ours.correct.tolist() == [True, False, False]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("option", ["plain", "kl_hidden", "kl_statistics", "smoothing"])
def test_bad_states_make_their_row_nan(option, bad, isa):
    inputs, options = make(spec.Case("", 40, 24, 300, ignored=0.0, **spec.OPTIONS[option]))
    clean = figures(inputs, options, isa=isa)
    hidden = inputs[0].clone()
    hidden[7, 5] = bad
    ours = figures((hidden, *inputs[1:]), options, isa=isa)
    assert ours.ce[7].isnan() and ours.gradient[7].isnan().any()
    others = torch.arange(40) != 7
    assert torch.equal(ours.ce[others], clean.ce[others])
    assert torch.equal(ours.gradient[others], clean.gradient[others])


def test_long_sums():
    """262144 terms: float32 sums of that length are off by 1e-5 and more."""
    case = spec.Case("", 3, 8, 262144, ignored=0.0, bias=True, options={"label_smoothing": 0.1})
    check(*make(case), threads=1)


def test_bad_indices_are_refused():
    inputs, options = make(spec.Case("", 5, 4, 6, ignored=0.0, teacher="statistics"))
    with pytest.raises(ValueError, match="targets"):
        figures((*inputs[:2], inputs[2] + 6, *inputs[3:]), options)
    top = options["teacher"].top_indices + 6
    with pytest.raises(ValueError, match="top_indices"):
        figures(inputs, {"teacher": options["teacher"]._replace(top_indices=top)})
    with pytest.raises(ValueError, match="isa"):
        figures(inputs, options, isa="sse9")


def test_statistics_without_a_top():
    inputs, options = make(spec.Case("", 20, 24, 101, ignored=0.0, **spec.OPTIONS["kl_statistics"]))
    states = torch.randn(20, 24)
    options["teacher"] = spec.statistics(states, inputs[1], None, 0)
    check(inputs, options)


def _forked(queue, inputs, options):
    queue.put(figures(inputs, options, threads=2).ce.tolist())


def test_works_in_a_forked_child():
    inputs, options = make(replace(spec.TEST_CASES[0], vocabulary=500))
    expected = figures(inputs, options, threads=2).ce.tolist()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_forked, args=(queue, inputs, options))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join()
    assert child.exitcode == 0


@pytest.mark.parametrize("isa", ISAS)
def test_sums_over_a_large_vocabulary_stay_as_exact_as_torchs(isa):
    """Blocks are added up, not number to number: a running total of 50 thousand terms loses a digit."""
    check(*make(spec.Case("large", 64, 24, 50_000, ignored=0.0)), isa=isa)
