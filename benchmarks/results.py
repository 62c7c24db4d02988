"""Compact results: one record per measured thing, for tables and plots."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import measure
from dive_fast.bench.noise import NOISY, is_noisy
from dive_fast.bench.results import parse_results

FIGURES = ("median", "iqr", "min", "mean", "stddev", "rounds")


def record(benchmark) -> dict:
    """What pytest-benchmark's fixture holds after a test: name, group, seconds and what the test noted."""
    stats = benchmark.stats.stats
    interval = measure.median(stats.data)
    return {
        "name": benchmark.name,
        "group": benchmark.group,
        "seconds": {figure: getattr(stats, figure) for figure in FIGURES}
        | {"low": interval.low, "high": interval.high},
        "threads": torch.get_num_threads(),
        **benchmark.extra_info,
    }


def content(records: Sequence[dict], scale: str, machine: dict[str, str]) -> dict:
    """What a results file holds; "noise" names records with an interval too wide for a quiet machine."""
    found = {"scale": scale, "machine": machine, "records": list(records)}
    noisy = [one.name for one in parse_results(found, "results").records if is_noisy(one)]
    return found | {"noise": {"wider_than": NOISY, "records": noisy}}


def write(path: Path, records: Sequence[dict], scale: str, machine: dict[str, str]) -> None:
    """Writes a results file, in place of one that is there at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(content(records, scale, machine), indent=1) + "\n")
    os.replace(unfinished, path)
