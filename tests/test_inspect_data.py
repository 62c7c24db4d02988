"""What is said of a data set: numbers worked out by hand, the known figures of Open-i, and the command."""

import importlib.util
import json

import pytest
from transformers import PreTrainedTokenizerFast

from dive_fast import cli
from dive_fast.data import DATA_SETS, Record, load_open_i
from dive_fast.errors import InputError
from dive_fast.inspect_data import by_split, inspect_data
from dive_fast.supervision.tagger import Span
from tests.data_fixtures import WRITERS, write_mimic_cxr


def tagger(text):
    """Words in capitals decide: A is (A, present), B is (B, absent); "AB" carries both."""
    spans = []
    for label, polarity in (("A", "present"), ("B", "absent")):
        start = text.find(label)
        if start >= 0:
            spans.append(Span(start, start + 1, (label, polarity)))
    return spans


def record(name, report, patient=None, images=(), prompt="one two three", **meta):
    return Record(name, prompt, report, images, {"patient_id": patient, **meta} if patient else meta)


@pytest.fixture
def parts():
    train = [
        record("1", "A b c d", "p1", ("x.png",)),
        record("2", "a B", "p1", prompt="one"),
        record("3", "AB c", "p2", ("y.png", "z.png")),
        record("4", "a  b", "p3"),
    ]
    test = [record("5", " A b\nc d ", "p4"), record("6", "e", "p2", ("z.png",)), record("7", "a b c", "p5")]
    return {"train": train, "test": test}


def test_counts_lengths_and_decisive_words(parts):
    found = inspect_data(parts, tagger=tagger, samples=1)
    train = found["parts"]["train"]
    assert found["unit"] == "words"
    counts = [train[name] for name in ("records", "images", "patients", "distinct_reports", "measured")]
    assert counts == [4, 3, 3, 4, 4]
    # Reports of 4, 2, 2 and 2 words: 75 % have two at most.
    assert train["report_length"] == {"5": 2, "25": 2, "50": 2, "75": 2, "95": 4, "99": 4, "100": 4}
    assert train["prompt_length"] == {"5": 1, "25": 1, "50": 3, "75": 3, "95": 3, "99": 3, "100": 3}
    # Of 10 words A, B and AB decide; AB counts for both classes.
    assert train["decisive"]["share"] == 3 / 10
    assert train["decisive"]["classes"] == {
        "A present": {"reports": 2 / 4, "tokens": 2 / 10},
        "B absent": {"reports": 2 / 4, "tokens": 2 / 10},
    }
    assert train["samples"] == [{"id": "1", "prompt": "one two three", "report": "A b c d", "images": ["x.png"]}]


def test_leaks(parts):
    (leak,) = inspect_data(parts, tagger=tagger)["leakage"]
    assert leak == {
        "parts": ["train", "test"],
        "patients": {"n": 1, "share": 1 / 3},  # p2
        "reports": {"n": 1, "share": 1 / 3},  # "A b c d", whatever its white space
        "images": {"n": 1, "share": 1 / 3},  # z.png
    }
    parts["test"].append(record("8", "f"))
    (leak,) = inspect_data(parts, tagger=tagger)["leakage"]
    assert leak["patients"] is None and leak["reports"] == {"n": 1, "share": 1 / 4}
    assert inspect_data(parts, tagger=tagger)["parts"]["test"]["patients"] is None
    more = {**parts, "val": parts["test"], "no split": parts["train"]}
    pairs = [leak["parts"] for leak in inspect_data(more, tagger=tagger)["leakage"]]
    assert pairs == [["train", "test"], ["train", "val"], ["test", "val"]]


def test_leaks_into_another_data_set(parts):
    other = {"new a": [record("9", "a b c", "p9")], "new b": [record("10", "a b c", "p9")]}
    found = inspect_data({"train": parts["train"], "no split": parts["test"]}, against=other, tagger=tagger)
    assert list(found["parts"]) == ["train", "no split", "new a", "new b"]
    assert [(*leak["parts"], leak["reports"]["n"]) for leak in found["leakage"]] == [
        ("train", "new a", 0), ("train", "new b", 0), ("no split", "new a", 1), ("no split", "new b", 1)
    ]  # fmt: skip
    with pytest.raises(InputError, match="against: .*'test' in both"):
        inspect_data(parts, against={"test": parts["test"]}, tagger=tagger)


