"""Where models run, also on several devices, and what is said of devices that are not here or too small."""

import accelerate
import peft
import pytest
import torch

import dive_fast
from dive_fast.arguments import DiveTrainingArguments, training_arguments
from dive_fast.devices import AUTO, device_map, is_spread, on_device, placement, torch_device
from dive_fast.errors import InputError
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from dive_fast.steering.positions import SteeringCall
from tests.tiny_models import randomize_adapters
from tests.training_runs import RECORDS


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("auto", "device: expected a name such as 'cpu' or 'cuda:0', got 'auto'"),
        ("gpu", "device: expected a name such as 'cpu' or 'cuda:0', got 'gpu'"),
        (1.5, "device: expected a name such as 'cpu' or 'cuda:0', got 1.5"),
        ("cuda:99", "device: 'cuda:99' is not here, torch sees"),
        ("vulkan", "device: 'vulkan' is not usable here"),
        ("meta", "device: 'meta' is not usable here"),
    ],
)
def test_a_device_that_is_none_is_refused(name, words):
    with pytest.raises(InputError, match=words):
        torch_device(name)


@pytest.mark.parametrize(("gpu", "expected"), [(True, "cuda"), (False, "cpu")])
def test_none_is_a_gpu_where_there_is_one(monkeypatch, gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert torch_device(None) == torch.device(expected)


def test_a_model_without_room_is_told_in_gib(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = torch.nn.Linear(2**15, 2**14, bias=False, device="meta", dtype=torch.float32)
    model.tied = model.weight
    monkeypatch.setattr(model, "to", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 2**29, 2**33))
    with pytest.raises(InputError, match=r"weights take 2\.0 GiB, and cpu has 2\.5 GiB left; .*\(dtype\)"):
        on_device(model, torch.device("cpu"))


def bytes_of(model):
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize(("gpus", "expected"), [(2, AUTO), (1, "cuda"), (0, "cpu")])
def test_auto_is_for_several_gpus(monkeypatch, gpus, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    assert str(placement("auto")) == expected


def test_a_model_is_divided_among_gpus_between_its_layers():
    model = tiny_llama(num_hidden_layers=12)
    found = device_map(model, {0: int(0.8 * bytes_of(model)), 3: int(0.6 * bytes_of(model))})
    layers = [found[f"model.layers.{i}"] for i in range(12)]
    assert layers == sorted(layers) and 5 <= layers.count(0) <= 8 and set(layers) == {0, 3}
    with pytest.raises(InputError, match=r"weights take 0\.0 GiB, and the GPUs have 0\.0 GiB, 0\.0 GiB left; "):
        device_map(model, {0: bytes_of(model) // 3, 1: bytes_of(model) // 3})


@pytest.mark.parametrize(("room", "expected"), [(2.0, "cuda:1"), (0.8, [0, 1])])
def test_auto_takes_one_gpu_if_the_model_fits_well(monkeypatch, room, expected):
    model, moved = tiny_llama(), []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (int(room * bytes_of(model)), 0))
    monkeypatch.setattr(model, "to", lambda device: moved.append(str(device)))
    monkeypatch.setattr(accelerate, "dispatch_model", lambda model, parts: moved.append(sorted(set(parts.values()))))
    on_device(model, AUTO)
    assert moved == [expected]


def test_load_moves_what_it_loads_and_what_it_is_told_to(monkeypatch, tmp_path):
    moved = []
    monkeypatch.setattr("dive_fast.adapters.on_device", lambda model, device: moved.append(device.type) or model)
    monkeypatch.setattr("dive_fast.adapters.load_backbone", lambda name, dtype: (tiny_llama(), "processor"))
    peft.get_peft_model(tiny_llama(), dive_fast.DiveConfig(r=4)).save_pretrained(tmp_path)
    dive_fast.load(tiny_llama(), tmp_path)
    assert moved == []
    dive_fast.load(tiny_llama(), tmp_path, device="cpu")
    assert moved == ["cpu"]
    assert dive_fast.load("named", tmp_path).processor == "processor"
    assert moved == ["cpu", torch_device(None).type]


@pytest.mark.parametrize("kind", ["lowrank", "heads"])
@pytest.mark.parametrize("adapter_first", [True, False])
def test_a_model_behind_accelerates_hooks_is_steered(kind, adapter_first):
    """As with device_map="auto", whose hooks call a forward that they keep."""

    def hooked(model):
        parts = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
        return accelerate.dispatch_model(model, dict.fromkeys(parts, "cpu"), main_device="cpu", force_hooks=True)

    def steered(model):
        model = peft.get_peft_model(model, dive_fast.DiveConfig(kind=kind, r=4)).eval()
        randomize_adapters(model)
        return model

    def written(model):
        output = dive_fast.generate(model, RECORDS[:3], processor=tiny_tokenizer(), max_new_tokens=8)
        return [row.tolist() for row in output.sequences]

    expected, base = written(steered(tiny_llama())), written(tiny_llama())
    if adapter_first:
        model = steered(tiny_llama())
        hooked(model.get_base_model())
    else:
        model = steered(hooked(tiny_llama()))
    assert written(model) == expected != base
    assert written(model.unload()) == base


def test_masks_follow_the_layers():
    mask, rows = torch.tensor([[True, False]]), torch.tensor([0])
    call = SteeringCall({"response": mask, "all": None}, {"default": rows})
    there = call.on(torch.device("meta"))
    assert there.masks["response"].is_meta and there.masks["all"] is None and there.rows["default"].is_meta
    assert call.on(torch.device("meta")) is there and call.on(mask.device) is call
    nothing = SteeringCall({"all": None})
    assert nothing.on(torch.device("meta")) is nothing


def test_several_gpus_are_for_several_processes_or_a_model_over_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(DiveTrainingArguments, "n_gpu", 2)
    with pytest.raises(InputError, match="2 GPUs are visible to one process.*device_map='auto'"):
        training_arguments({}, tmp_path)
    model = tiny_llama()
    assert not is_spread(model) and not is_spread("smollm2")
    model.lm_head = torch.nn.Linear(8, 8, device="meta")
    assert is_spread(model)
    training_arguments({}, tmp_path, spread=is_spread(model))
