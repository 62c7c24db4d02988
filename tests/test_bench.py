"""What is made of results files: intervals, comparisons, fits, targets and a README's tables."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dive_fast import cli
from dive_fast.bench import fits
from dive_fast.bench.compare import compare
from dive_fast.bench.noise import is_noisy, ratio_of_medians
from dive_fast.bench.readme import filled
from dive_fast.bench.results import LEAST_ROUNDS, Interval, newest, parse_results
from dive_fast.bench.table import Table, digits, duration, faster, html, markdown, size
from dive_fast.bench.targets import TARGETS, Target, judge
from dive_fast.errors import InputError
from tests.bench_records import content, ratio, record, seconds
from tests.report_example import example_result

ROOT = Path(__file__).parents[1]


def parsed(*records: dict, **machine):
    return parse_results(content(*records, **machine), "file.json")


def file(folder: Path, name: str, *records: dict, **more) -> str:
    path = folder / name
    path.write_text(json.dumps(content(*records, **more)))
    return str(path)


# Reading


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda c: [1], "file.json: expected a results file of the benchmark suite"),
        (lambda c: {"systems": []}, "a result of `dive-fast demo`"),
        (lambda c: c | {"scale": 3}, '"scale" or "machine" is missing'),
        (lambda c: c | {"records": [3]}, 'record 0: expected an object with "name"'),
        (lambda c: c | {"records": [{"name": "a"}]}, r"record 0 \('a'\)"),
        (lambda c: c | {"records": [record("a") | {"seconds": {"median": math.nan}}]}, 'expected "seconds"'),
        (lambda c: c | {"records": [record("a", -1.0)]}, "expected seconds above 0"),
        (lambda c: c | {"records": [record("a"), record("a")]}, "'a' of group 'loss' occurs twice"),
        (lambda c: c | {"records": [record("a", ratios={"b": {"median": 1}})]}, "expected ratios of b"),
        (lambda c: c | {"records": [record("a", ratios=3)]}, 'expected "ratios" with a figure for every name'),
        (lambda c: c | {"records": [record("a", overhead_percent={})]}, "expected overhead_percent"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_record(damage, complaint):
    with pytest.raises(InputError, match=complaint):
        parse_results(damage(content(record("a"))), "file.json")


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_the_committed_files_are_read(path):
    found = json.loads(path.read_text())
    if "systems" not in found:
        assert len(parse_results(found, path.name).records) == len(found["records"])


def test_an_interval_is_the_stored_one_or_follows_from_the_quartiles():
    stored, older = record("a", 2.0, reach=0.1), record("b", 2.0)
    older["seconds"] = {"median": 2.0, "stddev": 0.3, "min": 1.95, "rounds": 9}
    few = record("c", 2.0, reach=0.1)
    few["seconds"]["rounds"] = 4
    first, second, third = (r.seconds for r in parsed(stored, older, few).records)
    assert first == Interval(2.0, pytest.approx(1.8), pytest.approx(2.2))
    # Student's t of 8 degrees times the standard error of a normal sample's median; not below the quickest round.
    reach = 2.306 * math.sqrt(math.pi / 2) * 0.3 / 3
    assert second == Interval(2.0, 1.95, pytest.approx(2 + reach, rel=1e-4))
    assert third == Interval(2.0)


@pytest.mark.parametrize("rounds", [5, 9, 25])
def test_the_normal_interval_holds_the_median_as_often_as_it_says(rounds):
    draws = np.random.default_rng(0).normal(10, 1, (4000, rounds))
    inside = 0
    for run in draws:
        figures = {"median": np.median(run), "stddev": run.std(ddof=1), "min": 0.001, "rounds": rounds}
        found = parsed(record("a") | {"seconds": figures}).records[0].seconds
        inside += found.low <= 10 <= found.high
    assert 0.93 < inside / len(draws) < 0.99


def test_a_ratio_of_few_rounds_has_no_interval():
    one, other = (
        parsed(record("a", ratios={"b": ratio(0.5, 0.1, 4), "c": ratio(0.5, 0.1, 5)})).records[0].interval,
        None,
    )
    assert one("ratios", "b") == Interval(0.5) and one("ratios", "c").known
    assert one("ratios", "d") is other


def test_the_interval_of_the_fewest_rounds_holds_the_median_nearly_as_often_as_it_says():
    """By the bootstrap that files hold; of four rounds it would be 7 of 8."""
    draws, resampled = np.random.default_rng(0), np.random.default_rng(1)
    inside = 0
    for run in draws.normal(10, 1, (2000, LEAST_ROUNDS)):
        medians = np.median(resampled.choice(run, (500, LEAST_ROUNDS)), axis=1)
        low, high = np.quantile(medians, (0.025, 0.975))
        inside += low <= 10 <= high
    assert inside / 2000 > 0.925


def test_the_last_file_counts():
    first = parse_results(content(record("a", 1.0), record("b", 1.0)), "1")
    second = parse_results(content(record("b", 2.0)), "2")
    assert [(r.name, r.seconds.median) for r in newest([first, second])] == [("a", 1.0), ("b", 2.0)]


# Noise and comparison


def test_the_interval_of_a_ratio_covers_the_true_one():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        runs = [np.exp(generator.normal(math.log(scale), 0.05, 15)) for scale in (3.0, 2.0)]
        medians = []
        for run in runs:
            resampled = np.median(generator.choice(run, (400, 15)), axis=1)
            medians.append(Interval(float(np.median(run)), *map(float, np.quantile(resampled, (0.025, 0.975)))))
        found = ratio_of_medians(*medians)
        inside += found.low <= 1.5 <= found.high
    assert 0.9 < inside / 400 <= 1.0
    assert ratio_of_medians(Interval(3.0), Interval(2.0)) == Interval(1.5)


def test_a_noisy_record_is_one_with_a_wide_interval():
    quiet, noisy = record("a", reach=0.04), record("b", reach=0.06)
    # What was measured in turn is there for the ratio, which drift does not move.
    pairs = record("c", reach=0.5, ratios={"x": ratio(2.0, 0.04)})
    wide = record("d", ratios={"x": ratio(2.0, 0.04), "y": ratio(2.0, 0.06)})
    assert [is_noisy(r) for r in parsed(quiet, noisy, pairs, wide).records] == [False, True, False, True]


def test_what_has_moved():
    before = parsed(*(record(name, 1.0, reach=0.02) for name in "abcde"), record("gone"))
    after = parsed(
        record("a", 1.10, reach=0.02),  # apart, and by 10 %
        record("b", 0.50, reach=0.02),
        record("c", 1.025, reach=0.001),  # apart, but by less than 3 %
        record("d", 1.035, reach=0.02),  # more than 3 %, but the intervals overlap
        record("e", 1.50) | {"seconds": seconds(1.5, 0.0, rounds=1)},
        record("new"),
    )
    found = compare(before, after)
    verdicts = {change.record.name: change.verdict for change in found.changes}
    assert verdicts == {"a": "slower", "b": "faster", "c": "same", "d": "same", "e": "unknown"}
    assert [change.record.name for change in found.changes] == ["b", "e", "a", "d", "c"]
    assert [r.name for r in found.only_before] == ["gone"] and [r.name for r in found.only_after] == ["new"]


def test_what_did_other_work_is_not_compared():
    work = {"prompt_tokens": 128, "dtype": "bfloat16"}
    before = parsed(record("a", **work, peak_memory=1), record("b", **work), record("c"))
    after = parsed(
        record("a", 2.0, **work, peak_memory=2), record("b", 2.0, **work | {"prompt_tokens": 64}), record("c", B=1)
    )
    found = compare(before, after)
    assert [change.record.name for change in found.changes] == ["a"]
    assert found.other_work == ["b: prompt_tokens 128 and 64", "c: B not recorded and 1"]


# Fits


def test_a_power_law_is_that_of_numpy_and_its_interval_follows_the_noise():
    sizes = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    exact = [[0.5 * x**1.5] * 3 for x in sizes]
    law = fits.power_law(sizes, exact)
    assert law.exponent == pytest.approx((1.5, 1.5, 1.5)) and law.r_squared == pytest.approx(1.0)
    assert law.at(32.0) == pytest.approx(0.5 * 32**1.5)
    generator = np.random.default_rng(1)
    noisy = [list(0.5 * x**1.5 * np.exp(generator.normal(0, 0.1, 20))) for x in sizes]
    law = fits.power_law(sizes, noisy)
    slope, intercept = np.polyfit(np.log(sizes), np.log([np.median(rounds) for rounds in noisy]), 1)
    assert law.exponent.median == pytest.approx(slope) and math.log(law.factor.median) == pytest.approx(intercept)
    assert 1.4 < law.exponent.low < 1.5 < law.exponent.high < 1.6


def test_a_line_has_relative_errors():
    sizes = np.array([128.0, 512.0, 1024.0, 2000.0])
    times = [[1e-3 + 2e-6 * x, 1.1e-3 + 2e-6 * x, 0.9e-3 + 2e-6 * x] for x in sizes]
    line = fits.line(sizes, times)
    assert line.constant.median == pytest.approx(1e-3) and line.slope.median == pytest.approx(2e-6)
    assert line.constant.low < 1e-3 < line.constant.high and line.r_squared == pytest.approx(1.0)
    bent = [[t] * 3 for t in (1.0, 2.0, 2.5, 9.0)]
    slope, constant = np.polyfit(sizes, [1.0, 2.0, 2.5, 9.0], 1, w=1 / np.array([1.0, 2.0, 2.5, 9.0]))
    line = fits.line(sizes, bent)
    assert (line.slope.median, line.constant.median) == (pytest.approx(slope), pytest.approx(constant))
    assert line.r_squared < 0.95


def test_two_sizes_give_no_law():
    assert fits.power_law([1.0, 2.0], [[1.0], [2.0]]) is None and fits.line([1.0, 2.0], [[1.0], [2.0]]) is None


# Targets


def test_targets_are_judged_by_the_record_that_they_name():
    targets = [
        Target("time", "g", {"problem": "p"}, ("ratios", "eager"), most=0.28),
        Target("speed", "g", {"problem": "p"}, ("ratios", "hooks"), least=1.1, per=True, unit=" ×"),
        Target("share", "g", {"problem": "p"}, ("share_of_read_limit",), least=85, scale=100, unit=" %"),
        Target("memory", "g", {"problem": "p"}, ("memory",), most=64, scale=2**-20, unit=" MiB"),
        Target("elsewhere", "g", {"problem": "q"}, ("memory",), most=64),
        Target("no such figure", "g", {"problem": "p"}, ("other",), most=64),
    ]
    found = record(
        "r",
        group="g",
        problem="p",
        ratios={"eager": ratio(0.27, 0.1), "hooks": ratio(0.5, 0.1)},
        share_of_read_limit=ratio(0.8, 0.01),
        memory=32 * 2**20,
    )
    time, speed, share, memory, *rest = judge(parsed(record("s", group="g", problem="z"), found).records, targets)
    assert (time.status, time.clear, time.target.bound) == ("met", False, "≤ 0.28")
    assert (speed.status, speed.clear) == ("met", True)
    assert speed.figure == Interval(pytest.approx(2.0), pytest.approx(1 / 0.55), pytest.approx(1 / 0.45))
    assert (share.status, share.clear, share.target.bound) == ("missed", True, "≥ 85 %")
    assert memory.status == "met" and memory.figure == Interval(32.0)
    assert [verdict.status for verdict in rest] == ["not measured"] * 2


def test_every_target_on_a_cpu_names_a_record_that_the_suite_makes():
    """Spelled as in the committed files, or it would stay "not measured" for ever."""
    measured = set()
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        found = json.loads(path.read_text())
        # Each by itself: a later file may hold the same comparison with fewer peers.
        if "systems" not in found:
            verdicts = judge(parse_results(found, path.name).records)
            measured |= {verdict.target.what for verdict in verdicts if verdict.status != "not measured"}
    for target in TARGETS:
        on_gpu = target.where.get("device") == "cuda"
        assert target.what in measured or on_gpu, target.what
    assert len({target.what for target in TARGETS}) == len(TARGETS)


# Tables


def test_figures_are_written_for_people():
    assert [digits(x) for x in (0, 0.1234, 9.996, 99.96, 1234.5, 999.96)] == [
        "0",
        "0.123",
        "10.0",
        "100",
        "1,234",
        "1,000",
    ]
    assert [duration(x) for x in (3.618, 0.9999, 0.0281, 4.5e-5)] == ["3.62 s", "1.00 s", "28.1 ms", "45.0 µs"]
    assert [size(x) for x in (1536, 56328192, 3 * 2**30)] == ["1.50 KiB", "53.7 MiB", "3.00 GiB"]
    assert faster(Interval(0.5, 0.4, 0.8)) == "2.00 × (1.25 to 2.50)" and faster(None) == "–"


def test_a_table_in_markdown_and_html():
    table = Table("T & t", ["", "a|b"], [["ours", "1"], ["<x>", "2"]], strong=frozenset([0]), note="note")
    assert markdown(table) == "|  | a\\|b |\n|---|---:|\n| **ours** | 1 |\n| <x> | 2 |\n\nnote"
    page = html(table)
    assert "T &amp; t" in page and "&lt;x&gt;" in page and "<b>ours</b>" in page


def test_a_marked_table_is_filled_and_stays():
    text = "# Title\n\n<!-- table: loss-ratios a.json -->\nold\n<!-- /table -->\n\nend\n"
    found = record(
        "r",
        group="loss ratios",
        problem="p",
        implementation="i",
        device="cpu",
        dtype="bfloat16",
        T=10,
        N=3,
        ratios={"a peer": ratio(0.4, 0.1, peak_memory=0.09)},
    )
    made = filled(text, "README.md", {"a.json": content(found)}.__getitem__)
    assert "| bfloat16, 3 of 10 rows count | a peer | 0.40 (0.36 to 0.44) | 0.09 |" in made and "old" not in made
    assert made.startswith("# Title\n") and made.endswith("<!-- /table -->\n\nend\n")
    assert filled(made, "README.md", {"a.json": content(found)}.__getitem__) == made


def test_tables_of_the_page_are_there_for_a_readme():
    figures = {"documents": 99, "documents_per_second": 1234.0, "difference": 2e-9, "ratios": {"peer": ratio(0.5, 0.2)}}
    found = record("r", group="evaluate", metric="bleu", **figures)
    made = filled("<!-- table: evaluate a.json -->\n<!-- /table -->\n", "README.md", lambda path: content(found))
    assert "| bleu | 1,234 | peer | 2.00 × (1.67 to 2.50) | 2e-09 |" in made


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("\n<!-- table: loss a.json -->\n", "README.md, line 2: expected <!-- /table -->"),
        (
            "<!-- table: loss a.json -->\n<!-- table: loss a.json -->\n<!-- /table -->",
            "line 1: expected <!-- /table -->",
        ),
        ("<!-- table: lost a.json -->\n<!-- /table -->", "with a NAME of decode, .*; got 'lost a.json'"),
        ("<!-- table: loss -->\n<!-- /table -->", "got 'loss'"),
        ("<!-- table: loss a.json -->\n<!-- /table -->", "line 1: table loss: the files hold no record for it"),
        ("<!-- table: fits a.json -->\n<!-- /table -->", "line 1: table fits: the files hold no record for it"),
        ("<!-- table: demo a.json -->\n<!-- /table -->", 'line 1: result: expected a mapping with a list "systems"'),
    ],
)
def test_a_wrong_marker_is_named_with_its_line(text, complaint):
    with pytest.raises(InputError, match=complaint):
        filled(text, "README.md", lambda path: content(record("r")))


def test_tables_of_scores_come_from_the_demo_and_from_experiments():
    names = ("demo", "quality", "demo-terminal", "differences", "costs")
    text = "".join(f"<!-- table: {name} r.json -->\n<!-- /table -->\n" for name in names)
    result = example_result() | {"compare_with": "lowrank", "seeds": [0, 1, 2]}
    result["systems"][3] |= {
        "costs": {
            "teacher_seconds": 90.0,
            "tokens_per_second": 512.3,
            "train_peak_bytes": 2e9,
            "write_peak_bytes": 4e8,
        },
        "differences": {
            "perplexity": {"difference": 1.1, "interval": [0.6, 1.5], "clear": True},
            "rouge_l": {"difference": -0.01, "interval": [-0.03, 0.02], "clear": False},
        },
    }
    made = filled(text, "README.md", lambda path: result)
    scores, quality, terminal, differences, costs = re.findall(r"-->\n\n(.*?)\n\n<!-- /table", made, re.S)
    assert "| **DIVE low-rank** | 10.1 (9.4 to 10.8) |" in scores and "| 571 k | 188 s |" in scores
    assert "| **DIVE low-rank** | 10.1 (9.4 to 10.8) | 0.108 (0.097 to 0.119) |" in quality
    assert "Means over 3 seeds on 64 held-out reports" in quality
    assert all(line.startswith("    ") or not line for line in terminal.splitlines()) and "Zero-shot" in terminal
    assert "| minus DIVE low-rank |" in differences and "Zero-shot" not in differences
    assert "| LoRA | +1.1 (+0.6 to +1.5) † | – | −0.010 (−0.030 to +0.020) | – |" in differences
    assert "| LoRA | 461 k | 90 s | 231 s | 2.00 GB | 42 s | 512 | 400 MB | native |" in costs


def test_the_pages_are_up_to_date_with_the_results():
    pages = (ROOT / "README.md", ROOT / "benchmarks/RESULTS.md")
    assert cli.main(["bench", "--readme", *map(str, pages), "--check"]) == 0


# The command


def test_filling_a_readme(tmp_path, capsys):
    found = record(
        "r",
        group="loss ratios",
        problem="p",
        implementation="i",
        device="cpu",
        T=10,
        N=3,
        dtype="float32",
        ratios={"a peer": ratio(0.4, peak_memory=0.09)},
    )
    file(tmp_path, "a.json", found)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- table: loss-ratios a.json -->\n<!-- /table -->\n")
    assert cli.main(["bench", "--readme", str(readme), "--check"]) == 1
    assert "differs" in capsys.readouterr().err and "a peer" not in readme.read_text()
    assert cli.main(["bench", "--readme", str(readme)]) == 0
    assert "| a peer | 0.40 (0.40 to 0.40) | 0.09 |" in readme.read_text()
    assert cli.main(["bench", "--readme", str(readme), "--check"]) == 0
    other = tmp_path / "OTHER.md"
    other.write_text("<!-- table: loss-ratios a.json -->\n<!-- /table -->\n")
    assert cli.main(["bench", "--readme", str(other), str(readme), "--check"]) == 1, "one that is up to date hides none"
    capsys.readouterr()
    readme.write_text("<!-- table: loss-ratios b.json -->\n<!-- /table -->\n")
    assert cli.main(["bench", "--readme", str(readme)]) == 2
    assert "b.json: No such file" in capsys.readouterr().err


def test_comparing(tmp_path, capsys):
    a = file(tmp_path, "a.json", record("one"), record("two"))
    b = file(tmp_path, "b.json", record("one", 1.01), record("three"), processor="Another CPU")
    assert cli.main(["bench", "--compare", a, b]) == 0
    shown = capsys.readouterr()
    assert "the machines differ: processor 'Example CPU, 2 cores' and 'Another CPU'" in shown.err
    assert "Only in" in shown.out and "three" in shown.out and "0 slower, 0 faster, 1 same, 0 unknown" in shown.out
    slower = file(tmp_path, "c.json", record("one", 1.5))
    assert cli.main(["bench", "--compare", a, slower]) == 1
    assert "1.500 (1.500 to 1.500)" in capsys.readouterr().out
    assert cli.main(["bench", "--compare", slower, a]) == 0
    other, gpu = file(tmp_path, "d.json", record("one", B=4)), file(tmp_path, "e.json", record("one", B=4), gpu="H100")
    capsys.readouterr()
    assert cli.main(["bench", "--compare", a, other]) == 0
    shown = capsys.readouterr().out
    assert "Not compared, for they did other work:\n  one: B not recorded and 4" in shown and "0 same" in shown
    assert "Record" not in shown, "a table without rows"
    assert cli.main(["bench", "--compare", other, gpu]) == 0
    assert "the machines differ: gpu not recorded and 'H100'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        (content(record("other")), "no record in common"),
        (content(record("one"), scale="smoke"), "of scale 'laptop'"),
        ({"systems": []}, "expected a results file"),
    ],
)
def test_what_cannot_be_compared(tmp_path, capsys, second, complaint):
    a = file(tmp_path, "a.json", record("one"))
    (tmp_path / "b.json").write_text(json.dumps(second))
    assert cli.main(["bench", "--compare", a, str(tmp_path / "b.json")]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--check"], "--check: means nothing beside a run of the suite"),
        (["--compare", "a", "b", "--output", "c"], "--output: means nothing beside --compare"),
        (["--report", "a", "--scale", "smoke"], "--scale: means nothing beside --report"),
        (["--readme", "a", "-k", "loss"], "-k: means nothing beside --readme"),
        (["--report", "a", "--compare", "b", "c"], "not allowed with"),
        (["--report", "no.json"], "no.json: No such file"),
        (["--scale", "tiny"], "invalid choice"),
    ],
)
def test_options_that_do_not_go_together(capsys, options, complaint):
    assert cli.main(["bench", *options]) == 2
    assert complaint in capsys.readouterr().err


def test_results_are_not_overwritten(tmp_path, capsys):
    taken = file(tmp_path, "a.json", record("one"))
    assert cli.main(["bench", "--output", taken]) == 2
    assert "exists, and results are never overwritten" in capsys.readouterr().err


def test_without_a_checkout_the_command_says_where_to_get_one(tmp_path):
    """The package alone, as a wheel installs it, in a folder of its own."""
    shutil.copytree(ROOT / "dive_fast", tmp_path / "site" / "dive_fast", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\nfrom dive_fast.cli import main\n"
    code += "sys.exit(main(['bench']))"
    (tmp_path / "elsewhere" / "benchmarks").mkdir(parents=True)
    # -S: without site-packages, where this checkout is installed.
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "clone that, and run `dive-fast bench` in its folder" in done.stderr
