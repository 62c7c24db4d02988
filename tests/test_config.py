"""Reading runs: YAML and overrides, types from annotations, messages."""

import dataclasses
import enum
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from dive_fast import config
from dive_fast.config_values import check_type
from dive_fast.errors import InputError


class Schedule(enum.Enum):
    LINEAR = "linear"
    COSINE = "cosine"


@dataclasses.dataclass
class Base:
    inherited: str | None = None


@dataclasses.dataclass
class Steering(Base):
    kind: str = "lowrank"
    r: int = 16
    layers_to_transform: list[int] | int | None = None
    alpha: float | None = None
    preserve_norm: bool = False
    window: tuple[int, int] = (0, 4)
    fixed: int = dataclasses.field(default=3, init=False)


@dataclasses.dataclass
class Supervision:
    eos_weight: float = 4.0
    tagger: str | Callable = "lexicon"


@dataclasses.dataclass
class Teacher:
    shots: int = 8
    demos: Literal["random", "nearest", "fixed"] = "random"


@dataclasses.dataclass
class Training:
    output_dir: str | None = None
    max_steps: int = -1
    learning_rate: float = 1e-3
    schedule: Schedule | str = Schedule.LINEAR
    options: dict[str, Any] | str | None = None
    hub_token: str | None = None
    callback: Callable | None = None


@pytest.fixture(autouse=True)
def classes(monkeypatch):
    table = {"steering": Steering, "supervision": Supervision, "teacher": Teacher, "training": Training}
    monkeypatch.setattr(config, "section_classes", lambda: table)


@pytest.fixture
def written(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(textwrap.dedent(text))
        return path

    return write


def refusal(*arguments) -> str:
    with pytest.raises(InputError) as caught:
        config.load_config(*arguments)
    return str(caught.value)


def test_no_file_gives_the_defaults():
    assert config.load_config() == config.RunConfig()


def test_file_and_overrides(written):
    path = written("""
        model: my/model
        data: {name: json_lines, path: a.jsonl}
        steering: {r: 8, layers_to_transform: [1, 2]}
        training: {learning_rate: 3e-3, schedule: cosine}
        output: runs/a
    """)
    run = config.load_config(path, ["steering.r=32", "steering.r=64", "teacher.shots=2", "training.max_steps=1e2"])
    assert run.model == "my/model"
    assert run.data == {"name": "json_lines", "path": "a.jsonl"}
    assert run.steering == {"r": 64, "layers_to_transform": [1, 2]}
    assert run.teacher == {"shots": 2}
    assert run.training == {"learning_rate": 0.003, "schedule": "cosine", "max_steps": 100}
    assert type(run.training["learning_rate"]) is float and type(run.training["max_steps"]) is int


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1E5", 1e5), ("2", 2.0), (".5", 0.5), ("5.", 5.0), ("-1.5e+2", -150.0), ("null", None)],
)
def test_numbers_follow_yaml_1_2(text, value):
    result = config.load_config(None, [f"steering.alpha={text}"]).steering["alpha"]
    assert result == value and isinstance(result, float | None)


@pytest.mark.parametrize("text", ["no", "off", "yes", "2024-01-01", "0x10", "1_000", "12:30", "e5"])
def test_yaml_1_1_surprises_stay_text(text):
    assert config.load_config(None, [f"steering.kind={text}"]).steering["kind"] == text


def test_leading_zeros_are_decimal():
    assert config.load_config(None, ["steering.r=010"]).steering["r"] == 10


@pytest.mark.parametrize(
    ("override", "result"),
    [
        ("data=open_i", {"name": "open_i"}),
        ("data=my/Reports.JSONL", {"name": "json_lines", "path": "my/Reports.JSONL"}),
        ("data=rows.csv.gz", {"name": "json_lines", "path": "rows.csv.gz"}),
    ],
)
def test_short_data(override, result):
    assert config.load_config(None, [override]).data == result


def test_override_extends_a_short_data_section(written):
    run = config.load_config(written("data: open_i\n"), ["data.split=test", "data.limit=3"])
    assert run.data == {"name": "open_i", "split": "test", "limit": 3}


