"""Group `decode kernels`: matrix times a few vectors, in turn with reading the same bytes, which is its limit."""

import functools
from typing import NamedTuple

import pytest
import torch

from benchmarks import measure
from dive_fast import native

CPU = native.load().cpu
LEVEL = CPU.kernel_levels()[-1]
INT8_ROWS, INT8_COLUMNS = CPU.decode.INT8_LINE
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/cpu/dtype.h
# Columns and bytes of weights: SmolLM2-135M's two input sizes and Mistral-7B's, several times what caches hold.
COLUMNS = {"smoke": (64,), "laptop": (576, 1536, 4096), "gpu": ()}
BYTES = {"smoke": 2**20, "laptop": 256 * 2**20}
BATCHES = (1, 4, 8)
TOLERANCE = 3e-6  # as in tests/test_decode_kernels.py


class Problem(NamedTuple):
    kind: torch.dtype
    columns: int
    bytes: int

    device = "cpu"

    def __str__(self):
        return f"{str(self.kind)[6:]}-K{self.columns}"

    @property
    def rows(self) -> int:
        """A whole number of an int8 matrix's lines of rows."""
        return self.bytes // (self.columns * self.kind.itemsize) // INT8_ROWS * INT8_ROWS


def pytest_generate_tests(metafunc):
    scale = metafunc.config.option.scale
    kinds = (torch.bfloat16, torch.float32, torch.int8)
    found = [Problem(kind, columns, BYTES[scale]) for columns in COLUMNS[scale] for kind in kinds]
    if not found:
        reason = "--scale gpu measures a GPU; --scale laptop measures the CPU"
        found = [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="cpu")]
    metafunc.parametrize("problem", found, ids=str)


@functools.lru_cache(maxsize=1)
def weights(problem: Problem) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One matrix, larger than the caches, and an int8 matrix's scales."""
    generator = torch.Generator().manual_seed(0)
    if problem.kind == torch.int8:
        lines = (problem.rows // INT8_ROWS, problem.columns // INT8_COLUMNS, INT8_ROWS, INT8_COLUMNS)
        data = torch.randint(-127, 128, lines, dtype=torch.int8, generator=generator)
        return data, torch.rand(problem.rows, generator=generator)
    return torch.randn(problem.rows, problem.columns, generator=generator).to(problem.kind), None


@pytest.mark.benchmark(group="decode kernels")
@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: f"B{batch}")
def test_projection(benchmark, problem, batch, scale):
    data, scales = weights(problem)
    x = torch.randn(batch, problem.columns, generator=torch.Generator().manual_seed(1))
    out, threads = torch.empty(batch, problem.rows), torch.get_num_threads()
    dtype = 0 if scales is not None else DTYPES.index(problem.kind)
    N, K = problem.rows, problem.columns
    matrix = (data.data_ptr(), dtype, 0 if scales is None else scales.data_ptr(), N, K, K, 0)

    def run():
        CPU.decode.project([matrix], x.data_ptr(), batch, [out.data_ptr()], False, LEVEL, threads)

    def read():
        CPU.decode.read_memory(data.data_ptr(), data.nbytes, LEVEL, threads)

    run()
    check(out, x, data, scales)
    benchmark.group = f"decode kernels {problem}"
    ratio = measure.paired(benchmark, run, {"read": read}, "cpu", scale).get("read")
    benchmark.extra_info |= {
        "implementation": "dive_fast",
        "level": LEVEL,
        "K": K,
        "N": N,
        "B": batch,
        "dtype": str(problem.kind)[6:],
        "threads": threads,
        "bytes": data.nbytes,
    }
    if ratio is not None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info |= {
            "gigabytes_per_second": data.nbytes / seconds / 1e9,
            "read_limit_gigabytes_per_second": data.nbytes / seconds * ratio.median / 1e9,
            # Of the speed at which the same bytes can be read: the median over rounds, and its 95 % interval.
            "share_of_read_limit": {"median": 1 / ratio.median, "low": 1 / ratio.high, "high": 1 / ratio.low},
        }


def check(out, x, data, scales) -> None:
    """Some rows against float64, the first and the last among them; written so that NaN fails."""
    rows = torch.linspace(0, out.shape[1] - 1, 64).long()
    chosen = data[rows] if scales is None else data[rows // INT8_ROWS, :, rows % INT8_ROWS].flatten(1)
    true = x.double() @ chosen.double().T * (1 if scales is None else scales[rows].double())
    error = (out[:, rows] - true).abs().max()
    assert error <= TOLERANCE * true.abs().max(), f"wrong by {error:.2g}"
