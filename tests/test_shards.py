"""Predictions in shards: what is kept, what is computed again, what is refused, and that the whole is one file."""

import dataclasses
import errno
import json
from itertools import pairwise

import pytest
from PIL import Image

from dive_fast import predictions as module
from dive_fast import shards as shards_module
from dive_fast.data.images import StoredImage
from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.predictions import predictions, record_seed
from dive_fast.shards import Shards, records_fingerprint

RECORDS = [Record(f"r{i}", f"Case {i}: Ödem?", "No effusion.") for i in range(11)]
SETUP = {"model": "m", "options": {"temperature": 0.0, "stop": ["."]}, "data": {"records": 11}}


def rows(records, samples=1):
    return [{"id": r.id, "prediction": f"{r.prompt} {s}"} for r in records for s in range(samples)]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_joined_file_has_the_records_order_whatever_the_shards_order(tmp_path):
    shards = Shards(tmp_path / "p.jsonl", RECORDS, 4, SETUP)
    assert len(shards) == 3 and shards.unfinished() == [0, 1, 2] and not shards.folder.exists()
    for index in (2, 0, 1):
        shards.save(index, rows(shards.shards[index]))
    assert shards.join() == 11
    assert lines(tmp_path / "p.jsonl") == rows(RECORDS)
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_finished_shards_are_found_again_and_damaged_ones_are_not(tmp_path):
    shards = Shards(tmp_path / "p.jsonl", RECORDS, 4, SETUP)
    for index in range(3):
        shards.save(index, rows(shards.shards[index]))
    for damaged in (lambda text: text[:-1], lambda text: text[:9], lambda text: text.replace("r5", "r6"), lambda _: ""):
        path = shards.path(1)
        whole = path.read_text(encoding="utf-8")
        path.write_text(damaged(whole), encoding="utf-8")
        assert Shards(tmp_path / "p.jsonl", RECORDS, 4, SETUP).unfinished() == [1]
        with pytest.raises(InputError, match="shard 1: .*shard-000001.jsonl is missing or damaged"):
            shards.join()
        path.write_text(whole, encoding="utf-8")
    shards.path(1).write_bytes(b"\xff\xfe")
    assert shards.unfinished() == [1] and not (tmp_path / "p.jsonl").exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": "other"}, 'model: "m" there, "other" now'),
        ({"options": {"temperature": 1.0, "stop": ["."]}}, "options.temperature: 0.0 there, 1.0 now"),
        ({"options": {"temperature": 0.0}}, r"options.stop: \[\".\"\] there, null now"),
        ({"adapter": "abc"}, 'adapter: null there, "abc" now'),
        ({"data": {"records": 12}}, "data.records: 11 there, 12 now"),
    ],
)
def test_shards_of_another_setup_are_refused_by_what_differs(tmp_path, changed, words):
    first = Shards(tmp_path / "p.jsonl", RECORDS, 4, SETUP)
    Shards(tmp_path / "p.jsonl", RECORDS, 4, SETUP | changed)  # nothing is finished yet
    first.save(0, rows(RECORDS[:4]))
    with pytest.raises(InputError, match=f"other settings .{words}.; give the same ones"):
        Shards(tmp_path / "p.jsonl", RECORDS, 4, SETUP | changed)
    # A tuple is JSON's list, so it is the same setup.
    same = SETUP | {"options": {"temperature": 0.0, "stop": (".",)}}
    assert Shards(tmp_path / "p.jsonl", RECORDS, 4, same).unfinished() == [1, 2]


@pytest.mark.parametrize("text", [None, "", "{", "\udcff"])
def test_shards_of_an_unknown_setup_are_refused(tmp_path, text):
    shards = Shards(tmp_path / "p.jsonl", RECORDS, 4, SETUP)
    shards.save(0, rows(RECORDS[:4]))
    setup = shards.folder / "setup.json"
    setup.unlink()
    if text is not None:
        setup.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match="setup.json does not say what its folder was made with .*; remove"):
        Shards(tmp_path / "p.jsonl", RECORDS, 4, SETUP)