def test_merged_keys_stay_apart(written):
    run = config.load_config(written("data: &data {name: open_i, split: train}\neval_data: {<<: *data, split: val}\n"))
    assert (run.data["split"], run.eval_data) == ("train", {"name": "open_i", "split": "val"})


def test_null_section_and_nested_override():
    run = config.load_config(None, ["teacher=null", "training.options.min_lr=1e-5", "training.options.deep.er=[1, a]"])
    assert run.teacher is None
    assert run.training["options"] == {"min_lr": 1e-5, "deep": {"er": [1, "a"]}}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steering.rr=3", ["steering.rr", "unknown key", "did you mean 'r'"]),
        ("steering.preserve_nrom=true", ["did you mean 'preserve_norm'"]),
        ("supervison.eos_weight=1", ["supervison", "did you mean 'supervision'"]),
        ("steering.fixed=1", ["steering.fixed", "unknown key"]),
        ("steering.zzzz=1", ["known are", "kind"]),
        ("steering.r=many", ["steering.r", "expected a whole number", "got 'many' (text)"]),
        ("steering.r=1.5", ["expected a whole number", "got 1.5"]),
        ("steering.r=true", ["expected a whole number", "got true"]),
        ("steering.r=null", ["expected a whole number", "got null"]),
        ("steering.alpha=true", ["expected a number or null", "got true"]),
        ("steering.preserve_norm=yes", ["expected true or false", "got 'yes'"]),
        ("steering.kind=3", ["expected text", "got 3"]),
        ("steering.layers_to_transform=[1, x]", ["a list (each a whole number) or a whole number or null"]),
        ("steering.window=[1, 2, 3]", ["steering.window", "list"]),
        ("teacher.demos=closest", ["one of random, nearest, fixed", "'closest'"]),
        ("training.schedule=linaer", ["one of linear, cosine", "'linaer'"]),
        ("training.output_dir=x", ["training.output_dir", "--output"]),
        ("training.callback=f", ["set it from Python", "null"][1:]),
        ("supervision.tagger=3", ["expected text, got 3"]),
        ("steering=3", ["steering", "mapping", "got 3"]),
        ("data={split: test}", ["data", "the data set's name"]),
        ("data.limit=ten", ["data.limit", "whole number"]),
        ("steering.r", ["expected key=value"]),
        ("=3", ["expected key=value"]),
        ("steering..r=3", ["expected key=value"]),
        ("steering.r=[1", ["override 'steering.r=[1'", "not valid YAML"]),
        ("training.options=&a {b: *a}", ["an anchor is used inside what it names"]),
        ("model=a\x07", ["not valid YAML: line 1: the character '\\x07' may not stand in it"]),
        ("model.name=3", []),
    ],
)
def test_refused_overrides(override, words):
    message = refusal(None, [override])
    assert [word for word in words if word not in message] == [], message


def test_override_below_a_value_that_holds_no_keys():
    assert "holds no keys" in refusal(None, ["model=a", "model.name=3"])


