"""A system is a row of the table: the frozen model alone, with demonstrations, or with an adapter trained by a recipe.

What its section leaves out is shared by all rows; what it is like comes between the two.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import peft

from dive_fast.adapters import adapter_settings
from dive_fast.arguments import DiveTrainingArguments, training_arguments
from dive_fast.data.record import Record
from dive_fast.devices import torch_device
from dive_fast.errors import InputError
from dive_fast.experiment.settings import KINDS, SHARED, ExperimentConfig, Generation, ancestors
from dive_fast.steering import DiveConfig
from dive_fast.supervision import Supervision, Teacher

ANY_SEED = "any"
"""In place of a seed where the seed changes nothing: such a system is run once and counts for every seed."""

REFERENCE = "dive"
"""The row that others are compared with, where `compare_with` names none and there is one of this name."""


class TeacherPass(NamedTuple):
    """A teacher's results that several systems of a seed may share: what is asked of it, and where it is kept.

    `cache_dir` None: in the experiment's own folder, wherever that is moved to.
    """

    shots: int
    demos: str
    layers: bool
    disagreement: bool
    cache_dir: str | None

    @property
    def name(self) -> str:
        """Readable, and different for different passes."""
        parts = ["teacher", f"{self.shots}-shot", self.demos]
        parts += [word for word, wanted in (("layers", self.layers), ("disagreement", self.disagreement)) if wanted]
        if self.cache_dir is not None:
            parts.append(hashlib.sha256(self.cache_dir.encode()).hexdigest()[:6])
        return "-".join(parts)


@dataclass(frozen=True)
class System:
    """A resolved row; `training` holds the shared arguments too. `teacher` None: there is none."""

    name: str
    kind: str
    label: str
    description: str
    adapter: Mapping[str, Any]
    supervision: Mapping[str, Any]
    teacher: Mapping[str, Any] | None
    training: Mapping[str, Any]

    @property
    def role(self) -> str:
        return KINDS[self.kind].role

    @property
    def trained(self) -> bool:
        return self.role == "adapter"

    def adapter_config(self) -> peft.PeftConfig:
        """A fresh configuration: PEFT writes into the one it is given."""
        # `like` hands on what it has; PEFT gets copies.
        values = {key: list(value) if isinstance(value, list) else value for key, value in self.adapter.items()}
        return DiveConfig(**values) if self.kind == "steering" else peft.LoraConfig(**values)

    def supervision_settings(self) -> Supervision:
        return Supervision(**self.supervision)

    def teacher_settings(self, seed: int, pool: Sequence[Record], output: Path) -> Teacher | None:
        """The teacher of one seed, which keeps its results below `output` unless `cache_dir` says otherwise."""
        if self.teacher is None:
            return None
        given = {"cache_dir": str(output / "teacher-cache"), **self.teacher}
        return Teacher(**given, pool=pool, seed=seed)

    def teacher_pass(self) -> TeacherPass | None:
        """What to compute ahead of training; None where there is no teacher, or its results are not kept on disk."""
        if not self.trained or self.teacher is None:
            return None
        if "cache_dir" in self.teacher and self.teacher["cache_dir"] is None:
            return None
        teacher, supervision = Teacher(**self.teacher), self.supervision_settings()
        wanted = supervision.align_weight > 0, supervision.needs_disagreement
        return TeacherPass(teacher.shots, teacher.demos, *wanted, teacher.cache_dir)

    def training_settings(self, seed: int, output: Path) -> DiveTrainingArguments:
        """The checked arguments of one seed's training."""
        # Without it, transformers would train on what the other stages do not use, such as a Mac's GPU.
        use_cpu = torch_device(None).type == "cpu"
        return training_arguments({"use_cpu": use_cpu, **self.training, "seed": seed, "data_seed": seed}, output)

    def depends_on_seed(self, generation: Generation) -> bool:
        """Whether two seeds can give different figures."""
        drawn = self.role == "teacher" and Teacher(**self.teacher).demos != "nearest"
        return self.trained or drawn or generation.temperature > 0

    def setup(self) -> dict:
        """What its figures depend on, beyond what all systems share, as JSON values with the defaults filled in."""
        found: dict[str, Any] = {"kind": self.kind}
        if self.trained:
            found["adapter"] = adapter_settings(self.adapter_config())
            found["supervision"] = _fields(self.supervision_settings())
            found["training"] = dict(self.training)
        if self.teacher is not None:
            settings = _fields(Teacher(**self.teacher))
            found["teacher"] = {key: settings[key] for key in ("shots", "demos")}
        return found


