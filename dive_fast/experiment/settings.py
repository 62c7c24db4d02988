"""An experiment as a YAML file: one frozen model, data, seeds and steps, and the systems that are compared on them.

    title: Steering on Open-i
    model: smollm2
    data: {name: open_i, split: train}    # trained on, and where demonstrations are drawn from
    validation: {name: open_i, split: val, limit: 64}    # where training evaluates; may be left out
    test: {name: open_i, split: test, limit: 128}
    licence: CC BY-NC-ND 4.0              # of the data's texts, which the page quotes
    seeds: [0, 1, 2]                      # of data order, weights and demonstrations
    training: {max_steps: 36}             # shared, as are `supervision` and `teacher`
    teacher: {shots: 4}
    systems:                              # the rows of the table
      zero_shot: {kind: zero_shot}
      dive: {kind: steering, steering: {kind: lowrank, r: 16}, training: {learning_rate: 2e-2}}
      dive_no_eos: {like: dive, supervision: {eos_weight: 0}}
      lora: {kind: lora, lora: {r: 10, target_modules: [q_proj, v_proj]}, teacher: null}

Every key and type is checked against what receives it; `key=value` overrides reach anywhere
(`systems.dive.steering.r=32`).
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dive_fast.config import Places, check_data, check_section, read_values, section_classes, unknown_key
from dive_fast.config_values import check_type
from dive_fast.config_yaml import dump
from dive_fast.decode.generate import ENGINES
from dive_fast.decode.options import Options
from dive_fast.errors import InputError
from dive_fast.metrics import DEFAULT

TEXTS = ("title", "model", "dtype", "licence", "compare_with", "output")
DATA_SECTIONS = ("data", "validation", "test")
SHARED = ("supervision", "teacher", "training")
SECTIONS = (
    *("title", "model", "dtype", *DATA_SECTIONS, "licence", "seeds", "training", "supervision", "teacher"),
    *("generation", "evaluation", "systems", "compare_with", "output"),
)

# What makes systems of one seed comparable: they take the same steps on the same batches.
SAME_STEPS = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
SEEDED = ("seed", "data_seed")


class Kind(NamedTuple):
    """What a system is: its role on the result page, and the sections it may have."""

    role: str
    sections: tuple[str, ...]


KINDS = {
    "zero_shot": Kind("baseline", ()),
    "few_shot": Kind("teacher", ("teacher",)),
    "steering": Kind("adapter", ("steering", *SHARED)),
    "lora": Kind("adapter", ("lora", *SHARED)),
}


@dataclass
class Generation:
    """How every system writes its reports: arguments of `dive_fast.generate`, explained there."""

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    batch_size: int = 8
    engine: str | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    weights: str | None = None


@dataclass
class Evaluation:
    """How reports are scored: arguments of `dive_fast.evaluate`, explained there; `lexicon` holds the decisive words.

    Perplexity and the share of reports that end by themselves are always measured. So many `examples` are quoted in
    results.json and report.html: 0 where results are to be shared and texts must not be.
    """

    metrics: list[str] = field(default_factory=lambda: list(DEFAULT))
    protocol: str = "r2gen"
    bootstrap: int = 1000
    seed: int = 0
    examples: int = 5
    metric_options: dict[str, Any] | None = None
    lexicon: str | None = None


@dataclass
class SystemSection:
    """A row as the file has it; `like` names another row, whose sections this one extends key by key."""

    kind: str | None = None
    label: str | None = None
    description: str | None = None
    like: str | None = None
    steering: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    supervision: dict[str, Any] | None = None
    teacher: dict[str, Any] | None = None
    training: dict[str, Any] | None = None


@dataclass
class ExperimentConfig:
    """A checked experiment. Sections hold plain values; `systems` holds each row as it was given."""

    data: dict[str, Any]
    test: dict[str, Any]
    systems: dict[str, dict[str, Any]]
    seeds: list[int] = field(default_factory=lambda: [0])
    title: str = "Comparison of systems"
    model: str = "smollm2"
    dtype: str | None = None
    licence: str | None = None
    validation: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    supervision: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    compare_with: str | None = None
    output: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The experiment as JSON values that `ExperimentConfig(**values)` takes back."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The experiment as YAML that `load_experiment` reads back. Access tokens are left out."""
        return dump({key: value for key, value in without_tokens(self.to_json()).items() if value is not None})


