"""Group `end-to-end`: what a user waits for. Training until held-out reports are predicted well, and written reports.

Every clock counts what its user would wait for: of training all steps but no evaluation; of reports the whole call,
prompts included, with rows that end where the model ends them.
"""

import gc

import pytest

from benchmarks import measure, report_writers
from benchmarks.end_to_end import OURS, SYSTEMS, Problem, Training
from benchmarks.test_train_step import TOLERANCES, skip_if_missing

TRAINING = {
    "smoke": [Problem("tiny", steps=12, reports=4, evaluate_every=3, held_out=6, threshold=3.0)],
    "laptop": [Problem("smollm2", steps=36, reports=8, evaluate_every=3, held_out=32, threshold=2.0)],
    "gpu": [Problem("smollm2", steps=36, reports=8, evaluate_every=3, held_out=32, threshold=2.0, device="cuda")],
}
# Reports to write, rows at a time, and the most tokens of one.
WRITING = {"smoke": (6, 3, 12), "laptop": (32, 16, 96), "gpu": (64, 32, 96)}
# transformers takes tens of seconds a round on two cores; three rounds are the fewest that give an interval.
WRITING_SCALE = measure.Scale(seconds=60.0, least_rounds=5, most_rounds=10, patience=240.0)


def pytest_generate_tests(metafunc):
    scale = metafunc.config.option.scale
    if "problem" in metafunc.fixturenames:
        metafunc.parametrize("problem", TRAINING[scale], ids=str)
    if "steered" in metafunc.fixturenames:
        metafunc.parametrize("steered", [True, False], ids=["steered", "unsteered"])


@pytest.mark.benchmark(group="end-to-end training")
def test_training_to_a_loss(benchmark, problem, scale):
    """Every system trains to the end, step by step in turn; when each reached the loss is read off its curve."""
    skip_if_missing(problem)
    memories = {name: peak_memory(problem, name) for name in SYSTEMS}
    systems = {name: Training(problem, name) for name in SYSTEMS}
    others = {name: training for name, training in systems.items() if name != OURS}
    turns = measure.in_turn(benchmark, systems[OURS], others, problem.device, scale, wanted=problem.steps)
    if not turns.own:
        return
    measure.prepare(systems.values())  # the last evaluation
    first = systems[OURS].curve[0][1]
    for name, training in systems.items():
        assert abs(training.curve[0][1] / first - 1) <= TOLERANCES[problem.dtype], f"{name} begins elsewhere"
    times = {OURS: turns.own} | dict(turns.others)
    found = {name: outcome(training, times[name], memories[name]) for name, training in systems.items()}
    benchmark.extra_info |= described(problem) | {
        "implementation": OURS,
        "steps": problem.steps,
        "reports": problem.reports,
        "held_out": problem.held_out,
        "threshold": problem.threshold,
        "systems": found,
        "ratios": {name: ratio._asdict() for name, ratio in turns.ratios().items()},
        "threshold_ratios": threshold_ratios(found, times),
    }


def peak_memory(problem: Problem, name: str) -> measure.Memory:
    """Of a step on the run's largest batch, as its first: gradients, moments and all.

    The system is dropped behind it; having been called once, the timed one starts warm.
    """
    gc.collect()
    rehearsal = Training(problem, name)
    batch = rehearsal.largest_batch()
    memory, _ = measure.peak_memory(lambda: rehearsal.step(batch), problem.device)
    return memory


def outcome(training: Training, seconds: list[float], memory: measure.Memory) -> dict:
    """When the loss was reached, and the curve: [steps, seconds of training, held-out loss] of every evaluation."""
    curve = [[steps, sum(seconds[:steps]), loss] for steps, loss in training.curve]
    reached = next(((steps, took) for steps, took, loss in curve if loss < training.problem.threshold), (None, None))
    return {
        "reached": reached[0] is not None,
        "steps": reached[0],
        "seconds": reached[1],
        "final_loss": curve[-1][2],
        "peak_memory": memory.peak,
        "memory_method": memory.method,
        "parameters": sum(p.numel() for p in training.trained),
        "learning_rate": training.optimizer.defaults["lr"],
        "curve": curve,
    }


def threshold_ratios(found: dict, times: dict) -> dict:
    """Time to the loss, ours : another's, of those that reached it.

    The steps that each took are what they are; the interval is that of the steps' times, drawn in pairs.
    """
    own = found[OURS]
    ratios = {}
    for name, other in found.items():
        if name != OURS and own["reached"] and other["reached"]:
            steps = measure.ratio_of_sums(times[OURS], times[name])
            scale = own["seconds"] / other["seconds"] / steps.median
            ends = {end: scale * getattr(steps, end) for end in ("median", "low", "high")}
            ratios[name] = ends | {"rounds": steps.rounds}
    return ratios


def described(problem: Problem) -> dict:
    return {
        "problem": str(problem),
        "device": problem.device,
        "dtype": str(problem.dtype)[6:],
        "backbone": problem.backbone,
    }


@pytest.mark.benchmark(group="end-to-end reports")
def test_writing_reports(benchmark, problem, steered, scale):
    """Prompts in, reports out, with the adapter that training gave or without; ours in turn with transformers."""
    skip_if_missing(problem)
    size = next(size for name, size in WRITING.items() if measure.SCALES[name] is scale)
    task = report_writers.Task(problem, steered, *size)
    left_out = {name: reason for name, make in report_writers.WRITERS.items() if (reason := make.missing(task))}
    writers = {name: make(task) for name, make in report_writers.WRITERS.items() if name not in left_out}
    if "dive_fast" not in writers:
        pytest.skip(f"dive_fast: {left_out['dive_fast']}")
    shortfalls = report_writers.check(task, writers)
    others = {name: writer for name, writer in writers.items() if name != "dive_fast"}
    scale = scale if scale is measure.SCALES["smoke"] else WRITING_SCALE
    turns = measure.in_turn(benchmark, writers["dive_fast"], others, problem.device, scale, measure.SETTLE_SECONDS)
    if not turns.own:
        return
    times = {"dive_fast": turns.own} | dict(turns.others)
    benchmark.extra_info |= described(problem) | {
        "implementation": "dive_fast",
        "steering": "steered" if steered else "unsteered",
        "reports": len(task.records),
        "batch": task.batch,
        "max_new_tokens": task.max_new_tokens,
        "left_out": left_out,
        "systems": {name: rates(writer, times[name], shortfalls[name]) for name, writer in writers.items()},
        "ratios": {name: ratio._asdict() for name, ratio in turns.ratios().items()},
    }


def rates(writer, seconds: list[float], shortfall: float) -> dict:
    """What a writer's user gets in a minute, and what its reports are like."""
    counts = [len(row) for row in writer.tokens]
    per_minute = measure.median([60 * len(counts) / took for took in seconds])
    return {
        "reports_per_minute": per_minute._asdict(),
        "tokens_per_second": sum(counts) / measure.median(seconds).median,
        "new_tokens": sum(counts),
        "ended": sum(row[-1] == writer.task.end for row in writer.tokens) / len(counts),
        "shortfall": shortfall,
    }
