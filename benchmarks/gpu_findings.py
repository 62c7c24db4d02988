"""What the parts of `gpu_check` have found: read from pytest's XML, the sanitizer's output and results files."""

import json
import re
import xml.etree.ElementTree as ElementTree
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu_parts import Part
from benchmarks.gpu_process import Outcome

# What a benchmark that was not begun says; conftest.py of this folder skips with it.
NO_TIME = "not run: the time was up"
NO_TESTS = 5  # pytest's exit status where nothing was selected


def read_junit(path: Path) -> dict:
    """Counts, and what was not passed.

    Returns:
        "passed", "failed" (errors outside a test's body included), "skipped", "not_run": counts; "failures",
        "skips": [name, first line of the reason] each; "left": names that time was missing for.
    """
    found = {"passed": 0, "failed": 0, "skipped": 0, "not_run": 0, "failures": [], "skips": [], "left": []}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name')}".removeprefix("::")
        bad = [*case.findall("failure"), *case.findall("error")]
        skipped = case.find("skipped")
        if bad:
            found["failed"] += 1
            found["failures"].append([name, _first_line(bad[0].get("message") or bad[0].text)])
        elif skipped is not None and NO_TIME in skipped.get("message", ""):
            found["not_run"] += 1
            found["left"].append(name)
        elif skipped is not None:
            found["skipped"] += 1
            found["skips"].append([name, _first_line(skipped.get("message"))])
        else:
            found["passed"] += 1
    return found


def _first_line(text: str | None) -> str:
    return ((text or "").strip().splitlines() or [""])[0]


def read_sanitizer(output: str) -> dict:
    """{"errors": count or None where the tool came to no conclusion, "summary": its last line about that}.

    What a tool reported before it was cut off counts without its summary: every process that it looks at has one of its
    own.
    """
    summaries = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", output)
    # racecheck counts hazards and, of these, errors and warnings.
    counts = [re.search(r"\((\d+) error", line) or re.search(r"SUMMARY: (\d+)", line) for line in summaries]
    counts = [int(count[1]) for count in counts if count]
    reports = re.findall(r"=+ ((?:Invalid|Uninitialized|Barrier error|Error: Race).*)", output)
    if len(reports) > sum(counts):
        return {"errors": len(reports), "summary": reports[-1]}
    return {"errors": sum(counts) if counts else None, "summary": summaries[-1] if summaries else ""}


def judge(part: Part, outcome: Outcome) -> dict:
    """What goes into the results for a part that has run.

    Returns:
        "status": "passed", "failed" or "unfinished" (not shown to be at fault), "why" if not passed, and
        the counts of `read_junit` where pytest wrote some, "errors" and "summary" of a sanitizer, "records" of a
        benchmark, the floors and the "machine".
    """
    found = {"name": part.name, "kind": part.kind, "seconds": round(outcome.seconds, 1)}
    counts, content = None, {}
    # Either may be cut off where the part was killed while it wrote.
    with suppress(ElementTree.ParseError):
        counts = read_junit(part.xml) if part.xml is not None and part.xml.exists() else None
    with suppress(json.JSONDecodeError):
        content = json.loads(part.json.read_text()) if part.json is not None and part.json.exists() else {}
    wanted = {"floors": ("floors", "machine"), "kernels": ("kernels",)}.get(part.kind, ("records",))
    found |= (counts or {}) | {name: content[name] for name in wanted if name in content}
    if part.kind == "sanitizer":
        found |= read_sanitizer(outcome.output)
    status, why = _verdict(part, outcome, found, counts)
    return found | {"status": status} | ({"why": why} if why else {})


def _verdict(part: Part, outcome: Outcome, found: dict, counts: dict | None) -> tuple[str, str]:
    last = last_line(outcome.output)
    if part.kind == "sanitizer" and found["errors"]:
        return "failed", found["summary"]
    if outcome.overran:
        why = f"ended after {outcome.seconds:.0f} s; last line: {last}"
        # Slow is no fault of a checked program, nor of what has come some way; where nothing came, it was hanging.
        went_on = any(found.get(name) for name in ("records", "kernels"))
        went_on |= part.name == "kernel tests" and bool(found.get("passed"))
        slow = part.kind == "sanitizer" or (went_on and not found.get("failed"))
        return ("unfinished" if slow else "failed"), why
    if found.get("failed"):
        return "failed", f"{found['failed']} failed"
    if part.kind == "sanitizer":
        if found["errors"] is None:
            return "unfinished", f"it came to no conclusion; last line: {last}"
        if outcome.returncode == NO_TESTS:
            return "unfinished", "no test was selected"
    if outcome.returncode:
        return "failed", f"exit status {outcome.returncode}; last line: {last}"
    if part.xml is not None and counts is None:
        return "failed", f"pytest wrote no results; last line: {last}"
    # Skipped tests prove nothing.
    if part.kind == "tests" and not counts["passed"]:
        return "failed", "no test passed"
    if part.kind == "floors" and "floors" not in found:
        return "failed", f"it measured nothing; last line: {last}"
    wanted = {"benchmark": "records", "kernels": "kernels"}.get(part.kind)
    if wanted and not found.get(wanted):
        return "unfinished", "nothing was measured"
    return "passed", ""


def last_line(output: str) -> str:
    return ([line for line in output.splitlines() if line.strip()] or ["nothing"])[-1].strip()[:200]
