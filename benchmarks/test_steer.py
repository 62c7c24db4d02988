"""Group `steer-op`: the steering op alone, against copying the residual stream."""

import pytest
import torch

from benchmarks import measure
from dive_fast.ops import steer
from dive_fast.ops.backend import BACKENDS
from dive_fast.ops.steer import spec

SIZES = {
    "smoke": [("smoke", 64, 64, 4)],
    "laptop": [("smollm2-135m step", 1288, 576, 16), ("7b step", 1024, 4096, 64), ("7b decode", 1, 4096, 64)],
    "gpu": [("7b decode", 8, 4096, 64), ("7b step", 16384, 4096, 64), ("7b rank 256", 16384, 4096, 256)],
}
DTYPES = (torch.float32, torch.bfloat16)
DIRECTIONS = ("forward", "forward and backward")


def cases(scale: str) -> list[tuple]:
    device = "cuda" if scale == "gpu" else "cpu"
    return [
        pytest.param(
            device, size, dtype, backend, id=f"{device}-{size[0].replace(' ', '_')}-{str(dtype)[6:]}-{backend}"
        )
        for size in SIZES[scale]
        for dtype in DTYPES
        for backend in BACKENDS["steer", device]
    ]


def pytest_generate_tests(metafunc):
    if "size" in metafunc.fixturenames:
        metafunc.parametrize(("device", "size", "dtype", "backend"), cases(metafunc.config.option.scale))


@pytest.mark.benchmark(group="steer-op")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_steer(benchmark, device, size, dtype, backend, direction, scale):
    """h' = h + push with h = residual + update, in turn with a copy of the same bytes."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    name, rows, hidden_size, rank = size
    case = spec.Case(name, rows, hidden_size, rank, dtype)
    (residual, update), options = spec.make_inputs(case, device)
    trains = direction != "forward"
    inputs = [residual, update] + [x for x in options.values() if isinstance(x, torch.Tensor)]
    if trains:
        inputs = [x.requires_grad_() for x in inputs]
    upstream = torch.ones_like(residual)
    check(residual, update, options, backend, spec.TOLERANCES[dtype])

    def run():
        with torch.set_grad_enabled(trains):
            steered = steer(residual, update, backend=backend, **options)
        return torch.autograd.grad(steered, inputs, upstream) if trains else (steered,)

    # Forward reads residual and update and writes h'; backward reads both and the upstream gradient and writes one.
    stream = rows * hidden_size * dtype.itemsize
    moved = stream * (3 + 4 * trains) + sum(x.nbytes for x in inputs[2:]) * (1 + 2 * trains)
    source = torch.empty(moved // 2 // dtype.itemsize, dtype=dtype, device=device).normal_()
    target = torch.empty_like(source)
    ratios = measure.paired(benchmark, run, {"copy of the same bytes": lambda: target.copy_(source)}, device, scale)
    benchmark.extra_info |= {
        "implementation": f"dive_fast {backend}",
        "device": device,
        "dtype": str(dtype)[6:],
        "direction": direction,
        "T": rows,
        "D": hidden_size,
        "r": rank,
        "bytes": moved,
        "ratios": {other: ratio._asdict() for other, ratio in ratios.items()},
    }
    if benchmark.stats is not None:
        benchmark.extra_info["gigabytes_per_second"] = moved / benchmark.stats.stats.median / 1e9


def check(residual, update, options, backend, tolerance) -> None:
    """A wrong result is not timed."""
    with torch.no_grad():
        ours = steer(residual, update, backend=backend, **options).double()
        exact = steer(
            residual.double(),
            update.double(),
            backend="reference",
            **{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()},
        )
        # The stream is rounded when the update is added and when h' is stored.
        assert (ours - exact).abs().max() <= (tolerance + 2 * torch.finfo(residual.dtype).eps) * exact.abs().max()