def test_images_are_compared_by_the_file_they_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "x.png").touch()
    (tmp_path / "link.png").symlink_to("films/x.png")
    train = [record("1", "a", images=("films/x.png",))]
    for name, n in {"films/../films/x.png": 1, f"{tmp_path}/films/x.png": 1, "link.png": 1, "films/y.png": 0}.items():
        (leak,) = inspect_data({"train": train, "test": [record("2", "b", images=(name,))]}, tagger=tagger)["leakage"]
        assert leak["images"]["n"] == n, name


def test_lengths_in_tokens():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<unk>", "<eos>", "ask", "No", "effusion", "."])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    found = inspect_data({"all": [record("1", "No effusion.", images=("x.png",), prompt="ask ask")]}, tokenizer=fast)
    part = found["parts"]["all"]
    assert found["unit"] == "tokens" and found["leakage"] == []
    assert part["report_length"]["100"] == 4 and part["prompt_length"]["100"] == 2  # the report's EOS counts
    assert part["decisive"] == {
        "share": 1 / 3,
        "classes": {"Pleural Effusion absent": {"reports": 1.0, "tokens": 1 / 3}},
    }


def test_a_sample_is_measured_and_all_is_compared(parts):
    train = [record(str(i), f"text {i}", f"p{i}") for i in range(500)]
    found = inspect_data({"train": train, "test": train[400:450]}, tagger=tagger, sample=20)
    assert [found["parts"][name]["measured"] for name in ("train", "test")] == [20, 20]
    assert found["parts"]["train"]["records"] == 500 and found["leakage"][0]["patients"]["n"] == 50
    again = inspect_data({"train": train}, tagger=tagger, sample=20)
    assert again["parts"]["train"]["samples"] == found["parts"]["train"]["samples"]


