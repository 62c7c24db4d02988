"""Cases of `linear_cross_entropy`, with what each must at least read, write and multiply: for tests and benchmarks.

T rows, N rows that count, D hidden size, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from dive_fast.ops.linear_cross_entropy.types import TeacherStatistics

# Added to torch's own error in the same dtype, relative to the largest true value: a few units in the last place.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Case:
    """One problem size with its options.

    Attributes:
        name: shown by tests and benchmarks.
        rows, hidden_size, vocabulary: T, D, V.
        dtype: of hidden and weight.
        ignored: fraction of rows whose target is ignore_index.
        weighted: token weights of 1 and 3 rather than None.
        bias: with a bias.
        teacher: None, "hidden" or "statistics".
        options: keyword arguments passed through.
    """

    name: str
    rows: int
    hidden_size: int
    vocabulary: int
    dtype: torch.dtype = torch.float32
    ignored: float = 0.3
    weighted: bool = True
    bias: bool = False
    teacher: str | None = None
    options: Mapping = field(default_factory=dict)

    @property
    def counted_rows(self) -> int:
        """N: the first rows are the ignored ones."""
        return self.rows - int(self.rows * self.ignored)


OPTIONS = {
    "plain": {},
    "smoothing": {"options": {"label_smoothing": 0.1}},
    "z_loss": {"options": {"z_loss": 1e-2}},
    "softcap": {"options": {"softcap": 5.0}},
    "bias": {"bias": True},
    "kl_hidden": {"teacher": "hidden", "options": {"kl_weight": 0.5}},
    "kl_statistics": {"teacher": "statistics", "options": {"kl_weight": 0.5}},
    "kl_softcap": {"teacher": "hidden", "options": {"kl_weight": 0.5, "softcap": 5.0}},
    "all_hidden": {
        "bias": True,
        "teacher": "hidden",
        "options": {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0, "kl_weight": 0.5},
    },
    "all_statistics": {
        "bias": True,
        "teacher": "statistics",
        "options": {"label_smoothing": 0.1, "z_loss": 1e-2, "kl_weight": 0.5},
    },
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TEST_CASES = tuple(
    Case(f"{option}-{str(dtype)[6:]}", 37, 24, 101, dtype, **settings)
    for option, settings in OPTIONS.items()
    for dtype in DTYPES
) + (
    Case("one_row", 1, 24, 101, ignored=0.0),
    Case("one_token", 5, 24, 1),
    Case("no_rows", 0, 24, 101),
    Case("all_ignored", 7, 24, 101, ignored=1.0),
    Case("one_dimension", 9, 1, 3),
)

# (D, V) of named models' heads. A report batch ignores most rows: prompt, image and padding.
HEADS = {
    "smollm2-135m": (576, 49152),
    "mistral-7b": (4096, 32000),
    "qwen2.5-7b": (3584, 152064),
    "gemma3-4b": (2560, 262208),
}
BENCHMARK_CASES = tuple(
    Case(f"{head}-{rows}-{ignored:.0%}", rows, *HEADS[head], torch.bfloat16, ignored=ignored)
    for head in HEADS
    for rows in (1024, 4096, 16384)
    for ignored in (0.0, 0.8)
)


def make_inputs(case: Case, device: str | torch.device = "cpu", seed: int = 0):
    """(hidden, weight, targets, token_weights) and keyword arguments; logits of standard deviation 2.

    Ignored rows come first, as a prompt does. Nothing requires grad.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape, scale=1.0):
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return (values * scale).to(case.dtype)

    hidden = normal(case.rows, case.hidden_size)
    weight = normal(case.vocabulary, case.hidden_size, scale=2 / case.hidden_size**0.5)
    targets = torch.randint(case.vocabulary, (case.rows,), generator=generator, device=device)
    targets[: case.rows - case.counted_rows] = -100
    token_weights = None
    if case.weighted:
        token_weights = 1.0 + 2.0 * (torch.rand(case.rows, generator=generator, device=device) < 0.25)
    options = dict(case.options)
    if case.bias:
        options["bias"] = normal(case.vocabulary)
    if case.teacher == "hidden":
        options["teacher"] = normal(case.rows, case.hidden_size)
    elif case.teacher == "statistics":
        options["teacher"] = statistics(normal(case.rows, case.hidden_size), weight, options.get("bias"))
    return (hidden, weight, targets, token_weights), options


