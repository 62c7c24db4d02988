"""Quality beside speed: what each part of the method is worth, by `dive-fast experiment`, with seeds and intervals.

    pytest benchmarks/quality --scale smoke                     # 40 steps of a tiny model: does it run?
    pytest benchmarks/quality --scale laptop --results FILE     # the ablation; FILE gets the result without its texts

Nothing here is timed, so `--benchmark-only` leaves it out.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dive_fast.models.tiny import tiny_llama, tiny_tokenizer

CONFIG = Path(__file__).with_name("ablation.yaml")
# Of the ablation's systems, one of each sort of row.
SMOKE_SYSTEMS = ("zero_shot", "dive", "dive_no_eos", "fixed")
REPORTS = (
    "the lungs are clear .",
    "the heart is normal in size . no pleural effusion .",
    "left pleural effusion . the heart is enlarged .",
)
SCORES = ("perplexity", "bleu_4", "rouge_l", "cider", "decisive_f1", "eos_rate", "length_error")


def smoke_options(folder: Path) -> list[str]:
    """40 steps of a random model on invented reports."""
    model, data = folder / "model", folder / "reports.jsonl"
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    rows = [{"id": f"r{i}", "prompt": f"case {i}", "report": REPORTS[i % len(REPORTS)]} for i in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = ["training.max_steps=40", "training.per_device_train_batch_size=2", "training.save_steps=40"]
    texts = [f"{part}={{name: json_lines, path: {data}}}" for part in ("data", "test")]
    sizes = ["seeds=[0]", "teacher.shots=1", "generation.max_new_tokens=16", "evaluation.bootstrap=200"]
    return [f"model={model}", "dtype=float32", *texts, *steps, *sizes, "--only", ",".join(SMOKE_SYSTEMS)]


@pytest.mark.timeout(0)  # hours at laptop scale
def test_ablation(request, tmp_path):
    """Every row trains, writes and is scored; every score of every row has its interval over documents and seeds."""
    scale, results = request.config.option.scale, request.config.option.results
    output = tmp_path / "runs"
    options = smoke_options(tmp_path) if scale == "smoke" else []
    command = [sys.executable, "-m", "dive_fast.cli", "experiment", str(CONFIG), "--output", str(output), *options]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    result = json.loads((output / "results.json").read_text())
    for system in result["systems"]:
        assert "samples" not in system, "of Open-i no text may leave the machine"
        for name in SCORES:
            low, high = system["intervals"][name]
            assert math.isfinite(system["scores"][name]) and low <= high, f"{system['name']}: {name}"
    perplexities = {system["name"]: system["perplexity"] for system in result["systems"]}
    assert perplexities["dive"] < perplexities["zero_shot"]
    if results is not None:
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps(result, indent=1) + "\n")
