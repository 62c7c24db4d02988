"""Cases of `linear_cross_entropy`, with what each must at least read, write and multiply: for tests and benchmarks.

T rows, N rows that count, D hidden size, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from dive_fast.ops.linear_cross_entropy.types import TOP_TOKENS, TeacherStatistics

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
        bias, class_weights: with a bias, with class weights.
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
    class_weights: bool = False
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
    "class_weights": {"class_weights": True},
    "kl_hidden": {"teacher": "hidden", "options": {"kl_weight": 0.5}},
    "kl_statistics": {"teacher": "statistics", "options": {"kl_weight": 0.5}},
    "kl_softcap": {"teacher": "hidden", "options": {"kl_weight": 0.5, "softcap": 5.0}},
    "all_hidden": {
        "bias": True,
        "class_weights": True,
        "teacher": "hidden",
        "options": {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0, "kl_weight": 0.5},
    },
    "all_statistics": {
        "bias": True,
        "class_weights": True,
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

# (D, V) of named models' heads; "smoke" is a small one of no model, to try a benchmark out. A report batch ignores most
# rows: prompt, image and padding.
HEADS = {
    "smoke": (64, 2048),
    "smollm2-135m": (576, 49152),
    "mistral-7b": (4096, 32000),
    "qwen2.5-7b": (3584, 152064),
    "gemma3-4b": (2560, 262208),
}


def _variants(head: str, rows: int, dtype: torch.dtype, ignored: float, kinds: tuple[str, ...]) -> list[Case]:
    """One size with the named ways to use the loss."""
    settings = {
        "mean": {"weighted": False, "options": {"reduction": "mean"}},
        "weighted": {"weighted": True, "options": {"reduction": "mean"}},
        "none": {"weighted": False, "options": {"reduction": "none"}},
    }
    for teacher in ("statistics", "hidden"):
        settings[f"kl_{teacher}"] = {
            "weighted": True,
            "teacher": teacher,
            "options": {"reduction": "mean", "kl_weight": 0.5},
        }
    size = f"{head}-{str(dtype)[6:]}-T{rows}-valid{1 - ignored:.0%}"
    return [Case(f"{size}-{kind}", rows, *HEADS[head], dtype, ignored=ignored, **settings[kind]) for kind in kinds]


MEANS = ("mean", "weighted", "none")
TAUGHT = ("kl_statistics", "kl_hidden")
IGNORED = (0.0, 0.7, 0.9)
# By the scale of a benchmark run. One number of rows a head shows all ways to use the loss, the others how it scales.
BENCHMARK_CASES = {
    "smoke": tuple(
        case
        for dtype in (torch.float32, torch.bfloat16)
        for case in _variants("smoke", 64, dtype, 0.5, ("mean", "kl_statistics"))
    ),
    "laptop": tuple(
        case
        for dtype in (torch.float32, torch.bfloat16)
        for rows in (256, 1024, 4096)
        for ignored in IGNORED
        for case in _variants("smollm2-135m", rows, dtype, ignored, MEANS + TAUGHT if rows == 1024 else ("mean",))
    ),
    "gpu": tuple(
        case
        for head in ("mistral-7b", "qwen2.5-7b", "gemma3-4b")
        for rows in (256, 1024, 4096, 16384)
        for ignored in IGNORED
        for case in _variants(head, rows, torch.bfloat16, ignored, MEANS + TAUGHT if rows == 4096 else ("mean",))
    ),
}


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
    if case.class_weights:
        options["class_weights"] = 0.5 + torch.rand(case.vocabulary, generator=generator, device=device)
    if case.teacher == "hidden":
        options["teacher"] = normal(case.rows, case.hidden_size)
    elif case.teacher == "statistics":
        options["teacher"] = statistics(normal(case.rows, case.hidden_size), weight, options.get("bias"))
    return (hidden, weight, targets, token_weights), options


def statistics(
    teacher: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, top_k: int = 8
) -> TeacherStatistics:
    """TeacherStatistics by their definition, in float64 and rounded once."""
    bias = torch.zeros(weight.shape[0], device=weight.device) if bias is None else bias
    log_q = (teacher.double() @ weight.double().T + bias.double()).log_softmax(-1)
    top = log_q.topk(min(top_k, weight.shape[0]), dim=-1)
    tail = log_q.exp().scatter(-1, top.indices, 0.0)
    constant = torch.where(tail == 0, 0.0, tail * (log_q - bias.double())).sum(-1)
    dtype = torch.float64 if teacher.dtype == torch.float64 else torch.float32
    floats = (tail @ weight.double(), tail.sum(-1), constant)
    indices = top.indices.to(torch.int32)
    return TeacherStatistics(*(x.to(dtype) for x in floats), indices, top.values.to(dtype))


def definition_rows(inputs, options, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The op's formulas over all logits at once, every operation in `dtype`: in float64 the truth.

    Written apart from `reference.py`, on one row dimension; keys ce, kl, lse, nll, entropy, z, counted, w,
    class_weight.
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
    c = options.get("class_weights")
    c = torch.ones(weight.shape[0], device=z.device, dtype=dtype) if c is None else c.to(dtype)
    class_weight = c[targets.clamp(min=0)]
    ce = (1 - smoothing) * class_weight * nll + options.get("z_loss", 0.0) * lse**2
    if smoothing:
        ce = ce + smoothing * (c * nll_all).mean(-1)
    counted = targets != -100
    w = torch.ones(len(targets), device=z.device) if token_weights is None else token_weights
    counted &= w > 0
    kl = torch.zeros_like(ce)
    if isinstance(teacher, TeacherStatistics):
        mean, mass, negative_entropy, indices, log_q = (x if x.dtype == torch.int32 else x.to(dtype) for x in teacher)
        kl = negative_entropy - (mean * hidden.to(dtype)).sum(-1) + mass * lse
        kl = kl + (log_q.exp() * (log_q + nll_all.gather(1, indices.long()))).sum(-1)
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
        "class_weight": class_weight,
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
    divisor = torch.where(counted, rows["w"] * rows["class_weight"], 0).sum() if counted.any() else 1
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
        states += case.counted_rows * ((case.hidden_size + 2) * 4 + TOP_TOKENS * 8)
    return head + states + case.rows * (8 + 4 * case.weighted)
