"""One piece of an experiment, in a process of its own: `python -m dive_fast.experiment.worker`.

A process per stage gives its memory back whole, so that no system inherits the peak of the one before, and none the
caches, hooks or random state. Training and writing are two: what training leaves in memory is no cost of writing.

The first line of standard input says what to do; the input ends with the process that started this one, and so does
this one. The outcome is one JSON line on standard output; whatever libraries print goes to standard error.
"""

import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

INPUT, OUTPUT, ERRORS = 0, 1, 2
EXIT_INPUT_ERROR, EXIT_INTERRUPTED, EXIT_ORPHANED = 2, 130, 3
NOTED_EVERY = 8
"""Reports between two notes of the time that a teacher pass has taken."""
PATIENT_SECONDS = 10
"""How long to wait for another process without a word: one that was left behind needs a moment to end."""


def main() -> int:
    """Do the task that standard input names; returns the exit code."""
    outcome = os.fdopen(os.dup(OUTPUT), "w")
    os.dup2(ERRORS, OUTPUT)
    asked = json.loads(_first_line())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch")
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")

    code, answer = _outcome(asked)
    print(json.dumps(answer), file=outcome, flush=True)
    return code


def _outcome(asked: Mapping[str, Any]) -> tuple[int, dict]:
    """The exit code and the answer of a task."""
    from dive_fast.errors import InputError

    try:
        return 0, _do(asked)
    except InputError as error:
        return EXIT_INPUT_ERROR, {"error": str(error)}
    except OSError as error:
        if error.errno is None:  # not the system's: a library's, whose traceback says more
            raise
        message = (
            f"output: this piece of {asked['output']} cannot be made ({error}); free disk space or mend what is named, "
            "then start the same command again, which goes on"
        )
        return EXIT_INPUT_ERROR, {"error": message}
    except KeyboardInterrupt as stop:
        saved = getattr(stop, "saved_to", None)
        return EXIT_INTERRUPTED, {"saved_to": None if saved is None else str(saved)}


def _first_line() -> bytes:
    # Not through sys.stdin: its lock, held by the waiting thread below, would stand in the way of a clean exit.
    line = b""
    while not line.endswith(b"\n"):
        read = os.read(INPUT, 2**16)
        if not read:
            os._exit(EXIT_ORPHANED)
        line += read
    return line


def _end_with_parent() -> None:
    """Nobody would wait for this process's work any more, and the next start of the experiment must find it alone."""
    while os.read(INPUT, 1):
        pass
    os._exit(EXIT_ORPHANED)


def _do(asked: Mapping[str, Any]) -> dict:
    from dive_fast.experiment.pieces import Folder, Task
    from dive_fast.experiment.settings import ExperimentConfig
    from dive_fast.experiment.systems import resolve

    config, folder = ExperimentConfig(**asked["config"]), Folder(Path(asked["output"]))
    if "task" not in asked:
        from dive_fast.experiment.rehearsal import rehearse

        return rehearse(config, folder, asked["systems"])
    task = Task(*asked["task"])
    stages = {"teacher": _teach, "train": _train, "write": _write}
    system = resolve(config)[task.system]
    with _alone(folder.place(task, system)):
        # Another command in the same folder may have made it meanwhile.
        return {} if folder.done(task, {system.name: system}) else stages[task.stage](config, folder, system, task.seed)