def test_by_split():
    names = ["test", None, "validate", "train", "extra", "test"]
    parts = by_split([record(str(i), "r", split=name) for i, name in enumerate(names)])
    assert {name: [r.id for r in records] for name, records in parts.items()} == {
        "train": ["3"], "validate": ["2"], "test": ["0", "5"], "no split": ["1"], "extra": ["4"],
    }  # fmt: skip
    assert list(parts)[:3] == ["train", "validate", "test"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": {}}, "expected parts with records, got none"),
        ({"parts": {"train": []}}, "expected parts with records, got train"),
        ({"parts": {"train": [record("1", "r")]}, "sample": 0}, "sample >= 1"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(InputError, match=message):
        inspect_data(**arguments)


@pytest.mark.skipif(importlib.util.find_spec("torchxrayvision") is None, reason="torchxrayvision is not installed")
def test_the_known_leak_of_open_i():
    found = inspect_data(by_split(load_open_i(None)), tagger=tagger, sample=10)
    assert {name: part["records"] for name, part in found["parts"].items()} == {
        "train": 2069, "val": 296, "test": 590, "no split": 470,
    }  # fmt: skip
    leaks = {tuple(leak["parts"]): leak["reports"]["n"] for leak in found["leakage"]}
    assert leaks["train", "test"] == 274


# The command


def inspect(capsys, *arguments):
    code = cli.main(["data", "inspect", *map(str, arguments)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.parametrize("name", WRITERS)
def test_every_data_set_is_shown(tmp_path, capsys, name):
    root = WRITERS[name](tmp_path / "set")
    code, shown, _ = inspect(capsys, name, "--root", root)
    assert code == 0 and "left out: " in shown and "Lengths in words" in shown
    code, out, _ = inspect(capsys, name, "--root", root, "--json")
    found = json.loads(out)
    assert f"{name}: {found['loaded'][name]['summary']}\n" in shown  # on one line, however narrow the terminal
    assert found["data"] == {"name": name, "root": str(root), "split": None}
    assert found["loaded"][name]["records"] == sum(part["records"] for part in found["parts"].values())
    assert found["loaded"][name]["dropped"]


def test_options_split_and_limit(tmp_path, capsys):
    root = write_mimic_cxr(tmp_path)
    options = ["--root", root, "views=[PA]", "--limit", 1, "--split", "train"]
    code, out, _ = inspect(capsys, "mimic_cxr", *options, "--json")
    found = json.loads(out)
    assert code == 0 and found["data"] == {
        "name": "mimic_cxr", "root": str(root), "split": "train", "views": ["PA"], "limit": 1,
    }  # fmt: skip
    assert found["parts"]["train"]["records"] == 1 and found["leakage"] == []
    _, out, _ = inspect(capsys, "mimic_cxr", "--root", root, "--split", "train", "--samples", 0)
    assert "Leakage: there is one part only" in out and "s50000001" not in out


def test_files_against_files(tmp_path, capsys):
    for name, reports in (("train", ["Clear.", "No effusion."]), ("test", ["Clear.", "Small effusion."])):
        rows = [{"id": f"{name}{i}", "prompt": "Ask [b]", "report": text} for i, text in enumerate(reports)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = inspect(capsys, tmp_path / "train.jsonl", "--against", tmp_path / "test.jsonl")
    assert code == 0 and f"stands verbatim in {tmp_path / 'train.jsonl'}" in out
    assert f"Warning: 1 of {tmp_path / 'test.jsonl'}'s records (50.0%) have" in out
    assert "Leakage of patients cannot be told" in out and "Ask [b]" in out and "Pleural Effusion absent" in out


def test_all_parts_of_a_named_data_set_are_compared(tmp_path, capsys, monkeypatch):
    def clinic(split: str | None = "train"):
        rows = [record("1", "Clear.", split="train"), record("2", "No effusion.", split="test")]
        return [row for row in rows if split in (None, row.meta["split"])]

    monkeypatch.setitem(DATA_SETS, "clinic", clinic)
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"id": "m", "prompt": "Ask", "report": "No effusion."}))
    _, out, _ = inspect(capsys, path, "--against", "clinic", "--json")
    found = {tuple(leak["parts"]): leak["reports"]["n"] for leak in json.loads(out)["leakage"]}
    assert found == {(str(path), "clinic train"): 0, (str(path), "clinic test"): 1}
    _, out, _ = inspect(capsys, "clinic", "--against", "clinic", "--json")
    assert list(json.loads(out)["loaded"]) == ["clinic", "clinic (--against)"]


def test_what_goes_wrong(tmp_path, capsys):
    for arguments, words in [
        (["nowhere"], "data set: expected one of"),
        (["mimic_cxr"], "missing a required argument: 'root'; its options are root, split, target"),
        (["mimic_cxr", "--root", tmp_path], "looked for"),
        (["mimic_cxr", "--root", tmp_path, "veiws=all"], "got an unexpected keyword argument 'veiws'"),
        (["mimic_cxr", "--root", tmp_path, "views=3"], "data.views: expected text or a list"),
        (["open_i", "--tokenizer", tmp_path], "--tokenizer: expected smollm2, a folder or a hub id"),
    ]:
        code, out, err = inspect(capsys, *arguments)
        assert (code, out) == (2, "") and words in err
    assert cli.main(["data"]) == 2 and "ACTION" in capsys.readouterr().err
    assert cli.main(["data", "inspect", "--help"]) == 0 and "Examples:\n" in capsys.readouterr().out


def test_other_commands_say_what_was_left_out(tmp_path, capsys):
    from dive_fast.cli_data import load_counted

    section = {"name": "mimic_cxr", "root": str(write_mimic_cxr(tmp_path)), "split": "train"}
    load_counted(section)
    assert "mimic_cxr: 2 records with 3 images; left out: 2 without a text in findings" in capsys.readouterr().err
    load_counted(section, quiet=True)
    assert capsys.readouterr().err == ""
