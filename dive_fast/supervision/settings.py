"""How the loss weighs tokens, and how much of the teacher it holds."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from dive_fast.clinical import settings
from dive_fast.clinical.radgraph import RadGraphSettings
from dive_fast.data.encoding import Response
from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.supervision.lexicon import LexiconTagger
from dive_fast.supervision.radgraph import RadGraphTagger
from dive_fast.supervision.tagger import Tagger
from dive_fast.supervision.weights import checked_spans, token_weights

TAGGERS = LEXICON, DISAGREEMENT, RADGRAPH = "lexicon", "disagreement", "radgraph"


@dataclass
class Supervision:
    """The loss of decisive-token supervision (DIVE, arXiv 2605.27194)::

        w_t = 1 + pathology_weight * [token t lies in a decisive span] + eos_weight * [token t is EOS]
        L   = sum_t w_t CE_t / sum_t w_t + kl_weight * mean_t KL(q_t || p_t)
              + align_weight * mean_{l,t} |h_lt - teacher h_lt|^2 / D

    over response tokens. The last two terms exist only with a teacher.

    Args:
        pathology_weight, eos_weight: extra weights, >= 0; both 0 give plain cross-entropy.
        tagger: "lexicon" (the built-in chest lexicon), the path of a lexicon in the same YAML form, "disagreement"
            (the tokens on which teacher and zero-shot model differ most; needs a teacher), "radgraph" (RadGraph's
            entities; needs the extra `clinical`), or a callable `text -> [(start, end, class), ...]`.
        tagger_options: of "radgraph", fields of `dive_fast.clinical.radgraph.RadGraphSettings`: weights, model_type,
            cache, device, batch_size.
        kl_weight, align_weight: >= 0.
        disagreement_fraction: share of a report's tokens that "disagreement" marks, in (0, 1].

    Raises:
        InputError: a weight that is negative or not a number, a fraction out of range, an unknown tagger or option.
    """

    pathology_weight: float = field(default=2.0, metadata={"help": "extra weight of tokens in decisive spans"})
    eos_weight: float = field(default=4.0, metadata={"help": "extra weight of the end of sequence"})
    tagger: str | Tagger = field(
        default="lexicon", metadata={"help": "lexicon, disagreement, radgraph, or the path of a lexicon in YAML"}
    )
    tagger_options: dict[str, Any] | None = field(
        default=None, metadata={"help": "of radgraph: weights, model_type, cache, device, batch_size"}
    )
    kl_weight: float = field(default=0.5, metadata={"help": "weight of KL(teacher || student)"})
    align_weight: float = field(default=0.0, metadata={"help": "weight of the layer-wise alignment with the teacher"})
    disagreement_fraction: float = field(default=0.2, metadata={"help": "share of tokens that disagreement marks"})

    def __post_init__(self):
        for name in ("pathology_weight", "eos_weight", "kl_weight", "align_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise InputError(f"{name}: expected a number >= 0, got {value!r}")
        if not 0 < self.disagreement_fraction <= 1:
            raise InputError(f"disagreement_fraction: expected a number in (0, 1], got {self.disagreement_fraction!r}")
        if isinstance(self.tagger, str) and self.tagger not in TAGGERS:
            if not Path(self.tagger).is_file():
                raise InputError(
                    "tagger: expected 'lexicon', 'disagreement', 'radgraph', a lexicon file or a callable, got "
                    f"{self.tagger!r}"
                )
        elif not isinstance(self.tagger, str) and not callable(self.tagger):
            raise InputError(f"tagger: expected a name or a callable text -> spans, got {type(self.tagger).__name__}")
        if self.tagger == RADGRAPH:
            settings.read(RadGraphSettings, self.tagger_options, "tagger_options")
        elif self.tagger_options is not None:
            raise InputError(f"tagger_options: only tagger='radgraph' has options, got tagger={self.tagger!r}")

    @property
    def needs_disagreement(self) -> bool:
        return self.tagger == DISAGREEMENT and self.pathology_weight > 0

    def span_tagger(self) -> Tagger | None:
        """The callable behind the name, made once; None for `disagreement`, which works on tokens, not spans."""
        return self._span_tagger

    @cached_property
    def _span_tagger(self) -> Tagger | None:
        if callable(self.tagger):
            return self.tagger
        if self.tagger == DISAGREEMENT:
            return None
        if self.tagger == RADGRAPH:
            return RadGraphTagger(settings.read(RadGraphSettings, self.tagger_options, "tagger_options"))
        return LexiconTagger(None if self.tagger == LEXICON else self.tagger)

    @property
    def tagger_fingerprint(self) -> str | None:
        """sha256 of what is behind a name or path (lexicon, weights); None for a callable and "disagreement"."""
        return self.span_tagger().fingerprint if isinstance(self.tagger, str) and self.tagger != DISAGREEMENT else None

    def read_ahead(self, reports: Iterable[str]) -> None:
        """Let a tagger that runs a model read all reports in batches, before the first step asks for them one by one.

        Raises:
            InputError: what the tagger needs is not installed or not there.
        """
        if self.tagger == RADGRAPH:
            self.span_tagger().read_ahead(reports)

    def weigher(self) -> Callable[[Record, Response], Sequence[float]]:
        """(record, response) -> w_t per response token, EOS last; disagreement's part is added when it is known."""
        if self.tagger == DISAGREEMENT:
            return partial(_weigh_end, eos_weight=self.eos_weight)
        return partial(
            _weigh_spans,
            tagger=self.span_tagger(),
            pathology_weight=self.pathology_weight,
            eos_weight=self.eos_weight,
        )


# Functions of the module, since data loaders' workers are sent them where they are not forked.
def _weigh_end(record: Record, response: Response, *, eos_weight: float) -> Sequence[float]:
    return [1.0] * (len(response.ids) - 1) + [1.0 + eos_weight]


def _weigh_spans(
    record: Record, response: Response, *, tagger: Tagger, pathology_weight: float, eos_weight: float
) -> Sequence[float]:
    spans = checked_spans(tagger, record.report)
    return token_weights(response.offsets, spans, pathology_weight=pathology_weight, eos_weight=eos_weight)
