"""Cases of `steer`, with what each must at least read, write and multiply: for tests and benchmarks.

T rows, D hidden size, r adapter rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

# Added to torch's own error in the same dtype, relative to the largest true value: a few units in the last place.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass(frozen=True)
class Case:
    """One problem size with its options.

    Attributes:
        name: shown by tests and benchmarks.
        rows, hidden_size, rank: T, D, r; rank 0 leaves down and up out.
        dtype: of the residual stream; the adapter is float32.
        update, static, gate, norm: whether each is given.
        masked: fraction of rows left alone; None gives no mask.
        options: keyword arguments passed through.
    """

    name: str
    rows: int
    hidden_size: int
    rank: int
    dtype: torch.dtype = torch.float32
    update: bool = True
    static: bool = True
    gate: bool = False
    norm: bool = False
    masked: float | None = None
    options: Mapping = field(default_factory=dict)


OPTIONS = {
    "lowrank": {},
    "fixed": {"rank": 0, "options": {"alpha": 0.1, "preserve_norm": True}},
    "gated": {"rank": 0, "gate": True},
    "reft": {"static": False, "options": {"activation": "identity", "normalize_input": False}},
    "relu": {"options": {"activation": "relu"}},
    "gelu": {"options": {"activation": "gelu"}},
    "tanh": {"options": {"activation": "tanh", "alpha": 2.0}},
    "no_update": {"update": False},
    "masked": {"masked": 0.5},
    "next_norm": {"norm": True, "options": {"norm_eps": 1e-5}},
    "everything": {"gate": True, "norm": True, "masked": 0.5, "options": {"alpha": 0.7, "preserve_norm": True}},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TEST_CASES = tuple(
    Case(f"{option}-{str(dtype)[6:]}", 13, 40, dtype=dtype, **{"rank": 5, **settings})
    for option, settings in OPTIONS.items()
    for dtype in DTYPES
) + (
    Case("one_row", 1, 40, 5),
    Case("no_rows", 0, 40, 5),
    Case("one_dimension", 6, 1, 1),
    Case("rank_above_dimension", 6, 3, 7),
)

# Hidden sizes of named models; one decoding step at batch 1 and 32, and a training batch.
HIDDEN_SIZES = {"smollm2-135m": 576, "gemma3-4b": 2560, "qwen2.5-7b": 3584, "mistral-7b": 4096}
BENCHMARK_CASES = tuple(
    Case(f"{model}-{rows}-r{rank}", rows, hidden_size, rank, torch.bfloat16, norm=True)
    for model, hidden_size in HIDDEN_SIZES.items()
    for rows in (1, 32, 4096)
    for rank in (16, 64, 256)
)


def make_inputs(case: Case, device: str | torch.device = "cpu", seed: int = 0):
    """(residual, update) and keyword arguments; a push about as long as the stream. Nothing requires grad."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape, scale=1.0, dtype=torch.float32):
        return (torch.randn(shape, generator=generator, device=device, dtype=torch.float32) * scale).to(dtype)

    residual = normal(case.rows, case.hidden_size, dtype=case.dtype)
    update = normal(case.rows, case.hidden_size, dtype=case.dtype) if case.update else None
    options = dict(case.options)
    if case.rank:
        options["down"] = normal(case.rank, case.hidden_size, scale=case.hidden_size**-0.5)
        options["up"] = normal(case.hidden_size, case.rank, scale=case.rank**-0.5)
        options["bias"] = normal(case.rank)
    if case.static:
        options["static"] = normal(case.hidden_size)
    if case.gate:
        options["gate"] = (normal(case.hidden_size, scale=case.hidden_size**-0.5), normal())
    if case.masked is not None:
        options["mask"] = torch.rand(case.rows, generator=generator, device=device) >= case.masked
    if case.norm:
        options["norm_weight"] = normal(case.hidden_size, dtype=case.dtype)
    return (residual, update), options


def flops(case: Case) -> int:
    """The two products of the forward pass; the elementwise work is bound by memory."""
    return 2 * 2 * case.rows * case.hidden_size * case.rank


def bytes(case: Case) -> int:
    """Least traffic of the forward pass: the stream in and out, the update in, the normed row out, the adapter once."""
    streams = 2 + case.update + case.norm
    adapter = 4 * (2 * case.rank * case.hidden_size + case.rank)
    adapter += 4 * case.hidden_size * (case.static + case.gate)
    norm_weight = case.norm * case.hidden_size * case.dtype.itemsize
    mask = 0 if case.masked is None else case.rows
    return streams * case.rows * case.hidden_size * case.dtype.itemsize + adapter + norm_weight + mask
