"""`dive-fast demo`: the whole method on real reports and a small frozen language model, on any machine.

SmolLM2-135M-Instruct, frozen, writes the findings of Open-i chest X-ray reports from their tags and indication, with
R2Gen's split. Four systems meet the same held-out reports: the model as it is, the model with demonstrations in its
context (the teacher), an open-loop vector per layer, and the hidden-state-dependent adapter.
"""

import dataclasses
import datetime
import json
import random
import shlex
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track

from dive_fast import checkpoints, doctor, measurements
from dive_fast.data import load_data
from dive_fast.data.demonstrations import DemonstrationPool
from dive_fast.data.encoding import ReportEncoder
from dive_fast.data.record import Record
from dive_fast.decode import GenerateOutput
from dive_fast.devices import on_device, torch_device
from dive_fast.errors import InputError
from dive_fast.likelihood import report_nll
from dive_fast.models.backbone import load_backbone, products_are_slow
from dive_fast.models.spec import text_config_of
from dive_fast.report import result_table, write_report
from dive_fast.run_settings import changes, read_settings
from dive_fast.steering import DiveConfig
from dive_fast.supervision import Supervision, Teacher
from dive_fast.supervision.teacher import TeacherRunner
from dive_fast.train import TrainResult, train

STEPS = 36
EVAL_REPORTS = 64
SHOTS = 4
BATCH_SIZE = 8
MAX_NEW_TOKENS = 96
GENERATE_BATCH = 32
EXAMPLES = 5
PROTOCOL = "r2gen"


@dataclass
class Budget:
    """What one run of the demo spends."""

    steps: int
    eval_reports: int
    seed: int


@dataclass
class Task:
    """The frozen model and the reports: adapters see `train`, `pool` draws from the whole training split."""

    model: torch.nn.Module
    processor: object
    encoder: ReportEncoder
    train: list[Record]
    held_out: list[Record]
    pool: DemonstrationPool


class Adapter(NamedTuple):
    """One adapter of the comparison."""

    name: str
    label: str
    description: str
    steering: DiveConfig
    learning_rate: float


# Each with the learning rate that served it best of those tried, by perplexity of 48 validation reports after 24 steps
# without a teacher: lowrank 14.6 at 3e-3, 10.8 at 1e-2, 10.1 at 2e-2; fixed 17.3 at 0.1, 15.4 at 0.3, diverged at 1.
ADAPTERS = (
    Adapter(
        "fixed",
        "Open-loop vectors",
        "one learned vector and strength per layer (LIVE's recipe), the same push at every position",
        DiveConfig(kind="fixed"),
        learning_rate=0.3,
    ),
    Adapter(
        "lowrank",
        "Steered (DIVE)",
        "rank-16 adapter per layer, whose push depends on the current hidden state",
        DiveConfig(kind="lowrank", r=16),
        learning_rate=2e-2,
    ),
)


def main(
    output: str | Path = "demo-output",
    *,
    quick: bool = False,
    steps: int | None = None,
    eval_reports: int | None = None,
    seed: int = 0,
    dtype: str | None = None,
) -> int:
    """Run the demo; writes adapters, predictions, `result.json` and `report.html` into `output`.

    A run that was cut off goes on where it stopped when it is started again with the same settings.

    Args:
        quick: a run of about two minutes that shows the path, not the quality.
        steps: training steps of 8 reports, for each adapter.
        eval_reports: held-out reports to score.
        dtype: of the frozen weights, float32, bfloat16 or float16; None takes what `load_backbone` does.

    Raises:
        InputError: a number below 1; a seed below 0; an unknown dtype; the model or the reports are not installed;
            `output` holds another run.
    """
    usual_steps, usual_reports = (6, 8) if quick else (STEPS, EVAL_REPORTS)
    budget = Budget(
        usual_steps if steps is None else steps, usual_reports if eval_reports is None else eval_reports, seed
    )
    for name in ("steps", "eval_reports"):
        if getattr(budget, name) < 1:
            raise InputError(f"{name}: expected a whole number >= 1, got {getattr(budget, name)}")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed: expected a whole number from 0 to 2**32 - 1, got {seed}")
    output = Path(output)
    from_scratch = not output.exists() or not any(output.iterdir())
    console = Console()
    start = time.perf_counter()
    with _step(console, "Loading SmolLM2-135M-Instruct (frozen) and the Open-i reports"):
        task = _load(budget, dtype)
    _claim(output, dataclasses.asdict(budget) | {"dtype": _dtype_name(task)})
    _describe(console, task, budget)
    systems = [
        _score(console, task, output, "zero-shot", "Zero-shot", "baseline", "the frozen model, prompt only"),
        _score(
            console,
            task,
            output,
            "teacher",
            f"{SHOTS}-shot teacher",
            "teacher",
            f"the frozen model with {SHOTS} reports of the training set in its context",
            demonstrations=True,
        ),
    ]
    teacher_seconds = _teach(console, task, output, budget)
    for adapter in ADAPTERS:
        result, seconds = _train(console, task, output / adapter.name, adapter, budget)
        entry = _score(
            console, task, output, adapter.name, adapter.label, "adapter", adapter.description, model=result.model
        )
        entry |= {
            "trainable_parameters": sum(p.numel() for n, p in result.model.named_parameters() if "dive_" in n),
            "train_seconds": seconds,
            "history": [{k: h[k] for k in ("step", "loss") if k in h} for h in result.history if "loss" in h],
        }
        systems.append(entry)
        result.model.unload()
    summary = _summary(task, budget, output, systems, quick, dtype)
    summary["run"]["teacher_seconds"] = teacher_seconds
    seconds_total = time.perf_counter() - start
    if from_scratch:
        summary["run"]["seconds_total"] = seconds_total
    checkpoints.write_json(output / "result.json", summary)
    page = write_report(summary, output / "report.html")
    console.print()
    console.print(result_table(summary))
    console.print(f"Finished in {seconds_total / 60:.1f} minutes. Open {page} in a browser.")
    return 0


