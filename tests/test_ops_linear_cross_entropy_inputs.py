"""Unusual inputs that are none the less legitimate, on every backend of the loss."""

import threading

import pytest
import torch

from dive_fast.ops import TeacherStatistics, linear_cross_entropy, teacher_statistics

pytest.importorskip("triton", reason="triton is not installed")

from dive_fast.ops.linear_cross_entropy import triton  # noqa: E402

DEVICE = {"native": "cpu"} | dict.fromkeys(
    ("triton", "triton-streaming"), "cuda" if torch.cuda.is_available() else "cpu"
)
BACKENDS = tuple(DEVICE)
ROWS, HIDDEN_SIZE, VOCABULARY = 9, 24, 60


def problem(dtype=torch.float32, head_dtype=None):
    torch.manual_seed(0)
    hidden, weight = torch.randn(ROWS, HIDDEN_SIZE), torch.randn(VOCABULARY, HIDDEN_SIZE) / 3
    return hidden.to(dtype), weight.to(head_dtype or dtype), torch.randint(VOCABULARY, (ROWS,))


def loss_and_gradient(inputs, backend, **options):
    device = DEVICE.get(backend, "cpu")
    hidden, weight, targets = (tensor.to(device) for tensor in inputs)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    hidden = hidden.clone().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, backend=backend, **options)
    loss.backward()
    return loss.detach().double().cpu(), hidden.grad.double().cpu()


def close(found, true, tolerance):
    return (found - true).abs().max() <= tolerance * true.abs().max()


@pytest.mark.parametrize("size", [1e-7, 1 / 150_000, 1.0, 1e6])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothing"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_size_of_class_weights_costs_half_precision_no_digits(backend, options, size):
    """The mean does not depend on their size; float16 holds no 1e-7 and no 1e6."""
    inputs, classes = problem(torch.float16), torch.rand(VOCABULARY) + 0.5
    classes[3] = 0
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    true = loss_and_gradient(wide, "reference", class_weights=classes.double(), **options)
    found = loss_and_gradient(inputs, backend, class_weights=classes * size, **options)
    assert close(found[0], true[0], 1e-3) and close(found[1], true[1], 2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_class_weights_of_zero_alone_give_nothing(backend):
    options = {"class_weights": torch.zeros(VOCABULARY), "reduction": "sum"}
    loss, gradient = loss_and_gradient(problem(torch.float16), backend, **options)
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_in_half_precision_under_a_head_in_float32(backend):
    inputs = problem(torch.float16, torch.float32)
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    true = loss_and_gradient(wide, "reference")
    found = loss_and_gradient(inputs, backend, logits_dtype=torch.float16)
    assert close(found[0], true[0], 2e-3) and close(found[1], true[1], 5e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teachers_statistics_may_be_kept_in_another_dtype(backend, dtype):
    hidden, weight, targets = problem()
    statistics = teacher_statistics(hidden.flip(0), weight, top_k=4)
    kept = TeacherStatistics(*(x.to(dtype) if x.is_floating_point() else x for x in statistics))
    device = DEVICE[backend]
    options = {"kl_weight": 1.0, "teacher": TeacherStatistics(*(x.to(device) for x in kept))}
    found = loss_and_gradient((hidden, weight, targets), backend, **options)
    options["teacher"] = TeacherStatistics(*(x.float() if x.is_floating_point() else x for x in kept))
    true = loss_and_gradient((hidden, weight, targets), "reference", **options)
    # Rounded, a teacher's probabilities no longer add up to 1, which the kernels' gradient takes for granted.
    assert close(found[0], true[0], 1e-5) and close(found[1], true[1], 1e-5 + torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teachers_states_may_lie_the_other_way_round(backend):
    inputs = problem()
    teacher = inputs[0].flip(0)
    true = loss_and_gradient(inputs, "reference", teacher=teacher, kl_weight=1.0)
    across = teacher.to(DEVICE[backend]).T.contiguous().T
    found = loss_and_gradient(inputs, backend, teacher=across, kl_weight=1.0)
    assert close(found[0], true[0], 1e-5) and close(found[1], true[1], 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy
def test_rows_that_are_not_numbers_are_not_correct(backend):
    """One logit that is none, since the interpreter of Triton 3.9 takes no maximum of such numbers alone."""
    hidden, weight, targets = (x.to(DEVICE[backend]) for x in problem())
    bias = torch.zeros_like(weight[:, 0])
    bias[7] = torch.nan
    _, stats = linear_cross_entropy(hidden, weight, targets, bias=bias, backend=backend, return_stats=True)
    assert not stats.correct.any() and stats.entropy.isnan().all()


def test_overlapping_calls_hand_cublas_settings_back():
    """Two threads inside at once: the second must not remember the first one's settings as the process's."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    inside, leave = threading.Event(), threading.Event()

    def first():
        with triton._reductions.exact():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with triton._reductions.exact():
        leave.set()
        thread.join()
        assert matmul.allow_bf16_reduced_precision_reduction is False
    assert matmul.allow_bf16_reduced_precision_reduction == before
