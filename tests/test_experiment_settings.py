"""An experiment's file: what each row becomes, and what is refused with file and line before anything is loaded."""

import json
import sys
from pathlib import Path

import peft
import pytest

from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.experiment.inputs import load_experiment_data, training_records
from dive_fast.experiment.pieces import Folder
from dive_fast.experiment.scoring import Scorer
from dive_fast.experiment.settings import Evaluation, ExperimentConfig, Generation, chosen, load_experiment
from dive_fast.experiment.systems import reference, resolve
from dive_fast.steering import DiveConfig

CONFIGS = Path(__file__).parents[1] / "configs" / "experiments"

BASE = """
model: smollm2
data: train.jsonl
test: {name: json_lines, path: test.jsonl, limit: 6}
seeds: [0, 1]
training: {max_steps: 5, learning_rate: 1e-3}
supervision: {kl_weight: 0.25}
teacher: {shots: 2}
systems:
  zero_shot: {kind: zero_shot}
  few_shot: {kind: few_shot}
  dive:
    kind: steering
    label: DIVE
    steering: {kind: lowrank, r: 8}
    training: {learning_rate: 2e-2}
  lora: {kind: lora, lora: {r: 4, target_modules: [q_proj]}, teacher: null}
"""
POOL = [Record("r1", "Case 1.", "No effusion.")]


@pytest.fixture
def written(tmp_path):
    def write(text: str = BASE, *more: str) -> Path:
        path = tmp_path / "exp.yaml"
        path.write_text("".join([text, *more]))
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        resolve(load_experiment(path, overrides))
    return str(caught.value)


def test_rows_get_what_is_shared_and_what_is_their_own(written):
    config = load_experiment(written())
    systems = resolve(config)
    assert list(systems) == ["zero_shot", "few_shot", "dive", "lora"]
    assert [system.role for system in systems.values()] == ["baseline", "teacher", "adapter", "adapter"]
    assert [system.label for system in systems.values()] == ["Zero-shot", "2-shot teacher", "DIVE", "lora"]
    dive, lora = systems["dive"], systems["lora"]
    assert isinstance(dive.adapter_config(), DiveConfig) and dive.adapter_config().r == 8
    assert dive.supervision_settings().kl_weight == 0.25 and dive.supervision_settings().eos_weight == 4.0
    arguments = dive.training_settings(3, Path("x"))
    assert (arguments.max_steps, arguments.learning_rate, arguments.seed, arguments.data_seed) == (5, 2e-2, 3, 3)
    assert lora.training_settings(3, Path("x")).learning_rate == 1e-3
    assert isinstance(lora.adapter_config(), peft.LoraConfig) and lora.adapter_config().target_modules == {"q_proj"}
    teacher = dive.teacher_settings(3, POOL, Path("out"))
    assert (teacher.shots, teacher.seed, teacher.cache_dir) == (2, 3, "out/teacher-cache")
    assert lora.teacher_settings(3, POOL, Path("out")) is None and lora.teacher_pass() is None
    assert config.test == {"name": "json_lines", "path": "test.jsonl", "limit": 6}


def test_a_row_like_another_changes_only_what_it_says(written):
    path = written(
        BASE,
        "  no_eos: {like: dive, label: without EOS, supervision: {eos_weight: 0}}\n",
        "  no_teacher: {like: no_eos, teacher: null}\n",
        "  taught_again: {like: no_teacher, teacher: {shots: 3}, steering: {r: 2}}\n",
    )
    systems = resolve(load_experiment(path))
    no_eos, no_teacher, again = (systems[name] for name in ("no_eos", "no_teacher", "taught_again"))
    assert no_eos.label == "without EOS" and no_teacher.label == "no_teacher"
    assert no_eos.supervision == {"kl_weight": 0.25, "eos_weight": 0} == no_teacher.supervision
    assert no_eos.training == systems["dive"].training and no_eos.adapter_config().r == 8
    assert no_eos.teacher == {"shots": 2} and no_teacher.teacher is None
    assert again.teacher == {"shots": 3} and again.adapter_config().r == 2 and again.kind == "steering"


