"""Both Triton forms of the loss against float64: in the interpreter on a CPU, compiled where there is a GPU."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="kernels run in triton or its interpreter")

from dive_fast.ops.checks import accumulation_dtype  # noqa: E402
from dive_fast.ops.linear_cross_entropy import TeacherStatistics, spec  # noqa: E402
from dive_fast.ops.linear_cross_entropy import triton as row_chunked  # noqa: E402
from dive_fast.ops.linear_cross_entropy import triton_streaming as streaming  # noqa: E402
from dive_fast.ops.linear_cross_entropy.types import RowInputs  # noqa: E402

# The interpreter computes masked-out lanes too, with numpy, which warns of their infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = {"triton": row_chunked, "triton-streaming": streaming}
# tl.dot of bfloat16 is wrong in the interpreter.
DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if DEVICE == "cuda" else ())
FORMS_AND_DTYPES = [(form, dtype) for form in FORMS for dtype in DTYPES] + [("triton", torch.float64)]
TOLERANCES = spec.TOLERANCES | {torch.float64: 1e-14}
LARGE_BUDGET = 2**29


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that little problems have several of each, and several vocabulary splits."""
    monkeypatch.setattr(row_chunked, "PLAIN_BLOCK_V", 16)
    monkeypatch.setattr(row_chunked, "OPTIONS_BLOCK_V", 16)
    monkeypatch.setattr(row_chunked, "MAX_BLOCK_K", 4)
    monkeypatch.setattr(streaming, "FULL_TILE", streaming.Tile(16, 16, 16, 4, 1))
    monkeypatch.setattr(streaming, "HALF_TILE", streaming.Tile(16, 16, 16, 4, 1))
    monkeypatch.setattr(streaming, "MAX_BLOCK_K", 4)
    monkeypatch.setattr(streaming, "multiprocessors", lambda device: 6)


def problem(rows=5, hidden_size=24, vocabulary=37, dtype=torch.float32, option="plain", seed=0):
    """(hidden [T, D] with gaps between its rows, weight, targets [N], a shuffled part of the rows [N]) and options."""
    case = spec.Case("test", rows + 3, hidden_size, vocabulary, dtype, ignored=0.0, **spec.OPTIONS[option])
    (hidden, weight, targets, _), options = spec.make_inputs(case, DEVICE, seed)
    hidden = torch.cat([hidden, torch.full_like(hidden[:, :1], math.nan)], 1)[:, :-1]
    order = torch.randperm(rows + 3, generator=torch.Generator().manual_seed(seed))[:rows].to(DEVICE)
    options.pop("kl_weight", None)
    return (hidden, weight, targets[order], order), options


def shares(rows, dtype, with_teacher):
    ce_share = torch.linspace(0.2, 1, rows, device=DEVICE, dtype=dtype)
    return ce_share, 1 - ce_share if with_teacher else None


def run(form, inputs, options, *, budget=LARGE_BUDGET, gradient=True, stats=True, share=None, logits_dtype=None):
    """`row_figures` as a dict, without what was not asked for."""
    hidden, weight, targets, rows = inputs
    accumulate = accumulation_dtype(hidden)
    defaults = {"bias": None, "class_weights": None, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None}
    options = defaults | {"teacher": None} | options
    ce_share, kl_share = share or shares(len(rows), accumulate, options["teacher"] is not None)
    problem = RowInputs(
        hidden,
        weight,
        targets,
        rows,
        ce_share,
        kl_share,
        teacher_rows=None if options["teacher"] is None else rows,
        **options,
        logits_dtype=logits_dtype or accumulate,
        max_workspace_bytes=budget,
        gradient=gradient,
        stats=stats,
    )
    figures = FORMS[form].row_figures(problem)
    return {name: figure for name, figure in figures._asdict().items() if figure is not None}


