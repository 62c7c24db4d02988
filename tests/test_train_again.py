"""Trainings behind another one: on the same model, with another adapter, resumed, with changed data."""

import pickle
import shutil

import peft
import pytest
import torch

import dive_fast
from dive_fast.data.encoding import ReportEncoder
from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.likelihood import report_nll
from dive_fast.models.smol_llava import build_smol_llava
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from tests.training_runs import RECORDS, SHORT, adapter_bytes, losses, run

FAST = {"learning_rate": 0.05, "max_steps": 6}
SAVING = {"save_strategy": "steps", "save_steps": 2}


def nll(model) -> float:
    return sum(report_nll(model, RECORDS[:4], ReportEncoder(tiny_tokenizer()))[0])


def cut_off(folder, last="checkpoint-4"):
    """As if the run had been killed before its end."""
    shutil.rmtree(folder / last)
    for name in ("adapter_model.safetensors", "adapter_config.json", "dive_result.json"):
        (folder / name).unlink()


@pytest.mark.parametrize("kind", ["lowrank", "fixed", "gated", "reft"])
def test_evaluations_on_the_way_see_the_adapter_as_it_is(tmp_path, kind):
    """The default optimiser is fused, which changes parameters behind torch's count of writes."""
    args = FAST | {"eval_strategy": "steps", "eval_steps": 2}
    steering = dive_fast.DiveConfig(kind=kind, **({"r": 4} if kind in ("lowrank", "reft") else {}))
    result = run(tmp_path, steering=steering, eval_dataset=RECORDS[:4], args=args)
    loaded = dive_fast.load(tiny_llama(), result.adapter_dir)
    assert nll(result.model) == pytest.approx(nll(loaded), rel=1e-6)
    last = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry][-1]
    _, tokens = report_nll(loaded, RECORDS[:4], ReportEncoder(tiny_tokenizer()))
    assert last == pytest.approx(nll(loaded) / sum(tokens), rel=1e-5)


def test_one_base_model_holds_one_peft_model(tmp_path):
    base = tiny_llama()
    first = run(tmp_path / "first", base, args=FAST)
    before = nll(first.model)
    with pytest.raises(InputError, match="model: its layers hold adapters of an earlier PEFT model"):
        run(tmp_path / "second", base)
    with pytest.raises(InputError, match="base_or_path: its layers hold adapters"):
        dive_fast.load(base, first.adapter_dir)
    assert nll(first.model) == before
    again = run(tmp_path / "second", first.model.unload(), args=FAST)
    assert losses(again) == losses(first)


@pytest.mark.parametrize("steering", [None, peft.LoraConfig(r=2, target_modules=["q_proj"])], ids=["dive", "lora"])
def test_an_attempt_that_fails_leaves_the_model_as_it_was(tmp_path, steering):
    base = tiny_llama()
    names = list(base.state_dict())
    with pytest.raises(InputError):
        run(tmp_path, base, records=[Record("long", "p", "word " * 3000), *RECORDS], steering=steering)
    assert list(base.state_dict()) == names
    run(tmp_path, base, steering=steering, args={"max_steps": 1})


@pytest.mark.parametrize("how", ["gradient_checkpointing", "selective_checkpointing"])
def test_after_an_attempt_that_fails_the_engine_runs_the_model(tmp_path, monkeypatch, how):
    def fails(*args, **kwargs):
        raise InputError("training: no")

    base = tiny_llama()
    with monkeypatch.context() as patched, pytest.raises(InputError, match="training: no"):
        patched.setattr("dive_fast.trainer.DiveTrainer.compute_loss", fails)
        run(tmp_path, base, args={how: True})
    assert not base.is_gradient_checkpointing
    prompt = tiny_tokenizer()("Indication: cough.", return_tensors="pt")
    assert dive_fast.generate(base, dict(prompt), max_new_tokens=2).stats["engine"] == "native"