def _fields(settings) -> dict[str, Any]:
    return {entry.name: getattr(settings, entry.name) for entry in dataclasses.fields(settings)}


def resolve(config: ExperimentConfig) -> dict[str, System]:
    """Every row of the experiment by name, in the file's order, each checked by the classes that receive its values.

    Raises:
        InputError: a value out of range, a few_shot system without a teacher, an alignment without one.
    """
    found = {}
    for name in config.systems:
        system = _resolved(config, name)
        try:
            _check(system)
        except InputError as error:
            raise InputError(f"systems.{name}: {error}") from error
        found[name] = system
    return found


def _resolved(config: ExperimentConfig, name: str) -> System:
    chain = [config.systems[one] for one in reversed(ancestors(config.systems, name))]
    kind = next(row["kind"] for row in chain if row.get("kind"))
    own = KINDS[kind].sections
    shared = {section: getattr(config, section) for section in SHARED}
    merged = {section: _merged(shared.get(section), chain, section) for section in own}
    label = chain[-1].get("label")
    if label is None:
        label = _default_label(kind, name, merged.get("teacher"))
    return System(
        name=name,
        kind=kind,
        label=label,
        description=chain[-1].get("description") or "",
        adapter=merged.get("steering" if kind == "steering" else "lora") or {},
        supervision=merged.get("supervision") or {},
        teacher=merged.get("teacher"),
        training=merged.get("training") or {},
    )


def _merged(shared: Mapping | None, chain: Sequence[Mapping], section: str) -> dict | None:
    """The shared section with those of the chain on top; null takes it away, a later mapping starts from it again."""
    result = None if shared is None else dict(shared)
    for row in chain:
        if section in row:
            result = None if row[section] is None else {**(result or shared or {}), **row[section]}
    return result


def _default_label(kind: str, name: str, teacher: Mapping | None) -> str:
    if kind == "few_shot" and teacher is not None:
        return f"{Teacher(**teacher).shots}-shot teacher"
    return {"zero_shot": "Zero-shot"}.get(kind, name)


def _check(system: System) -> None:
    if system.role == "teacher" and system.teacher is None:
        raise InputError("teacher: a few_shot system needs demonstrations; give shots, here or in the shared section")
    if system.teacher is not None:
        Teacher(**system.teacher)
    if not system.trained:
        return
    supervision = system.supervision_settings()
    if supervision.align_weight > 0 and system.teacher is None:
        raise InputError("supervision.align_weight: aligns with a teacher's hidden states, and teacher is null")
    if supervision.needs_disagreement and system.teacher is None:
        raise InputError("supervision.tagger: 'disagreement' compares with a teacher, and teacher is null")
    try:
        system.adapter_config()
    except (ValueError, TypeError) as error:
        raise InputError(f"{'steering' if system.kind == 'steering' else 'lora'}: {error}") from error
    system.training_settings(0, Path("runs"))


def reference(config: ExperimentConfig, systems: Mapping[str, System]) -> str:
    """The row that differences are taken to: named, else "dive", else the first low-rank steering, else the first."""
    if config.compare_with is not None:
        return config.compare_with
    steered = (name for name, s in systems.items() if s.kind == "steering" and s.adapter_config().kind == "lowrank")
    return REFERENCE if REFERENCE in systems else next(steered, next(iter(systems)))
