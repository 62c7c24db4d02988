"""Group `scaling`: how costs grow, one size after another, ours in turn with a peer.

Few rounds at each size; their times are kept, so that a law can be fitted through them with an interval. Each axis has
its sizes by scale in a table. A size that does not fit in memory is skipped.
"""

import gc

import pytest
import torch

from benchmarks import loss_peers, measure
from benchmarks.decode_peers import OURS, TRANSFORMERS
from benchmarks.decode_problems import UNSTEERED
from benchmarks.decode_problems import Problem as DecodeProblem
from benchmarks.loss_problems import Problem as LossProblem
from benchmarks.loss_problems import prepare, step
from benchmarks.test_decode import LIMIT_NAMES, made_and_checked, read_limit, skip_if_missing
from benchmarks.test_loss import measured_and_checked
from benchmarks.test_train_step import TOLERANCES
from benchmarks.test_train_step import skip_if_missing as skip_step_if_missing
from benchmarks.train_steps import BASELINE, IMPLEMENTATIONS, Step
from benchmarks.train_steps import Problem as StepProblem
from dive_fast.ops.linear_cross_entropy import spec

FEW = {
    "smoke": measure.Scale(0.0, 3, 3, 0.5),
    "laptop": measure.Scale(1.0, 5, 10, 30.0),
    "gpu": measure.Scale(0.5, 10, 20, 10.0),
}
# Cached positions in front of one row; rows behind a short prompt; new tokens.
CONTEXTS = {"smoke": (8, 16, 32), "laptop": (128, 512, 1024, 2000), "gpu": (512, 2048, 4096, 8192)}
ROWS = {"smoke": (1, 2, 4), "laptop": (1, 2, 4, 8, 16, 32), "gpu": (1, 2, 4, 8, 16, 32)}
DECODING = {
    "smoke": {"backbone": "tiny", "dtype": torch.float32, "new_tokens": 4},
    "laptop": {"backbone": "smollm2", "new_tokens": 16},
    "gpu": {"backbone": "mistral-7b", "new_tokens": 16, "device": "cuda"},
}
ROWS_PROMPT = {"smoke": 8, "laptop": 128, "gpu": 1024}
# Hidden size, the vocabulary while rows grow, the rows while the vocabulary grows; all rows count.
HEADS = {"smoke": (64, 1024, 32), "laptop": (576, 49152, 512), "gpu": (4096, 32000, 4096)}
LOSS_ROWS = {"smoke": (16, 32, 64), "laptop": (256, 512, 1024, 2048, 4096), "gpu": (1024, 2048, 4096, 8192, 16384)}
VOCABULARIES = {
    "smoke": (512, 1024, 2048),
    "laptop": (8192, 16384, 32768, 65536, 131072),
    "gpu": (16384, 32768, 65536, 131072, 262144),
}
LOSS_DTYPES = {"smoke": torch.float32, "laptop": torch.float32, "gpu": torch.bfloat16}
LOSS_PEER = "eager float32 logits"
# Reports in a step, and the tokens of each one's prompt.
STEPS = {
    "smoke": ("tiny", 2, (16, 32, 48), torch.float32),
    "laptop": ("smollm2", 2, (64, 128, 256, 512, 1024), torch.float32),
    "gpu": ("mistral-7b", 2, (256, 512, 1024, 2048), torch.bfloat16),
}
STEP_OURS, STEP_KEPT = "dive_fast scope response", "dive_fast scope response, prompts kept"


def device_of(scale: str) -> str:
    return "cuda" if scale == "gpu" else "cpu"


def decode_problems(scale: str) -> list[tuple[str, int, DecodeProblem]]:
    """(axis, size, problem) of decoding."""
    make = DECODING[scale]
    found = [("decode context", n, DecodeProblem(rows=1, prompt_tokens=n, **make)) for n in CONTEXTS[scale]]
    prompt = ROWS_PROMPT[scale]
    return found + [("decode rows", n, DecodeProblem(rows=n, prompt_tokens=prompt, **make)) for n in ROWS[scale]]


def loss_problems(scale: str) -> list[tuple[str, int, LossProblem]]:
    """(axis, size, problem) of the loss."""
    hidden_size, vocabulary, rows = HEADS[scale]
    sizes = [("loss rows", n, (n, vocabulary)) for n in LOSS_ROWS[scale]]
    sizes += [("loss vocabulary", n, (rows, n)) for n in VOCABULARIES[scale]]
    return [(axis, n, LossProblem(_case(*size, hidden_size, scale), device_of(scale))) for axis, n, size in sizes]