def _load(budget: Budget, dtype: str | None) -> Task:
    train_records = load_data("open_i", split="train")
    test = load_data("open_i", split="test")
    model, processor = load_backbone("smollm2", dtype=dtype)
    on_device(model, torch_device(None))
    encoder = ReportEncoder(processor, context_length=text_config_of(model).max_position_embeddings)
    rng = random.Random(budget.seed)
    held_out = rng.sample(test, min(budget.eval_reports, len(test)))
    seen = rng.sample(train_records, min(budget.steps * BATCH_SIZE, len(train_records)))
    pool = DemonstrationPool(train_records, SHOTS, "random", budget.seed)
    return Task(model, processor, encoder, seen, held_out, pool)


def _dtype_name(task: Task) -> str:
    return str(task.model.dtype).removeprefix("torch.")


def _claim(output: Path, settings: dict) -> None:
    """Note what the folder's adapters are trained with; refuses a folder whose adapters were trained otherwise."""
    file = output / "run.json"
    if file.is_file():
        changed = changes(read_settings(file, "output", "name another folder, or remove this one"), settings)
        if changed:
            raise InputError(f"output: {output} holds another run ({changed}); give its settings or another folder")
    output.mkdir(parents=True, exist_ok=True)
    checkpoints.write_json(file, settings)


def _describe(console: Console, task: Task, budget: Budget) -> None:
    unseen = sum(bool(record.meta.get("unseen_text")) for record in task.held_out)
    slow = products_are_slow(task.model.dtype, task.model.device)
    hint = ", which this processor multiplies more slowly than float32: --dtype float32 takes less time" if slow else ""
    console.print(
        f"  Task: tags and indication in, findings out. {len(task.train)} of {len(task.pool.pool)} training reports, "
        f"in {budget.steps} steps of {BATCH_SIZE} for each adapter.\n  {len(task.held_out)} held-out reports; the "
        f"texts of {unseen} of them do not occur in training. The backbone stays frozen "
        f"({_dtype_name(task)}{hint})."
    )


def _teacher(task: Task, output: Path, budget: Budget) -> Teacher:
    return Teacher(
        shots=SHOTS, demos="random", cache_dir=str(output / "teacher-cache"), pool=task.pool.pool, seed=budget.seed
    )


def _stage_seconds(file: Path, measured: float, *, whole: bool) -> float | None:
    """What a stage takes: as measured if it ran from start to end, else as an earlier whole run noted it, else None."""
    if whole:
        file.write_text(json.dumps(measured), encoding="utf-8")
        return measured
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _teach(console: Console, task: Task, output: Path, budget: Budget) -> float | None:
    """Fill the cache that both adapters are distilled from, so that the time of each is its own."""
    settings = _teacher(task, output, budget)
    runner = TeacherRunner(task.model, task.encoder, task.pool, cache_dir=settings.cache_dir)
    shown = partial(track, description=f"{SHOTS}-shot teacher reads the training reports", console=console)
    seconds = measurements.fill_teacher_cache(runner, task.train, shown)
    whole = runner.passes == len(task.train)
    return _stage_seconds(output / "teacher-seconds.json", seconds, whole=whole)