def without_tokens(value: Any) -> Any:
    """`value` without the access tokens that transformers' arguments may hold, however deep."""
    if isinstance(value, dict):
        return {key: without_tokens(item) for key, item in value.items() if not str(key).endswith("_token")}
    return value


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read an experiment's file, apply `dotted.key=value` overrides, and check every key, type and reference.

    Raises:
        InputError: no such file, a YAML error, an unknown key, a value of the wrong type (with file and line), rows
            that contradict one another. No model, data or package is looked at.
    """
    values, places = read_values(path, overrides, DATA_SECTIONS)
    for key in values:
        if key not in SECTIONS:
            raise InputError(unknown_key(places[str(key)], str(key), SECTIONS))
    checked: dict[str, Any] = {}
    for key in TEXTS:
        if values.get(key) is not None:
            checked[key] = check_type(values[key], str, places[key])
    for key in DATA_SECTIONS:
        if values.get(key) is not None:
            checked[key] = check_data(values[key], key, places)
        elif key != "validation":
            raise InputError(
                f"{places[key]}: expected a data set, such as {key}: {{name: open_i, split: ...}}; give one"
            )
    checked["seeds"] = _seeds(values.get("seeds", [0]), places["seeds"])
    classes = {**section_classes(), "generation": Generation, "evaluation": Evaluation}
    for key in (*SHARED, "generation", "evaluation"):
        if values.get(key) is not None:
            checked[key] = check_section(values[key], key, classes[key], places)
    _check_shared(checked, places)
    checked["systems"] = _systems(values.get("systems"), places)
    config = ExperimentConfig(**checked)
    _check_generation(config.generation, places)
    _check_references(config, places)
    return config


def _seeds(value: Any, place: str) -> list[int]:
    seeds = check_type(value, list[int], place)
    if not seeds:
        raise InputError(f"{place}: expected at least one whole number, such as [0, 1, 2], got an empty list")
    repeated = next((seed for seed in seeds if seeds.count(seed) > 1), None)
    if repeated is not None:
        raise InputError(f"{place}: expected different numbers, {repeated} is given twice")
    wrong = next((seed for seed in seeds if not 0 <= seed < 2**32), None)
    if wrong is not None:
        raise InputError(f"{place}: expected whole numbers from 0 to 2**32 - 1, got {wrong}")
    return seeds


def _check_shared(checked: Mapping, places: Places) -> None:
    training = checked.get("training", {})
    _refuse_seeds(training, "training", places)
    _refuse_seeds(checked.get("teacher", {}), "teacher", places)
    if training.get("eval_strategy", "no") != "no" and "validation" not in checked:
        raise InputError(
            f"{places['training.eval_strategy']}: evaluates on held-out records; give them as `validation`, never the "
            "test records"
        )


def _refuse_seeds(section: Mapping, name: str, places: Places) -> None:
    for key in SEEDED:
        if key in section:
            raise InputError(f"{places[f'{name}.{key}']}: every run gets its seed from `seeds`; leave it out here")


def _check_generation(given: Mapping, places: Places) -> None:
    values = dict(vars(Generation(**given)))
    engine, batch_size = values.pop("engine"), values.pop("batch_size")
    if engine not in (None, *ENGINES):
        raise InputError(f"{places['generation.engine']}: expected null or one of {', '.join(ENGINES)}, got {engine!r}")
    if batch_size < 1:
        raise InputError(f"{places['generation.batch_size']}: expected a whole number >= 1, got {batch_size}")
    try:
        Options(**values)
    except InputError as error:
        raise InputError(f"{places['generation']}: {error}") from error


def _systems(value: Any, places: Places) -> dict[str, dict[str, Any]]:
    rows = check_type(value or {}, dict[str, Any], places["systems"])
    if not rows:
        raise InputError(
            f"{places['systems']}: expected the systems to compare, such as zero_shot: {{kind: zero_shot}}"
        )
    return {name: _system(name, row, places) for name, row in rows.items()}


def _system(name: str, value: Any, places: Places) -> dict[str, Any]:
    place = f"systems.{name}"
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        raise InputError(f"{places[place]}: expected a name of letters, digits, _ and -, which becomes a folder")
    row = check_section(value, place, SystemSection, places)
    kind = row.get("kind")
    if kind is None and row.get("like") is None:
        raise InputError(f"{places[place]}: expected kind: one of {', '.join(KINDS)}, or like: another system")
    if kind is not None and kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{places[f'{place}.kind']}: expected one of {', '.join(KINDS)}, got {kind!r}{hint}")
    classes = section_classes() | {"lora": _lora_config()}
    for section in ("steering", "lora", *SHARED):
        if row.get(section) is not None:
            row[section] = check_section(row[section], f"{place}.{section}", classes[section], places)
            _refuse_seeds(row[section], f"{place}.{section}", places)
        elif section in row and section != "teacher":
            raise InputError(
                f"{places[f'{place}.{section}']}: expected a mapping of key: value, got null; leave it out"
            )
    for key in SAME_STEPS:
        if key in (row.get("training") or {}):
            raise InputError(
                f"{places[f'{place}.training.{key}']}: all systems take the same steps on the same batches; give it in "
                "the shared `training`"
            )
    return row


def _lora_config() -> type:
    from peft import LoraConfig

    return LoraConfig


def _check_references(config: ExperimentConfig, places: Places) -> None:
    for name, row in config.systems.items():
        chain = ancestors(config.systems, name, places)
        kinds = [config.systems[one]["kind"] for one in chain if config.systems[one].get("kind")]
        if len(set(kinds)) > 1:
            raise InputError(
                f"{places[f'systems.{name}.kind']}: {name} is {kinds[0]!r} and like {chain[1]}, which is {kinds[1]!r}; "
                "leave out one of the two"
            )
        if not kinds:
            raise InputError(f"{places[f'systems.{name}']}: neither it nor what it is like has a kind; give it one")
        for section in ("steering", "lora", *SHARED):
            if section in row and section not in KINDS[kinds[0]].sections:
                raise InputError(
                    f"{places[f'systems.{name}.{section}']}: a system of kind {kinds[0]!r} has no such section"
                )
    if config.compare_with is not None and config.compare_with not in config.systems:
        raise InputError(f"{places['compare_with']}: {_no_system(config.compare_with, config.systems)}")


def ancestors(systems: Mapping[str, Mapping], name: str, places: Mapping | None = None) -> list[str]:
    """`name`, what it is like, what that is like, ...; InputError where that has no end or no such system."""
    chain = [name]
    while (like := systems[chain[-1]].get("like")) is not None:
        key = f"systems.{chain[-1]}.like"
        place = key if places is None else places[key]
        if like not in systems:
            raise InputError(f"{place}: {_no_system(like, systems)}")
        if like in chain:
            raise InputError(f"{place}: {' is like '.join([*chain, like])}, which has no end; give one of them a kind")
        chain.append(like)
    return chain


def _no_system(name: str, systems: Mapping) -> str:
    near = difflib.get_close_matches(name, systems, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"there is no system {name!r}{hint} Known: {', '.join(systems)}"


def chosen(names: str | None, systems: Mapping) -> list[str]:
    """The systems of `--only NAME[,NAME]` in the file's order; None: all.

    Raises:
        InputError: a name that is not there, or none at all.
    """
    if names is None:
        return list(systems)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise InputError(f"--only: expected names of systems, such as --only {next(iter(systems))}")
    for name in wanted:
        if name not in systems:
            raise InputError(f"--only: {_no_system(name, systems)}")
    return [name for name in systems if name in wanted]