def test_overrides_reach_anywhere(written):
    overrides = [
        "systems.dive.steering.r=32",
        "seeds=[4, 5]",
        "training.max_steps=40",
        "test.limit=2",
        "data=other.jsonl",
    ]
    config = load_experiment(written(), [*overrides, "data.limit=7", "systems.lora.teacher={shots: 1}"])
    systems = resolve(config)
    assert systems["dive"].adapter_config().r == 32 and config.seeds == [4, 5] and config.test["limit"] == 2
    assert systems["lora"].training["max_steps"] == 40 and systems["lora"].teacher == {"shots": 1}
    assert config.data == {"name": "json_lines", "path": "other.jsonl", "limit": 7}


def test_the_written_settings_read_back(written, tmp_path):
    config = load_experiment(written(), ["evaluation.metrics=[rouge_l]", "systems.dive.teacher=null"])
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load_experiment(again) == config
    assert ExperimentConfig(**json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("  dvie: {like: div}\n", "exp.yaml:18: systems.dvie.like: there is no system 'div'; did you mean 'dive'?"),
        ("  a: {like: b}\n  b: {like: a}\n", "exp.yaml:19: systems.b.like: a is like b is like a, which has no end"),
        ("  a: {like: a}\n", "systems.a.like: a is like a, which has no end"),
        ("  a: {kind: steerig}\n", "exp.yaml:18: systems.a.kind: expected one of zero_shot, few_shot, steering, lora"),
        ("  a: {kind: steerig}\n", "did you mean 'steering'?"),
        ("  a: {label: A}\n", "exp.yaml:18: systems.a: expected kind: one of"),
        ("  a: {like: dive, kind: lora}\n", "a is 'lora' and like dive, which is 'steering'"),
        ("  a: {kind: zero_shot, steering: {r: 2}}\n", "a system of kind 'zero_shot' has no such section"),
        ("  a: {like: dive, lora: {r: 2}}\n", "systems.a.lora: a system of kind 'steering' has no such section"),
        (
            "  a: {like: dive, steering: {rank: 2}}\n",
            "exp.yaml:18: systems.a.steering.rank: unknown key; did you mean 'r'",
        ),
        (
            "  a: {like: dive, steering: {r: two}}\n",
            "exp.yaml:18: systems.a.steering.r: expected a whole number, got 'two'",
        ),
        ("  a: {like: dive, supervison: {}}\n", "systems.a.supervison: unknown key; did you mean 'supervision'?"),
        ("  a: {like: lora, lora: {rank: 2}}\n", "systems.a.lora.rank: unknown key"),
        ("  a: {like: dive, training: {max_steps: 9}}\n", "all systems take the same steps on the same batches"),
        ("  a: {like: dive, training: {seed: 9}}\n", "systems.a.training.seed: every run gets its seed from `seeds`"),
        ("  a: {like: dive, training: null}\n", "systems.a.training: expected a mapping of key: value, got null"),
        ("  a b: {like: dive}\n", "expected a name of letters, digits, _ and -"),
        ("  dive: {kind: zero_shot}\n", "exp.yaml:18: systems.dive: given twice, first on line 12; keep one"),
        ("  a: 3\n", "exp.yaml:18: systems.a: expected a mapping of key: value, got 3"),
        ("compare_with: lara\n", "exp.yaml:18: compare_with: there is no system 'lara'; did you mean 'lora'?"),
        ("colour: red\n", "exp.yaml:18: colour: unknown key"),
        ("generation: {engine: fast}\n", "generation.engine: expected null or one of native, transformers, got 'fast'"),
        ("generation: {max_new_tokens: 0}\n", "generation: max_new_tokens: expected a whole number >= 1"),
        ("generation: {batch_size: 0}\n", "generation.batch_size: expected a whole number >= 1, got 0"),
        ("evaluation: {metric: [bleu]}\n", "evaluation.metric: unknown key; did you mean 'metrics'?"),
        # what the classes behind the sections refuse, headed by the row
        ("  a: {like: dive, steering: {r: 0}}\n", "systems.a: steering: r: kind='lowrank' needs a rank of at least 1"),
        ("  a: {like: dive, supervision: {eos_weight: -1}}\n", "systems.a: eos_weight: expected a number >= 0, got -1"),
        ("  a: {like: dive, teacher: {demos: best}}\n", "systems.a: demos: expected one of random, nearest, fixed"),
        (
            "  a: {like: dive, training: {learning_rate: -1}}\n",
            "systems.a: args: learning_rate: expected a number >= 0",
        ),
        ("  a: {like: dive, teacher: null, supervision: {align_weight: 1}}\n", "aligns with a teacher's hidden states"),
        ("  a: {like: dive, teacher: null, supervision: {tagger: disagreement}}\n", "compares with a teacher"),
        ("  a: {kind: few_shot, teacher: null}\n", "systems.a: teacher: a few_shot system needs demonstrations"),
    ],
)
def test_rows_that_cannot_be_meant_are_refused(written, more, words):
    assert words in refusal(written(BASE, more))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seeds=[]", "override seeds: expected at least one whole number, such as [0, 1, 2], got an empty list"),
        ("seeds=[0, 1, 0]", "override seeds: expected different numbers, 0 is given twice"),
        ("seeds=[-1]", "override seeds: expected whole numbers from 0 to 2**32 - 1, got -1"),
        ("seeds=3", "override seeds: expected a list (each a whole number), got 3"),
        ("systems={}", "override systems: expected the systems to compare"),
        ("data=null", "data: expected a data set, such as data: {name: open_i, split: ...}"),
        ("test=null", "test: expected a data set"),
        ("training.eval_strategy=steps", "give them as `validation`, never the test records"),
        ("training.seed=1", "override training.seed: every run gets its seed from `seeds`"),
        ("teacher.seed=1", "override teacher.seed: every run gets its seed from `seeds`"),
        ("training.output_dir=x", "override training.output_dir: the directory is given once"),
        ("systems.dive.colour=red", "override systems.dive.colour: unknown key"),
    ],
)
def test_shared_settings_that_cannot_be_meant_are_refused(written, override, words):
    assert words in refusal(written(), override)


