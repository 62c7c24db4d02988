"""One training run as a YAML file plus `key=value` overrides, checked against the dataclasses that receive the values.

    model: smollm2                    # a short name, a hub id or a local path
    dtype: bfloat16                   # of the weights; left out: the checkpoint's, or bfloat16 where that is quick
    data: {name: open_i, split: train}    # a data set, its options, and `limit` to take the first records only
    eval_data: {name: open_i, split: val}
    steering: {r: 16}                 # fields of dive_fast.DiveConfig
    supervision: {eos_weight: 4}      # fields of dive_fast.Supervision
    teacher: {shots: 8}               # fields of dive_fast.Teacher; null or left out: no teacher
    training: {max_steps: 100}        # fields of dive_fast.train.DiveTrainingArguments
    output: runs/first

Relative paths mean the directory the command is started in, in the file as on the command line, so that moving a value
from one to the other never changes it. Scalars follow YAML 1.2: `1e-3` is a number; `no`, `off` and `yes` are text.
"""

import dataclasses
import difflib
import importlib
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dive_fast.config_values import check_type, describe
from dive_fast.config_yaml import MERGE, dump, parse
from dive_fast.errors import InputError

CLASS_SECTIONS = {
    "steering": ("dive_fast.steering", "DiveConfig"),
    "supervision": ("dive_fast.supervision", "Supervision"),
    "teacher": ("dive_fast.supervision", "Teacher"),
    "training": ("dive_fast.train", "DiveTrainingArguments"),
}
SECTIONS = ("model", "dtype", "data", "eval_data", "steering", "supervision", "teacher", "training", "output")
DATA_SECTIONS = ("data", "eval_data")


def section_classes() -> dict[str, type]:
    """The dataclass behind each section that has one; imports torch, so it is called only when a run is read."""
    return {
        section: getattr(importlib.import_module(module), name) for section, (module, name) in CLASS_SECTIONS.items()
    }