def test_rows_of_other_records_are_no_shard(tmp_path):
    shards = Shards(tmp_path / "p.jsonl", RECORDS, 4, SETUP)
    for wrong in (rows(RECORDS[4:8]), rows(RECORDS[:3]), rows(RECORDS[:4])[::-1], []):
        with pytest.raises(InputError, match="shard 0: expected 1 rows for each of its records, in their order"):
            shards.save(0, wrong)
    sampled = Shards(tmp_path / "s.jsonl", RECORDS[:2], 4, SETUP | {"options": {"num_return_sequences": 3}})
    sampled.save(0, rows(RECORDS[:2], samples=3))
    assert sampled.join() == 6


@pytest.mark.parametrize("what", ["save", "join"])
def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch, what):
    shards = Shards(tmp_path / "p.jsonl", RECORDS, 4, SETUP)
    for index in range(3 if what == "join" else 2):
        shards.save(index, rows(shards.shards[index]))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards_module.os, "fsync", full)
        with pytest.raises(InputError, match="No space left on device.; free disk space, then start the same command"):
            shards.join() if what == "join" else shards.save(2, rows(shards.shards[2]))
    assert not list(tmp_path.rglob("*.part")) and not (tmp_path / "p.jsonl").exists()
    for index in shards.unfinished():
        shards.save(index, rows(shards.shards[index]))
    assert shards.join() == 11


def test_the_fingerprint_sees_every_part_of_a_record():
    film = Image.new("L", (4, 4))
    changes = [{"id": "x"}, {"prompt": "x"}, {"report": "x"}, {"images": ("a.png",)}, {"images": (film,)}]
    changes.append({"images": (Image.new("L", (4, 4), 9),)})
    changed = [[dataclasses.replace(RECORDS[0], **change)] for change in changes]
    prints = [records_fingerprint(records) for records in ([], RECORDS[:1], RECORDS[:2], *changed)]
    assert len(set(prints)) == len(prints)
    assert records_fingerprint(changed[4]) == records_fingerprint([dataclasses.replace(RECORDS[0], images=(film,))])


def test_the_fingerprint_of_stored_images_reads_none_of_them():
    def fingerprint(key):
        image = StoredImage(lambda: pytest.fail("an image was read"), key)
        return records_fingerprint([Record("a", "p", "r", (image,))])

    assert fingerprint("1a:0:0") == fingerprint("1a:0:0") != fingerprint("1a:1:0")


def test_a_record_draws_from_its_own_seed_in_any_batch(monkeypatch):
    seen = {}

    class Output:
        def __init__(self, records):
            self.texts = [record.prompt for record in records]
            self.finish_reasons, self.stats = ["eos"] * len(records), {"engine": "native"}

    def generate(model, records, *, processor, seed=None, **options):
        seen.update({record.id: own for record, own in zip(records, seed or [None] * len(records), strict=True)})
        return Output(records)

    monkeypatch.setattr(module, "generate", generate)
    options = {"temperature": 1.0, "seed": 7}
    whole = list(predictions(None, None, RECORDS, batch_size=3, options=options))
    first = dict(seen)
    parts = [
        list(predictions(None, None, RECORDS[a:b], batch_size=2, options=options)) for a, b in pairwise((0, 5, 11))
    ]
    assert seen == first and parts[0] + parts[1] == whole and len(set(first.values())) == len(RECORDS)
    assert all(0 <= own < 2**63 for own in first.values())
    list(predictions(None, None, RECORDS, batch_size=3, options={"temperature": 1.0, "seed": None}))
    assert set(seen.values()) == {None}


def test_a_records_seed_is_what_it_was_in_every_release():
    """The first 8 bytes that `printf '7 r0' | sha256sum` shows, without the sign bit."""
    assert record_seed(7, "r0") == 0xA1BFDF07B999550E >> 1
