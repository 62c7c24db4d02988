"""The bytes that every token of a tokenizer adds to a text, so that stop strings are found across tokens."""

import json
import re
from weakref import WeakKeyDictionary

from dive_fast.decode.plan import Unsupported

_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")
_known: WeakKeyDictionary = WeakKeyDictionary()


def token_texts(tokenizer) -> list[bytes]:
    """Token id -> its bytes; special tokens, which a text does not show, have none.

    Raises:
        Unsupported: neither byte-level BPE nor SentencePiece, so that a piece may depend on its neighbours.
    """
    size, known = len(tokenizer), _known.get(tokenizer)
    if known is None or known[0] != size:
        known = _known[tokenizer] = size, _token_texts(tokenizer)
    return known[1]


def special_ids(tokenizer) -> set[int]:
    """Ids that decoding with `skip_special_tokens` leaves out."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(token for token, entry in added.items() if entry.special)}


def _token_texts(tokenizer) -> list[bytes]:
    text_of = _reader_of(tokenizer)
    vocabulary, special = tokenizer.get_vocab(), special_ids(tokenizer)
    plain = {token for token in getattr(tokenizer, "added_tokens_decoder", {}) if token not in special}
    texts = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for piece, token in vocabulary.items():
        if token in plain:
            texts[token] = piece.encode()
        elif token not in special:
            texts[token] = text_of(piece)
    return texts


def _reader_of(tokenizer):
    """From a piece of the vocabulary to its bytes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = None if backend is None else json.loads(backend.to_str())["decoder"]
    kinds = set(_types(decoder))
    if kinds == {"ByteLevel"}:
        byte_of = _byte_of_characters()
        return lambda piece: bytes(byte_of[c] for c in piece) if byte_of.keys() >= set(piece) else piece.encode()
    replaces = any(d.get("pattern") == {"String": "\u2581"} and d.get("content") == " " for d in _parts(decoder))
    if kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and (replaces or "Metaspace" in kinds):

        def read(piece: str) -> bytes:
            byte = _BYTE_PIECE.fullmatch(piece) if "ByteFallback" in kinds else None
            return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()

        return read
    raise Unsupported(
        f"stop: it cannot tell what bytes the tokens of a {type(tokenizer).__name__} stand for (its decoder is "
        f"{', '.join(sorted(kinds)) or 'none'}; byte-level BPE and SentencePiece it can)"
    )


def _parts(decoder: dict | None) -> list[dict]:
    if decoder is None:
        return []
    return [p for d in decoder["decoders"] for p in _parts(d)] if decoder["type"] == "Sequence" else [decoder]


def _types(decoder: dict | None) -> list[str]:
    return [part["type"] for part in _parts(decoder)]


def _byte_of_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
