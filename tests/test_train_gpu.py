"""Training and generating with the model on a GPU, beside the same on the CPU."""

import copy
import shutil
from dataclasses import replace

import accelerate
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

import dive_fast
from dive_fast.data import generated_films
from dive_fast.data.encoding import ReportEncoder
from dive_fast.devices import is_spread
from dive_fast.likelihood import report_nll
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from tests.tiny_processors import tiny_backbone
from tests.training_runs import RECORDS, losses, run

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
TEACHER = dive_fast.Teacher(shots=2)
RUNS = {
    "lowrank": {},
    "all positions": {"steering": dive_fast.DiveConfig(r=4, scope="all")},
    "attention": {"steering": dive_fast.DiveConfig(r=4, site="attention")},
    "fixed": {"steering": dive_fast.DiveConfig(kind="fixed")},
    "gated": {"steering": dive_fast.DiveConfig(kind="gated")},
    "reft": {"steering": dive_fast.DiveConfig(kind="reft", r=4)},
    "heads": {"steering": dive_fast.DiveConfig(kind="heads")},
    "LoRA": {"steering": peft.LoraConfig(r=2, target_modules=["q_proj"])},
    "teacher": {"teacher": TEACHER},
    "alignment": {"teacher": TEACHER, "supervision": dive_fast.Supervision(align_weight=0.5)},
    "disagreement": {"teacher": TEACHER, "supervision": dive_fast.Supervision(tagger="disagreement")},
    "kept prompts": {"args": {"prompt_cache_bytes": 10**7, "max_steps": 8}},
    "accumulation": {"args": {"gradient_accumulation_steps": 2}},
    "checkpointing": {"args": {"gradient_checkpointing": True}},
    "selective checkpointing": {"args": {"selective_checkpointing": True}},
    "evaluation": {"eval_dataset": RECORDS[:3], "args": {"eval_strategy": "steps", "eval_steps": 1}},
}


def on(device: str, folder, args=None, **options):
    if "steering" in options:
        options["steering"] = replace(options["steering"])
    with pytest.MonkeyPatch.context() as patch:
        if device != "cpu" and not is_spread(options.get("model")):
            found = TrainingArguments.n_gpu.fget
            patch.setattr(TrainingArguments, "n_gpu", property(lambda args: min(found(args), 1)))
        return run(folder / device, args={"use_cpu": device == "cpu", **(args or {})}, **options)


def devices(model) -> set[str]:
    return {parameter.device.type for parameter in model.parameters()}


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_the_cpu(tmp_path, name):
    results = {device: on(device, tmp_path, **RUNS[name]) for device in ("cpu", DEVICE)}
    assert devices(results[DEVICE].model) == {DEVICE}
    assert losses(results[DEVICE]) == pytest.approx(losses(results["cpu"]), rel=1e-4)
    for figure in ("eval_loss", "eval_perplexity"):
        expected, found = (result.metrics.get(figure) for result in results.values())
        assert found == (None if expected is None else pytest.approx(expected, rel=1e-3))


def test_what_is_trained_there_loads_and_writes_here_and_there(tmp_path):
    result = on(DEVICE, tmp_path)
    elsewhere = [dive_fast.load(tiny_llama(), result.adapter_dir, device=device) for device in ("cpu", DEVICE)]
    texts = [
        dive_fast.generate(model, RECORDS[:5], processor=tiny_tokenizer(), max_new_tokens=8).texts
        for model in (result.model, *elsewhere)
    ]
    assert [devices(model) for model in elsewhere] == [{"cpu"}, {DEVICE}]
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("args", [{"bf16": True}, {"fp16": True}], ids=["bf16", "fp16"])
def test_mixed_precision(tmp_path, args):
    expected = losses(on("cpu", tmp_path))
    assert losses(on(DEVICE, tmp_path, args=args)) == pytest.approx(expected, rel=1e-2)


