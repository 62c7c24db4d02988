"""What `dive_fast.train` and `load` refuse, and in which words."""

import peft
import pytest
import torch
from accelerate import dispatch_model

import dive_fast
from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from tests.training_runs import RECORDS, run


@pytest.mark.parametrize(
    "change, message",
    [
        ({"records": []}, "at least one record"),
        ({"records": [Record("a", "p", " ")]}, "a"),
        ({"records": [{"prompt": "p", "text": "t"}]}, "report"),
        ({"processor": None}, "processor:"),
        ({"steering": {"r": 4}}, "steering: expected a dive_fast.DiveConfig or another peft.PeftConfig, got dict"),
        ({"supervision": {"eos_weight": 4}}, "supervision: expected a dive_fast.Supervision"),
        ({"teacher": {"shots": 2}}, "teacher: expected a dive_fast.Teacher"),
        ({"args": {"per_device_train_batch_size": 1.5}}, "per_device_train_batch_size: expected a whole number"),
        ({"args": {"max_stepz": 3}}, "did you mean 'max_steps'"),
        ({"args": {"learning_rate": "fast"}}, "args:"),
        ({"args": {"max_steps": 4.5}}, "args: max_steps: expected a whole number, got 4.5"),
        ({"args": {"bf16": "no"}}, "args: bf16: expected True or False, got 'no'"),
        ({"args": {"report_to": "wandbb"}}, "args: .*wandbb"),
        ({"args": {"eval_strategy": "epoch"}}, "args: eval_strategy .* give an eval_dataset"),
        ({"args": {"resume_from_checkpoint": "x"}}, "resume_from_checkpoint: .* resume=True"),
        (
            {"args": {"dataloader_drop_last": True, "per_device_train_batch_size": 32}},
            "dataloader_drop_last leaves nothing of 24 records, of which 32 make a batch",
        ),
        ({"records": 5}, "train_dataset: expected a list of records"),
        ({"eval_dataset": []}, "eval_dataset: .*at least one record"),
        ({"supervision": dive_fast.Supervision(tagger="disagreement")}, "disagreement"),
        ({"teacher": dive_fast.Teacher(shots=24)}, "shots"),
        ({"records": [Record("long", "word " * 3000, "r"), *RECORDS]}, "long"),
        ({"records": [Record("longer", "p", "word " * 3000), *RECORDS], "args": {"max_steps": 20}}, "longer"),
    ],
)
def test_bad_input_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, **change)
    assert not list((tmp_path / "run").glob("adapter*"))


@pytest.mark.parametrize("output_dir", ["", None, 5])
def test_training_writes_to_a_folder_that_is_named(tmp_path, monkeypatch, output_dir):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="output_dir: expected the folder to write to, got"):
        dive_fast.train(tiny_llama(), RECORDS, output_dir, processor=tiny_tokenizer())
    assert not list(tmp_path.iterdir())


def test_arguments_of_another_type_are_refused(tmp_path):
    with pytest.raises(InputError, match="args: expected DiveTrainingArguments or a dict of them, got int"):
        dive_fast.train(tiny_llama(), RECORDS, tmp_path / "run", processor=tiny_tokenizer(), args=5)


@pytest.mark.parametrize("name", ["pathology_weight", "eos_weight", "kl_weight", "align_weight"])
def test_negative_weights_are_refused(name):
    with pytest.raises(InputError, match=f"{name}: expected a number >= 0, got -1"):
        dive_fast.Supervision(**{name: -1})