def test_only_names_systems(written):
    systems = load_experiment(written()).systems
    assert chosen(None, systems) == list(systems) and chosen("lora, zero_shot", systems) == ["zero_shot", "lora"]
    with pytest.raises(InputError, match="--only: there is no system 'dife'; did you mean 'dive'"):
        chosen("lora,dife", systems)
    with pytest.raises(InputError, match="--only: expected names of systems"):
        chosen(" , ", systems)


def test_differences_are_taken_to_the_named_row_or_to_dive(written):
    config = load_experiment(written())
    assert reference(config, resolve(config)) == "dive"
    config = load_experiment(written(), ["compare_with=lora"])
    assert reference(config, resolve(config)) == "lora"
    renamed = BASE.replace("  dive:", "  steered:")
    config = load_experiment(written(renamed))
    assert reference(config, resolve(config)) == "steered"


def test_what_no_seed_changes_runs_once(written):
    config = load_experiment(written(), ["systems.near={kind: few_shot, teacher: {demos: nearest}}"])
    systems, greedy = resolve(config), Generation()
    assert {name: s.depends_on_seed(greedy) for name, s in systems.items()} == {
        "zero_shot": False, "few_shot": True, "dive": True, "lora": True, "near": False,
    }  # fmt: skip
    assert systems["zero_shot"].depends_on_seed(Generation(temperature=0.5))
    tasks = list(Folder(Path("out")).tasks(list(systems.values()), config))
    assert [tuple(task) for task in tasks[:3]] == [
        ("write", "zero_shot", "any"), ("write", "near", "any"), ("write", "few_shot", 0)
    ]  # fmt: skip
    assert [tuple(task) for task in tasks if task.system == "dive"] == [
        ("teacher", "dive", 0), ("train", "dive", 0), ("write", "dive", 0),
        ("teacher", "dive", 1), ("train", "dive", 1), ("write", "dive", 1),
    ]  # fmt: skip