def statistics(teacher: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> TeacherStatistics:
    """TeacherStatistics by their definition, in float64 and rounded once."""
    logits = teacher.double() @ weight.double().T + (0 if bias is None else bias.double())
    log_q = logits.log_softmax(-1)
    q = log_q.exp()
    constant = (q * log_q).sum(-1) - (0 if bias is None else q @ bias.double())
    dtype = torch.float64 if teacher.dtype == torch.float64 else torch.float32
    return TeacherStatistics((q @ weight.double()).to(dtype), constant.to(dtype))


def definition_rows(inputs, options, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The op's formulas over all logits at once, every operation in `dtype`: in float64 the truth.

    Written apart from `reference.py`, on one row dimension; keys ce, kl, lse, nll, entropy, z, counted, w.
    """
    hidden, weight, targets, token_weights = inputs
    bias, softcap, teacher = (options.get(name) for name in ("bias", "softcap", "teacher"))

    def logits_of(states):
        z = states.to(dtype) @ weight.to(dtype).T
        z = z if bias is None else z + bias.to(dtype)
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    z = logits_of(hidden)
    lse = torch.logsumexp(z, -1)
    nll_all = lse.unsqueeze(-1) - z
    nll = nll_all.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    smoothing = options.get("label_smoothing", 0.0)
    ce = (1 - smoothing) * nll + smoothing * nll_all.mean(-1) + options.get("z_loss", 0.0) * lse**2
    counted = targets != -100
    w = torch.ones(len(targets), device=z.device) if token_weights is None else token_weights
    counted &= w > 0
    kl = torch.zeros_like(ce)
    if isinstance(teacher, TeacherStatistics):
        mean_weight, negative_entropy = (figure.to(dtype) for figure in teacher)
        kl = negative_entropy - (mean_weight * hidden.to(dtype)).sum(-1) + lse
    elif teacher is not None:
        with torch.no_grad():
            log_q = logits_of(teacher).log_softmax(-1)
        kl = (log_q.exp() * (log_q + nll_all)).sum(-1)
    entropy = ((-nll_all).exp() * nll_all).sum(-1)
    return {
        "ce": ce,
        "kl": kl,
        "lse": lse,
        "nll": nll,
        "entropy": entropy,
        "z": z,
        "counted": counted,
        "w": w.to(dtype),
    }


def definition_loss(inputs, options, dtype: torch.dtype, reduction: str) -> torch.Tensor:
    """The three reductions of `definition_rows`."""
    rows = definition_rows(inputs, options, dtype)
    counted, kl_weight = rows["counted"], options.get("kl_weight", 0.0)
    weighted = torch.where(counted, rows["w"] * rows["ce"], 0)
    kl = torch.where(counted, rows["kl"], 0)
    if reduction == "none":
        return weighted + kl_weight * kl
    if reduction == "sum":
        return (weighted + kl_weight * kl).sum()
    divisor = torch.where(counted, rows["w"], 0).sum() if counted.any() else 1
    return weighted.sum() / divisor + kl_weight * kl.sum() / max(1, int(counted.sum()))


def flops(case: Case) -> int:
    """Least work of forward and backward with a frozen head: logits, hidden gradient, an online teacher's logits."""
    products = 3 if case.teacher == "hidden" else 2
    return products * 2 * case.counted_rows * case.vocabulary * case.hidden_size


def bytes(case: Case) -> int:
    """Least traffic of forward and backward: the head once a product, counted rows in, gradients, targets, weights."""
    products = 3 if case.teacher == "hidden" else 2
    element = case.dtype.itemsize
    head = products * case.vocabulary * (case.hidden_size * element + case.bias * element)
    states = (case.counted_rows + case.rows) * case.hidden_size * element
    if case.teacher == "hidden":
        states += case.counted_rows * case.hidden_size * element
    elif case.teacher == "statistics":
        states += case.counted_rows * (case.hidden_size + 1) * 4
    return head + states + case.rows * (8 + 4 * case.weighted)
