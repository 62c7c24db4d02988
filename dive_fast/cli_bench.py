"""`dive-fast bench`: measure, compare two results, turn results into a page, and fill a README's tables."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from dive_fast import cli_files as files
from dive_fast.errors import InputError

RESULTS, PAGE = "bench-results.json", "bench-report"
# What belongs to which way to use the command.
OPTIONS = {
    "report": ("output",),
    "compare": (),
    "readme": ("check",),
    None: ("scale", "chosen", "output"),
}
FLAGS = {"output": "--output", "scale": "--scale", "chosen": "-k", "check": "--check"}


def bench(args: Namespace) -> int:
    """One of the four ways, by what was asked for."""
    mode = next((name for name in ("report", "compare", "readme") if getattr(args, name)), None)
    wrong = [name for name in FLAGS if getattr(args, name) and name not in OPTIONS[mode]]
    if wrong:
        beside = f"--{mode}" if mode else "a run of the suite"
        raise InputError(f"{FLAGS[wrong[0]]}: means nothing beside {beside}; leave one of them out")
    return {"report": _report, "compare": _compare, "readme": _readme, None: _run}[mode](args)


def _run(args: Namespace) -> int:
    from dive_fast.bench.suite import find_suite, run_suite

    root = find_suite()
    output = Path(args.output or RESULTS)
    if output.exists():
        raise InputError(f"--output: {output} exists, and results are never overwritten; name another file")
    files.new_file(output, overwrite=False)
    status = run_suite(root, output, scale=args.scale, chosen=args.chosen)
    if output.is_file():
        print(f"\nResults in {output}. A page of them: dive-fast bench --report {output}")
    elif status == 0:
        print(
            "dive-fast: nothing was measured: all that was chosen was skipped, for the reasons above", file=sys.stderr
        )
        return 1
    return status


def _read(paths: Sequence[str]) -> list:
    from dive_fast.bench.results import parse_results

    return [parse_results(files.read_json(path), str(path)) for path in paths]


def _report(args: Namespace) -> int:
    from dive_fast.bench.page import write_page
    from dive_fast.bench.readme_tables import missed
    from dive_fast.bench.results import newest

    results = _read(args.report)
    folder = Path(args.output or PAGE)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output: expected a folder for the page and its plots, {folder} is a file")
    files.check_place("--output", folder, folder)
    with files.writing("--output", folder):
        page = write_page(results, folder)
    print(missed(newest(results)))
    print(f"Open {page} in a browser; {page.with_suffix('.md')} has the same tables, {folder / 'plots'} the plots.")
    return 0


def _compare(args: Namespace) -> int:
    from dive_fast.bench.compare import RULE, compare

    comparison = compare(*_read(args.compare))
    for difference in comparison.machines:
        print(f"Warning: the machines differ: {difference}", file=sys.stderr)
    if comparison.changes:
        _print_changes(comparison, *args.compare)
    if comparison.other_work:
        print("Not compared, for they did other work:", *(f"  {line}" for line in comparison.other_work), sep="\n")
    for name, records in zip(args.compare, (comparison.only_before, comparison.only_after), strict=True):
        if records:
            print(f"Only in {name}:", *(f"  {record.name}" for record in records), sep="\n")
    counts = {v: sum(c.verdict == v for c in comparison.changes) for v in ("slower", "faster", "same", "unknown")}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f". Moved means: {RULE}.")
    return 1 if comparison.slower else 0


def _print_changes(comparison, before: str, after: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dive_fast.bench.table import duration, fixed

    table = Table(title=Text(f"{before} → {after}"), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("Record", overflow="fold")
    for column in ("Before", "After", "After : before (95 %)", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for change in comparison.changes:
        moved = change.verdict in ("slower", "faster")
        times = (duration(change.before.median), duration(change.after.median))
        cells = (Text(change.record.name), *times, fixed(change.ratio, 3), change.verdict)
        table.add_row(*cells, style="bold" if moved else "")
    Console().print(table)


def _readme(args: Namespace) -> int:
    """1 if one of the files differs and was not to be filled."""
    return max([_fill(Path(name), args.check) for name in args.readme])


def _fill(path: Path, check: bool) -> int:
    from dive_fast.bench.readme import filled

    text = files.read_text(path)
    made = filled(text, str(path), lambda name: files.read_json(path.parent / name))
    if made == text:
        print(f"{path} is up to date.")
        return 0
    if check:
        print(f"{path} differs from its results files; fill it: dive-fast bench --readme {path}", file=sys.stderr)
        return 1
    files.write_text(path, made.removesuffix("\n"))
    print(f"{path} is filled anew.")
    return 0
