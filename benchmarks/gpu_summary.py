"""One page of Markdown about a run of `gpu_check`."""

from collections.abc import Iterator

from benchmarks import gpu_kernels

LISTED = 12  # of one kind of finding; the JSON file has all
SLOWEST = 6  # kernels of a step


def summary(results: dict) -> str:
    """Tests, sanitizer, floors, figures, what failed and what was not run."""
    sections = [_head(results), _parts(results), _floors(results), _figures(results), _kernels(results),
                _failed(results), _left(results)]  # fmt: skip
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(results: dict) -> str:
    machine, check = results["machine"], results["check"]
    about = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "triton", "transformers", "peft")
                      if name in machine)  # fmt: skip
    lines = [
        f"# {check['device']}, {check['started']}",
        f"**{check['verdict']}** in {check['seconds']:.0f} of {check['limit']:.0f} s.",
        f"{about}; driver {machine.get('gpu driver_version', 'unknown')}; {check['nvcc']}; "
        f"commit {machine.get('commit', 'unknown')}.",
    ]
    return "\n\n".join(lines)


def _parts(results: dict) -> str:
    rows = ["| part | outcome | seconds | |", "|---|---|---:|---|"]
    for part in results["check"]["parts"]:
        counts = [f"{part[name]} {name.replace('_', ' ')}" for name in ("passed", "failed", "skipped", "not_run")
                  if part.get(name)]  # fmt: skip
        notes = [*counts, *filter(None, [part.get("summary"), part.get("why")])]
        rows.append(f"| {part['name']} | {part['status']} | {part['seconds']:.0f} | {_cell('; '.join(notes))} |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _floors(results: dict) -> str:
    floors = results["check"].get("floors")
    if not floors:
        return ""
    copy, read, product = (floors[name] for name in ("copy", "read", "product"))
    state = ", ".join(f"{name} {value}" for name, value in floors["state"]["behind the product"].items())
    return (
        f"Measured in this run (median and quartiles): copy {_spread(copy)} GB/s, sum {_spread(read)} GB/s, "
        f"bfloat16 product {_spread(product)} TFLOP/s; behind it {state or 'nvidia-smi is not installed'}."
    )


def _spread(figure: dict) -> str:
    return f"{figure['median']:.0f} ({figure['low']:.0f} to {figure['high']:.0f})"


def _figures(results: dict) -> str:
    if not results["records"]:
        return "No figures."
    rows = ["| measured | ms, median (iqr) | share of its floor | share of the device | time : others |",
            "|---|---:|---:|---:|---|"]  # fmt: skip
    for record in results["records"]:
        seconds = record["seconds"]
        ratios = ", ".join(f"{other} {ratio['median']:.3f}" for other, ratio in record.get("ratios", {}).items())
        cells = (
            record["name"],
            f"{1e3 * seconds['median']:.3f} ({1e3 * seconds['iqr']:.3f})",
            _percent(share_of_floor(record)),
            _device_share(record),
            ratios,
        )
        rows.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(rows)


def _kernels(results: dict) -> str:
    """What is worth a look first: the slowest kernels of every step."""
    found = results["check"].get("kernels", [])
    return "\n".join(gpu_kernels.page(step | {"kernels": step["kernels"][:SLOWEST]}) for step in found).strip()


def share_of_floor(record: dict) -> float | None:
    """The time that the record's own floor takes over its time, however its group calls it."""
    share = record.get("share_of_floor")
    if isinstance(share, dict):
        return share["median"]
    copied = record.get("ratios", {}).get("copy of the same bytes")
    return 1 / copied["median"] if share is None and copied else share


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def add_device_shares(record: dict, floors: dict) -> None:
    """Puts the record's rate over what the device was measured to do into it: "share_of_copy", "share_of_product"."""
    if "gigabytes_per_second" in record:
        record["share_of_copy"] = record["gigabytes_per_second"] / floors["copy"]["median"]
    if "gflops_per_second" in record:
        record["share_of_product"] = record["gflops_per_second"] / 1e3 / floors["product"]["median"]


def _device_share(record: dict) -> str:
    shares = {"copy": record.get("share_of_copy"), "product": record.get("share_of_product")}
    return ", ".join(f"{share:.0%} of {name}" for name, share in shares.items() if share is not None)


def _failed(results: dict) -> str:
    failures = [failure for part in results["check"]["parts"] for failure in part.get("failures", [])]
    return _listed("Failed", [f"`{name}`: {reason}" for name, reason in failures])


def _left(results: dict) -> str:
    check = results["check"]
    left = [f"{name}: {why}" for name, why in check["not_run"]]
    left += [f"`{name}`: the time was up" for part in check["parts"] for name in part.get("left", [])]
    return "\n\n".join(filter(None, [_listed("Not run", left), _listed("Skipped", list(_reasons(check["parts"])))]))


def _reasons(parts: list[dict]) -> Iterator[str]:
    """Skipped tests by reason."""
    counts: dict[str, int] = {}
    for part in parts:
        for _, reason in part.get("skips", []):
            counts[reason] = counts.get(reason, 0) + 1
    for reason, count in counts.items():
        yield f"{count} x {reason}"


def _listed(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    more = [f"... and {len(lines) - LISTED} more, in the JSON file"] if len(lines) > LISTED else []
    return "\n".join([f"{title}:", "", *(f"- {line}" for line in [*lines[:LISTED], *more])])
