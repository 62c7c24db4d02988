"""What an experiment is about to do, on the terminal."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dive_fast.experiment.inputs import Data, left_out, training_records
from dive_fast.experiment.pieces import Folder, Task
from dive_fast.experiment.settings import ExperimentConfig
from dive_fast.experiment.systems import ANY_SEED, System
from dive_fast.report_assets.numbers import count

COLUMNS = (("System", "left"), ("Kind", "left"), ("Trained", "right"), ("Engine", "left"), ("Done", "right"))


def show_plan(
    console: Console, config: ExperimentConfig, systems: Sequence[System], folder: Folder, data: Data, tried: Mapping
) -> None:
    """Model, records, steps, and what is still to be made of each system.

    Args:
        tried: what `dive_fast.experiment.rehearsal.rehearse` found.
    """
    lines = [
        f"{config.model} in {tried['dtype']} on {tried['device']}, frozen. Seeds: {', '.join(map(str, config.seeds))}."
    ]
    for name, records in (("data", data.train), ("validation", data.validation), ("test", data.test)):
        if records is not None and (note := left_out(records)):
            lines.append(f"{name}: {note}.")
    trained = next((system for system in systems if system.trained), None)
    if trained is not None:
        lines.append(_training_line(config, trained, folder, data))
    unseen = sum(bool(record.meta.get("unseen_text")) for record in data.test)
    lines.append(f"Test: {len(data.test):,} records; the texts of {unseen:,} of them do not occur in training.")
    if tried["teacher_bytes"]:
        lines.append(f"The teachers' results will take about {tried['teacher_bytes'] / 1e6:,.0f} MB on disk.")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    console.print(_table(config, systems, folder, tried["systems"]))
    for reason in sorted({one["not_native"] for one in tried["systems"].values() if one["not_native"]}):
        console.print(f"Where transformers writes: {reason}.", style="dim", markup=False, soft_wrap=True)


def _training_line(config: ExperimentConfig, system: System, folder: Folder, data: Data) -> str:
    arguments = system.training_settings(config.seeds[0], folder.root)
    met = len(training_records(data.train, arguments, config.seeds[0]))
    length = f"{arguments.max_steps} steps" if arguments.max_steps > 0 else f"{arguments.num_train_epochs:g} epochs"
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return f"Training: {met:,} of {len(data.train):,} records for each seed, {length} of {batch} for every adapter."


def _table(config: ExperimentConfig, systems: Sequence[System], folder: Folder, tried: Mapping) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name, side in COLUMNS:
        table.add_column(name, justify=side)
    by_name = {system.name: system for system in systems}
    for system in systems:
        # A teacher's pass is shared, so it is none of the system's own pieces.
        one, tasks = tried[system.name], [t for t in folder.tasks([system], config) if t.stage != "teacher"]
        done = sum(folder.done(task, by_name) for task in tasks)
        row = (system.label, system.kind, count(one["trainable_parameters"]), one["engine"], f"{done}/{len(tasks)}")
        table.add_row(*map(Text, row))
    return table


def words(task: Task, system: System) -> str:
    """A task as a line of the log."""
    seed = "" if task.seed == ANY_SEED else f", seed {task.seed}"
    stages = {"teacher": "its teacher reads the training reports", "train": "training", "write": "writing"}
    return f"{system.label}{seed}: {stages[task.stage]}"