def definition(inputs, options, dtype):
    """The same figures by `spec`'s formulas in `dtype`, the gradient by autograd."""
    hidden, weight, targets, rows = inputs
    leaf = hidden[rows].to(dtype).requires_grad_()
    options = dict(options)
    teacher = options.get("teacher")
    if isinstance(teacher, TeacherStatistics):
        options["teacher"] = TeacherStatistics(*(table[rows] for table in teacher))
    elif teacher is not None:
        options["teacher"] = teacher[rows]
    figures = spec.definition_rows((leaf, weight, targets, None), options, dtype)
    ce_share, kl_share = shares(len(rows), torch.float64, teacher is not None)
    loss = (ce_share * figures["ce"]).sum()
    if teacher is not None:
        loss = loss + (kl_share * figures["kl"]).sum()
    [gradient] = torch.autograd.grad(loss, leaf)
    names = ("ce", "lse", "entropy") if teacher is None else ("ce", "kl", "lse", "entropy")
    result = {name: figures[name].detach() for name in names}
    return result | {"log_prob": -figures["nll"].detach(), "gradient": gradient, "z": figures["z"].detach()}


def assert_close_to_float64(ours, inputs, options):
    """|ours - float64| <= |torch in the inputs' dtype - float64| + tolerance, at the largest element."""
    dtype = inputs[0].dtype
    truth, in_dtype = (definition(inputs, options, d) for d in (torch.float64, dtype))
    for name in ours.keys() - {"correct"}:
        true = truth[name].double()
        # Logits beyond float16's range leave torch without a number: then only the tolerance is allowed.
        error_of_torch = (in_dtype[name].double() - true).abs().max().nan_to_num(0.0, posinf=0.0)
        allowed = error_of_torch + TOLERANCES[dtype] * true.abs().max().clamp(min=1)
        error = (ours[name].double() - true).abs().max()
        assert error <= allowed, f"{name}: {error:.3e} > {allowed:.3e}"
    if "correct" in ours:
        assert torch.equal(ours["correct"], truth["z"].argmax(1) == inputs[2])


@pytest.mark.parametrize("option", spec.OPTIONS)
@pytest.mark.parametrize(("form", "dtype"), FORMS_AND_DTYPES)
@pytest.mark.usefixtures("small_blocks", "poisoned_empty")
def test_figures_and_gradient_are_as_close_to_float64_as_torch(form, dtype, option):
    inputs, options = problem(18 if form == "triton-streaming" else 5, dtype=dtype, option=option)
    # The small budget: chunks of 2 to 5 rows in the row-chunked form, one split in the other.
    for budget in (LARGE_BUDGET, 1024):
        assert_close_to_float64(run(form, inputs, options, budget=budget), inputs, options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 24, 2), (3, 129, 1), (5, 1, 37), (2, 129, 131)], ids=str)
def test_odd_shapes(form, shape):
    for option in ("plain", "all_hidden", "all_statistics"):
        inputs, options = problem(*shape, option=option)
        assert_close_to_float64(run(form, inputs, options), inputs, options)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    form=st.sampled_from(list(FORMS)),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 18),
    hidden_size=st.integers(1, 40),
    vocabulary=st.integers(1, 70),
    option=st.sampled_from(list(spec.OPTIONS)),
    budget=st.sampled_from([1, 3000, LARGE_BUDGET]),
)
def test_any_shape(small_blocks, form, dtype, rows, hidden_size, vocabulary, option, budget):
    inputs, options = problem(rows, hidden_size, vocabulary, dtype, option)
    assert_close_to_float64(run(form, inputs, options, budget=budget), inputs, options)


@pytest.mark.parametrize("form", FORMS)
def test_no_rows(form):
    inputs, options = problem(0, option="all_statistics")
    figures = run(form, inputs, options)
    assert figures.pop("gradient").shape == (0, 24)
    assert all(figure.shape == (0,) for figure in figures.values())


