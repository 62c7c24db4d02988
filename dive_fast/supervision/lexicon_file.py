"""Read a lexicon file: check it, spell out its notation, and build the automaton that finds its phrases.

The notation and the sections are explained on top of `lexicons/chest.yaml`.
"""

import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

from dive_fast.errors import InputError
from dive_fast.supervision.tagger import POLARITIES

SECTIONS = ("words", "findings", "cues", "ignore")
PHRASE_KINDS = ("mention", *POLARITIES, "anatomy")
CUE_KINDS = (
    "absent_before", "absent_after", "uncertain_before", "uncertain_after", "uncertain_between",
    "normal_before", "normal_after", "pseudo", "terminators", "joiners",
)  # fmt: skip

# Numbers keep their decimal point, so a full stop is always the end of a sentence; a blank line or a list bullet ends a
# clause although no stop stands there. Hyphens and other signs are left out, so "air-space" reads as "air space", and
# so are the marks of de-identification: "no XXXX effusion", "no ___ effusion".
_WORD = re.compile(r"(?P<mark>[xX]{3,}(?![^\W_])|_+)|\n\s*(?:\n|[-*•])|\d+(?:[.,]\d+)*|[^\W\d_][^\W_]*|[.,;:!?/&]")

_NOTATION = re.compile(r"[()|]|<[^<>()|]*>|[^()|<>]+|[<>]")
_MAX_VARIANTS = 2_000  # of one word group of a phrase; more is a slip of the pen, and slow to load


class Item(NamedTuple):
    """What a phrase stands for: `kind` is one of PHRASE_KINDS with its finding, "ignore", or "cue" with its `cues`."""

    kind: str
    finding: str = ""
    cues: frozenset = frozenset()


class Lexicon(NamedTuple):
    """A checked file: names in order, the automaton (word -> node; node[None] is the Item that ends there), sha256."""

    findings: tuple[str, ...]
    automaton: dict
    fingerprint: str


def split_words(text: str) -> list[re.Match]:
    """The words and punctuation that phrases are made of; a match that begins with a newline is a paragraph break."""
    return [match for match in _WORD.finditer(text) if match.lastgroup is None]