def test_systems_with_the_same_teacher_share_its_pass(written):
    more = [
        "systems.a={like: dive, supervision: {eos_weight: 0}}",
        "systems.b={like: dive, supervision: {align_weight: 1}}",
        "systems.c={like: dive, teacher: {cache_dir: null}}",
    ]
    config = load_experiment(written(), ["seeds=[0]", *more])
    systems = resolve(config)
    passes = [t.system for t in Folder(Path("out")).tasks(list(systems.values()), config) if t.stage == "teacher"]
    assert passes == ["dive", "b"] and systems["b"].teacher_pass().name == "teacher-2-shot-random-layers"
    assert systems["c"].teacher_pass() is None and systems["c"].teacher_settings(0, POOL, Path("out")).cache_dir is None


def reports(path: Path, texts: list[str], **more) -> Path:
    rows = ({"id": f"{path.stem}{i}", "prompt": f"Case {i}.", "report": text, **more} for i, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path, written):
    reports(tmp_path / "train.jsonl", [f"The lungs are clear {i}." for i in range(30)])
    reports(tmp_path / "test.jsonl", ["The  lungs are CLEAR 3.", "New opacity.", "The lungs are clear 31."])
    return written(
        BASE.replace("train.jsonl", f"{tmp_path}/train.jsonl").replace("test.jsonl", f"{tmp_path}/test.jsonl")
    )


def test_test_records_know_whether_their_text_is_in_training(data, tmp_path):
    found = load_experiment_data(load_experiment(data))
    assert [record.meta["unseen_text"] for record in found.test] == [False, True, True]
    reports(tmp_path / "test.jsonl", ["The lungs are clear 3.", "New."], unseen_text=True)
    found = load_experiment_data(load_experiment(data))
    assert [record.meta["unseen_text"] for record in found.test] == [True, True], "the data set says so itself"


def test_a_seed_draws_the_records_that_its_steps_take(data, tmp_path):
    config = load_experiment(data, ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"])
    train, dive = load_experiment_data(config).train, resolve(config)["dive"]
    drawn = {seed: training_records(train, dive.training_settings(seed, tmp_path), seed) for seed in (0, 1)}
    assert [len({record.id for record in records}) for records in drawn.values()] == [20, 20]
    assert drawn[0] != drawn[1] and drawn[0] == training_records(train, dive.training_settings(0, tmp_path), 0)
    config = load_experiment(data, ["training.max_steps=50"])
    assert training_records(train, resolve(config)["dive"].training_settings(0, tmp_path), 0) == train


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.path=none.jsonl", "data: path: expected a .jsonl, .json or .csv file .* no file at none.jsonl"),
        ("data={name: mimic_cxr, root: /nowhere/mimic}", "data: .*/nowhere/mimic"),
        ("data={name: mimic_cxr}", "data: data set mimic_cxr: missing a required argument: 'root'"),
        ("test=opn_i", "test: data set: .* Did you mean 'open_i'"),
        ("validation=none.jsonl", "validation: path: .*none.jsonl"),
    ],
)
def test_data_that_is_not_there_is_named(data, override, words):
    with pytest.raises(InputError, match=words):
        load_experiment_data(load_experiment(data, [override]))


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ({"metrics": ["blue"]}, "unknown metric 'blue', did you mean 'bleu'"),
        ({"protocol": "r2g"}, "unknown protocol 'r2g'"),
        ({"metrics": ["bleu"], "metric_options": {"radgraph": {}}}, "'radgraph' is not among metrics"),
        ({"metrics": ["radgraph"], "metric_options": {"radgraph": {"weight": "x"}}}, "there is no option 'weight'"),
        ({"lexicon": "none.yaml"}, "none.yaml"),
        ({"bootstrap": -1}, "bootstrap: .*-1"),
        ({"examples": -1}, "evaluation: examples: expected a number of reports >= 0, got -1"),
        ({"examples": "all"}, "evaluation: examples: expected a number of reports >= 0, got 'all'"),
    ],
)
def test_metrics_that_are_not_there_are_refused_at_once(evaluation, words):
    with pytest.raises(InputError, match=words):
        Scorer(Evaluation(**evaluation))


