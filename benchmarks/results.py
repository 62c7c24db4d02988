"""Compact results: one record per measured thing, for tables and plots."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

FIGURES = ("median", "iqr", "min", "mean", "stddev", "rounds")


def record(benchmark) -> dict:
    """What pytest-benchmark's fixture holds after a test: name, group, seconds and what the test noted."""
    stats = benchmark.stats.stats
    return {
        "name": benchmark.name,
        "group": benchmark.group,
        "seconds": {figure: getattr(stats, figure) for figure in FIGURES},
        **benchmark.extra_info,
    }


def write(path: Path, records: Sequence[dict], scale: str, machine: dict[str, str]) -> None:
    """Writes {"scale", "machine", "records"} as JSON, in place of a file that is there at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"scale": scale, "machine": machine, "records": list(records)}
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(unfinished, path)
