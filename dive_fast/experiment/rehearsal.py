"""Everything that can fail cheaply fails here, before the first step: model, adapters, lengths, engine, metrics, disk.

It runs in a process of its own, because it loads the model, and writes nothing.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dive_fast.adapters import trainable_parameters, with_adapter
from dive_fast.data.demonstrations import DemonstrationPool
from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.experiment.inputs import Backbone, Data, load_experiment_data, load_frozen, training_records
from dive_fast.experiment.pieces import Folder
from dive_fast.experiment.scoring import Scorer
from dive_fast.experiment.settings import Evaluation, ExperimentConfig, Generation
from dive_fast.experiment.systems import System, resolve
from dive_fast.measurements import write_reports
from dive_fast.models.spec import text_config_of

LONGEST = 32
"""Records whose prompts are encoded to see that they fit, those with the most text."""
TEACHER_NUMBERS = 2 + 2 * 64
"""Of a teacher's results per token, four bytes each, beside the D of its mean (`dive_fast.ops.TeacherStatistics`)."""


def rehearse(config: ExperimentConfig, folder: Folder, names: Sequence[str]) -> dict[str, Any]:
    """Try everything once that the named systems will do.

    Returns:
        {"dtype", "device", "teacher_bytes", "systems": name -> {"trainable_parameters", "engine", "not_native"}}.

    Raises:
        InputError: what would have failed later.
    """
    Scorer(Evaluation(**config.evaluation)).rehearse()
    systems = [system for name, system in resolve(config).items() if name in names]
    data, frozen = load_experiment_data(config), load_frozen(config)
    frozen.encoder.check_lengths([*data.train, *(data.validation or ()), *data.test])
    found = {}
    for system in systems:
        try:
            _check_prompts(system, config, data, frozen, folder)
            found[system.name] = _tried(system, config, data, frozen, folder)
        except InputError as error:
            raise InputError(f"systems.{system.name}: {error}") from error
    needed = _teacher_bytes(systems, config, data, frozen, folder)
    _check_disk(folder.root, needed)
    return {
        "dtype": str(frozen.model.dtype).removeprefix("torch."),
        "device": str(frozen.model.device),
        "teacher_bytes": needed,
        "systems": found,
    }


def _tried(system: System, config: ExperimentConfig, data: Data, frozen: Backbone, folder: Folder) -> dict[str, Any]:
    """Make the system's adapter, write the first token of a report with it, and take it away again."""
    model, parameters = frozen.model, 0
    if system.trained:
        # A tagger that runs a model says here what it lacks.
        system.supervision_settings().span_tagger()
        torch.manual_seed(0)
        model = with_adapter(frozen.model, system.adapter_config()).eval()
        parameters = trainable_parameters(model)
    try:
        pool = _pool(system, config.seeds[0], data, folder) if system.role == "teacher" else None
        options = {**vars(Generation(**config.generation)), "max_new_tokens": 1, "min_new_tokens": 0}
        output, _ = write_reports(model, frozen.processor, data.test[:1], pool, **options)
    finally:
        if system.trained:
            model.unload()
    engine, reason = output.stats["engine"], output.stats.get("not_native")
    return {"trainable_parameters": parameters, "engine": engine, "not_native": reason}


def _check_prompts(system: System, config: ExperimentConfig, data: Data, frozen: Backbone, folder: Folder) -> None:
    """The longest prompts leave room for what is written behind them, with the demonstrations of every seed."""
    room = frozen.encoder.context_length
    new = config.generation.get("max_new_tokens", Generation.max_new_tokens)
    pools = {seed: _pool(system, seed, data, folder) for seed in config.seeds}
    for seed, pool in pools.items() if system.role == "teacher" else [(None, None)]:
        for record in _longest(data.test):
            length = _prompt_length(frozen, record, pool)
            if room is not None and length + new > room:
                more = "" if seed is None else f" with the demonstrations of seed {seed}"
                raise InputError(
                    f"generation.max_new_tokens: the prompt of test record {record.id!r}{more} has {length} tokens and "
                    f"the model's context {room}, so {new} new ones do not fit; lower it, or use fewer shots"
                )
    if not system.trained or system.teacher is None:
        return
    for seed, pool in pools.items():
        arguments = system.training_settings(seed, folder.root)
        for record in _longest(training_records(data.train, arguments, seed)):
            length = _prompt_length(frozen, record, pool) + len(frozen.encoder.response(record.report).ids)
            if room is not None and length > room:
                raise InputError(
                    f"teacher.shots: the teacher's prompt and report of training record {record.id!r} (seed {seed}) "
                    f"have {length} tokens, the model's context has {room}; use fewer shots than {pool.shots}"
                )


def _pool(system: System, seed: int, data: Data, folder: Folder) -> DemonstrationPool | None:
    teacher = system.teacher_settings(seed, data.train, folder.root)
    return None if teacher is None else teacher.demonstration_pool(data.train)


def _longest(records: Sequence[Record]) -> list[Record]:
    """Those with the most text; where there are images, a single one, since each costs a processor's pass."""
    most = 1 if any(record.images for record in records) else LONGEST
    return sorted(records, key=lambda record: len(record.prompt) + len(record.report))[-most:]


def _prompt_length(frozen: Backbone, record: Record, pool: DemonstrationPool | None) -> int:
    shown = [()] if pool is None else [pool.for_record(record)]
    return frozen.encoder.prompts([record], shown)["input_ids"].shape[1]


def _teacher_bytes(systems: Sequence[System], config: ExperimentConfig, data: Data, frozen: Backbone, folder) -> int:
    """What the teachers' results will take on disk, roughly: those of finished passes are counted again."""
    text, total, counted = text_config_of(frozen.model), 0, set()
    for system in systems:
        teacher = system.teacher_pass()
        if teacher is None:
            continue
        per_token = 4 * (text.hidden_size + TEACHER_NUMBERS)
        if teacher.layers:
            per_token += text.num_hidden_layers * text.hidden_size * frozen.model.dtype.itemsize
        for seed in config.seeds:
            if (teacher, seed) in counted or folder.teacher_file(teacher, seed).is_file():
                continue
            counted.add((teacher, seed))
            records = training_records(data.train, system.training_settings(seed, folder.root), seed)
            # A sample says how long reports are in tokens.
            sample = records[:: max(1, len(records) // 64)]
            tokens = sum(len(frozen.encoder.response(record.report).ids) for record in sample) / len(sample)
            total += int(len(records) * tokens * per_token)
    return total


def _check_disk(folder: Path, needed: int) -> None:
    above = folder.absolute()
    while not above.exists():
        above = above.parent
    free = shutil.disk_usage(above).free
    if needed > free:
        raise InputError(
            f"teacher.cache_dir: the teachers' results need about {needed / 1e9:.1f} GB, and {above} has "
            f"{free / 1e9:.1f} GB free; free some, give fewer steps, or give a system cache_dir: null, so that its "
            "teacher runs while it trains"
        )