@dataclasses.dataclass
class RunConfig:
    """What one `dive-fast train` run uses. The class sections hold plain values whose keys and types are checked."""

    model: str = "smollm2"
    dtype: str | None = None
    data: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "open_i"})
    eval_data: dict[str, Any] | None = None
    steering: dict[str, Any] = dataclasses.field(default_factory=dict)
    supervision: dict[str, Any] = dataclasses.field(default_factory=dict)
    teacher: dict[str, Any] | None = None
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    output: str | None = None

    def to_yaml(self) -> str:
        """The run as YAML that `load_config` reads back to an equal RunConfig. Access tokens are left out."""
        values = dataclasses.asdict(self)
        values["training"] = {key: value for key, value in self.training.items() if not key.endswith("_token")}
        return dump(values)

    def resolved(self) -> "RunConfig":
        """The same run with the defaults of this version written out: what `train` stores beside the adapter.

        Only fields that the section's own class declares are added (not the hundred of transformers.TrainingArguments).
        """
        filled = {}
        for section, cls in section_classes().items():
            given = getattr(self, section)
            filled[section] = given if given is None else {**_own_defaults(cls), **given}
        return dataclasses.replace(self, **filled)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file (or start from the defaults), apply overrides, and check every key and type.

    Args:
        path: the YAML file; None starts from the defaults of RunConfig.
        overrides: `dotted.key=value`, such as "steering.r=32"; the value is YAML, so `[0, 1]`, `null` and `1e-3` mean
            what they mean in the file. A later override wins. `data=open_i` is short for `data.name=open_i`.

    Raises:
        InputError: no such file, a YAML syntax error (with its line), an unknown key (with the nearest known one), or a
            value of the wrong type (with the key, what was expected and what came).
    """
    values, places = read_values(path, overrides, DATA_SECTIONS, {"data": RunConfig().data})
    return _check_run(values, places)


def read_values(
    path: str | Path | None, overrides: Sequence[str], data_sections: Sequence[str], defaults: Mapping | None = None
) -> tuple[dict, "Places"]:
    """A YAML file's values with the overrides applied, unchecked, and where each of them was given.

    Args:
        data_sections: top-level keys that may be a data set's name in place of a section.
        defaults: of top-level keys, which overrides may reach into.
    """
    values, lines = _read_yaml(Path(path)) if path is not None else ({}, {})
    places = {key: f"{path}:{line}: {key}" for key, line in lines.items()}
    for key, value in (defaults or {}).items():
        values.setdefault(key, value)
    for override in overrides:
        _apply_override(values, places, override, data_sections)
    return values, Places(places, None if path is None else str(path))


class Places(dict):
    """Where a dotted key was given, in words for an error message."""

    def __init__(self, places: Mapping[str, str], path: str | None):
        super().__init__(places)
        self.path = path

    def __missing__(self, key: str) -> str:
        return key if self.path is None else f"{self.path}: {key}"


def _read_yaml(path: Path) -> tuple[dict, dict[str, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"configuration {path}: {error.strerror}; expected the path of a YAML file") from None
    except UnicodeDecodeError:
        raise InputError(f"configuration {path}: expected YAML in UTF-8, got other bytes") from None
    values, node = parse(text, str(path))
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected sections such as `model:` and `data:`, got {describe(values)}")
    lines: dict[str, int] = {}
    _collect_lines(node, "", lines, str(path))
    return values, lines


def _collect_lines(node: yaml.Node, prefix: str, lines: dict[str, int], source: str) -> None:
    """Line of each key, dotted; one given twice is an error, where YAML would keep the last."""
    for key_node, value_node in node.value:
        if key_node.tag == MERGE:
            continue  # keys from elsewhere, which the mapping's own take the place of
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        if key in lines:
            raise InputError(f"{source}:{line}: {key}: given twice, first on line {lines[key]}; keep one")
        lines[key] = line
        if isinstance(value_node, yaml.MappingNode):
            _collect_lines(value_node, f"{key}.", lines, source)


def _apply_override(
    values: dict, places: dict[str, str], override: str, data_sections: Sequence[str] = DATA_SECTIONS
) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    parts = key.split(".")
    if not equals or not all(parts):
        raise InputError(f"override {override!r}: expected key=value, such as steering.r=32 or training.max_steps=100")
    value, _ = parse(text, f"override {override!r}")
    level = values
    for depth, part in enumerate(parts[:-1]):
        if depth == 0 and part in data_sections:
            level[part] = data_section(level.get(part))
        if level.get(part) is None:
            level[part] = {}
        if not isinstance(level[part], dict):
            inner = ".".join(parts[: depth + 1])
            raise InputError(f"override {override!r}: {inner} is {describe(level[part])} and holds no keys")
        level = level[part]
    level[parts[-1]] = value
    places[key] = f"override {key}"


def _check_run(values: dict, places: Places) -> RunConfig:
    for key in values:
        if key not in SECTIONS:
            raise InputError(unknown_key(places[str(key)], str(key), SECTIONS))
    run = RunConfig()
    for key in ("model", "dtype", "output"):
        if values.get(key) is not None:
            setattr(run, key, check_type(values[key], str, places[key]))
    for key in DATA_SECTIONS:
        if values.get(key) is not None:
            setattr(run, key, check_data(values[key], key, places))
    if any(values.get(section) is not None for section in CLASS_SECTIONS):
        classes = section_classes()
        for section in CLASS_SECTIONS:
            if values.get(section) is not None:
                setattr(run, section, check_section(values[section], section, classes[section], places))
    return run


def check_data(value: Any, key: str, places: Places) -> dict[str, Any]:
    """A data section (or the name or path it is short for) with the data set's name and options of its types."""
    value = check_type(data_section(value), dict[str, Any], places[key])
    if not isinstance(value.get("name"), str):
        raise InputError(f"{places[key]}: expected the data set's name, such as name: open_i, got {describe(value)}")
    hints = {**_loader_hints(value["name"]), "limit": int | None}
    # An option that the loader does not have is its own error, which lists those it has.
    return {name: check_type(v, hints.get(name, Any), places[f"{key}.{name}"]) for name, v in value.items()}


def _loader_hints(name: str) -> dict[str, Any]:
    """Types of a data set's options; of an unknown data set none are known, and loading it says so."""
    from dive_fast.data import DATA_SETS

    return typing.get_type_hints(DATA_SETS[name]) if name in DATA_SETS else {}