def test_a_metric_without_its_weights_package_or_java_fails_in_the_rehearsal(monkeypatch, tmp_path):
    chexbert = {"weights": str(tmp_path / "chexbert.pth"), "tokenizer": str(tmp_path)}
    with pytest.raises(InputError, match="chexbert.pth"):
        Scorer(Evaluation(metrics=["chexbert"], metric_options={"chexbert": chexbert})).rehearse()
    monkeypatch.setattr("dive_fast.metrics.peers.shutil.which", lambda name: None)
    with pytest.raises(InputError, match="'meteor' runs a Java program, but no `java` command is on PATH"):
        Scorer(Evaluation(metrics=["meteor"])).rehearse()
    missing(monkeypatch, "pycocoevalcap")
    with pytest.raises(InputError, match="computed by pycocoevalcap, which cannot be imported"):
        Scorer(Evaluation(metrics=["bleu"])).rehearse()
    missing(monkeypatch, "radgraph")
    with pytest.raises(InputError, match=r"pip install 'dive_fast\[clinical\]'"):
        Scorer(Evaluation(metrics=["radgraph"])).rehearse()


def missing(monkeypatch, package: str) -> None:
    """As if it were not installed; a module of it that was imported before would still be found."""
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


SHIPPED = sorted(CONFIGS.glob("*.yaml"))


def test_the_experiments_of_the_paper_are_shipped():
    assert [path.stem for path in SHIPPED] == [
        "chexpert_plus_huatuo", "chexpert_plus_llava_med", "mimic_cxr_huatuo", "mimic_cxr_llava_med", "open_i_smollm2"
    ]  # fmt: skip


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_experiment_loads_without_its_data(path):
    config = load_experiment(path)
    systems = resolve(config)
    kinds = {name: system.kind for name, system in systems.items()}
    wanted = {"zero_shot": "zero_shot", "few_shot": "few_shot", "live": "steering", "mimic": "steering",
              "lora": "lora", "dive": "steering", "dive_no_pathology": "steering", "dive_no_eos": "steering",
              "dive_no_teacher": "steering"}  # fmt: skip
    assert wanted.items() <= kinds.items()
    assert [systems[name].adapter_config().kind for name in ("live", "mimic", "dive")] == ["fixed", "heads", "lowrank"]
    assert reference(config, systems) == "dive" and len(config.seeds) == 3 and config.output
    Scorer(Evaluation(**config.evaluation))
    text = path.read_text(encoding="utf-8")
    assert f"dive-fast experiment configs/experiments/{path.name}" in text.split("\n\n")[0], (
        "the header has the command"
    )
    steps = {tuple(s.training_settings(0, Path("x")).to_dict()[k] for k in ("max_steps", "per_device_train_batch_size"))
             for s in systems.values() if s.trained}  # fmt: skip
    assert len(steps) == 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_ablations_differ_from_dive_in_one_thing(path):
    systems = resolve(load_experiment(path))
    dive = systems["dive"].setup()
    for name, section, key in (("dive_no_pathology", "supervision", "pathology_weight"),
                               ("dive_no_eos", "supervision", "eos_weight")):  # fmt: skip
        one = systems[name].setup()
        assert (
            one[section].pop(key) == 0
            and {**dive, section: {k: v for k, v in dive[section].items() if k != key}} == one
        )
    without = systems["dive_no_teacher"].setup()
    assert "teacher" in dive and without == {key: value for key, value in dive.items() if key != "teacher"}