def read_lexicon(path: Path) -> Lexicon:
    """Raises InputError for a missing or damaged file; it names the file, section, phrase and nearest valid key."""
    try:
        content = _read(path)
        fingerprint = hashlib.sha256(json.dumps(_normalised(content)).encode()).hexdigest()
        return Lexicon(tuple(content["findings"]), _build_automaton(content, path), fingerprint)
    except RecursionError:
        raise InputError(f"lexicon {path}: nested too deeply, or a phrase with too many words; shorten it") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys; a finding written twice would lose its phrases without a word."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict:
    """The file's content with every section present and checked, up to the notation inside the phrases."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except OSError as error:
        raise InputError(f"lexicon {path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"lexicon {path}: not readable as YAML in UTF-8: {error}") from error
    except ValueError as error:  # PyYAML makes dates of what looks like one
        raise InputError(f"lexicon {path}: not readable as YAML: {error}; put such phrases in quotes") from error
    _check_keys(content, SECTIONS, path, "the file", required=("findings", "cues"))
    content = {"words": {}, "ignore": [], **content}
    for section in ("words", "findings", "cues"):
        _check_keys(content[section], CUE_KINDS if section == "cues" else None, path, section)
    if not content["findings"]:
        raise InputError(f"lexicon {path}, findings: expected at least one finding, found none")
    for name, phrases in content["findings"].items():
        _check_keys(phrases, PHRASE_KINDS, path, f"findings: {name}")
        if not any(phrases.values()):
            raise InputError(f"lexicon {path}, findings: {name}: expected at least one phrase, found none")
    for where, phrases in _phrase_lists(content):
        _check_phrases(phrases, path, ": ".join(where))
    return content


def _check_keys(mapping, valid, path, where, required=()):
    if not isinstance(mapping, Mapping):
        raise InputError(f"lexicon {path}, {where}: expected a mapping (name: ...), found {_kind(mapping)}")
    for key in mapping:
        if valid is not None and key not in valid:
            nearest = difflib.get_close_matches(key, valid, n=1, cutoff=0.0)[0]
            raise InputError(
                f"lexicon {path}, {where}: unknown key {key!r}; did you mean {nearest!r}? Valid: {', '.join(valid)}"
            )
    for key in required:
        if key not in mapping:
            raise InputError(f"lexicon {path}, {where}: the section {key!r} is missing")


def _check_phrases(phrases, path, where):
    if not isinstance(phrases, list):
        raise InputError(
            f"lexicon {path}, {where}: expected a list of phrases (- phrase), found {_kind(phrases)} {phrases!r}"
        )
    for phrase in phrases:
        if isinstance(phrase, bool):
            raise InputError(
                f"lexicon {path}, {where}: YAML reads a bare no/yes/on/off as {phrase}; put the word in quotes"
            )
        if not isinstance(phrase, str):
            raise InputError(
                f"lexicon {path}, {where}: expected text, found {_kind(phrase)} {phrase!r}; put the phrase in quotes"
            )


def _kind(value) -> str:
    names = {list: "a list", dict: "a mapping", str: "text", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")


def _phrase_lists(content: Mapping) -> Iterable[tuple[tuple[str, ...], list]]:
    """((section, name, ...), phrases) for every list of the file, word lists first."""
    for section in ("words", "cues"):
        for name, phrases in content[section].items():
            yield (section, name), phrases
    for name, kinds in content["findings"].items():
        for kind, phrases in kinds.items():
            yield ("findings", name, kind), phrases
    yield ("ignore",), content["ignore"]


def _normalised(content: Mapping) -> list:
    """What the fingerprint covers; findings keep their order because it is the order of the labels."""
    lists = {where: sorted({_tidy(phrase.lower()) for phrase in phrases}) for where, phrases in _phrase_lists(content)}
    return [list(content["findings"]), sorted((list(where), phrases) for where, phrases in lists.items())]


def _build_automaton(content: Mapping, path: Path) -> dict:
    """One deterministic automaton over words for all phrases (subset construction; phrases have no loops)."""
    starts, word_lists = [], {}
    for where, phrases in _phrase_lists(content):
        for phrase in phrases:
            place = f"{', '.join(where)}: {phrase!r}"
            groups = [_variants(group, word_lists, f"lexicon {path}, {place}") for group in _groups(_tidy(phrase))]
            if all(() in group for group in groups):
                raise InputError(
                    f"lexicon {path}, {place}: the phrase is empty, or becomes empty without its optional parts"
                )
            if where[0] == "words":
                spelled = word_lists.setdefault(where[1], [])
                spelled.extend(" ".join(words) for words in _products(groups, f"lexicon {path}, {place}"))
            else:
                starts += _phrase_nodes(groups, (_item(where), place))
    return _determinise(starts, path)


def _item(where: tuple[str, ...]) -> Item:
    if where[0] == "cues":
        return Item("cue", cues=frozenset({where[1]}))
    return Item("ignore") if where[0] == "ignore" else Item(where[2], where[1])


def _phrase_nodes(groups: list[list[tuple[str, ...]]], end: tuple[Item, str]) -> list[dict]:
    """The start nodes of one phrase, built from its end; a node maps a word to the nodes that it may lead to."""
    following = [{None: [end]}]
    for group in reversed(groups):
        entry = {}
        for variant in filter(None, group):
            node = entry
            for word in variant[:-1]:
                inner = {}
                node.setdefault(word, []).append(inner)
                node = inner
            node.setdefault(variant[-1], []).extend(following)
        following = [entry, *following] if () in group else [entry]
    return following


def _determinise(starts: list[dict], path: Path) -> dict:
    merged = {}

    def merge(nodes: list[dict], spelled: tuple[str, ...]) -> dict:
        key = frozenset(map(id, nodes))
        if key not in merged:
            targets = {}
            for node in {id(node): node for node in nodes}.values():
                for word, following in node.items():
                    targets.setdefault(word, []).extend(following)
            ends = targets.pop(None, None)
            merged[key] = {word: merge(following, (*spelled, word)) for word, following in targets.items()}
            if ends:
                merged[key][None] = _only_item(ends, " ".join(spelled), path)
        return merged[key]

    return merge(starts, ())


def _only_item(ends: list[tuple[Item, str]], spelled: str, path: Path) -> Item:
    """The same words may be several cues (before and after), but never two findings, or a phrase and a cue."""
    first, place = ends[0]
    for item, other in ends[1:]:
        both_cues = first.kind == item.kind == "cue" and not {"pseudo", "terminators"} & (first.cues ^ item.cues)
        if item != first and not both_cues:
            raise InputError(
                f"lexicon {path}: {spelled!r} has two meanings, in {place} and in {other}; keep one of them"
            )
        first = Item(first.kind, first.finding, first.cues | item.cues)
    return first


def _tidy(phrase: str) -> str:
    """Blanks beside `|` and inside a bracket mean nothing: a long phrase may be broken there."""
    return re.sub(r"(?<=[(|]) | (?=[)|])", "", " ".join(phrase.split()))


def _groups(phrase: str) -> list[str]:
    """The parts of a phrase between blanks outside of brackets."""
    groups, depth = [""], 0
    for character in phrase:
        depth += (character == "(") - (character == ")")
        if character.isspace() and depth <= 0:
            groups.append("")
        else:
            groups[-1] += character
    return list(filter(None, groups))


def _variants(group: str, word_lists: Mapping[str, list[str]], place: str) -> list[tuple[str, ...]]:
    return [tuple(word[0].lower() for word in split_words(variant)) for variant in _expand(group, word_lists, place)]


def _products(groups: list[list[tuple[str, ...]]], place: str) -> list[tuple[str, ...]]:
    if math.prod(map(len, groups)) > _MAX_VARIANTS:
        raise _too_many(place)
    return [sum(choice, ()) for choice in itertools.product(*groups)]


def _too_many(place: str) -> InputError:
    return InputError(f"{place}: more than {_MAX_VARIANTS} variants; split it into several phrases")


def _expand(phrase: str, word_lists: Mapping[str, list[str]], place: str) -> list[str]:
    """Every plain phrase that the notation `(s)`, `(a|b)`, `<name>` stands for."""
    pieces, position = _NOTATION.findall(phrase), 0

    def branches() -> list[list[str]]:
        nonlocal position
        result = [[""]]
        while position < len(pieces) and pieces[position] != ")":
            piece, position = pieces[position], position + 1
            if piece == "|":
                result.append([""])
                continue
            if piece == "(":
                inner = branches()
                if position == len(pieces):
                    raise InputError(f"{place}: a '(' has no ')'")
                position += 1
                variants = [*inner[0], ""] if len(inner) == 1 else [variant for branch in inner for variant in branch]
            elif piece.startswith("<") or piece == ">":
                variants = _word_list(piece, word_lists, place)
            else:
                variants = [piece]
            if len(result[-1]) * len(variants) > _MAX_VARIANTS:
                raise _too_many(place)
            result[-1] = [head + variant for head in result[-1] for variant in variants]
        return result

    result = branches()
    if position < len(pieces):
        raise InputError(f"{place}: a ')' has no '('")
    if len(result) > 1:
        raise InputError(f"{place}: '|' stands outside of ( ); write (a|b), or two phrases")
    return result[0]


def _word_list(piece: str, word_lists: Mapping[str, list[str]], place: str) -> list[str]:
    if len(piece) < 3:
        raise InputError(f"{place}: '<' and '>' enclose the name of a list under `words`: <name>")
    name = piece[1:-1].strip()
    if name not in word_lists:
        nearest = difflib.get_close_matches(name, word_lists, n=1, cutoff=0.0)
        hint = f"did you mean <{nearest[0]}>?" if nearest else "the file has no list above this one"
        raise InputError(f"{place}: <{name}> is no list that stands above it under `words`; {hint}")
    return word_lists[name]
