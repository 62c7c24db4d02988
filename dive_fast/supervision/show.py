"""Show which words of a report are decisive: in the terminal, and as HTML for the report page."""

import html
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

from dive_fast.errors import InputError
from dive_fast.supervision.tagger import POLARITIES, Span, checked
from dive_fast.supervision.weights import decisive_mask

if TYPE_CHECKING:
    from rich.text import Text

OTHER = "other"  # a user's class without a polarity
SIGNS = dict(zip((*POLARITIES, OTHER), "+-?*", strict=True))
_STYLES = dict(zip((*POLARITIES, OTHER), ("bold magenta", "cyan", "yellow", "blue"), strict=True))


def render(text: str, spans: Iterable, tokens: tuple[Sequence[int], Sequence[tuple[int, int]]] | None = None) -> "Text":
    """The report, decisive words coloured by polarity and enclosed in [+...], [-...], [?...]; [*...] without polarity.

    The signs are part of the text, so nothing is lost where there is no colour (NO_COLOR, a file, a pipe).

    Args:
        text: the report.
        spans: (start, end, class) of a tagger; they may overlap.
        tokens: `response_tokens(tokenizer, text)`. Then the brackets enclose the *tokens* that are up-weighted, with |
            between two tokens, and the EOS token that the loss adds is shown: what the loss sees.

    Raises:
        InputError: a span is none of the text's, or `rich` is not installed.
    """
    try:
        from rich.text import Text
    except ImportError as error:
        raise InputError("showing tags in the terminal needs rich: pip install rich") from error
    spans = checked(spans, text)
    shown = Text()
    offsets = [] if tokens is None else tokens[1]
    cuts = {start for start, _ in offsets}
    for start, end, labels in _pieces(text, spans, None if tokens is None else offsets):
        if not labels:
            shown.append(text[start:end])
            continue
        inside = sorted({start, *(cut for cut in cuts if start < cut < end), end})
        polarity = _polarity(labels[0])
        body = "|".join(text[first:last] for first, last in zip(inside, inside[1:], strict=False))
        shown.append(f"[{SIGNS[polarity]}{body}]", style=_STYLES[polarity])
    if tokens is not None:
        mask = decisive_mask(offsets, spans)
        shown.append("[EOS]", style="bold reverse")
        shown.append(f"\n\n{sum(mask)} of {len(mask)} tokens up-weighted, and EOS", style="dim")
    shown.append("\n")
    for polarity, names in _legend(spans).items():
        shown.append(f"\n[{SIGNS[polarity]}] {polarity}: ", style=_STYLES[polarity])
        shown.append(", ".join(names))
    return shown


def render_html(text: str, spans: Iterable) -> str:
    """The escaped text with decisive words in `<mark class="absent" title="Pleural Effusion, absent">`.

    The CSS class is a polarity, or "other" for a class without one. Where spans overlap, one mark has
    all their classes in its title, and the CSS class of the span that begins first.

    Raises:
        InputError: a span is none of the text's.
    """
    spans = checked(spans, text)
    parts = []
    for start, end, labels in _pieces(text, spans):
        body = html.escape(text[start:end])
        if labels:
            title = html.escape("; ".join(map(_name, labels)))
            body = f'<mark class="{_polarity(labels[0])}" title="{title}">{body}</mark>'
        parts.append(body)
    return "".join(parts)


def _pieces(
    text: str, spans: list[Span], units: Sequence[tuple[int, int]] | None = None
) -> list[tuple[int, int, tuple]]:
    """(start, end, classes) of the stretches the text falls into; a unit (a token, or each character) is never cut."""
    classes = [()] * len(text)
    for start, end in units if units is not None else [(p, p + 1) for p in range(len(text))]:
        touched = [span.label for span in spans if span.start < end and start < span.end]
        for position in range(start, end):
            classes[position] = tuple(dict.fromkeys((*classes[position], *touched)))
    pieces = []
    for position, labels in enumerate(classes):
        if pieces and pieces[-1][2] == labels:
            pieces[-1] = (pieces[-1][0], position + 1, labels)
        else:
            pieces.append((position, position + 1, labels))
    return pieces


def _polarity(label: Hashable) -> str:
    is_pair = isinstance(label, tuple) and len(label) == 2
    return label[1] if is_pair and label[1] in POLARITIES else OTHER


def _name(label: Hashable) -> str:
    return ", ".join(map(str, label)) if isinstance(label, tuple) else str(label)


def _legend(spans: list[Span]) -> dict[str, list[str]]:
    """Polarity -> its classes in the order of the text; the three polarities always, "other" where it occurs."""
    legend = {polarity: {} for polarity in POLARITIES}
    for span in spans:
        polarity = _polarity(span.label)
        legend.setdefault(polarity, {})[_name(span.label if polarity == OTHER else span.label[:1])] = None
    return {polarity: list(names) or ["none"] for polarity, names in legend.items()}