def test_messages_name_file_and_line(written):
    path = written("""\
        model: a
        steering:
          r: 8
          rank: 4
    """)
    assert refusal(path).startswith(f"{path}:4: steering.rank: unknown key")
    assert f"{path}:3: steering.r: expected a whole number" in refusal(written("model: a\nsteering:\n  r: x\n"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: a\nsteering: {r: 1\n", ["not valid YAML", "line 3"]),
        ("model: a\nmodel: b\n", [":2: model: given twice, first on line 1"]),
        ("steering:\n  r: 1\n  r: 2\n", [":3: steering.r: given twice, first on line 2"]),
        ("- a\n", ["expected sections"]),
        ("model: !!python/object/apply:os.system [echo]\n", ["not valid YAML", "line 1"]),
        ("a: 1\n---\nb: 2\n", ["not valid YAML"]),
        ("? [a]\n: 1\n", ["not valid YAML"]),
        ("model: a\noutput: b\0c\n", ["not valid YAML: line 2: the character '\\x00' may not stand in it"]),
        ("steering: &s\n  r: 4\n  me: *s\n", ["line 1, column 11: an anchor is used inside what it names"]),
        ("training: {options: &a [*a]}\n", ["an anchor is used inside what it names"]),
        (f"data: {'[' * 1500}\n", ["not valid YAML: nested too deeply"]),
    ],
)
def test_refused_files(written, text, words):
    message = refusal(written(text))
    assert [word for word in words if word not in message] == [], message


def test_unreadable_files(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9\n")
    assert "UTF-8" in refusal(tmp_path / "latin.yaml")


def test_empty_file_is_the_defaults(written):
    assert config.load_config(written("# nothing\n")) == config.RunConfig()


def test_round_trip(written):
    overrides = ["steering.window=[1, 2]", "steering.alpha=1e-7", "steering.kind='no'", "teacher.demos=fixed",
                 "supervision.tagger='010'", "training.options={a: [1.5, null, true], b: '1e3'}",
                 "eval_data={name: open_i, limit: 5}", "output=runs/ä", "data.title='2024-01-01: #1'"]  # fmt: skip
    run = config.load_config(None, overrides)
    assert run.steering["window"] == (1, 2)
    assert config.load_config(written(run.to_yaml())) == run


def test_resolved_writes_out_own_defaults_and_no_token(written):
    run = config.load_config(None, ["steering.r=4", "training.hub_token=secret"]).resolved()
    assert run.steering == {"kind": "lowrank", "r": 4, "layers_to_transform": None, "alpha": None,
                            "preserve_norm": False, "window": [0, 4]}  # fmt: skip
    assert run.teacher is None and run.supervision == {"eos_weight": 4.0, "tagger": "lexicon"}
    assert "secret" not in run.to_yaml()
    again = config.load_config(written(run.to_yaml()))
    assert again.steering == {**run.steering, "window": (0, 4)}


@pytest.mark.parametrize(
    ("value", "annotation", "result"),
    [
        (3, int | str, 3),
        ("3", int | str, "3"),
        (1, bool | float, 1.0),
        ([1, 2], Sequence[float], [1.0, 2.0]),
        ([1], tuple[float, ...], (1.0,)),
        ({"a": 1}, Mapping[str, float], {"a": 1.0}),
        ("x", Path, "x"),
        ("cosine", Schedule, "cosine"),
        (False, Literal[False] | str, False),
        ({"x": [1]}, Any, {"x": [1]}),
    ],
)
def test_check_type(value, annotation, result):
    assert check_type(value, annotation, "key") == result


def test_data_with_options():
    section = config.data_with_options("odd: #name", ["split=test", "n=3"])
    assert section == {"name": "odd: #name", "split": "test", "n": 3}


def test_load_records_takes_the_first(monkeypatch):
    data = pytest.importorskip("dive_fast.data")
    rows = [data.Record(name, "p", "r") for name in "abc"]
    monkeypatch.setitem(data.DATA_SETS, "x", lambda split: [*rows, split])
    assert config.load_records({"name": "x", "split": "test", "limit": 2}) == rows[:2]
    assert config.load_records({"name": "x", "split": "test", "limit": None}) == [*rows, "test"]
    monkeypatch.setitem(data.DATA_SETS, "y", lambda limit: [limit])
    assert config.load_records({"name": "y", "limit": 2}) == [2]  # a loader with a limit of its own stops there
    with pytest.raises(InputError, match="positive"):
        config.load_records({"name": "x", "split": "test", "limit": 0})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["views=3"], "override data.views: expected text or a list (each text) or null, got 3"),
        (["skip_missing_images=yes"], "override data.skip_missing_images: expected true or false, got 'yes'"),
        (["limit=ten"], "override data.limit: expected a whole number"),
    ],
)
def test_options_of_a_data_set_have_types(options, words):
    with pytest.raises(InputError, match=re.escape(words)):
        config.data_with_options("mimic_cxr", options)
    fine = config.data_with_options("mimic_cxr", ["views=[PA, AP]", "root=/data", "split=null", "limit=5"])
    assert fine == {"name": "mimic_cxr", "views": ["PA", "AP"], "root": "/data", "split": None, "limit": 5}


def test_the_example_is_a_valid_run(monkeypatch):
    monkeypatch.undo()
    run = config.load_config(Path(__file__).parents[1] / "configs" / "open_i_smollm2.yaml")
    assert run.data["name"] == "open_i" and run.teacher is None
    assert run.training["learning_rate"] == 0.003
