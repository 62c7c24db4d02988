"""What the demo refuses before it loads anything; the demo itself is `make demo`."""

import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from dive_fast import demo
from dive_fast.data.encoding import ReportEncoder
from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer


@pytest.mark.parametrize("name", ["steps", "eval_reports"])
@pytest.mark.parametrize("value", [0, -3])
def test_a_budget_below_one_is_refused_and_nothing_is_written(name, value, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_load", lambda *_: pytest.fail("the demo went on"))
    with pytest.raises(InputError, match=f"{name}: expected a whole number >= 1, got {value}"):
        demo.main(tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused_at_once(seed, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_load", lambda *_: pytest.fail("the demo went on"))
    with pytest.raises(InputError, match=f"seed: expected a whole number from 0 to .*, got {seed}"):
        demo.main(tmp_path / "out", seed=seed)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_run_is_refused_before_anything_is_scored(tmp_path, monkeypatch):
    model = SimpleNamespace(dtype=torch.bfloat16)
    monkeypatch.setattr(demo, "_load", lambda *_: SimpleNamespace(model=model))
    monkeypatch.setattr(demo, "_describe", lambda *_: pytest.fail("the demo went on"))
    demo._claim(tmp_path, {"steps": 6, "eval_reports": 64, "seed": 0, "dtype": "float32"})
    with pytest.raises(InputError, match='another run .steps: 6 there, 7 now; dtype: "float32" there, "bfloat16" now.'):
        demo.main(tmp_path, steps=7)
    demo._claim(tmp_path, {"steps": 6, "eval_reports": 64, "seed": 0, "dtype": "float32"})


def test_its_reports_come_from_the_native_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 8)
    tokenizer = tiny_tokenizer()
    records = [Record(f"r{i}", f"Case {i}.", "The lungs are clear. No effusion.") for i in range(3)]
    task = SimpleNamespace(
        model=tiny_llama(), processor=tokenizer, encoder=ReportEncoder(tokenizer), held_out=records, pool=None
    )
    console = Console(quiet=True)
    entry = demo._score(console, task, tmp_path, "base", "Base", "baseline", "nothing is steered")
    assert entry["engine"] == "native"
    rows = (tmp_path / "predictions-base.jsonl").read_text().splitlines()
    assert [json.loads(row)["id"] for row in rows] == ["r0", "r1", "r2"]
