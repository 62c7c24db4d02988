"""Tag the decisive phrases of a report by a lexicon: a class is (finding, "present" | "absent" | "uncertain").

One regular expression cuts the text into words and one automaton finds the lexicon's phrases and cues, the longest
first. Which cue reaches which mention is then decided clause by clause, in the manner of NegEx (Chapman et al., J
Biomed Inform 2001), with reach through coordinated lists ("no pneumothorax, effusion or consolidation").
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from dive_fast.errors import InputError
from dive_fast.supervision.lexicon_file import Item, read_lexicon, split_words
from dive_fast.supervision.tagger import POLARITIES, Span

CHEST_LEXICON = Path(__file__).with_name("lexicons") / "chest.yaml"

_BREAK = "\n"
_AFTER_GAP = 8  # words between a mention and the cue after it: "pneumothorax on the left or right side is not seen"
_NORMAL_GAP = 6  # words between body part and "normal": "mediastinum, hilar contours and great vessels are normal"
_LIST_GAP = 5  # words between two items of a list: "effusion, or a large left apical pneumothorax"


class _Match(NamedTuple):
    """`item` stands at words [first, last); `opening`: the cues that a statement begins with ("no acute disease")."""

    first: int
    last: int
    item: Item
    opening: frozenset = frozenset()


class LexiconTagger:
    """Callable `text -> list[Span]`, sorted and disjoint, label = (finding, polarity).

    Args:
        path: a lexicon file; None is the chest lexicon of this package.

    Attributes:
        findings: the names of the findings, in the file's order.
        fingerprint: sha256 of the file's content, whatever its layout and order of phrases; for caches and run records.

    Raises:
        InputError: the file is missing or damaged; names the file, the section, the phrase, and the nearest valid key.
    """

    def __init__(self, path=None):
        self.path = CHEST_LEXICON if path is None else Path(path)
        self.findings, self._automaton, self.fingerprint = read_lexicon(self.path)

    def __call__(self, text: str) -> list[Span]:
        if not isinstance(text, str):
            raise InputError(f"text: expected a str, got {type(text).__name__}; tag one report at a time")
        found = split_words(text)
        words = [_BREAK if match[0][0] == "\n" else match[0].lower() for match in found]
        spans = []
        for clause in _clauses(self._matches(words), words):
            for first, last, label in _resolve(clause, words):
                spans.append(Span(found[first].start(), found[last - 1].end(), label))
        return sorted(spans)

    def __repr__(self):
        return f"LexiconTagger({str(self.path)!r})"

    def _matches(self, words: list[str]) -> list[_Match]:
        """Longest match first, earlier first among equals, none overlapping; in the order of the text."""
        candidates, cue_at = [], {}
        for first in range(len(words)):
            node = self._automaton
            for last in range(first, len(words)):
                node = node.get(words[last])
                if node is None:
                    break
                if item := node.get(None):
                    candidates.append((first - last, first, item))
                    if item.kind == "cue":
                        cue_at[first] = item.cues
        free = [True] * len(words)
        matches = []
        for negative_length, first, item in sorted(candidates, key=lambda candidate: candidate[:2]):
            last = first - negative_length + 1
            if all(free[first:last]):
                free[first:last] = [False] * (last - first)
                opening = cue_at.get(first, frozenset()) if item.kind in POLARITIES else frozenset()
                matches.append(_Match(first, last, item, opening))
        return sorted(matches, key=lambda match: match.first)


def _clauses(matches: list[_Match], words: list[str]) -> Iterable[list[_Match]]:
    """The stretches of matches between terminators and paragraph breaks."""
    clause, seen = [], 0
    for match in matches:
        if "terminators" in match.item.cues or _BREAK in words[seen : match.first]:
            yield clause
            clause = []
        seen = match.last
        if "terminators" not in match.item.cues and match.item.kind != "ignore":
            clause.append(match)
    yield clause


def _resolve(clause: list[_Match], words: list[str]) -> Iterable[tuple[int, int, tuple[str, str]]]:
    """(first word, last word, label) of every finding of one clause."""
    polarity = _cues_before(clause)
    bounds = [(match.first, match.last) for match in clause]
    for position, match in enumerate(clause):
        if {"normal_before", "normal_after"} & match.item.cues:
            _call_normal(position, clause, polarity, bounds)
        for kind in ("absent", "uncertain"):
            before_only = f"{kind}_before" in match.item.cues and not _speaks_of_what_precedes(position, clause)
            if {f"{kind}_after", f"{kind}_between"} & match.item.cues and not before_only:
                for mention in _mentions_before(position, clause, words):
                    polarity[mention] = kind
    for position in sorted(polarity):
        yield *bounds[position], (clause[position].item.finding, polarity[position])


def _cues_before(clause: list[_Match]) -> dict[int, str]:
    """Polarity of mentions and statements by their position in the clause, from the cues that stand before them."""
    polarity, active, reached = {}, "present", None
    for position, match in enumerate(clause):
        kind, cues = match.item.kind, match.item.cues | match.opening
        if kind == "mention":
            # Denial reaches to the end of the clause, doubt only through a list.
            if active == "uncertain" and reached is not None and not _in_one_list(clause, reached, position):
                active = "present"
            polarity[position], reached = active, position
        elif kind in POLARITIES:
            polarity[position], active = kind, "present"
        if "absent_before" in cues and not _speaks_of_what_precedes(position, clause):
            active, reached = "absent", None
        elif {"uncertain_before", "uncertain_between"} & cues and not _speaks_of_what_precedes(position, clause):
            # "no consolidation to suggest pneumonia" denies both; "no effusion, possible pneumonia" begins anew.
            if active != "absent" or (position and _joins(clause[position - 1]) and _adjacent(clause, position - 1)):
                active, reached = "uncertain", None
    return polarity


def _speaks_of_what_precedes(position: int, clause: list[_Match]) -> bool:
    """Whether a cue listed as before and as after is an after cue here: no mention is next ("effusion resolved.")."""
    cues = clause[position].item.cues
    both = {"absent_before", "absent_after"} <= cues or {"uncertain_before", "uncertain_after"} <= cues
    return both and (position + 1 == len(clause) or clause[position + 1].item.kind != "mention")


def _mentions_before(position: int, clause: list[_Match], words: list[str]) -> list[int]:
    """The mention that an after cue speaks of, and the list that it ends ("effusion or pneumothorax is not seen")."""
    mention = next((p for p in reversed(range(position)) if clause[p].item.kind in ("mention", *POLARITIES)), None)
    if mention is None or clause[mention].item.kind != "mention":
        return []
    if clause[position].first - clause[mention].last > _AFTER_GAP:
        return []
    reached = [mention]
    for earlier in reversed(range(mention)):
        if clause[earlier].item.kind == "mention":
            between = clause[earlier + 1 : reached[-1]]
            ends_list = len(reached) > 1 or any(words[joiner.first] != "," for joiner in between)
            if not (ends_list and _in_one_list(clause, earlier, reached[-1])):
                break
            reached.append(earlier)
    return reached


def _call_normal(position: int, clause: list[_Match], polarity: dict[int, str], bounds: list[tuple[int, int]]) -> None:
    """Mark as absent the findings of the body parts that the cue at `position` calls normal."""
    cue = clause[position]
    before = _anatomy(clause, range(position - 1, -1, -1), polarity)
    after = _anatomy(clause, range(position + 1, len(clause)), polarity)
    gap_before = cue.first - clause[before[0]].last if before and "normal_after" in cue.item.cues else _NORMAL_GAP + 1
    follows = after and after[0] == position + 1 and "normal_before" in cue.item.cues
    gap_after = clause[after[0]].first - cue.last if follows else _NORMAL_GAP + 1
    # "silhouette shows normal heart size" speaks of the heart, "heart size normal, mediastinum ..." of the heart too.
    if gap_before <= min(gap_after, _NORMAL_GAP):
        bounds[before[0]] = (clause[before[0]].first, cue.last)
        polarity.update(dict.fromkeys(before, "absent"))
    elif gap_after <= _NORMAL_GAP:
        bounds[after[0]] = (cue.first, clause[after[0]].last)
        polarity.update(dict.fromkeys(after, "absent"))


def _anatomy(clause: list[_Match], positions: range, polarity: dict[int, str]) -> list[int]:
    """The list of body parts nearest to a cue, walking away from it: nothing but joiners may stand between."""
    parts = []
    for position in positions:
        match = clause[position]
        if match.item.kind == "anatomy" and position not in polarity:
            if parts and not _in_one_list(clause, *sorted((parts[-1], position))):
                break
            parts.append(position)
        elif not _joins(match):
            break
    return parts


def _joins(match: _Match) -> bool:
    return "joiners" in match.item.cues


def _adjacent(clause: list[_Match], position: int) -> bool:
    return clause[position].last == clause[position + 1].first


def _in_one_list(clause: list[_Match], left: int, right: int) -> bool:
    """Whether a joiner follows `left` at once and leads, past a few words and no other cue, to `right`."""
    between = clause[left + 1 : right]
    near = clause[right].first - clause[left].last <= _LIST_GAP
    return bool(between) and near and all(map(_joins, between)) and _adjacent(clause, left)