@pytest.mark.parametrize("option", ["plain", "all_hidden", "all_statistics"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("small_blocks")
def test_what_is_not_asked_for_is_not_computed_and_changes_nothing_else(form, option):
    inputs, options = problem(option=option)
    everything = run(form, inputs, options)
    for gradient, stats in ((False, False), (True, False), (False, True)):
        some = run(form, inputs, options, gradient=gradient, stats=stats)
        assert ("gradient" in some, "lse" in some, "kl" in some) == (gradient, stats, option != "plain")
        assert all(torch.equal(some[name], everything[name]) for name in some)


@pytest.mark.parametrize("option", ["plain", "all_hidden", "all_statistics"])
@pytest.mark.parametrize("form", FORMS)
def test_twice_the_same_bits(form, option):
    inputs, options = problem(option=option)
    first, second = (run(form, inputs, options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("option", ["all_hidden", "all_statistics"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("small_blocks")
def test_rows_without_shares_get_zeros_whatever_they_hold(form, option):
    (hidden, weight, targets, rows), options = problem(option=option)
    share = shares(len(rows), torch.float32, True)
    for factor in share:
        factor[[0, 2, 4]] = 0
    # The streaming form's place of the largest logit: there is none in a row of NaN, for which Triton 3.8's interpreter
    # raises; a GPU takes any.
    stats = form == "triton" or DEVICE == "cuda"
    clean = run(form, (hidden, weight, targets, rows), options, share=share, stats=stats)
    bad = hidden.clone()
    bad[rows[[0, 2, 4]]] = math.nan
    teacher = options["teacher"]
    if isinstance(teacher, TeacherStatistics):
        teacher = teacher._replace(tail_mean_weight=teacher.tail_mean_weight.clone())
        teacher.tail_mean_weight[rows[[0, 2, 4]]] = math.inf
    spoiled = run(form, (bad, weight, targets, rows), options | {"teacher": teacher}, share=share, stats=stats)
    assert not spoiled["gradient"][[0, 2, 4]].any()
    kept = [row for row in range(len(rows)) if row not in (0, 2, 4)]
    assert all(torch.equal(clean[name][kept], spoiled[name][kept]) for name in clean)


@pytest.mark.parametrize("form", FORMS)
def test_a_share_that_is_not_a_number_reaches_the_gradient(form):
    inputs, options = problem()
    ce_share, _ = shares(5, torch.float32, False)
    ce_share[3] = math.nan
    is_nan = run(form, inputs, options, share=(ce_share, None))["gradient"].isnan()
    assert is_nan[3].all() and is_nan.sum() == 24


@pytest.mark.parametrize("option", ["plain", "kl_hidden", "kl_statistics"])
@pytest.mark.parametrize(("form", "dtype"), [pair for pair in FORMS_AND_DTYPES if pair[1] != torch.float64])
@pytest.mark.usefixtures("small_blocks")
def test_logits_up_to_ten_thousand(form, dtype, option):
    (hidden, weight, targets, rows), options = problem(dtype=dtype, option=option)
    scaled = hidden * (1e4 / (hidden[rows].double() @ weight.double().T).abs().max().item())
    inputs = (scaled, weight, targets, rows)
    figures = run(form, inputs, options)
    assert all(figure.isfinite().all() for figure in figures.values())
    assert_close_to_float64(figures, inputs, options)


@pytest.mark.parametrize(("form", "dtype"), FORMS_AND_DTYPES)
def test_one_hot_rows(form, dtype):
    # Each row's logit is 200 at its target and 0 elsewhere: probability 1 in every dtype, and no gradient.
    weight = torch.eye(24, device=DEVICE, dtype=dtype)
    targets = torch.arange(24, device=DEVICE).flip(0)
    figures = run(form, (200 * weight, weight, targets.flip(0), targets.flip(0)), {})
    assert (
        figures["ce"].abs().max() < 1e-30
        and figures["gradient"].double().abs().max() < 1e-80
        and figures["correct"].all()
    )
    figures = run(form, (200 * weight, weight, targets, targets.flip(0)), {})
    assert torch.equal(figures["ce"], torch.full_like(figures["ce"], 200)) and not figures["correct"].any()


@pytest.mark.parametrize("form", FORMS)
def test_a_probability_close_to_one_keeps_its_gradient_in_half_precision(form):
    # p_target - 1 = -e^-9 / (1 + e^-9): rounding p to float16 first would make it 0.
    weight = torch.tensor([[9.0], [0.0]], device=DEVICE, dtype=torch.float16)
    index = torch.zeros(1, device=DEVICE, dtype=torch.int64)
    share = (torch.ones(1, device=DEVICE), None)
    gradient = run(form, (torch.ones_like(weight[:1]), weight, index, index), {}, share=share)["gradient"]
    assert gradient.item() == pytest.approx(-9 / (1 + math.exp(9)), rel=2e-3)


@pytest.mark.parametrize("form", FORMS)
def test_correct_means_the_first_of_equal_logits(form, small_blocks):
    weight = torch.zeros(40, 1, device=DEVICE)
    weight[[5, 6, 30]] = 1.0
    hidden, rows = torch.ones(4, 1, device=DEVICE), torch.arange(4, device=DEVICE)
    targets = torch.tensor([5, 6, 30, 2], device=DEVICE)
    for softcap in (None, 1e-3):
        figures = run(form, (hidden, weight, targets, rows), {"softcap": softcap})
        assert figures["correct"].tolist() == [True, False, False, False]


@pytest.mark.parametrize("option", ["bias", "kl_hidden", "kl_statistics"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("small_blocks")
def test_tokens_that_a_bias_takes_out_have_no_part(form, option):
    (hidden, weight, _, rows), options = problem(option=option)
    kept = torch.cat([torch.arange(3, 15), torch.arange(32, 37)]).to(DEVICE)
    targets = torch.arange(len(rows), device=DEVICE)
    narrow = options | {"bias": torch.linspace(-1, 1, len(kept), device=DEVICE)}
    if option == "kl_statistics":
        narrow["teacher"] = spec.statistics(hidden.flip(0), weight[kept], narrow["bias"])
        indices = kept[narrow["teacher"].top_indices.long()].to(torch.int32)
        options["teacher"] = narrow["teacher"]._replace(top_indices=indices)
    bias = torch.full((37,), -math.inf, device=DEVICE)
    bias[kept] = narrow["bias"]
    ours = run(form, (hidden, weight, kept[targets], rows), options | {"bias": bias})
    assert_close_to_float64(ours, (hidden, weight[kept], targets, rows), narrow)


@pytest.mark.parametrize("top", [0, 1, 5, 37])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("small_blocks")
def test_any_number_of_top_tokens(form, top):
    inputs, options = problem(option="all_statistics")
    generator = torch.Generator(DEVICE).manual_seed(1)
    teacher = torch.randn(inputs[0].shape, generator=generator, device=DEVICE)
    options["teacher"] = spec.statistics(teacher, inputs[1], options["bias"], top)
    assert options["teacher"].top_indices.shape == (8, top)
    assert_close_to_float64(run(form, inputs, options), inputs, options)


@pytest.mark.parametrize(("form", "dtype"), FORMS_AND_DTYPES)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(form, dtype):
    inputs, options = problem(dtype=dtype, option="bias")
    hidden, weight, _, rows = inputs
    zeros = torch.zeros(len(rows), device=DEVICE, dtype=accumulation_dtype(hidden))
    share = (zeros, zeros + 1)
    online = run(form, inputs, options | {"teacher": hidden}, share=share)
    assert not online["gradient"].any() and not online["kl"].any()
    cached = run(form, inputs, options | {"teacher": spec.statistics(hidden, weight, options["bias"], 37)}, share=share)
    tolerance = 5e-15 if dtype == torch.float64 else 5e-6
    assert cached["gradient"].abs().max() < tolerance and cached["kl"].abs().max() < tolerance


@pytest.mark.parametrize("form", FORMS)
def test_logits_in_half_precision_cost_accuracy_and_nothing_else(form):
    inputs, options = problem(hidden_size=64, dtype=torch.float16, option="all_hidden")
    assert_close_to_float64(run(form, inputs, options, logits_dtype=torch.float16), inputs, options)
    exact, rounded = (run(form, inputs, options, logits_dtype=dtype)["ce"] for dtype in (None, torch.float16))
    assert 1e-5 < (exact - rounded).abs().max() < 1e-1


def test_one_split_and_many_agree(monkeypatch, small_blocks):
    splits, rows_and_splits = [], streaming.rows_and_splits

    def noted(*arguments):
        chosen = rows_and_splits(*arguments)
        splits.append(chosen[1])
        return chosen

    monkeypatch.setattr(streaming, "rows_and_splits", noted)
    for option in ("all_hidden", "all_statistics"):
        inputs, options = problem(option=option)
        many = run("triton-streaming", inputs, options)
        monkeypatch.setattr(streaming, "multiprocessors", lambda device: 1)
        one = run("triton-streaming", inputs, options)
        assert splits.pop() == 1 < splits.pop()
        for name in many:
            torch.testing.assert_close(many[name], one[name], rtol=1e-5, atol=2e-6)
        monkeypatch.setattr(streaming, "multiprocessors", lambda device: 6)


@settings(deadline=None)
@given(
    rows=st.integers(1, 20000),
    hidden_size=st.integers(1, 8192),
    row_bytes=st.integers(128, 2**21),
    budget=st.integers(1, 2**30),
    multiprocessors=st.integers(1, 160),
)
def test_chunks_fit_the_budget(rows, hidden_size, row_bytes, budget, multiprocessors):
    size = row_chunked.rows_per_chunk(rows, hidden_size, row_bytes, budget, multiprocessors)
    assert 1 <= size <= rows
    assert size * row_bytes <= max(budget, row_bytes)
    assert size == rows or budget // row_bytes < 128 or size % 128 == 0 or size * row_bytes > budget - 128 * row_bytes


def test_chunks_are_even_and_of_whole_tiles():
    row_bytes, budget = 152064 * 4, 512 * 2**20
    assert row_chunked.rows_per_chunk(300, 3584, row_bytes, budget, 132) == 300
    size = row_chunked.rows_per_chunk(4096, 3584, row_bytes, budget, 132)
    assert size % 128 == 0 and 512 <= size <= 768
    assert row_chunked.rows_per_chunk(100, 3584, row_bytes, 40 * row_bytes, 132) == 34


@settings(deadline=None)
@given(
    rows=st.integers(1, 20000),
    hidden_size=st.integers(1, 8192),
    tile_rows=st.sampled_from([16, 32, 64]),
    tiles=st.integers(1, 3000),
    budget=st.integers(1, 2**30),
    multiprocessors=st.integers(1, 160),
)
def test_splits_fit_the_budget_and_none_is_empty(rows, hidden_size, tile_rows, tiles, budget, multiprocessors):
    size, splits = streaming.rows_and_splits(rows, hidden_size, tile_rows, tiles, budget, multiprocessors)
    assert 1 <= size <= rows and 1 <= splits <= tiles
    assert splits * size * hidden_size * 4 <= max(budget, hidden_size * 4)
    assert (splits - 1) * math.ceil(tiles / splits) < tiles


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("hidden_size", [1, 129])
@pytest.mark.usefixtures("poisoned_empty")
def test_scatter_scales_places_and_fills(dtype, hidden_size):
    gradient = torch.randn(5, hidden_size, device=DEVICE).to(dtype)
    scale = torch.tensor([0.5, 0.0, -3.0, math.nan, 1.0], device=DEVICE, dtype=accumulation_dtype(gradient))
    gradient[1] = math.nan
    inverse = torch.tensor([-1, 4, 1, -1, 0, 2, 3], device=DEVICE, dtype=torch.int32)
    out = row_chunked.scatter_scaled_rows(gradient, scale, inverse, out_rows=7)
    assert out.dtype == dtype and out.shape == (7, hidden_size)
    assert not out[[0, 2, 3]].any()
    assert torch.equal(out[1], gradient[4])
    assert torch.equal(out[4], (gradient[0].to(scale) * 0.5).to(dtype))
    assert torch.equal(out[5], (gradient[2].to(scale) * -3.0).to(dtype))
    assert out[6].isnan().all()
    assert row_chunked.scatter_scaled_rows(gradient[:0], scale[:0], inverse[[0, 0]] * 0 - 1, out_rows=2).eq(0).all()


def test_the_processes_precision_settings_come_back(monkeypatch):
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    seen = []
    product = row_chunked._product
    monkeypatch.setattr(
        row_chunked,
        "_product",
        lambda *args: (seen.append([getattr(matmul, name) for name in names]), product(*args)),
    )
    try:
        for allowed in (True, False):
            for name in names:
                setattr(matmul, name, allowed)
            run("triton", *problem(2))
            assert [getattr(matmul, name) for name in names] == [allowed] * 2
    finally:
        for name, allowed in zip(names, before, strict=True):
            setattr(matmul, name, allowed)
    assert seen and all(setting == [False, False] for setting in seen)


@pytest.mark.gpu
@pytest.mark.parametrize("option", spec.OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_waits_for_the_device(form, option):
    inputs, options = problem(dtype=torch.bfloat16, option=option)
    share = shares(5, torch.float32, options.get("teacher") is not None)
    inverse = torch.arange(8, device=DEVICE, dtype=torch.int32) % 5
    # The first run compiles, which may wait.
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            figures = run(form, inputs, options, share=share)
            row_chunked.scatter_scaled_rows(figures["gradient"], share[0], inverse, out_rows=8)
        finally:
            torch.cuda.set_sync_debug_mode("default")
