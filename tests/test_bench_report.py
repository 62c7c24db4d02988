"""The report of results files: a page, the same in Markdown, and plots, from invented records of every group."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from PIL import Image

from dive_fast import cli
from dive_fast.bench import drawing, scaling_plots
from dive_fast.bench.chapters import CHAPTERS
from dive_fast.bench.group_tables import GROUPS, fit_table, group_table, left_out, noise_note
from dive_fast.bench.results import parse_results
from dive_fast.errors import InputError
from tests.bench_records import content, ratio, record

DECODE = {"device": "cpu", "dtype": "bfloat16", "prompt_tokens": 128, "new_tokens": 32, "steering": "unsteered"}


def decode(rows: int, implementation: str, milliseconds: float) -> dict:
    problem = f"smollm2-bfloat16-B{rows}"
    return record(
        f"decode {rows} {implementation}",
        32e-3 * milliseconds,
        group=f"decode {problem}",
        reach=0.02,
        problem=problem,
        implementation=implementation,
        B=rows,
        tokens_per_second=1e3 * rows / milliseconds,
        milliseconds_per_step=milliseconds,
        first_token_seconds=0.08,
        share_of_read_limit=ratio(4.5 / milliseconds, 0.02),
        memory_beyond_weights_and_cache=10 * 2**20,
        **DECODE,
    )


def steering(rows: int, name: str, added: float, implementation: str = "dive_fast") -> dict:
    problem = f"smollm2-bfloat16-B{rows}"
    found = ratio(1 + added / 100, 0.01, 150)
    overhead = {end: 100 * (found[end] - 1) for end in ("median", "low", "high")}
    more = DECODE | {"steering": name, "adapter_bytes_share": 0.01, "ratios": {"unsteered": found}}
    return record(
        f"steering {rows} {name} {implementation}",
        group="decode steering",
        problem=problem,
        implementation=implementation,
        B=rows,
        overhead_percent=overhead,
        **more,
    )


def loss(implementation: str, seconds: float, memory: int) -> dict:
    problem = "smollm2-135m-float32-T1024-valid100%-mean"
    figures = {"gflops_per_second": 100 / seconds, "floor_seconds": 0.5, "gradient_error": 1e-6, "peak_memory": memory}
    more = {"problem": problem, "device": "cpu", "T": 1024, "N": 1024, "V": 49152, "dtype": "float32"}
    return record(
        f"loss {implementation}", seconds, group=f"loss cpu-{problem}", implementation=implementation, **figures, **more
    )


def scaling(axis: str, size: int, **milliseconds: float) -> dict:
    times = {name: [1e-3 * t, 1.01e-3 * t, 0.99e-3 * t] for name, t in milliseconds.items()}
    memory = {name: 2**20 * size for name in times} if axis.startswith("loss") else None
    more = {"peak_memory": memory} if memory else {}
    return record(f"{axis} {size}", group="scaling", axis=axis, size=size, dtype="float32", times=times, **more)


def every_group() -> list[dict]:
    peers = {"transformers": ratio(0.16, 0.02)}
    curve = [[0, 0.0, 3.9], [3, 5.0, 2.9], [6, 10.0, 2.4]]
    system = {"reached": True, "steps": 6, "seconds": 10.0, "final_loss": 2.4, "peak_memory": 2**28, "curve": curve}
    system |= {"learning_rate": 0.02, "parameters": 10, "memory_method": "high-water mark"}
    other = system | {"reached": False, "steps": None, "seconds": None, "final_loss": 2.9}
    written = {"reports_per_minute": ratio(120.0, 0.05), "tokens_per_second": 80.0, "new_tokens": 900, "ended": 0.97}
    step = {"problem": "cpu-smollm2-float32-batch8-open_i", "implementation": "dive_fast scope all", "device": "cpu"}
    op = {"implementation": "dive_fast native", "direction": "forward", "dtype": "float32", "T": 8, "D": 64, "r": 4}
    train = {"problem": "cpu-smollm2-36steps", "backbone": "smollm2", "dtype": "float32", "reports": 8}
    return [
        decode(1, "dive_fast", 4.5),
        decode(8, "dive_fast", 11.0),
        decode(1, "transformers", 28.0),
        decode(8, "transformers", 45.0),
        record("dr", group="decode ratios", problem="smollm2-bfloat16-B1", implementation="dive_fast", ratios=peers),
        steering(1, "lowrank-r16", 0.8),
        steering(1, "lowrank-r64", 4.6),
        steering(8, "lowrank-r64-different", 14.4),
        steering(8, "lowrank-r64-different", 64.0, "transformers"),
        record("op", group="steer-op", gigabytes_per_second=9.0, ratios={"copy of the same bytes": ratio(5.0)}, **op),
        record("kernel", group="decode kernels bfloat16-K576", implementation="dive_fast", dtype="bfloat16", K=576, B=1,
               gigabytes_per_second=50.0, share_of_read_limit=ratio(0.95, 0.02)),
        record("step", group="train-step", ratios={"plain hooks": ratio(0.6, 0.1, peak_memory=0.7)}, **step),
        loss("dive_fast native", 0.3, 54 * 2**20),
        loss("eager float32 logits", 0.86, 576 * 2**20),
        record("lr", group="loss ratios", problem="smollm2-135m-float32-T1024-valid100%-mean", device="cpu",
               implementation="dive_fast native", ratios={"eager float32 logits": ratio(0.4, 0.02, peak_memory=0.09)},
               left_out={"Liger": "its kernels are Triton's"}),
        *(scaling("loss rows", n, dive_fast=n * 0.3, eager=5 + n * 0.8) for n in (256, 1024, 4096)),
        *(scaling("decode rows", n, dive_fast=4 + n) for n in (1, 2, 4)),
        record("train", group="end-to-end training", threshold=2.5, steps=6, threshold_ratios={},
               systems={"dive_fast scope response": system, "<LoRA>": other}, **train),
        record("write", group="end-to-end reports", steering="steered", batch=16,
               systems={"dive_fast": written, "transformers": written}, ratios=peers, **train),
        record("bleu", group="evaluate", metric="bleu", documents=100, documents_per_second=5e3, difference=1e-9,
               ratios={"pycocoevalcap": ratio(1.1, 0.04)}),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    file = folder / "results.json"
    file.write_text(json.dumps(content(*every_group())))
    assert cli.main(["bench", "--report", str(file), "--output", str(folder / "page")]) == 0
    return folder / "page"


def test_every_plot_is_drawn_twice_and_names_its_machine(report):
    stems = {stem for chapter in CHAPTERS.values() for stem in chapter.plots}
    assert {path.name for path in (report / "plots").iterdir()} == {
        f"{s}{end}" for s in stems for end in (".svg", ".png")
    }
    for stem in stems:
        assert ElementTree.parse(report / "plots" / f"{stem}.svg").getroot().tag.endswith("svg")
        image = Image.open(report / "plots" / f"{stem}.png").convert("L")
        assert image.width > 1000 and image.getextrema()[0] < 64
    assert not list(report.rglob("*.part"))


def test_the_page_is_one_file_and_holds_everything(report):
    page = (report / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page and "<script" not in page
    assert len(re.findall(r'<img alt="[^"]+" src="data:image/svg', page)) == sum(
        len(c.plots) for c in CHAPTERS.values()
    )
    for text in ("Of 60 targets", "Example CPU, 2 cores", "not measured", "&lt;LoRA&gt;", "Liger: its kernels"):
        assert text in page, text
    assert "<LoRA>" not in page


def test_the_markdown_has_the_same_tables(report):
    text = (report / "report.md").read_text()
    for group in GROUPS.values():
        assert f"### {group.title}\n" in text
    assert "1 row: added to a step | missed | Example CPU, 2 cores | ≤ 3 % |" in text
    missing = text[text.index("### Not measured") :]
    assert "| decoding on a GPU, Mistral-7B, 1 row: share of the floor | ≥ 75 % |\n" in missing
    assert "![Peak memory by implementation.](plots/loss-memory.png)" in text
    assert text.count("Example CPU, 2 cores · 2 threads") >= sum(len(c.plots) for c in CHAPTERS.values())


def test_the_same_results_give_the_same_files(report, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content(*every_group())))
    assert cli.main(["bench", "--report", str(file), "--output", str(tmp_path / "page")]) == 0
    for path in (report / "plots").glob("*.svg"):
        assert path.read_bytes() == (tmp_path / "page" / "plots" / path.name).read_bytes()


def test_results_of_one_group_give_its_chapter_alone(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content(loss("dive_fast native", 0.3, 2**20))))
    assert cli.main(["bench", "--report", str(file), "--output", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert 'id="loss"' in page and 'id="decode"' not in page


def parsed():
    return parse_results(content(*every_group()), "file.json").records


def test_a_table_holds_the_figures_of_its_records():
    training = group_table("training", parsed())
    assert training.rows[0][:4] == ["cpu-smollm2-36steps", "ours scope response", "6 of 6", "10.0 s"]
    assert training.rows[1][:4] == ["cpu-smollm2-36steps", "<LoRA>", "not reached", "–"]
    assert training.rows[1][5] == "2.900"
    reports = group_table("reports", parsed())
    assert reports.rows[1][2:6] == ["120 (114 to 126)", "6.25 × (6.13 to 6.38)", "80.0", "112"]
    assert group_table("steering", parsed()).rows[1][3] == "4.6 (3.6 to 5.6)"
    assert left_out(parsed()) == ["Liger: its kernels are Triton's"]


def test_the_laws_are_those_that_the_times_follow():
    rows = {tuple(row[:2]): row for row in fit_table(parsed()).rows}
    proportional = rows["loss, forward and backward : rows that count", "ours"]
    assert proportional[3].startswith("1.00 (") and proportional[4] == proportional[7] == "1.000"
    affine = rows["loss, forward and backward : rows that count", "eager"]
    assert affine[5].startswith("5.00 ms (") and affine[6].startswith("800 µs (") and "a row" in affine[6]


def test_times_of_two_machines_are_two_curves():
    """Through both goes no law: the second machine takes a thousandth, at other sizes."""
    sizes = (256, 1024, 4096)
    slow = parse_results(content(*(scaling("loss rows", n, dive_fast=n) for n in sizes)), "a.json")
    quick = (scaling("loss rows", 4 * n, dive_fast=n / 250) for n in sizes)
    quick = parse_results(content(*quick, gpu="An H100"), "b.json")
    rows = {row[1]: row for row in fit_table([*slow.records, *quick.records]).rows}
    assert list(rows) == ["ours, Example CPU, 2 cores", "ours, An H100"]
    assert all(row[3].startswith("1.00 (") and row[4] == "1.000" for row in rows.values())
    records = [*slow.records, *quick.records]
    for figure in (scaling_plots.times(records), scaling_plots.memory(records)):
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == list(rows)


def test_noise_is_said():
    assert noise_note(parsed()).startswith("1 of ")  # the train-step's quotient of 0.6 ± 10 %
    assert noise_note(parsed()[:1]) == "No interval is wider than 10% of its figure."


def test_without_matplotlib_the_remedy_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content(record("a"))))
    assert cli.main(["bench", "--report", str(file), "--output", str(tmp_path / "page")]) == 2
    assert "pip install 'dive_fast[plots]'" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_a_group_that_lacks_what_its_tables_need_is_refused():
    with pytest.raises(InputError, match="record 0 .*: a record of group 'scaling' needs axis, size, times"):
        parse_results(content(record("a", group="scaling")), "file.json")


def test_no_two_systems_look_alike():
    looks = drawing.looks([f"system {i}" for i in range(20)])
    assert len({(look.colour, look.marker) for look in looks.values()}) == 20
    assert list(drawing.looks(["a", "dive_fast"]))[0] == "dive_fast"


@pytest.mark.parametrize("output", ["results.json", "results.json/page"])
def test_a_place_that_cannot_be_written(tmp_path, capsys, output):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content(*every_group())))
    assert cli.main(["bench", "--report", str(file), "--output", str(tmp_path / output)]) == 2
    assert "--output: " in capsys.readouterr().err
