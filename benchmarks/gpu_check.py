"""`make gpu-check`: builds, tests and measures everything on this machine's GPU, within nine minutes.

    python -m benchmarks.gpu_check [--quick] [--only "gpu tests,decode"] [--out DIR] [--dry-run]

Needs torch with a CUDA device, nvcc, and what the tests import; no network. Every part is a process of its own, so that
one that hangs or runs out of memory costs itself alone. Results are written after each: `<device>-<date>.json` and a
page of Markdown beside it. Exit status: 0 all is well, 1 something failed (the page says what), 2 it could not run.
"""

import argparse
import datetime
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import gpu_findings, gpu_parts, gpu_process, gpu_summary
from benchmarks.gpu_parts import ROOT, Part

RESULTS, LOGS = ROOT / "benchmarks" / "results", ROOT / "build" / "gpu-check"
LIMIT, QUICK_LIMIT = 540.0, 180.0
# Kept for writing the results.
RESERVE = 5.0
# A part is not begun with less than this share of its time, or these seconds: it could only be cut off.
LEAST_SHARE, LEAST_SECONDS = 0.3, 10.0
FACTS_SECONDS = 90.0
# Stands in for a device where a dry run has none.
NO_DEVICE = {"device": "no device", "capability": [9, 0], "compute_sanitizer": None, "xdist": False, "machine": {}}
# Without these the rest proves nothing, so that not having run them is a failure.
REQUIRED = ("build", "gpu tests")
ALL_WELL, FAILED, COULD_NOT_RUN = 0, 1, 2

Run = Callable[..., gpu_process.Outcome]


class CannotRun(Exception):
    """The machine lacks something; the message says what."""


def main(argv: Sequence[str] | None = None, run: Run = gpu_process.run) -> int:
    options = _parser().parse_args(argv)
    limit = 60 * options.minutes if options.minutes else QUICK_LIMIT if options.quick else LIMIT
    deadline = gpu_process.Deadline(limit - RESERVE)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as temporary:
        folder = Path(temporary)
        try:
            if options.dry_run:
                return _dry_run(options, folder)
            facts, nvcc = look(run, folder, folder / "facts.log", deadline)
            chosen = choose(gpu_parts.parts(facts, nvcc, folder), options.only, options.quick)
            results = new_results(facts, nvcc, limit, options.commit)
            path = claim(options.out, facts["device"])
        except CannotRun as error:
            print(f"gpu-check: {error}", file=sys.stderr)
            return COULD_NOT_RUN
        except KeyboardInterrupt:
            print("gpu-check: interrupted before it began", file=sys.stderr)
            return COULD_NOT_RUN
        log = path.with_suffix(".log") if options.out != RESULTS else LOGS / f"{path.stem}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"gpu-check: {facts['device']}, torch {facts['torch']}, {results['check']['nvcc']}; log in {log}")
        return Check(results, path, log, deadline, run, options.quick).run(chosen)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the most important parts, in three minutes")
    parser.add_argument("--minutes", type=_positive, metavar="N", help="the most it may take; default 9, or 3 if quick")
    parser.add_argument("--only", metavar="NAMES", help="parts whose names contain one of these, separated by commas")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="for results and log")
    parser.add_argument("--commit", metavar="SHA", help="the commit to note where this is no git checkout")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing; needs no GPU")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of minutes above 0, got {text}")
    return value


def look(run: Run, folder: Path, log: Path, deadline: gpu_process.Deadline) -> tuple[dict, str]:
    """(`gpu_device.facts`, nvcc's path).

    Raises:
        CannotRun: no CUDA device, no nvcc, or a package is missing.
    """
    found = folder / "facts.json"
    command = [sys.executable, "-m", "benchmarks.gpu_device", "facts", str(found)]
    outcome = run(command, seconds=min(FACTS_SECONDS, deadline.left()), log=log, cwd=ROOT)
    try:
        facts = json.loads(found.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # it ended before it wrote, or while it did
        last = gpu_findings.last_line(outcome.output)
        raise CannotRun(f"{sys.executable} could not say what device there is: {last}") from None
    if facts["error"]:
        raise CannotRun(f"no usable CUDA device: {facts['error']} (by {sys.executable}; make gpu-check PYTHON=...)")
    if facts["missing"]:
        raise CannotRun(f"{sys.executable} lacks what the tests import: pip install {' '.join(facts['missing'])}")
    nvcc = gpu_parts.find_nvcc()
    if nvcc is None:
        raise CannotRun("nvcc is missing: install the CUDA toolkit, or put nvcc on PATH")
    return facts, nvcc


def choose(parts: list[Part], only: str | None, quick: bool) -> list[Part]:
    """The parts to run; those that a quick run leaves out are taken where they are asked for by name."""
    if only is None:
        return [part for part in parts if part.quick is not None] if quick else parts
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in wanted if not any(name in part.name for part in parts)]
    if unknown or not wanted:
        raise CannotRun(f"--only: no part is called {unknown or only!r}; there are {[part.name for part in parts]}")
    return [part for part in parts if any(name in part.name for name in wanted)]


