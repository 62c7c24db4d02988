"""The report page: well-formed, self-contained, safe, complete where the numbers are and silent where they are not."""

import copy
import errno
import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from dive_fast.errors import InputError
from dive_fast.report import result_table, write_report
from dive_fast.report_assets import charts
from dive_fast.report_assets.numbers import COLUMNS, count, finding, measure, moment, seconds
from tests.report_example import REFERENCES, example_result, history, system

VOID = {"meta", "br", "hr", "img", "link", "input"}
ATTACK = '<script>alert("x")</script>&<img src=http://a.b/c.png onerror=x>'


class Page(HTMLParser):
    """Checks that tags balance; keeps the text, the tags and their attributes."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text = [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), f"{tag}: an attribute twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    def having(self, tag, **attributes):
        return [found for name, found in self.tags if name == tag and attributes.items() <= found.items()]


def marked(text: str) -> tuple[str, frozenset]:
    """A stand-in for the lexicon: every "effusion" is one class."""
    from html import escape

    return escape(text).replace("effusion", '<mark class="present">effusion</mark>'), frozenset(
        ["effusion"] if "effusion" in text else []
    )


@pytest.fixture
def page_of(tmp_path):
    def write(result: dict, highlight=marked) -> tuple[str, Page]:
        path = write_report(result, tmp_path / "deep" / "page.html", highlight=highlight)
        source = path.read_text(encoding="utf-8")
        return source, Page(source)

    return write


def test_the_whole_page(page_of):
    result = example_result()
    source, page = page_of(result)
    text = " ".join(page.text)
    headings = ["Scores", "Scores with intervals", "Losses", "Report lengths", "Example reports", "How it was made"]
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", source) == headings
    assert finding(result) in text and result["command"] in text and "CC0 1.0" in text
    assert len(page.having("table")) == 3 and source.count("<caption>") == 3
    assert "never occurs in training (n = 36)" in text
    for role_img in page.having("div", role="img"):
        assert role_img["aria-label"]
    # Every section is named by a heading that exists.
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert {found["aria-labelledby"] for found in page.having("section")} <= set(identifiers)


def test_the_page_loads_nothing(page_of):
    source, page = page_of(example_result())
    assert not re.search(r"https?://|url\(|@import|<script|<link|<img|<iframe", source)
    assert not [found for _, attributes in page.tags for found in attributes if found in ("src", "href", "srcset")]
    policy = page.having("meta", **{"http-equiv": "Content-Security-Policy"})[0]
    assert policy["content"].startswith("default-src 'none'")


def poison(value):
    if isinstance(value, str):
        return value + ATTACK
    if isinstance(value, dict):
        return {key: item if key == "role" else poison(item) for key, item in value.items()}
    return [poison(item) for item in value] if isinstance(value, list) else value


def test_every_text_is_escaped(page_of):
    result = poison(example_result())
    result["run"][ATTACK] = result["environment"][ATTACK] = "x"
    source, page = page_of(result)
    assert "<script" not in source and "<img" not in source and "&lt;script&gt;" in source
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert not page.having("img") and ATTACK in "".join(page.text)


def test_the_lexicon_marks_by_default(page_of):
    source, page = page_of(example_result(), highlight=None)
    assert page.having("mark", **{"class": "absent"}) and page.having("mark", **{"class": "uncertain"})
    assert "Pleural Effusion" in source


def test_examples_count_findings_against_the_reference(page_of):
    result = example_result()
    result["systems"] = result["systems"][:1]
    result["systems"][0]["samples"] = [
        {"id": "1", "prompt": "", "reference": "effusion", "prediction": "effusion"},
        {"id": "2", "prompt": "", "reference": "effusion", "prediction": ""},
        {"id": "3", "prompt": "", "reference": "clear", "prediction": "effusion"},
    ]
    source, _ = page_of(result)
    tallies = [re.findall(r"\d+ \w+", found) for found in re.findall(r'class="tally">(.*?)</p>', source)]
    assert tallies == [
        ["1 agree", "0 added", "0 missing"],
        ["0 agree", "0 added", "1 missing"],
        ["0 agree", "1 added", "0 missing"],
    ]
    assert "<em>(empty)</em>" in source and 'class="prompt"' not in source


OPTIONAL = ["title", "created", "command", "protocol", "run", "data", "environment", "reference_lengths"]


def test_the_page_says_which_engine_wrote_the_reports(page_of):
    result = example_result()
    assert "42 s (native)" in " ".join(page_of(result)[1].text)
    for one in result["systems"]:
        del one["generate_seconds"]
    assert "(native)" not in " ".join(page_of(result)[1].text)


@pytest.mark.parametrize("key", OPTIONAL)
def test_a_missing_key_is_left_out(page_of, key):
    result = example_result()
    del result[key]
    _, page = page_of(result)
    assert "None" not in " ".join(page.text)


@pytest.mark.parametrize(
    ("keys", "gone"),
    [
        (["unseen"], "never occurs in training"),
        (["history"], "Losses"),
        (["lengths"], "Report lengths"),
        (["samples"], "Example reports"),
        (["scores", "intervals", "perplexity", "perplexity_interval", "finish"], "Scores with intervals"),
        (["train_seconds", "generate_seconds", "trainable_parameters", "description"], "Trained parameters of"),
    ],
)
def test_a_section_without_numbers_is_left_out(page_of, keys, gone):
    result = example_result()
    before = " ".join(page_of(result)[1].text)
    for one in result["systems"]:
        for key in keys:
            del one[key]
    after = " ".join(page_of(result)[1].text)
    assert gone not in after and "None" not in after and "nan" not in after
    assert gone in before or gone == "Trained parameters of"


def test_the_smallest_result(page_of):
    source, page = page_of({"systems": [{"name": "only"}]})
    assert "No perplexity was measured." in source and "only" in page.text


def test_odd_numbers(page_of):
    result = example_result()
    first = result["systems"][0]
    first["perplexity"], first["scores"]["bleu_1"], first["scores"]["cider"] = math.nan, math.inf, None
    first["intervals"]["rouge_l"], first["lengths"] = [math.nan, 1], [0, 0]
    result["systems"][2]["history"] = [{"step": 5, "loss": 2.0}, {"step": 6, "loss": math.nan}, {"epoch": 1}]
    for one in result["systems"]:
        one["scores"]["bleu_4"], one["intervals"]["bleu_4"] = 0.0, [0.0, 0.0]
    source, page = page_of(result)
    assert "nan" not in " ".join(page.text).lower() and "inf" not in re.sub("[Ii]nfo", "", " ".join(page.text))
    assert not re.search(r"nan|inf", "".join(re.findall(r'(?: d|style)="([^"]*)"', source)))


NO_SYSTEMS = [None, [], {}, {"systems": []}, {"systems": "a"}, {"systems": [{}]}, {"systems": [3]}]


@pytest.mark.parametrize("result", NO_SYSTEMS)
def test_no_systems_is_refused(tmp_path, result):
    with pytest.raises(InputError, match="systems"):
        write_report(result, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_report(example_result(), tmp_path / "page.html", highlight=marked)
    before = (tmp_path / "page.html").read_bytes()
    cut = {"systems": [{"name": "a", "samples": [{"id": "x", "prediction": "left \ud83d effusion"}]}]}
    with pytest.raises(InputError, match=r"result: a text holds \\ud83d, half of a surrogate pair.*replace it"):
        write_report(cut, tmp_path / "page.html", highlight=marked)

    def half(path, text, encoding):
        path.write_bytes(text.encode(encoding)[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        write_report(example_result(), tmp_path / "page.html", highlight=marked)
    assert (tmp_path / "page.html").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_page_into_a_pipe_does_not_replace_it(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as reader:
        read = reader.submit(pipe.read_text, encoding="utf-8")
        write_report(example_result(), pipe, highlight=marked)
        assert read.result().endswith("</html>\n") and pipe.is_fifo()


def three(base: float, teacher: float | None, adapter: float | None, width: float = 0.01, **more) -> dict:
    systems = []
    for name, role, value in (("Base", "baseline", base), ("Shots", "teacher", teacher), ("Ours", "adapter", adapter)):
        if value is not None:
            interval = [value * (1 - width), value * (1 + width)]
            systems.append({"label": name, "role": role, "perplexity": value, "perplexity_interval": interval, **more})
    return {"systems": systems}


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (three(47, 18, 10), "10.0, down from the 47.0 of Base and below the 18.0 of Shots."),
        (
            three(40, 10, 20),
            "20.0, down from the 40.0 of Base, 50 % of the way to the 10.0 of Shots, counted in nats per token.",
        ),
        (three(20, 10, 30), "30.0, worse than the 20.0 of Base and above the 10.0 of Shots."),
        (three(20, None, 20.1), "20.1, not clearly different from the 20.0 of Base (the intervals overlap)."),
        (
            three(40, 20, 20.2),
            "20.2, down from the 40.0 of Base and level with the 20.0 of Shots within the intervals.",
        ),
        (
            three(4e4, None, 10, trainable_parameters=552_960),
            "10.0, down from the 40,000 of Base, with 553 k trained parameters.",
        ),
    ],
)
def test_the_finding_follows_from_the_numbers(result, says):
    assert finding(result) == f"Ours reaches a perplexity of {says}"


def test_the_finding_without_an_adapter():
    assert finding(three(40, 20, None)) == "Shots has the lowest perplexity, 20.0."


def test_the_finding_names_the_best_adapter():
    result = example_result()
    assert finding(result).startswith("DIVE low-rank reaches a perplexity of 10.1")
    result["systems"][3]["perplexity"], result["systems"][3]["perplexity_interval"] = 9.0, [8.9, 9.1]
    assert finding(result).startswith("LoRA reaches a perplexity of 9.0")


def test_settings_of_every_kind_are_written_out(page_of):
    result = example_result()
    result["run"] = {"rate": 1e-3, "layers": [1, 2], "weights": {"eos": 4}, "limit": None, "seconds_total": 75}
    text = page_of(result)[1].text
    assert {"0.001", "1, 2", "eos 4", "–", "1 min 15 s"} <= set(text)


def test_bold_is_the_best_of_a_column(page_of):
    source, _ = page_of(example_result())
    table = source[source.index("<table>") : source.index("</table>")]
    rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", table)
    assert [row.count("<b>") for row in rows] == [0, 0, 0, 0, 8]


def test_measure_takes_the_rate_of_ends_from_either_place():
    assert measure({"finish": {"eos": 0.5}}, "eos_rate").value == 0.5
    assert measure({"finish": {"eos": 0.5}, "scores": {"eos_rate": 0.25}}, "eos_rate").value == 0.25
    assert measure({"scores": {"cider": True}}, "cider") is None


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1234, "1.23 k"), (570_720, "571 k"), (1.5e9, "1.5 B"), (None, "–")]
)
def test_count(value, text):
    assert count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(3.14, "3.1 s"), (59, "59 s"), (75, "1 min 15 s"), (3661, "1 h 01 min"), (None, "–")]
)
def test_seconds(value, text):
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0.13, 0.42, [0.2, 0.3, 0.4]), (-1, 1, [-1, -0.5, 0, 0.5, 1]), (3, 3, [3])],
)
def test_ticks(low, high, expected):
    found = charts.ticks(low, high, 5 if expected != [0.2, 0.3, 0.4] else 4)
    assert found == pytest.approx(expected)


def test_running_mean_keeps_ends_and_lines():
    line = [(i / 50, 3 - i / 50) for i in range(51)]
    assert charts.running_mean(line) == [pytest.approx(point) for point in line]
    spike = [(i, 50.0 if i == 25 else 0.0) for i in range(50)]
    assert sum(y for _, y in charts.running_mean(spike)) == pytest.approx(50.0)


def test_the_drawn_loss_is_the_loss():
    points = charts.loss_points(history(2.0, steps=20), "loss")
    line = charts.line_chart("Loss", "steps", [charts.Line("a", charts.Style("c-0", "disc", ""), points)])
    drawn = re.search(r'class="line c-0"[^>]* d="M([^"]*)"', line)[1]
    heights = [float(pair.split()[1]) for pair in drawn.split("L")]
    losses = [loss for _, loss in points]
    low, high = min(losses), max(losses)
    expected = [1 - (loss - low + 0.05 * (high - low)) / (1.1 * (high - low)) for loss in losses]
    assert heights == pytest.approx(expected, abs=1e-4)


def test_a_large_loss_does_not_press_the_others_flat():
    style = charts.Style("c-0", "disc", "")
    lines = [charts.Line("a", style, [(1, 40.0), (2, 30.0)]), charts.Line("b", style, [(1, 4.0), (2, 2.0)])]
    chart = charts.line_chart("Loss", "steps", lines)
    heights = [
        [float(pair.split()[1]) for pair in d.split("L")]
        for d in re.findall(r'class="line c-0"[^>]* d="M([^"]*)"', chart)
    ]
    assert "log scale" in chart and re.findall(r'top:[\d.]+%">([^<]*)<', chart) == ["2", "5", "10", "20"]
    halved, quartered = heights[1][1] - heights[1][0], heights[0][1] - heights[0][0]
    assert halved / quartered == pytest.approx(math.log(2) / math.log(4 / 3), rel=1e-3)
    assert "log scale" not in charts.line_chart("Loss", "steps", [charts.Line("b", style, [(1, 4.0), (2, 1.0)])])


def test_intervals_lie_where_their_axis_says():
    style = charts.Style("c-0", "disc", "")
    panel = charts.interval_panel("T", "", [charts.Point("a", style, 10.0, (5.0, 20.0), "10")])
    # 5 .. 20 spans a factor of 4: linear, with 6 % of the span on either side.
    left, width, dot = (float(x) for x in re.search(
        r'bar" style="left:([\d.]+)%;width:([\d.]+)%.*?disc" style="left:([\d.]+)%', panel).groups())  # fmt: skip
    assert left == pytest.approx(100 * 0.9 / 16.8, abs=0.01)
    assert width == pytest.approx(100 * 15 / 16.8, abs=0.01)
    assert dot == pytest.approx(100 * 5.9 / 16.8, abs=0.01)


def test_an_axis_names_its_unit_once():
    style = charts.Style("c-0", "disc", "")
    points = [charts.Point("a", style, 0.4, None, "40 %"), charts.Point("b", style, 2.2, None, "220 %")]
    panel = charts.interval_panel("T", "", points, percent=True, unbounded=True)
    assert re.findall(r'left:[\d.]+%">([^<]*)</span>', panel) == ["50", "100", "200 %"]


def test_times_are_written_for_people():
    assert moment("2026-11-30T06:03:59+00:00") == "2026-11-30 06:03 UTC"
    assert moment("2026-11-30T01:03:59-05:00") == "2026-11-30 06:03 UTC"
    assert moment("a Monday") == "a Monday" and moment("2026-01-15 10:30") == "2026-01-15 10:30"


def test_systems_differ_by_more_than_colour():
    adapters = [system(str(i), str(i), "adapter", 10.0 + i) for i in range(6)]
    looks = charts.styles(adapters)
    assert len({look.dash for look in looks}) == 6 and looks[0] == charts.Style("c-0", "disc", "")


def test_the_table_fits_a_terminal():
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(result_table(example_result()))
    shown = console.export_text()
    assert "…" not in shown
    for one in example_result()["systems"]:
        assert one["label"] in shown and f"{one['perplexity']:.1f}" in shown
    assert "9.4–10.8" in shown and max(map(len, shown.splitlines())) <= 80


def test_the_table_takes_labels_as_text_not_as_markup():
    result = copy.deepcopy(example_result())
    result["systems"][0]["label"] = "[red]x[/nope]"
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(result_table(result))
    assert "[red]x[/nope]" in console.export_text()


def test_columns_are_distinct_and_the_example_is_json():
    assert len({column.key for column in COLUMNS}) == len(COLUMNS)
    assert json.loads(json.dumps(example_result()))["systems"][0]["samples"][0]["reference"] == REFERENCES[0]