def _case(rows: int, vocabulary: int, hidden_size: int, scale: str) -> spec.Case:
    return spec.Case(
        f"T{rows}-V{vocabulary}",
        rows,
        hidden_size,
        vocabulary,
        LOSS_DTYPES[scale],
        ignored=0.0,
        weighted=False,
        options={"reduction": "mean"},
    )


def step_problems(scale: str) -> list[tuple[str, int, StepProblem]]:
    """(axis, size, problem) of a training step."""
    backbone, reports, sizes, dtype = STEPS[scale]
    return [("step prompt", n, StepProblem(backbone, reports, n, dtype, device_of(scale))) for n in sizes]


def pytest_generate_tests(metafunc):
    make = {test_decoding: decode_problems, test_loss: loss_problems, test_train_step: step_problems}
    cases = [
        pytest.param(axis, size, problem, id=f"{problem.device}-{axis.replace(' ', '_')}-{size}")
        for axis, size, problem in make[metafunc.function](metafunc.config.option.scale)
    ]
    metafunc.parametrize(("axis", "size", "problem"), cases)


@pytest.fixture
def few(request) -> measure.Scale:
    return FEW[request.config.option.scale]


@pytest.fixture(autouse=True)
def device_or_skip(problem):
    if problem.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.benchmark(group="scaling")
def test_decoding(benchmark, axis, size, problem, few):
    """A step's time: against the context it reads, and against the rows that share its weights."""
    skip_if_missing(problem, OURS, UNSTEERED)
    ours, _ = made_and_checked(problem, OURS, UNSTEERED, rows=1)
    theirs, _ = made_and_checked(problem, TRANSFORMERS, UNSTEERED, rows=1)
    others = {TRANSFORMERS.name: theirs, LIMIT_NAMES[problem.device]: read_limit(problem, ours)}
    turns = measure.in_turn(benchmark, ours, others, problem.device, few, measure.SETTLE_SECONDS)
    describe(benchmark, axis, size, problem.dtype, OURS.name, turns, per=problem.new_tokens)


@pytest.mark.benchmark(group="scaling")
def test_loss(benchmark, axis, size, problem, few):
    """Forward and backward through a frozen head: against the rows that count, and against the vocabulary."""
    prepared, ours = prepare(problem), loss_peers.best_of_ours(problem.device)
    runs, memories = {}, {}
    for implementation in (ours, loss_peers.peer(LOSS_PEER)):
        runs[implementation.name] = step(implementation.make(), prepared.inputs)
        memory, _ = measured_and_checked(runs[implementation.name], implementation, problem)
        memories[implementation.name] = memory.peak
    turns = measure.in_turn(benchmark, runs[ours.name], {LOSS_PEER: runs[LOSS_PEER]}, problem.device, few)
    describe(benchmark, axis, size, problem.case.dtype, ours.name, turns, memories=memories)


@pytest.mark.benchmark(group="scaling")
def test_train_step(benchmark, axis, size, problem, few):
    """A training step against the length of its prompts."""
    skip_step_if_missing(problem)
    steps, memories, losses = {}, {}, {}
    for name in (STEP_OURS, STEP_KEPT, BASELINE):
        gc.collect()
        try:
            steps[name] = Step(problem, IMPLEMENTATIONS[name])
            memory, (loss,) = measure.peak_memory(steps[name], problem.device)
        except torch.OutOfMemoryError as error:
            pytest.skip(f"{name}: out of memory: {str(error).splitlines()[0]}")
        memories[name], losses[name] = memory.peak, float(loss)
    steps[STEP_KEPT]()  # the first one filled the store
    spread = max(losses.values()) / min(losses.values()) - 1
    assert spread <= TOLERANCES[problem.dtype], f"first losses differ: {losses}"
    others = {name: one for name, one in steps.items() if name != STEP_OURS}
    turns = measure.in_turn(benchmark, steps[STEP_OURS], others, problem.device, few)
    describe(benchmark, axis, size, problem.dtype, STEP_OURS, turns, memories=memories)


def describe(benchmark, axis: str, size: int, dtype, name: str, turns: measure.Turns, per: int = 1, memories=None):
    """The point on the axis; `times` are seconds of every round, of one of `per` equal parts of a call."""
    if not turns.own:
        return
    times = {name: turns.own} | dict(turns.others)
    benchmark.extra_info |= {
        "implementation": name,
        "axis": axis,
        "size": size,
        "dtype": str(dtype)[6:],
        "times": {one: [seconds / per for seconds in taken] for one, taken in times.items()},
        "ratios": {one: ratio._asdict() for one, ratio in turns.ratios().items()},
    } | ({"peak_memory": memories} if memories else {})