def new_results(facts: dict, nvcc: str, limit: float, commit: str | None) -> dict:
    """In the form of the other results files, with a member "check"."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=30).stdout
    release = re.search(r"release ([\d.]+)", version)
    check = {
        "device": facts["device"],
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "nvcc": f"nvcc {release[1] if release else 'of an unknown version'}",
        "limit": limit,
        "commit": commit,
        "seconds": 0.0,
        "verdict": "unfinished",
        "parts": [],
        "not_run": [],
    }
    return {"scale": "gpu", "machine": facts["machine"], "records": [], "check": check}


def claim(folder: Path, device: str) -> Path:
    """A new file `<device>-<date>.json` there, with a number where that name is taken.

    Raises:
        CannotRun: the folder cannot be written.
    """
    stem = f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}-{datetime.date.today()}"
    for number in range(1, 1000):
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.open("x").close()
            return path
        except FileExistsError as error:
            if not path.exists():
                raise CannotRun(f"--out: {folder} is no folder") from error
        except OSError as error:
            raise CannotRun(f"--out: {folder} cannot be written: {error}") from error
    raise CannotRun(f"--out: {folder} holds a thousand results of this day")


class Check:
    """A run over parts.

    Attributes:
        results: what is written, after every part.
    """

    def __init__(
        self, results: dict, path: Path, log: Path, deadline: gpu_process.Deadline, run: Run, quick: bool = False
    ):
        self.results, self.path, self.log, self.deadline, self._run = results, path, log, deadline, run
        self.check, self.quick, self.interrupted = results["check"], quick, False

    def run(self, parts: list[Part]) -> int:
        self._save()
        for part in parts:
            try:
                self._take(part)
                self._save()
            except KeyboardInterrupt:
                self.interrupted = True
        failed = self._failures()
        self.check["verdict"] = self._verdict(failed)
        self._save()
        print(f"\n{gpu_summary.summary(self.results)}\ngpu-check: results in {self.path}")
        return FAILED if failed else ALL_WELL

    def _take(self, part: Part) -> None:
        seconds = part.most_seconds(self.quick)
        reason = self._not_begun(part, seconds)
        if reason:
            self.check["not_run"].append([part.name, reason])
            print(f"gpu-check: {part.name}: not run, {reason}", flush=True)
        else:
            self._run_part(part, min(seconds, self.deadline.left()))

    def _not_begun(self, part: Part, seconds: float) -> str | None:
        if self.interrupted:
            return "interrupted"
        if part.missing:
            return part.missing
        left = self.deadline.left()
        return f"{left:.0f} s were left" if left < max(LEAST_SHARE * seconds, min(LEAST_SECONDS, seconds)) else None

    def _run_part(self, part: Part, seconds: float) -> None:
        print(f"gpu-check: {part.name}, at most {seconds:.0f} s", flush=True)
        try:
            command = part.command_within(seconds)
            outcome = self._run(command, seconds=seconds, log=self.log, cwd=ROOT, env=part.env)
        except KeyboardInterrupt:
            self.interrupted = True
            outcome = gpu_process.Outcome(None, 0.0, True, "interrupted")
        except OSError as error:
            outcome = gpu_process.Outcome(1, 0.0, False, str(error))
        found = gpu_findings.judge(part, outcome)
        if self.interrupted:
            found |= {"status": "unfinished", "why": "interrupted"}
        print(f"gpu-check: {part.name}: {found['status']} {found.get('why', '')}".rstrip(), flush=True)
        self.results["records"] += found.pop("records", [])
        self.results["machine"] = found.pop("machine", self.results["machine"])
        for name in ("floors", "kernels"):
            if name in found:
                self.check[name] = found.pop(name)
        self.check["parts"].append(found)

    def _verdict(self, failed: list[str]) -> str:
        if failed:
            return f"Failed: {', '.join(failed)}"
        open_ends = [part["name"] for part in self.check["parts"] if part["status"] == "unfinished"]
        open_ends += [name for name, _ in self.check["not_run"]]
        return f"Nothing failed; not finished: {', '.join(open_ends)}" if open_ends else "All is well"

    def _failures(self) -> list[str]:
        failed = [part["name"] for part in self.check["parts"] if part["status"] == "failed"]
        left = [name for name, _ in self.check["not_run"]]
        failed += [f"{name} was not run" for name in left if name.startswith(REQUIRED)]
        return failed + ["interrupted"] * self.interrupted

    def _save(self) -> None:
        """Replaces both files at once, so that a check that is killed leaves whole ones."""
        self.check["seconds"] = round(self.check["limit"] - RESERVE - self.deadline.left(), 1)
        if self.check["commit"]:
            self.results["machine"].setdefault("commit", self.check["commit"])
        for record in self.results["records"]:
            if "floors" in self.check:
                gpu_summary.add_device_shares(record, self.check["floors"])
        texts = {".json": json.dumps(self.results, indent=1) + "\n", ".md": gpu_summary.summary(self.results)}
        for suffix, text in texts.items():
            path = self.path.with_suffix(suffix)
            unfinished = path.with_name(path.name + ".part")
            unfinished.write_text(text)
            os.replace(unfinished, path)


def _dry_run(options: argparse.Namespace, folder: Path) -> int:
    nvcc = gpu_parts.find_nvcc() or "nvcc"
    for part in choose(gpu_parts.parts(NO_DEVICE, nvcc, folder), options.only, options.quick):
        seconds = part.most_seconds(options.quick)
        print(f"# {part.name}, at most {seconds:.0f} s" + (f"; here {part.missing}" if part.missing else ""))
        print(shlex.join(part.command_within(seconds)))
    return ALL_WELL


if __name__ == "__main__":
    # A terminated check keeps what it has measured, like an interrupted one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
