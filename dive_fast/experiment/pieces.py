"""The folder of an experiment: what is finished, and whether it was made with the same settings.

    experiment.yaml                        the settings, as they were read
    setup.json                             what the pieces depend on
    runs/<system>/seed-<n>/adapter/        checkpoints and the adapter
                           train.json      written when training is done
                           predictions.jsonl, likelihood.json, write.json (last: the reports are written)
                           scores.json     of these reports, with the tables that intervals are made of
    runs/<teacher>/seed-<n>.json           a teacher pass, shared by the systems of the seed
    teacher-cache/                         the teacher's results
    results.json table.md table.tex report.html

Each file is written whole or not at all. A piece that is there is finished work and is not made again. A system that
no seed can change has one run, `any`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dive_fast import checkpoints
from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.experiment.inputs import Data
from dive_fast.experiment.settings import SHARED, ExperimentConfig, Generation, without_tokens
from dive_fast.experiment.systems import ANY_SEED, System, TeacherPass
from dive_fast.run_settings import changes, read_settings
from dive_fast.shards import records_fingerprint

SETUP, CONFIG = "setup.json", "experiment.yaml"


class Task(NamedTuple):
    """One process's work: stage "teacher", "train" or "write", of a system (or of its teacher) and a seed."""

    stage: str
    system: str
    seed: int | str


@dataclass(frozen=True)
class Piece:
    """The files of one system and seed."""

    folder: Path

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def file(self, name: str) -> Path:
        return self.folder / name

    def read(self, name: str) -> Any:
        """The content of a finished JSON file.

        Raises:
            InputError: it is not there or cannot be read.
        """
        try:
            return json.loads(self.file(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"output: {self.file(name)} cannot be read ({error}); remove {self.folder} to make this run again"
            ) from error

    def rows(self) -> list[dict]:
        """The lines of the predictions file."""
        try:
            text = self.file("predictions.jsonl").read_text(encoding="utf-8")
            return [json.loads(line) for line in text.removesuffix("\n").split("\n")]
        except (OSError, ValueError) as error:
            raise InputError(
                f"output: {self.file('predictions.jsonl')} cannot be read ({error}); remove {self.folder} to make this "
                "run again"
            ) from error

    @property
    def trained(self) -> bool:
        return self.file("train.json").is_file() and (self.adapter / "adapter_model.safetensors").is_file()

    @property
    def written(self) -> bool:
        names = ("write.json", "predictions.jsonl", "likelihood.json")
        return all(self.file(name).is_file() for name in names)


@dataclass(frozen=True)
class Folder:
    """An experiment's output folder."""

    root: Path

    def piece(self, system: str, seed: int | str) -> Piece:
        return Piece(self.root / "runs" / system / (seed if seed == ANY_SEED else f"seed-{seed}"))

    def teacher_file(self, teacher: TeacherPass, seed: int | str) -> Path:
        return self.root / "runs" / teacher.name / f"seed-{seed}.json"

    def seeds_of(self, system: System, config: ExperimentConfig) -> list[int | str]:
        """The runs of a system: one per seed, or the one that counts for all."""
        return list(config.seeds) if system.depends_on_seed(Generation(**config.generation)) else [ANY_SEED]

    def tasks(self, systems: Sequence[System], config: ExperimentConfig) -> Iterator[Task]:
        """Everything there is to do, finished or not, in order: seed by seed, so that early seeds are whole early."""
        passed = set()
        for seed in (ANY_SEED, *config.seeds):
            for system in systems:
                if seed not in self.seeds_of(system, config):
                    continue
                teacher = system.teacher_pass()
                if teacher is not None and (teacher, seed) not in passed:
                    passed.add((teacher, seed))
                    yield Task("teacher", system.name, seed)
                if system.trained:
                    yield Task("train", system.name, seed)
                yield Task("write", system.name, seed)

    def place(self, task: Task, system: System) -> Path:
        """The file or folder that a task makes."""
        if task.stage == "teacher":
            return self.teacher_file(system.teacher_pass(), task.seed)
        return self.piece(task.system, task.seed).folder

    def done(self, task: Task, systems: Mapping[str, System]) -> bool:
        if task.stage == "teacher":
            return self.place(task, systems[task.system]).is_file()
        piece = self.piece(task.system, task.seed)
        return piece.trained if task.stage == "train" else piece.written

    def begin(self, config: ExperimentConfig, systems: Mapping[str, System], data: Data) -> None:
        """Take the folder for this experiment, or go on in it.

        Raises:
            InputError: it holds another experiment's runs, with what differs; it cannot be written.
        """
        setup = self.check(config, systems, data)
        with self.writing():
            self.root.mkdir(parents=True, exist_ok=True)
            checkpoints.write_json(self.root / SETUP, setup)
            checkpoints.write_text(self.root / CONFIG, config.to_yaml())

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What the system refuses while files of the folder are written, as an InputError that names it."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"output: {self.root} cannot be written ({error.strerror or error}); free disk space and start the "
                "same command again, which goes on, or name another folder"
            ) from error

    def check(self, config: ExperimentConfig, systems: Mapping[str, System], data: Data) -> dict:
        """What `begin` would store; raises InputError where the folder holds another experiment's runs."""
        setup = json.loads(json.dumps(_setup(config, systems, data)))
        file = self.root / SETUP
        if not file.is_file():
            if self.root.is_dir() and any(self.root.iterdir()):
                raise InputError(
                    f"output: {self.root} is not empty and holds no experiment (no {SETUP}); name another folder"
                )
            return setup
        before = read_settings(file, "output", "name another folder, or remove this one")
        # A system that only one of them has was added or left out; one without runs has nothing to contradict.
        both = before.get("systems", {}).keys() & setup["systems"].keys()
        both = sorted(name for name in both if (self.root / "runs" / name).is_dir())
        theirs, ours = ({**s, "systems": {name: s["systems"][name] for name in both}} for s in (before, setup))
        changed = changes(theirs, ours)
        if changed:
            raise InputError(
                f"output: {self.root} holds an experiment with other settings ({changed}); give the same ones, or name "
                "another --output. A system's own settings may change once its folder in runs/ is removed"
            )
        # A system that is left out this time stays what its runs were made with.
        setup["systems"] = {**before.get("systems", {}), **setup["systems"]}
        return setup


def _setup(config: ExperimentConfig, systems: Mapping[str, System], data: Data) -> dict:
    """What finished runs depend on. Seeds, added systems and how reports are scored may change in a folder."""
    records = {"data": data.train, "validation": data.validation, "test": data.test}
    setup = {
        "model": config.model,
        "dtype": config.dtype,
        **{name: _described(getattr(config, name), found) for name, found in records.items() if found is not None},
        "generation": vars(Generation(**config.generation)),
        # Also in every system that uses them; here so that a difference is named once, and first.
        **{name: getattr(config, name) for name in SHARED},
        "systems": {name: system.setup() for name, system in systems.items()},
    }
    return without_tokens(setup)


def _described(section: Mapping, records: Sequence[Record]) -> dict:
    return {**section, "records": len(records), "sha256": records_fingerprint(records)}


def digest(*parts: str) -> str:
    """sha256 (hex) of texts, each with its place."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
