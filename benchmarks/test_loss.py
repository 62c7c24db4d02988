"""Group `loss`: forward and backward of the loss through a frozen head, ours and our peers'."""

import pytest
import torch

from benchmarks import loss_peers, measure
from benchmarks.loss_problems import TOLERANCES, Inputs, Problem, errors, prepare, step
from dive_fast.ops.linear_cross_entropy import spec

# The cases and peers that decide the op's targets, by scale and by device.
RATIO_CASES = {
    "smoke": ("smoke-float32-T64-valid50%-mean",),
    "laptop": tuple(
        f"smollm2-135m-{dtype}-T1024-valid{valid}-mean"
        for dtype in ("float32", "bfloat16")
        for valid in ("30%", "100%")
    ),
    "gpu": ("mistral-7b-bfloat16-T4096-valid100%-weighted", "mistral-7b-bfloat16-T4096-valid10%-mean"),
}
CHUNKED = f"F.linear_cross_entropy chunks of {loss_peers.CHUNK_ROWS}"
RATIO_PEERS = {
    "cpu": ("eager float32 logits", "eager", "eager valid rows", "torch.compile", "F.linear_cross_entropy", CHUNKED),
    "cuda": ("eager float32 logits", "eager valid rows", CHUNKED, "Liger", "Cut Cross-Entropy exact"),
}


def problems(scale: str) -> list:
    """The problems of a scale; where it names a device that is not here, one that is skipped in their place."""
    cases = spec.BENCHMARK_CASES[scale]
    found = [Problem(case, "cpu") for case in cases if scale != "gpu"]
    if scale == "laptop":
        return [*found, skipped("cuda", "--scale laptop measures the CPU; --scale gpu measures a GPU")]
    if not torch.cuda.is_available():
        reason = f"no CUDA device: the {len(spec.BENCHMARK_CASES['gpu'])} problems of --scale gpu need one"
        return [*found, skipped("cuda", reason)]
    return [*found, *(Problem(case, "cuda") for case in cases)]


def skipped(name: str, reason: str):
    return pytest.param(None, marks=pytest.mark.skip(reason=reason), id=name)


def pytest_generate_tests(metafunc):
    scale = metafunc.config.option.scale
    if "implementation" in metafunc.fixturenames:
        params = []
        for index, problem in enumerate(problems(scale)):
            if not isinstance(problem, Problem):
                params.append(pytest.param(None, None, marks=problem.marks, id=problem.id))
                continue
            params += [
                pytest.param(problem, implementation, id=f"{problem}-{implementation.name.replace(' ', '_')}")
                for implementation in loss_peers.implementations(problem.device)
                if not (scale == "smoke" and implementation.slow_start and index)
            ]
        metafunc.parametrize(("problem", "implementation"), params)
    elif "problem" in metafunc.fixturenames:
        names = RATIO_CASES[scale]
        metafunc.parametrize(
            "problem", [p for p in problems(scale) if not isinstance(p, Problem) or p.case.name in names], ids=str
        )


@pytest.mark.benchmark(group="loss")
def test_loss(benchmark, problem, implementation, scale):
    skip_if(implementation, implementation.missing(problem.device))
    prepared = prepare(problem)
    skip_if(implementation, implementation.unfit(prepared.inputs))
    run = step(implementation.make(), prepared.inputs)
    try:
        if implementation.slow_start:
            run()
        memory, found = measured_and_checked(run, implementation, problem)
        benchmark.group = f"loss {problem}"
        measure.timed(benchmark, run, problem.device, scale)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"out of memory: {str(error).splitlines()[0]}")
    benchmark.extra_info |= described(problem, prepared.inputs, implementation, memory, found)
    if benchmark.stats is not None:
        benchmark.extra_info |= speed(problem, prepared.floor, benchmark.stats.stats.median)


@pytest.mark.benchmark(group="loss ratios")
def test_loss_ratios(benchmark, problem, scale):
    """Ours in turn with its peers: the comparison that decides the targets."""
    prepared, ours = prepare(problem), loss_peers.best_of_ours(problem.device)
    runs, memories, left_out = {}, {}, {}
    for implementation in (ours, *map(loss_peers.peer, RATIO_PEERS[problem.device])):
        reason = implementation.missing(problem.device) or implementation.unfit(prepared.inputs)
        if reason is not None:
            left_out[implementation.name] = reason
            continue
        run = step(implementation.make(), prepared.inputs)
        if implementation.slow_start:
            run()
        memories[implementation.name], found = measured_and_checked(run, implementation, problem)
        runs[implementation.name] = run
        if implementation is ours:
            own_errors = found
    run = runs.pop(ours.name)
    ratios = measure.paired(benchmark, run, runs, problem.device, scale)
    own = memories[ours.name]
    benchmark.extra_info |= described(problem, prepared.inputs, ours, own, own_errors)
    benchmark.extra_info["left_out"] = left_out
    benchmark.extra_info["ratios"] = {
        name: ratio._asdict() | {"peak_memory": own.peak / max(1, memories[name].peak)}
        for name, ratio in ratios.items()
    }
    if benchmark.stats is not None:
        benchmark.extra_info |= speed(problem, prepared.floor, benchmark.stats.stats.median)


def skip_if(implementation: loss_peers.Implementation, reason: str | None) -> None:
    if reason is not None:
        pytest.skip(f"{implementation.name}: {reason}")


def measured_and_checked(run, implementation, problem: Problem) -> tuple[measure.Memory, tuple[float, float]]:
    """Peak memory of one call, and the errors of its result; a wrong result ends the test untimed."""
    memory, result = measure.peak_memory(run, problem.device)
    found = errors(result, prepare(problem))
    allowed = implementation.tolerance or TOLERANCES[problem.case.dtype]
    # written so that NaN fails
    assert all(error <= allowed for error in found), (
        f"{implementation.name} is wrong by {found[0]:.2g} (loss) and {found[1]:.2g} (gradient), more than {allowed:g}"
    )
    return memory, found


def described(problem: Problem, inputs: Inputs, implementation, memory: measure.Memory, found) -> dict:
    """What was measured, and the figures that are not times."""
    case = problem.case
    return {
        "implementation": implementation.name,
        "label": implementation.label(inputs),
        "problem": case.name,
        "device": problem.device,
        "D": case.hidden_size,
        "V": case.vocabulary,
        "T": case.rows,
        "N": case.counted_rows,
        "dtype": str(case.dtype)[6:],
        "valid": case.counted_rows / case.rows,
        "reduction": inputs.reduction,
        "weighted": case.weighted,
        "kl": case.teacher,
        "threads": torch.get_num_threads(),
        "peak_memory": memory.peak,
        "kept_memory": memory.kept,
        "memory_method": memory.method,
        "loss_error": found[0],
        "gradient_error": found[1],
    }


def speed(problem: Problem, floor: float, seconds: float) -> dict:
    """The least work over the time, and the bare products' time over it (above 1: faster than torch.mm is)."""
    flops = spec.flops(problem.case)
    return {
        "flops": flops,
        "bytes": spec.bytes(problem.case),
        "gflops_per_second": flops / seconds / 1e9,
        "floor_seconds": floor,
        "share_of_floor": floor / seconds,
    }
