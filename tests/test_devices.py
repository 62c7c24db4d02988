"""Where models run, and what is said of devices that are not here or too small."""

import peft
import pytest
import torch

import dive_fast
from dive_fast.devices import on_device, torch_device
from dive_fast.errors import InputError
from dive_fast.models.tiny import tiny_llama


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpu", "device: expected a name such as 'cpu' or 'cuda:0', got 'gpu'"),
        (1.5, "device: expected a name such as 'cpu' or 'cuda:0', got 1.5"),
        ("cuda:99", "device: 'cuda:99' is not here, torch sees"),
        ("vulkan", "device: 'vulkan' is not usable here"),
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