def _train(console, task: Task, folder: Path, adapter: Adapter, budget: Budget):
    console.print(f"[bold]Training: {adapter.label}[/]")
    whole = not checkpoints.checkpoints(folder)
    start = time.perf_counter()
    result: TrainResult = train(
        task.model,
        task.train,
        folder,
        processor=task.processor,
        steering=dataclasses.replace(adapter.steering),
        supervision=Supervision(),
        teacher=_teacher(task, folder.parent, budget),
        args={
            "max_steps": budget.steps,
            "per_device_train_batch_size": BATCH_SIZE,
            "learning_rate": adapter.learning_rate,
            "logging_steps": 4,
            "save_steps": 12,
            "save_total_limit": 1,
            "seed": budget.seed,
            "use_cpu": task.model.device.type == "cpu",
        },
        resume=True,
    )
    return result, _stage_seconds(folder / "train-seconds.json", time.perf_counter() - start, whole=whole)


def _score(
    console: Console,
    task: Task,
    output: Path,
    name: str,
    label: str,
    role: str,
    description: str,
    *,
    model=None,
    demonstrations: bool = False,
) -> dict:
    """Perplexity of the held-out reports, greedy reports of the system's own, and their scores."""
    model = task.model if model is None else model
    records, pool = task.held_out, task.pool if demonstrations else None
    with _step(console, f"{label}: perplexity of {len(records)} held-out reports"):
        likelihoods = report_nll(model, records, task.encoder, demonstrations=pool and pool.for_record)
    with _step(console, f"{label}: writing {len(records)} reports"):
        written, seconds = measurements.write_reports(
            model, task.processor, records, pool, max_new_tokens=MAX_NEW_TOKENS, batch_size=GENERATE_BATCH
        )
    output.mkdir(parents=True, exist_ok=True)
    lines = measurements.prediction_lines(records, written)
    (output / f"predictions-{name}.jsonl").write_text(lines, encoding="utf-8")
    entry = {
        "name": name,
        "label": label,
        "role": role,
        "description": description,
        "trainable_parameters": 0,
        "train_seconds": None,
        "generate_seconds": seconds,
        "engine": written.stats["engine"],
        "history": [],
    }
    entry |= measurements.shape(records, written.texts, written.finish_reasons, EXAMPLES)
    entry |= _figures(records, written, likelihoods)
    unseen = measurements.unseen_rows(records)
    if len(unseen) > 1:
        entry["unseen"] = {"n": len(unseen)} | _figures(records, written, likelihoods, unseen)
    return entry


def _figures(records, written: GenerateOutput, likelihoods, rows: Sequence[int] | None = None) -> dict:
    scores = measurements.score(records, written.texts, written.finish_reasons, likelihoods, rows, protocol=PROTOCOL)
    return measurements.figures(scores, scores.intervals)


def _summary(task: Task, budget: Budget, output: Path, systems: list, quick: bool, dtype: str | None) -> dict:
    supervision = Supervision()
    command = ["dive-fast", "demo", "--output", str(output), "--steps", str(budget.steps)]
    command += ["--eval-reports", str(budget.eval_reports), "--seed", str(budget.seed)]
    command += ["--dtype", dtype] if dtype else []
    return {
        "title": "Steering a frozen language model to write chest X-ray findings",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "protocol": PROTOCOL,
        "run": {
            "seed": budget.seed,
            "steps": budget.steps,
            "batch_size": BATCH_SIZE,
            "learning rates": ", ".join(f"{a.name} {a.learning_rate:g}" for a in ADAPTERS),
            "shots": SHOTS,
            "pathology_weight": supervision.pathology_weight,
            "eos_weight": supervision.eos_weight,
            "kl_weight": supervision.kl_weight,
            "max_new_tokens": MAX_NEW_TOKENS,
            "dtype": _dtype_name(task),
            "quick": quick,
        },
        "data": {
            "name": "Open-i chest X-ray reports (Indiana University), R2Gen split",
            "licence": "CC BY-NC-ND 4.0; texts are read from the installed torchxrayvision package",
            "train": len(task.train),
            "demonstration pool": len(task.pool.pool),
            "eval": len(task.held_out),
            "unseen": sum(bool(r.meta.get("unseen_text")) for r in task.held_out),
        },
        "environment": doctor.environment(),
        "reference_lengths": [len(r.report.split()) for r in task.held_out],
        "systems": systems,
    }


@contextmanager
def _step(console: Console, text: str):
    start = time.perf_counter()
    with console.status(text):
        yield
    console.print(f"{text} [dim]({time.perf_counter() - start:.0f} s)[/]")
