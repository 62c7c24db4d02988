"""What an experiment found: `results.json` in the schema of `dive_fast.report`, the tables and the page.

Values are means over the seeds; `dive_fast.experiment.summary` says what intervals and differences are.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dive_fast import checkpoints, doctor, measurements
from dive_fast.errors import InputError
from dive_fast.experiment import tables
from dive_fast.experiment.inputs import Data
from dive_fast.experiment.pieces import Folder, Piece
from dive_fast.experiment.scoring import PARTS, Scorer
from dive_fast.experiment.settings import Evaluation, ExperimentConfig, Generation
from dive_fast.experiment.summary import Summary, summarize
from dive_fast.experiment.systems import System, reference
from dive_fast.metrics.scores import Scores
from dive_fast.report import result_table, write_report
from dive_fast.supervision import Teacher

RESULTS, MARKDOWN, LATEX, PAGE = "results.json", "table.md", "table.tex", "report.html"


@dataclass(frozen=True)
class Finished:
    """The systems that all seeds are written of, and where: `pieces` holds one run per seed, or the one for all."""

    config: ExperimentConfig
    folder: Folder
    data: Data
    systems: Mapping[str, System]
    pieces: Mapping[str, Sequence[Piece]]
    missing: Sequence[str]
    compared_with: str | None


def finished(config: ExperimentConfig, systems: Mapping[str, System], folder: Folder, data: Data) -> Finished:
    """What there is to show so far.

    Raises:
        InputError: runs that were made with different weights of the model.
    """
    pieces = {name: [folder.piece(name, seed) for seed in folder.seeds_of(s, config)] for name, s in systems.items()}
    whole = {name: runs for name, runs in pieces.items() if all(piece.written for piece in runs)}
    weights: dict[str, Piece] = {}
    for piece in (piece for runs in whole.values() for piece in runs):
        for file in ("train.json", "write.json"):
            if piece.file(file).is_file():
                weights.setdefault(piece.read(file)["model_sha256"], piece)
    if len(weights) > 1:
        first, second, *_ = weights.values()
        raise InputError(
            f"output: {first.folder} and {second.folder} were made with different weights of the model; remove the one "
            "that is not wanted, and start the same command again"
        )
    known = {name: system for name, system in systems.items() if name in whole}
    missing, wanted = [name for name in systems if name not in whole], reference(config, systems)
    return Finished(config, folder, data, known, whole, missing, wanted if wanted in whole else None)


def write_results(console, found: Finished, scorer: Scorer, command: str) -> None:
    """Score what is finished, write all four files, and print the table; systems that lack a seed are named.

    Raises:
        InputError: runs that cannot be compared, or a folder that cannot be written.
    """
    if found.missing:
        console.print(f"Not finished, and not in the results: {', '.join(found.missing)}.", markup=False)
    if not found.systems:
        return
    with console.status("Scoring the reports"):
        scores = {name: [scorer.score(found.data.test, piece) for piece in runs] for name, runs in found.pieces.items()}
    result = result_of(found, scores) | {"command": command}
    root = found.folder.root
    with found.folder.writing():
        checkpoints.write_json(root / RESULTS, result)
        checkpoints.write_text(root / MARKDOWN, tables.markdown(result))
        checkpoints.write_text(root / LATEX, tables.latex(result))
        page = write_report(result, root / PAGE)
    console.print()
    console.print(result_table(result))
    console.print(f"Open {page} in a browser; {RESULTS}, {MARKDOWN} and {LATEX} are beside it.", markup=False)


def result_of(found: Finished, scores: Mapping[str, Sequence[Mapping[str, Scores]]]) -> dict[str, Any]:
    """The result in the schema of `dive_fast.report`.

    Args:
        scores: system -> for every run its scores by part.
    """
    config, test = found.config, found.data.test
    evaluation, summaries = Evaluation(**config.evaluation), {}
    for part in PARTS:
        if all(part in run for runs in scores.values() for run in runs):
            # A run that counts for all seeds stands in the place of each.
            runs = {name: [run[part] for run in own] for name, own in scores.items()}
            runs = {name: own * (len(config.seeds) // len(own)) for name, own in runs.items()}
            summaries[part] = summarize(
                runs, reference=found.compared_with, bootstrap=evaluation.bootstrap, seed=evaluation.seed
            )
    unseen = len(measurements.unseen_rows(test))
    entries = []
    for name in found.systems:
        entry = _entry(found, name) | _figures(summaries["all"][name])
        entry["seeds"] = _by_seed(found, name, summaries["all"][name])
        if "unseen" in summaries:
            entry["unseen"] = {"n": unseen} | _figures(summaries["unseen"][name])
        entries.append(entry)
    return {
        "title": config.title,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "protocol": evaluation.protocol,
        "seeds": list(config.seeds),
        "compare_with": found.compared_with,
        "bootstrap": {"resamples": evaluation.bootstrap, "seed": evaluation.seed},
        "run": _run_facts(found),
        "data": {
            "name": str(config.data.get("path", config.data["name"])),
            "licence": config.licence,
            "train": len(found.data.train),
            "eval": len(test),
            "unseen": unseen,
        },
        "environment": doctor.environment(),
        "reference_lengths": [len(record.report.split()) for record in test],
        "systems": entries,
    }


def _figures(summary: Summary) -> dict[str, Any]:
    found = measurements.figures(summary.values, summary.intervals)
    if summary.differences:
        found["differences"] = {
            key: {"difference": one.value, "interval": one.interval and list(one.interval), "clear": one.clear}
            for key, one in summary.differences.items()
        }
    return found


def _by_seed(found: Finished, name: str, summary: Summary) -> list[dict]:
    seeds = found.folder.seeds_of(found.systems[name], found.config)
    return [{"seed": seed, "scores": one} for seed, one in zip(seeds, summary.per_seed, strict=False)]


def _entry(found: Finished, name: str) -> dict[str, Any]:
    """What a system is, cost and wrote."""
    system, pieces, test = found.systems[name], found.pieces[name], found.data.test
    written, rows = [piece.read("write.json") for piece in pieces], [piece.rows() for piece in pieces]
    trained = [piece.read("train.json") for piece in pieces] if system.trained else []
    reasons = [row["finish_reason"] for run in rows for row in run]
    examples = Evaluation(**found.config.evaluation).examples
    first = measurements.shape(
        test, [row["prediction"] for row in rows[0]], [row["finish_reason"] for row in rows[0]], examples
    )
    return {
        "name": name,
        "label": system.label,
        "role": system.role,
        "description": system.description,
        "trainable_parameters": trained[0]["trainable_parameters"] if trained else 0,
        "train_seconds": _mean(run["seconds"] for run in trained),
        "generate_seconds": _mean(run["seconds"] for run in written),
        "engine": written[0]["engine"],
        "costs": _costs(found, system, trained, written),
        "history": _mean_history([run["history"] for run in trained]),
        "finish": {
            reason: reasons.count(reason) / len(reasons) for reason in dict.fromkeys(("eos", "length", *reasons))
        },
        "lengths": [len(row["prediction"].split()) for run in rows for row in run],
        **({"samples": first["samples"]} if examples else {}),
    }


def _costs(found: Finished, system: System, trained: Sequence[Mapping], written: Sequence[Mapping]) -> dict[str, Any]:
    teacher = system.teacher_pass()
    files = [] if teacher is None else [found.folder.teacher_file(teacher, seed) for seed in found.config.seeds]
    passes = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    return {
        "teacher_seconds": _mean(one["seconds"] for one in passes),
        "teacher_in_training": any(run["teacher_in_training"] for run in trained),
        "train_peak_bytes": _mean(run["peak_bytes"] for run in trained),
        "tokens_per_second": _mean(run["tokens_per_second"] for run in written),
        "write_peak_bytes": _mean(run["peak_bytes"] for run in written),
        "memory": written[0]["memory"],
        "not_native": written[0]["not_native"],
    }


def _mean(values) -> float | None:
    """The mean of what was measured; None where nothing was."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _mean_history(histories: Sequence[Sequence[Mapping]]) -> list[dict]:
    """The mean losses over the seeds at every logged step that all of them have."""
    found = []
    for key in ("loss", "eval_loss"):
        by_step: dict[int, list[float]] = {}
        for entry in (entry for history in histories for entry in history if key in entry and "step" in entry):
            by_step.setdefault(entry["step"], []).append(entry[key])
        whole = {step: losses for step, losses in sorted(by_step.items()) if len(losses) == len(histories)}
        found += [{"step": step, key: float(np.mean(losses))} for step, losses in whole.items()]
    return found


def _run_facts(found: Finished) -> dict[str, Any]:
    config, runs = found.config, found.pieces
    trained = [system for system in found.systems.values() if system.trained]
    facts: dict[str, Any] = {"model": config.model, "dtype": next(iter(runs.values()))[0].read("write.json")["dtype"]}
    facts |= {"seeds": list(config.seeds), "max_new_tokens": Generation(**config.generation).max_new_tokens}
    if trained:
        arguments = [s.training_settings(config.seeds[0], runs[s.name][0].adapter) for s in trained]
        facts["steps"] = runs[trained[0].name][0].read("train.json")["steps"]
        facts["batch_size"] = arguments[0].per_device_train_batch_size * arguments[0].gradient_accumulation_steps
        rates = [f"{s.name} {one.learning_rate:g}" for s, one in zip(trained, arguments, strict=True)]
        facts["learning rates"] = ", ".join(rates)
    shots = sorted({Teacher(**s.teacher).shots for s in found.systems.values() if s.teacher is not None})
    return facts | ({"shots": shots} if shots else {})
