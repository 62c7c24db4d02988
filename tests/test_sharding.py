"""Training with the frozen layers shared by two processes: the losses, scores and adapter of one process."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import dive_fast
from dive_fast import checkpoints
from dive_fast.data import Record, generated_films
from dive_fast.errors import InputError
from dive_fast.models.hidden import unwrapped
from dive_fast.models.spec import decoder_of
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from tests.tiny_processors import tiny_backbone
from tests.training_runs import RECORDS, SHORT

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TAUGHT = {
    "supervision": dive_fast.Supervision(pathology_weight=2.0, eos_weight=3.0, kl_weight=0.5, align_weight=0.3),
    "teacher": dive_fast.Teacher(shots=2),
}
# Films and texts in turn: now and then one process has films and the other has none.
FILMS = [
    record if i % 2 else Record(f"text {i}", record.prompt, record.report)
    for i, record in enumerate(generated_films(12))
]
# `batch` is a micro-batch over all processes.
SCENARIOS = {
    "every position": {"scope": "all", "args": {"max_steps": 12, "save_strategy": "steps", "save_steps": 3}},
    # In the second epoch processes find different records' prompts and teachers in memory.
    "response, taught, prompts kept": {
        **TAUGHT,
        "args": {
            "max_steps": 9,
            "gradient_accumulation_steps": 2,
            "prompt_cache_bytes": 2**24,
            "eval_reports": 3,
            "eval_max_new_tokens": 8,
        },
    },
    "reft, layers recomputed": {"kind": "reft", "args": {"gradient_checkpointing": True}},
    "heads, products kept": {
        "kind": "heads",
        "scope": "all",
        "args": {"selective_checkpointing": True},
        "fsdp_config": {"version": 2, "reshard_after_forward": False},
    },
    "gated, one layer, compiled": {
        "kind": "gated",
        "layers_to_transform": [1],
        "args": {"torch_compile": True, "torch_compile_backend": "eager"},
    },
    "Gemma's films": {"family": "gemma3", "batch": 2, **TAUGHT},
    "Qwen-VL's films": {"family": "qwen2_5_vl", "batch": 2, "scope": "all"},
}


def train(name: str, folder: Path, processes: int, *, resume: bool = False, **args):
    """The run of a scenario in this process, one of so many."""
    scenario = {"kind": "lowrank", "scope": "response", "layers_to_transform": None, "batch": 4} | SCENARIOS[name]
    films = "family" in scenario
    model, processor = tiny_backbone(scenario["family"]) if films else (tiny_llama(), tiny_tokenizer())
    records = FILMS if films else RECORDS
    args = SHORT | {"per_device_train_batch_size": scenario["batch"] // processes} | scenario.get("args", {}) | args
    args |= {"max_grad_norm": 1.0, "learning_rate": 1e-2}
    if processes > 1:
        args |= {"fsdp": True, "fsdp_config": scenario.get("fsdp_config", {"version": 2})}
    steering = {key: scenario[key] for key in ("kind", "scope", "layers_to_transform")}
    return dive_fast.train(
        model,
        records,
        folder / name,
        processor=processor,
        steering=dive_fast.DiveConfig(r=4, **steering),
        eval_dataset=records[:5],
        supervision=scenario.get("supervision"),
        teacher=scenario.get("teacher"),
        args=args,
        resume=resume,
    )


def work(folder: Path) -> None:
    """What each of two processes does: all scenarios, and how much of the model it has held."""
    from torch.distributed.tensor import DTensor

    held = {}
    for name in SCENARIOS:
        base = unwrapped(train(name, folder, processes=2).model)
        frozen, whole = [], []
        for key, parameter in base.named_parameters():
            (frozen if isinstance(parameter, DTensor) else whole).append((key, parameter))
        layers = [key for key, _ in decoder_of(base).layers.named_parameters() if "dive_" not in key]
        held[name] = {
            "sharded": len(frozen) == len(layers),
            "here": sum(p.to_local().numel() for _, p in frozen),
            "all": sum(p.numel() for _, p in frozen),
            "adapters": sum("dive_" in key for key, _ in whole),
        }
    if os.environ["RANK"] == "0":
        (folder / "held.json").write_text(json.dumps(held))


def script(folder: Path, body: str) -> Path:
    path = folder / "worker.py"
    path.write_text(
        f"import sys\nfrom pathlib import Path\nimport torch.distributed as dist\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"{body}\nif dist.is_initialized():\n    dist.destroy_process_group()\n"
    )
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    worker = script(folder, "from tests.test_sharding import work\nwork(Path(sys.argv[1]))")
    done = subprocess.run([*TORCHRUN, worker, folder], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def result_of(folder: Path) -> tuple[torch.Tensor, dict]:
    stored = json.loads((folder / "dive_result.json").read_text())
    return torch.tensor([entry["loss"] for entry in stored["history"] if "loss" in entry]), stored["metrics"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_as_one(sharded, tmp_path, name):
    train(name, tmp_path, processes=1)
    (losses, scores), (expected, wanted) = result_of(sharded / name), result_of(tmp_path / name)
    torch.testing.assert_close(losses, expected, atol=2e-5, rtol=1e-5)
    for key in wanted:
        if key.startswith("eval_"):
            assert scores[key] == pytest.approx(wanted[key], rel=1e-4), key
    files = [folder / name / "adapter_model.safetensors" for folder in (sharded, tmp_path)]
    adapter, other = map(load_file, files)
    assert adapter.keys() == other.keys() and any(tensor.abs().max() > 0 for tensor in adapter.values())
    for key in adapter:
        torch.testing.assert_close(adapter[key], other[key], atol=2e-5, rtol=1e-4)


def test_each_process_holds_half_of_the_frozen_layers_and_whole_adapters(sharded):
    for name, held in json.loads((sharded / "held.json").read_text()).items():
        assert held["sharded"] and held["adapters"] > 0, name
        # Rows are dealt out: of an odd number one process has one more.
        assert held["here"] == pytest.approx(held["all"] / 2, rel=0.02), name


def test_the_adapter_loads_in_one_process(sharded, tmp_path):
    name = "every position"
    result = train(name, tmp_path, processes=1)
    model = dive_fast.load(tiny_llama(), sharded / name)
    batch = tiny_tokenizer()("Indication: case 1.", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, result.model(**batch).logits, atol=1e-4, rtol=1e-4)


def children(process: subprocess.Popen) -> list[psutil.Process]:
    """The processes that torchrun has started."""
    return [child for child in psutil.Process(process.pid).children() if "worker.py" in " ".join(child.cmdline())]


def reached(run: Path) -> int:
    """The step of the newest whole checkpoint."""
    newest = checkpoints.newest_complete(run) if run.is_dir() else None
    return 0 if newest is None else int(newest.name.removeprefix(checkpoints.PREFIX))


def test_a_killed_run_goes_on_in_two_processes_to_the_bit_and_in_one(sharded, tmp_path):
    name = "every position"
    body = f"from tests.test_sharding import train\ntrain({name!r}, Path(sys.argv[1]), 2, resume=True)"
    command = [*TORCHRUN, script(tmp_path, body), tmp_path / "two"]
    run = tmp_path / "two" / name
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and reached(run) < 3:
        time.sleep(0.01)
    for killed in (*children(process), process):
        killed.kill()
    process.wait()
    assert 3 <= reached(run) < 12 and not (run / "adapter_model.safetensors").exists()
    shutil.copytree(run, tmp_path / "one" / name)
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    train(name, tmp_path / "one", processes=1, resume=True)
    whole, two, one = (
        folder / name / "adapter_model.safetensors" for folder in (sharded, tmp_path / "two", tmp_path / "one")
    )
    assert two.read_bytes() == whole.read_bytes()
    expected = load_file(whole)
    for key, tensor in load_file(one).items():
        torch.testing.assert_close(tensor, expected[key], atol=2e-5, rtol=1e-4)


def test_ctrl_c_in_one_process_stops_all_behind_the_same_step(tmp_path):
    name = "gated, one layer, compiled"
    body = f"from tests.test_sharding import train\ntrain({name!r}, Path(sys.argv[1]), 2, max_steps=4000)"
    command = [*TORCHRUN, script(tmp_path, body), tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "'loss'" in line:
            break
    children(process)[-1].send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    saved = checkpoints.newest_complete(tmp_path / name)
    assert process.returncode != 0 and saved is not None
    assert errors.count(f"TrainingInterrupted: interrupted; saved to {saved}") == 2


def test_the_command_line_shards_and_changes_no_bit(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"id": record.id, "prompt": record.prompt, "report": record.report} for record in RECORDS]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.yaml").write_text(
        f"model: {tmp_path / 'model'}\ndata: {tmp_path / 'data.jsonl'}\n"
        "training: {max_steps: 4, per_device_train_batch_size: 2, save_strategy: 'no'}\n"
    )
    body = (
        "from dive_fast import cli\nassert cli.main(sys.argv[1:]) == 0\n"
        "assert not dist.is_initialized(), 'threads of the process group outlive the command'"
    )
    command = [*TORCHRUN, script(tmp_path, body), "train", tmp_path / "run.yaml"]
    for folder, option in (("sharded", "training.fsdp=true"), ("copied", "training.fsdp=null")):
        argv = [option, "--output", tmp_path / folder]
        done = subprocess.run([*command, *argv], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-4000:]
    # The same reports in every process, whatever the precision that the command loads the model in.
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("sharded", "copied")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "fsdp: it shares the frozen layers among processes, and there is only one; start several with `torchrun"),
        ({"fsdp_config": {"version": 1}}, "fsdp_config: expected version 2, got 1"),
        ({"fsdp_config": {"cpu_offload": True}}, "fsdp_config: expected version and reshard_after_forward alone, got"),
        ({"fsdp_config": {"transformer_layer_cls_to_wrap": "A"}}, "alone, got transformer_layer_cls_to_wrap; what is"),
        ({"fsdp": "offload"}, "alone, got cpu_offload"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, args, message):
    for kind in (dict, TrainingArguments):
        given = {"fsdp": True} | args
        with pytest.raises(InputError, match=message):
            arguments = given if kind is dict else TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **given)
            dive_fast.train(tiny_llama(), RECORDS, tmp_path / "run", processor=tiny_tokenizer(), args=arguments)
    assert not (tmp_path / "run").exists()


def test_a_model_that_accelerate_would_shard_is_refused(tmp_path, monkeypatch):
    """What `accelerate launch` with FSDP in its configuration comes to on a GPU."""
    made = Trainer.create_accelerator_and_postprocess

    def make(self):
        made(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", make)
    with pytest.raises(InputError, match="fsdp: accelerate was told to shard the model"):
        dive_fast.train(tiny_llama(), RECORDS, tmp_path / "run", processor=tiny_tokenizer(), args=SHORT)
    assert not (tmp_path / "run").exists()
