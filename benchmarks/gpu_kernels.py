"""Where a decoding step's time goes on a GPU, kernel by kernel: python -m benchmarks.gpu_kernels FILE [--seconds S].

Kernels overlap, each beginning while the one before it still runs, so the sum of their durations says nothing. What one
adds to a step is the time from the end of the kernel before it to its own.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

BACKBONES = ("mistral-7b", "gemma3-4b", "qwen2.5-7b")
ROWS, RANK, NEW_TOKENS, PROMPT_TOKENS = (1, 32, 8), 64, 16, 1024
# A longer time between the ends of two kernels holds a gap of the host's, not a kernel.
LONGEST = 1000.0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gpu_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON to write, after every problem")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin only what is likely to end by then")
    options = parser.parse_args(argv)
    end, found, longest = time.monotonic() + options.seconds, [], 0.0
    for name, decoding in decodings():
        begun = time.monotonic()
        if begun + 1.5 * longest > end:
            break
        found.append({"name": name, **profiled(decoding())})
        options.file.write_text(json.dumps({"kernels": found}, indent=1))
        print(page(found[-1]), flush=True)
        longest = max(longest, time.monotonic() - begun)


def decodings() -> Iterator[tuple]:
    """(name, what makes the engine's decoding) of the first backbone with all rows, of the others with one."""
    from benchmarks.decode_peers import Native
    from benchmarks.decode_problems import UNSTEERED, Problem, Steering

    for backbone in BACKBONES:
        for rows in ROWS if backbone == BACKBONES[0] else ROWS[:1]:
            problem = Problem(backbone, rows, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, device="cuda")
            for steering in (UNSTEERED, Steering("lowrank", RANK)):
                yield f"{problem}-{steering}", lambda problem=problem, steering=steering: Native(problem, steering)


def profiled(decoding) -> dict:
    """What `of_trace` finds in a run behind a first one, which records the step."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        decoding.prepare()
        decoding()
        decoding.prepare()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            decoding()
        profiler.export_chrome_trace(str(trace))
        return of_trace(json.loads(trace.read_text())["traceEvents"])


def of_trace(events: list[dict]) -> dict:
    """Of a trace's events: what each of the engine's kernels adds to a step.

    Returns:
        "steps", "microseconds": of the median step, from one step's first kernel to the next one's, and "kernels":
        name and grid, "a_step": how many, "added", "own" (from its begin to its end), "early" (how long before the end
        of the kernel before it it began): medians in microseconds. The first step, which the host starts, is left out.
    """
    kernels = sorted((e for e in events if e.get("cat") == "kernel" and "dive::" in e["name"]), key=lambda e: e["ts"])
    begins = [i for i, event in enumerate(kernels) if short(event["name"]).startswith("begin_kernel")]
    if len(begins) < 2:
        raise ValueError(f"the trace holds {len(begins)} steps of the engine, expected 2 or more")
    steps = [kernels[b]["ts"] - kernels[a]["ts"] for a, b in zip(begins, begins[1:], strict=False)]
    figures: dict[str, list[tuple[float, float, float]]] = {}
    for before, event in zip(kernels[begins[1] - 1 :], kernels[begins[1] :], strict=False):
        ended, end = before["ts"] + before["dur"], event["ts"] + event["dur"]
        if end - ended > LONGEST:
            continue
        name = f"{short(event['name'])} {event['args'].get('grid', '')}".rstrip()
        figures.setdefault(name, []).append((end - ended, event["dur"], ended - event["ts"]))
    counted = len(begins) - 1
    rows = []
    for name, values in figures.items():
        added, own, early = map(statistics.median, zip(*values, strict=True))
        rows.append({"name": name, "a_step": len(values) / counted, "added": added, "own": own, "early": early})
    rows.sort(key=lambda row: -row["a_step"] * row["added"])
    return {"steps": counted, "microseconds": statistics.median(steps), "kernels": rows}


def short(name: str) -> str:
    """A kernel's name without its namespaces, types and parameters."""
    plain = re.sub(r"\(anonymous namespace\)::|\([\w:]+\)(?=\d)", "", name)
    found = re.search(r"(\w+)(<[\w, ]*>)?\(", plain) or re.search(r"(\w+)(<[\w, ]*>)?$", plain)
    return found[1] + (found[2] or "") if found else name


def page(found: dict) -> str:
    """As a table of Markdown."""
    lines = [
        f"{found['name']}: {found['microseconds']:.0f} µs a step",
        "",
        "| kernel | a step | adds, µs | own, µs | early, µs | adds a step, µs |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in found["kernels"]:
        figures = (row["a_step"], row["added"], row["own"], row["early"], row["a_step"] * row["added"])
        count, *others = figures
        lines.append(f"| `{row['name']}` | {count:.0f} | " + " | ".join(f"{figure:.1f}" for figure in others) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