def data_section(value: Any) -> Any:
    """A data set given by its name, or by the path of a .jsonl, .json or .csv file, as the section it is short for."""
    if not isinstance(value, str):
        return value
    if re.search(r"\.(jsonl|json|csv)(\.gz)?$", value.lower()):
        return {"name": "json_lines", "path": value}
    return {"name": value}


def data_with_options(name_or_path: str, options: Sequence[str]) -> dict[str, Any]:
    """A `data` section from a name or path and `key=value` options, checked like one in a file."""
    values, places = {"data": data_section(name_or_path)}, {}
    for option in options:
        _apply_override(values, places, f"data.{option}")
    return check_data(values["data"], "data", Places(places, None))


def load_metric_options(items: Sequence[str]) -> dict[str, Any] | None:
    """Options of metrics from a YAML file (metric: {option: value}) and `metric.option=value` items, which win.

    Raises:
        InputError: two files, no such file, not YAML, an item that is not metric.option=value.
    """
    paths = [item for item in items if "=" not in item]
    if len(paths) > 1:
        raise InputError(f"metric options: expected one YAML file, got {', '.join(paths)}")
    values = _read_yaml(Path(paths[0]))[0] if paths else {}
    for item in items:
        if item in paths:
            continue
        if item.partition("=")[0].count(".") != 1:
            raise InputError(f"metric option {item!r}: expected metric.option=value, such as chexbert.device=cpu")
        _apply_override(values, {}, item)
    return values or None


def load_records(section: Mapping[str, Any]) -> Sequence:
    """The records of a `data` section: `dive_fast.data.load_data` with its options, cut to the first `limit`."""
    from dive_fast.data import load_data

    return load_data(**section)


def check_section(value: Any, section: str, cls: type, places: Places) -> dict[str, Any]:
    """The keys and values of a section, against the fields of the class that receives them.

    Args:
        section: dotted, as `places` has it.
    """
    value = check_type(value, dict[str, Any], places[section])
    fields = {field.name for field in dataclasses.fields(cls) if field.init}
    if section.endswith("training") and "output_dir" in value:
        raise InputError(f"{places[f'{section}.output_dir']}: the directory is given once, as `output` (or --output)")
    hints = typing.get_type_hints(cls)
    checked = {}
    for key, item in value.items():
        place = places[f"{section}.{key}"]
        if key not in fields:
            raise InputError(unknown_key(place, key, option_help(cls)))
        checked[key] = check_type(item, hints[key], place)
    return checked


def option_help(cls: type) -> dict[str, str]:
    """The options of a section and what they are for, without the bookkeeping fields of every PeftConfig."""
    from peft import PeftConfig

    hidden = {"output_dir"}
    if issubclass(cls, PeftConfig):
        hidden |= {field.name for field in dataclasses.fields(PeftConfig)}
    return {
        field.name: " ".join(str(field.metadata.get("help", "")).split())
        for field in dataclasses.fields(cls)
        if field.init and field.name not in hidden
    }


def unknown_key(place: str, key: str, known: Sequence[str] | Mapping[str, str]) -> str:
    """The message for a key that is not one of `known`; names the nearest, by name or by the first word of its help."""
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    if not near and isinstance(known, Mapping):
        near = [name for name, about in known.items() if about.split(" ")[0].lower() == key.lower()]
    if near:
        return f"{place}: unknown key; did you mean {near[0]!r}?"
    listed = [*list(known)[:20], *(["..."] if len(known) > 20 else [])]
    return f"{place}: unknown key; known are {', '.join(listed)}"


def _own_defaults(cls: type) -> dict[str, Any]:
    own = cls.__dict__.get("__annotations__", {})
    defaults = {}
    for field in dataclasses.fields(cls):
        if field.name not in own or not field.init or field.name == "output_dir":
            continue
        default = field.default_factory() if callable(field.default_factory) else field.default
        if default is None or isinstance(default, bool | int | float | str | list | tuple | dict):
            defaults[field.name] = list(default) if isinstance(default, tuple) else default
    return defaults
