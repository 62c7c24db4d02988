"""Whether a folder's files were made with the same settings, and how a difference is told."""

import pytest

from dive_fast.errors import InputError
from dive_fast.run_settings import changes, read_settings

HASHES = ("ab" * 32, "cd" * 32)


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        ({}, {}, ""),
        ({"a": 1, "b": {"c": [1, 2]}}, {"b": {"c": (1, 2)}, "a": 1.0}, ""),
        ({"a": None}, {"b": None}, ""),
        ({"a": 1}, {"a": 2}, "a: 1 there, 2 now"),
        ({"a": {"b": "x"}}, {"a": {"b": "é"}}, 'a.b: "x" there, "é" now'),
        ({"a": {"b": True}}, {"a": {}}, "a.b: true there, null now"),
        ({}, {"a": 3}, "a: null there, 3 now"),
        ({"a": None}, {"a": {"b": 1}}, 'a: null there, {"b": 1} now'),
        ({"a": {"b": 1}}, {"a": None}, 'a: {"b": 1} there, null now'),
        ({}, {"a": {"b": HASHES[0]}}, "a: not noted there"),
        ({"a": HASHES[0]}, {"a": HASHES[1]}, "a: abababab there, cdcdcdcd now"),
        (
            dict.fromkeys("abcdef", 0),
            dict.fromkeys("fedcba", 1),
            "f: 0 there, 1 now; e: 0 there, 1 now; d: 0 there, 1 now; c: 0 there, 1 now; and 2 more",
        ),
    ],
)
def test_what_differs_is_told(before, now, told):
    assert changes(before, now) == told


@pytest.mark.parametrize("text", [None, b"", b"{", b"[1]", b"null", b"\xff"])
def test_settings_that_cannot_be_read(tmp_path, text):
    file = tmp_path / "setup.json"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(InputError, match="^output: .*setup.json does not say what .* made with .*; name another$"):
        read_settings(file, "output", "name another")
