"""What every process of an experiment loads alike: its records and its frozen model."""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dive_fast.config import load_records
from dive_fast.data.encoding import ReportEncoder
from dive_fast.data.prompt import collapse
from dive_fast.data.record import Record
from dive_fast.devices import on_device, torch_device
from dive_fast.errors import InputError
from dive_fast.experiment.settings import ExperimentConfig
from dive_fast.models.backbone import load_backbone
from dive_fast.models.spec import text_config_of


class Data(NamedTuple):
    """The records; demonstrations come from all of `train`."""

    train: Sequence[Record]
    validation: Sequence[Record] | None
    test: Sequence[Record]


def load_experiment_data(config: ExperimentConfig) -> Data:
    """The records of the experiment; test records say whether their text occurs in training (`meta["unseen_text"]`).

    Where the data set does not say it itself, "in training" means the experiment's own training records.

    Raises:
        InputError: what the loaders refuse, headed by the section.
    """
    found: dict[str, Any] = {}
    for section in ("data", "validation", "test"):
        options: Mapping | None = getattr(config, section)
        try:
            found[section] = None if options is None else load_records(options)
        except InputError as error:
            raise InputError(f"{section}: {error}") from error
        if found[section] is not None and not len(found[section]):
            raise InputError(f"{section}: expected at least one record, got none; look at its options")
    seen = {collapse(record.report).lower() for record in found["data"]}
    test = [
        record if "unseen_text" in record.meta else _with_unseen(record, collapse(record.report).lower() not in seen)
        for record in found["test"]
    ]
    return Data(found["data"], found["validation"], test)


def _with_unseen(record: Record, unseen: bool) -> Record:
    return dataclasses.replace(record, meta={**record.meta, "unseen_text": unseen})


def left_out(records: Sequence[Record]) -> str | None:
    """What a loader left out on the way to its records, in words."""
    counts = getattr(records, "counts", None)
    return str(counts) if counts is not None and (counts.dropped or counts.notes) else None


def training_records(records: Sequence[Record], arguments, seed: int) -> list[Record]:
    """The records that one seed's training meets: as many as its steps take, drawn by the seed, or all of them.

    Drawn ahead of training, so that the teacher can read them ahead too.
    """
    count = arguments.max_steps * arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    if arguments.max_steps < 1 or count >= len(records):
        return list(records)
    return random.Random(seed).sample(records, count)


@dataclass
class Backbone:
    """The frozen model on its device, and what goes with it."""

    model: torch.nn.Module
    processor: Any
    encoder: ReportEncoder


def load_frozen(config: ExperimentConfig) -> Backbone:
    """Raises InputError where there is no such model."""
    model, processor = load_backbone(config.model, dtype=config.dtype)
    encoder = ReportEncoder(processor, context_length=text_config_of(model).max_position_embeddings)
    return Backbone(on_device(model, torch_device(None)), processor, encoder)