@pytest.mark.parametrize(
    "name, value",
    [
        ("learning_rate", -1),
        ("learning_rate", float("inf")),
        ("weight_decay", -1),
        ("max_grad_norm", -1),
        ("adam_beta1", 1.0),
        ("seed", -1),
        ("seed", 2**32),
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("save_total_limit", -1),
        ("save_steps", 0),
        ("num_train_epochs", 0),
        ("max_steps", 0),
        ("max_steps", -5),
    ],
)
def test_training_arguments_out_of_range_are_refused(tmp_path, name, value):
    with pytest.raises(InputError, match=f"args: {name}: expected"):
        run(tmp_path, args={name: value})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "args, options, message",
    [
        ({"eval_reports": 2}, {}, "eval_reports: .* give an eval_dataset"),
        ({"eval_reports": -1}, {}, "eval_reports: expected"),
        ({"eval_reports": 2.5}, {}, "eval_reports: expected a whole number"),
        ({"eval_reports": 1, "eval_max_new_tokens": 0}, {}, "eval_max_new_tokens: expected"),
        ({"eval_reports": 1, "eval_max_new_tokens": 2040}, {"eval_dataset": RECORDS[:1]}, "record 'r0' has .* lower"),
    ],
)
def test_reports_that_cannot_be_written_are_refused_at_once(tmp_path, args, options, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path, args=args, **options)
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


def test_an_output_folder_of_another_run_is_refused(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 2}
    run(tmp_path, args=args)
    with pytest.raises(InputError, match="holds another run"):
        run(tmp_path, args=args)
    with pytest.raises(
        InputError, match=r"\(steering.r: 4 there, 2 now; training.learning_rate: 0.003 there, 0.1 now\)"
    ):
        run(tmp_path, steering=dive_fast.DiveConfig(r=2), args=args | {"learning_rate": 0.1}, resume=True)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_run_whose_settings_are_damaged_is_refused(tmp_path, text):
    args = {"save_strategy": "steps", "save_steps": 2}
    folder = run(tmp_path, args=args).adapter_dir
    (folder / "dive_setup.json").write_text(text)
    with pytest.raises(InputError, match="resume: .*dive_setup.json does not say .*; name another output_dir"):
        run(tmp_path, args=args, resume=True)


def test_a_run_does_not_go_on_with_another_model(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 2}
    run(tmp_path, tiny_llama(), args=args)
    other = tiny_llama()
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    with pytest.raises(InputError, match=r"other settings \(model.fingerprint: [0-9a-f]{8} there, [0-9a-f]{8} now\)"):
        run(tmp_path, other, args=args, resume=True)
    with pytest.raises(
        InputError, match=r'other settings \(model.dtype: "torch.float32" there, "torch.bfloat16" now\)'
    ):
        run(tmp_path, tiny_llama().to(torch.bfloat16), args=args, resume=True)
    run(tmp_path, tiny_llama(), args=args, resume=True)


def test_offloaded_weights_are_refused(tmp_path):
    model = tiny_llama()
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(len(model.model.layers))}
    model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "weights", force_hooks=True)
    with pytest.raises(InputError, match="model: some of its weights are offloaded"):
        run(tmp_path, model)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_and_names_the_batch(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = float("nan")
    with pytest.raises(InputError, match="loss became nan at step 1 on records r"):
        run(tmp_path, model)


def test_a_refused_run_leaves_no_folder(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = float("nan")
    with pytest.raises(InputError, match="loss became nan"):
        run(tmp_path, model)
    assert not (tmp_path / "run").exists()


def test_load_refuses_what_is_no_adapter(tmp_path):
    with pytest.raises(InputError, match="adapter_config.json is missing"):
        dive_fast.load(tiny_llama(), tmp_path)
    run(tmp_path)
    with pytest.raises(InputError, match="hidden_size=64, this one has 32"):
        dive_fast.load(tiny_llama(hidden_size=32), tmp_path / "run")


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("adapter_config.json", lambda text: text.replace('"r": 4', '"r": 8'), "does not fit.*size mismatch"),
        ("adapter_config.json", lambda text: text[:40], "cannot be read.*copy it again"),
        ("adapter_config.json", lambda text: "[1]", "cannot be read"),
        ("adapter_model.safetensors", lambda text: "", "cut short"),
    ],
)
def test_load_refuses_a_damaged_adapter(tmp_path, file, change, message):
    peft.get_peft_model(tiny_llama(), dive_fast.DiveConfig(r=4)).save_pretrained(tmp_path)
    path = tmp_path / file
    path.write_text(change(path.read_text(encoding="latin-1")))
    with pytest.raises(InputError, match=message):
        dive_fast.load(tiny_llama(), tmp_path)
