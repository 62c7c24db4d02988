"""Short trainings of a tiny random model on invented reports, for the tests of `dive_fast.train`."""

from pathlib import Path

import dive_fast
from dive_fast.data.record import Record
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer

FINDINGS = (
    "no pleural effusion",
    "left pleural effusion",
    "the lungs are clear",
    "mild cardiomegaly",
    "no pneumothorax",
)
RECORDS = [
    Record(f"r{i}", f"Indication: case {i % 7}. Tags: {i % 3}.", f"{FINDINGS[i % 5]}. {FINDINGS[(i * 3 + 1) % 5]}.")
    for i in range(24)
]
SHORT = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "disable_tqdm": True,
    "save_strategy": "no",
}
PLAIN = dive_fast.Supervision(pathology_weight=0, eos_weight=0)
REPORTS = {"eval_reports": 3, "eval_max_new_tokens": 12}


def run(tmp_path, model=None, records=RECORDS, args=None, **options):
    options.setdefault("processor", tiny_tokenizer())
    options.setdefault("steering", dive_fast.DiveConfig(r=4))
    model = tiny_llama() if model is None else model
    return dive_fast.train(model, records, tmp_path / "run", args=SHORT | (args or {}), **options)


def losses(result):
    return [entry["loss"] for entry in result.history if "loss" in entry]


def adapter_bytes(folder: Path) -> bytes:
    return (Path(folder) / "adapter_model.safetensors").read_bytes()
