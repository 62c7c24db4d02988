"""Tag the decisive phrases of a report by RadGraph's entities: a class is ("Observation" | "Anatomy", polarity)."""

from collections.abc import Iterable

from dive_fast.clinical.radgraph import RadGraphSettings
from dive_fast.errors import InputError
from dive_fast.supervision.tagger import POLARITIES, Span

# Of RadGraph XL "Observation::definitely present", of the first version "OBS-DP".
_CATEGORIES = {"OBS": "Observation", "ANAT": "Anatomy"}
_POLARITIES = dict(zip(("definitely present", "definitely absent", "uncertain"), POLARITIES, strict=True))
_POLARITIES |= dict(zip(("DP", "DA", "U"), POLARITIES, strict=True))


class RadGraphTagger:
    """Callable `text -> list[Span]`: every entity of the text, sorted; entities may overlap.

    Args:
        settings: where the weights lie, on which device they run, and the file that keeps annotations; None: defaults.

    Attributes:
        fingerprint: sha256 of the weights; None where the annotator is a user's own.

    Raises:
        InputError: radgraph is not installed, its weights are missing or do not fit; (from a call) no str.
    """

    def __init__(self, settings: RadGraphSettings | None = None):
        self._annotate = (settings or RadGraphSettings()).build()
        self.fingerprint = getattr(self._annotate, "fingerprint", None)
        self._spans: dict[str, list[Span]] = {}

    def __call__(self, text: str) -> list[Span]:
        if not isinstance(text, str):
            raise InputError(f"text: expected a str, got {type(text).__name__}; tag one report at a time")
        self.read_ahead([text])
        return list(self._spans[text])

    def read_ahead(self, texts: Iterable[str]) -> None:
        """Annotate many texts in batches, so that calls with one of them answer at once."""
        new = list(dict.fromkeys(text for text in texts if text not in self._spans))
        try:
            for text, annotation in zip(new, self._annotate(new) if new else (), strict=True):
                self._spans[text] = sorted(
                    Span(entity["start"], entity["end"], entity_class(entity["label"]))
                    for entity in annotation["entities"].values()
                )
        except (KeyError, TypeError, AttributeError) as error:  # only a user's own annotator can be so
            raise InputError(
                f"tagger_options.annotator: expected RadGraph's annotations with start and end of every entity "
                f"({type(error).__name__}: {error})"
            ) from error


def entity_class(label: str) -> tuple[str, ...]:
    """("Observation", "absent") of "Observation::definitely absent" and of "OBS-DA"; other labels as they are."""
    category, _, certainty = label.rpartition("::" if "::" in label else "-")
    if certainty not in _POLARITIES:
        return (label,)
    return (_CATEGORIES.get(category, category), _POLARITIES[certainty])