def test_a_cut_off_run_goes_on(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 2}
    adapter = on(DEVICE, tmp_path, args=args).adapter_dir
    whole = load_file(adapter / "adapter_model.safetensors")
    shutil.rmtree(adapter / "checkpoint-4")
    (adapter / "adapter_model.safetensors").unlink()
    again = on(DEVICE, tmp_path, args=args, resume=True)
    assert len(losses(again)) == 4
    # Not to the bit: attention's backward pass may add up by atomics there.
    torch.testing.assert_close(load_file(adapter / "adapter_model.safetensors"), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_images(tmp_path, family):
    films = generated_films(6)
    found, (fresh, processor) = {}, tiny_backbone(family)
    for device in ("cpu", DEVICE):
        options = {"processor": processor, "teacher": dive_fast.Teacher(shots=1)}
        args = {"max_steps": 2, "per_device_train_batch_size": 2}
        result = on(device, tmp_path, model=copy.deepcopy(fresh), records=films, args=args, **options)
        output = dive_fast.generate(result.model, films[:2], processor=processor, max_new_tokens=6, temperature=0.0)
        found[device] = losses(result), [row.tolist() for row in output.sequences]
    assert found[DEVICE][0] == pytest.approx(found["cpu"][0], rel=1e-4)
    assert found[DEVICE][1] == found["cpu"][1]


def test_searches_and_draws(tmp_path):
    model = on(DEVICE, tmp_path).model
    searches = ({"num_beams": 3}, {"repetition_penalty": 1.3, "min_new_tokens": 3}, {"stop": ["a"]})
    drawing = {"temperature": 0.8, "seed": 1, "num_return_sequences": 2}

    def texts(options):
        return dive_fast.generate(model, RECORDS[:3], processor=tiny_tokenizer(), max_new_tokens=8, **options).texts

    there, drawn = [texts(options) for options in searches], [texts(drawing) for _ in range(2)]
    assert devices(model) == {DEVICE}
    assert drawn[0] == drawn[1] and len(drawn[0]) == 6
    model.cpu()
    assert there == [texts(options) for options in searches]


def test_likelihood(tmp_path):
    model = on(DEVICE, tmp_path).model
    encoder = ReportEncoder(tiny_tokenizer())
    there, counts = report_nll(model, RECORDS[:5], encoder)
    here, same_counts = report_nll(model.cpu(), RECORDS[:5], encoder)
    assert there == pytest.approx(here, rel=1e-4) and counts == same_counts


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ["lowrank", "heads", "alignment", "disagreement", "kept prompts", "evaluation"])
def test_a_model_over_two_gpus(tmp_path, name):
    """As with device_map="auto"."""
    model = tiny_llama(tie_word_embeddings=False)
    first = ("model.embed_tokens", "model.rotary_emb", "model.layers.0")
    last = ("model.layers.1", "model.norm", "lm_head")
    spread = accelerate.dispatch_model(copy.deepcopy(model), dict.fromkeys(first, 0) | dict.fromkeys(last, 1))
    results = [on(device, tmp_path, model=m, **RUNS[name]) for device, m in (("cpu", model), (DEVICE, spread))]
    assert {parameter.device.index for parameter in results[1].model.parameters()} == {0, 1}
    assert losses(results[1]) == pytest.approx(losses(results[0]), rel=1e-4)
    texts = [
        dive_fast.generate(result.model, RECORDS[:5], processor=tiny_tokenizer(), max_new_tokens=8).texts
        for result in results
    ]
    assert texts[0] == texts[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_is_placed_over_two_gpus(monkeypatch):
    monkeypatch.setattr(dive_fast.devices, "_ONE_GPU", 0)
    model = tiny_llama(tie_word_embeddings=False, num_hidden_layers=12)
    spread = dive_fast.devices.on_device(copy.deepcopy(model), dive_fast.devices.placement("auto"))
    assert is_spread(spread)
    here, there = (
        dive_fast.generate(m, RECORDS[:5], processor=tiny_tokenizer(), max_new_tokens=8).texts for m in (model, spread)
    )
    assert here == there
