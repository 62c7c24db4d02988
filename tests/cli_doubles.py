"""Stand-ins and files that the tests of the command line share."""

import json
from pathlib import Path
from types import SimpleNamespace

REPORTS = ["The lungs are clear.", "Small left effusion. No pneumothorax.", "Mild cardiomegaly is seen."]


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reports_file(folder: Path) -> Path:
    """A data set of three reports."""
    rows = [{"id": f"r{i}", "prompt": f"Case {i}", "report": text} for i, text in enumerate(REPORTS)]
    return lines(folder / "data.jsonl", rows)


class StandInModel(str):
    """A name where a model would be; adapters put on it are added to the name."""

    device = None

    def to(self, device):
        self.device = device
        return self

    def __add__(self, adapter):
        return StandInModel(super().__add__(adapter)).to(self.device)


def stand_in_for_load_backbone(monkeypatch) -> list[tuple]:
    """`load_backbone` gives a StandInModel; returns the list of calls."""
    calls = []

    def load(name, *, dtype=None):
        calls.append((name, dtype))
        return StandInModel(f"model {name}"), SimpleNamespace(tokenizer="tokenizer")

    monkeypatch.setattr("dive_fast.models.backbone.load_backbone", load)
    return calls