@contextmanager
def _alone(place: Path):
    """One process at a time makes what lies at `place`; a lock goes with the process that holds it."""
    from filelock import FileLock, Timeout

    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.parent / f".{place.name}.lock")
    try:
        lock.acquire(timeout=PATIENT_SECONDS)
    except Timeout:
        print(f"another process makes {place}; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _teach(config, folder, system, seed: int) -> dict:
    """Fill the cache that the systems of this seed are distilled from, so that the time of each is its own."""
    from dive_fast import checkpoints, measurements
    from dive_fast.experiment.inputs import load_experiment_data, load_frozen, training_records
    from dive_fast.supervision.teacher import TeacherRunner

    data, frozen = load_experiment_data(config), load_frozen(config)
    wanted = system.teacher_pass()
    teacher = system.teacher_settings(seed, data.train, folder.root)
    runner = TeacherRunner(
        frozen.model,
        frozen.encoder,
        teacher.demonstration_pool(data.train),
        cache_dir=teacher.cache_dir,
        memory_bytes=0,
        layers=wanted.layers,
        disagreement=wanted.disagreement,
    )
    records = training_records(data.train, system.training_settings(seed, folder.root), seed)
    file = folder.teacher_file(wanted, seed)
    notes = _Notes(file.with_suffix(".part"))
    measurements.fill_teacher_cache(runner, records, partial(notes.track, runner))
    # Passes that a cut-off run did not note cost as much as the others.
    spent = notes.seconds * len(records) / notes.passes if notes.passes else None
    checkpoints.write_json(file, {"seconds": spent, "records": len(records), "passes_timed": notes.passes})
    notes.file.unlink(missing_ok=True)
    return {"seconds": spent}


class _Notes:
    """The time of a teacher's passes, kept from process to process."""

    def __init__(self, file: Path):
        self.file, self.seconds, self.passes = file, 0.0, 0
        if file.is_file():
            noted = json.loads(file.read_text(encoding="utf-8"))
            self.seconds, self.passes = noted["seconds"], noted["passes"]

    def track(self, runner, records):
        """The records, with the time between them counted where the teacher had to run."""
        from rich.console import Console
        from rich.progress import track

        from dive_fast import checkpoints

        console = Console(stderr=True)
        quiet = not console.is_terminal
        for record in track(records, "the teacher reads", console=console, transient=True, disable=quiet):
            before, start = runner.passes, time.perf_counter()
            yield record
            if runner.passes > before:
                self.seconds, self.passes = self.seconds + time.perf_counter() - start, self.passes + 1
                if self.passes % NOTED_EVERY == 0:
                    checkpoints.write_json(self.file, {"seconds": self.seconds, "passes": self.passes})


def _train(config, folder, system, seed: int) -> dict:
    from dive_fast import checkpoints
    from dive_fast.adapters import trainable_parameters
    from dive_fast.experiment.inputs import load_experiment_data, load_frozen, training_records
    from dive_fast.experiment.memory import PeakMemory
    from dive_fast.models.fingerprint import model_fingerprint
    from dive_fast.train import train

    data, frozen = load_experiment_data(config), load_frozen(config)
    arguments = system.training_settings(seed, folder.piece(system.name, seed).adapter)
    arguments.disable_tqdm = not sys.stderr.isatty()
    fingerprint, piece = model_fingerprint(frozen.model), folder.piece(system.name, seed)
    peak = PeakMemory(frozen.model.device)
    result = train(
        frozen.model,
        training_records(data.train, arguments, seed),
        piece.adapter,
        processor=frozen.processor,
        eval_dataset=data.validation,
        steering=system.adapter_config(),
        supervision=system.supervision_settings(),
        teacher=system.teacher_settings(seed, data.train, folder.root),
        args=arguments,
        resume=True,
    )
    steps = max((entry.get("step", 0) for entry in result.history), default=0)
    per_step = result.metrics.get("seconds_per_step")
    trained = {
        "steps": steps,
        "seconds": None if per_step is None else per_step * steps,
        "teacher_in_training": system.teacher is not None and system.teacher_pass() is None,
        "peak_bytes": peak.bytes(),
        "memory": peak.kind,
        "trainable_parameters": trainable_parameters(result.model),
        "model_sha256": fingerprint,
        "metrics": result.metrics,
        "history": result.history,
    }
    checkpoints.write_json(piece.file("train.json"), trained)
    return {"seconds": trained["seconds"]}


def _write(config, folder, system, seed: int | str) -> dict:
    from dive_fast import checkpoints, measurements
    from dive_fast.adapters import load
    from dive_fast.experiment.inputs import load_experiment_data, load_frozen
    from dive_fast.experiment.memory import PeakMemory
    from dive_fast.experiment.settings import Generation
    from dive_fast.experiment.systems import ANY_SEED
    from dive_fast.likelihood import report_nll
    from dive_fast.models.fingerprint import model_fingerprint
    from dive_fast.predictions import record_seed

    data, frozen = load_experiment_data(config), load_frozen(config)
    piece, options = folder.piece(system.name, seed), vars(Generation(**config.generation))
    fingerprint, pool = model_fingerprint(frozen.model), None
    if system.role == "teacher":
        first = config.seeds[0] if seed == ANY_SEED else seed
        pool = system.teacher_settings(first, data.train, folder.root).demonstration_pool(data.train)
    if options["temperature"] > 0:
        options["seed"] = [record_seed(seed, record.id) for record in data.test]
    model = load(frozen.model, piece.adapter) if system.trained else frozen.model
    peak = PeakMemory(frozen.model.device)
    output, seconds = measurements.write_reports(model, frozen.processor, data.test, pool, **options)
    needed = peak.bytes()
    nll, tokens = report_nll(
        model,
        data.test,
        frozen.encoder,
        demonstrations=pool and pool.for_record,
        batch_size=config.training.get("per_device_eval_batch_size", 8),
    )
    piece.folder.mkdir(exist_ok=True)
    checkpoints.write_text(piece.file("predictions.jsonl"), measurements.prediction_lines(data.test, output))
    checkpoints.write_json(piece.file("likelihood.json"), {"nll": nll, "tokens": tokens})
    written = {
        "seconds": seconds,
        "new_tokens": output.stats["new_tokens"],
        "tokens_per_second": output.stats["new_tokens"] / seconds,
        "engine": output.stats["engine"],
        "not_native": output.stats.get("not_native"),
        "peak_bytes": needed,
        "memory": peak.kind,
        "dtype": str(frozen.model.dtype).removeprefix("torch."),
        "model_sha256": fingerprint,
    }
    checkpoints.write_json(piece.file("write.json"), written)
    return {"seconds": seconds}


if __name__ == "__main__":
    sys.exit(main())