def test_an_adapter_of_any_name_is_saved_where_load_looks(tmp_path):
    def named():
        return peft.get_peft_model(tiny_llama(), dive_fast.DiveConfig(r=4), adapter_name="chest")

    result = run(tmp_path, named(), steering=None, args=FAST | SAVING)
    assert nll(dive_fast.load(tiny_llama(), result.adapter_dir)) == pytest.approx(nll(result.model), rel=1e-6)
    assert not (result.adapter_dir / "chest").exists()
    before = adapter_bytes(result.adapter_dir)
    cut_off(result.adapter_dir, "checkpoint-6")
    run(tmp_path, named(), steering=None, args=FAST | SAVING, resume=True)
    assert adapter_bytes(result.adapter_dir) == before


def test_of_several_adapters_the_trained_one_is_saved(tmp_path):
    old = run(tmp_path / "old", args=FAST).adapter_dir
    model = dive_fast.load(tiny_llama(), old)
    model.add_adapter("new", dive_fast.DiveConfig(r=4))
    model.base_model.set_adapter(["default", "new"])
    with pytest.raises(InputError, match="one adapter is trained at a time, active are default, new"):
        run(tmp_path / "new", model, steering=None)
    model.set_adapter("new")
    result = run(tmp_path / "new", model, steering=None, args=FAST | {"seed": 3})
    assert nll(dive_fast.load(tiny_llama(), result.adapter_dir)) == pytest.approx(nll(result.model), rel=1e-6)
    assert adapter_bytes(result.adapter_dir) != adapter_bytes(old)


def test_a_loaded_adapter_can_be_trained_on(tmp_path):
    first = run(tmp_path / "first", args=FAST)
    loaded = dive_fast.load(tiny_llama(), first.adapter_dir)
    before = nll(loaded)
    result = run(tmp_path / "on", loaded, steering=None, args=FAST)
    assert nll(result.model) < before


def test_a_configuration_of_a_finished_adapter_trains_another(tmp_path):
    """PEFT's saved ones have inference_mode=True, and what it makes of them does not train."""
    first = run(tmp_path / "first", args=FAST)
    config = peft.PeftConfig.from_pretrained(first.adapter_dir)
    assert config.inference_mode
    result = run(tmp_path / "second", steering=config, args=FAST)
    assert adapter_bytes(result.adapter_dir) == adapter_bytes(first.adapter_dir)
    assert config.inference_mode, "the caller's own stays as it is"


def test_a_model_card_is_not_written_over(tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "README.md").write_text("my notes")
    run(tmp_path, args=FAST | SAVING)
    assert (output / "README.md").read_text() == "my notes"


def test_the_same_command_again_keeps_the_best_adapter(tmp_path):
    """Held-out texts of another kind, so that the best step is not the last one."""
    held_out = [Record("e", "Indication: case 1.", "degenerative changes of the thoracic spine.")]
    args = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.3}
    args |= SAVING | {"load_best_model_at_end": True, "lr_scheduler_type": "constant"}
    first = run(tmp_path, eval_dataset=held_out, args=args)
    evaluated = [entry["eval_loss"] for entry in first.history if "eval_loss" in entry]
    assert first.metrics["eval_loss"] == min(evaluated) < evaluated[3]
    best = adapter_bytes(first.adapter_dir)
    again = run(tmp_path, eval_dataset=held_out, args=args, resume=True)
    assert adapter_bytes(first.adapter_dir) == best and again.metrics["eval_loss"] == first.metrics["eval_loss"]
    assert again.metrics["train_loss"] == first.metrics["train_loss"]
    for name in ("adapter_model.safetensors", "adapter_config.json", "dive_result.json"):
        (first.adapter_dir / name).unlink()
    run(tmp_path, eval_dataset=held_out, args=args, resume=True)
    assert adapter_bytes(first.adapter_dir) == best


def test_a_rewritten_lexicon_is_another_run(tmp_path):
    lexicon = tmp_path / "lexicon.yaml"
    lexicon.write_text("findings:\n  effusion: {mention: [effusion]}\ncues: {absent_before: ['no']}\n")
    supervision = {"supervision": dive_fast.Supervision(tagger=str(lexicon))}
    run(tmp_path, args=SAVING, **supervision)
    cut_off(tmp_path / "run")
    moved = tmp_path / "moved.yaml"
    lexicon.rename(moved)
    run(tmp_path, args=SAVING, supervision=dive_fast.Supervision(tagger=str(moved)), resume=True)
    moved.write_text("findings:\n  heart: {mention: [cardiomegaly]}\ncues: {absent_before: ['no']}\n")
    with pytest.raises(InputError, match="supervision.tagger_fingerprint"):
        run(tmp_path, args=SAVING, supervision=dive_fast.Supervision(tagger=str(moved)), resume=True)


@pytest.mark.parametrize("teacher", [None, dive_fast.Teacher(shots=1)], ids=["alone", "taught"])
def test_films_may_move_and_may_not_change_places(tmp_path, teacher):
    def films(folder):
        folder.mkdir()
        found = []
        for i, film in enumerate(dive_fast.data.generated_films(6)):
            path = folder / f"patient{i}" / "study1" / "frontal.bmp"  # all of one size
            path.parent.mkdir(parents=True)
            film.images[0].save(path)
            found.append(Record(film.id, film.prompt, film.report, (str(path),)))
        return found

    def train(records, **options):
        model, processor = build_smol_llava()
        args = SHORT | SAVING | {"per_device_train_batch_size": 2}
        return dive_fast.train(
            model, records, tmp_path / "run", processor=processor, teacher=teacher, args=args, **options
        )

    records = films(tmp_path / "a")
    train(records)
    cut_off(tmp_path / "run")
    swapped = [Record(a.id, a.prompt, a.report, b.images) for a, b in zip(records, reversed(records), strict=True)]
    with pytest.raises(InputError, match="resume: .*data.sha256"):
        train(swapped, resume=True)
    train(films(tmp_path / "b"), resume=True)


def test_another_rope_is_another_model(tmp_path, caplog):
    def model(theta):
        base = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": theta})
        base.load_state_dict(tiny_llama().state_dict())
        return base

    result = run(tmp_path, model(1e4), args=SAVING)
    cut_off(tmp_path / "run")
    with pytest.raises(InputError, match="model.settings.rope_parameters.rope_theta"):
        run(tmp_path, model(1e6), args=SAVING, resume=True)
    run(tmp_path, model(1e4), args=SAVING, resume=True)
    dive_fast.load(model(1e4), result.adapter_dir)
    assert not caplog.records
    dive_fast.load(model(1e6), result.adapter_dir)
    assert "weights or settings (rope's, say) differ" in caplog.text


def test_records_with_too_few_demonstrations_are_found_before_the_first_step(tmp_path):
    records = [Record(f"n{i}", f"Indication: {i}", f"finding {i}.") for i in range(8)]
    records.append(Record("twin", "Indication: t", "Finding 3."))
    with pytest.raises(InputError, match="shots: record 'n3' needs 8 demonstrations, only 7"):
        run(tmp_path, records=records, teacher=dive_fast.Teacher(shots=8))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tagger", ["lexicon", "disagreement"])
def test_token_weights_travel_to_workers_that_are_not_forked(tagger):
    supervision = dive_fast.Supervision(tagger=tagger)
    response = ReportEncoder(tiny_tokenizer()).response(RECORDS[0].report)
    weigh = supervision.weigher()
    assert pickle.loads(pickle.dumps(weigh))(RECORDS[0], response) == weigh(RECORDS[0], response)


def test_arguments_that_this_loss_does_not_know_are_refused(tmp_path):
    with pytest.raises(InputError, match="label_smoothing_factor: this loss"):
        run(tmp_path, args={"label_smoothing_factor": 0.1})
    assert torch.is_grad_enabled()
