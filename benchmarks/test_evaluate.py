"""Group `evaluate`: documents that a metric scores in a second, in turn with pycocoevalcap's own classes.

Ours is what a user calls, `dive_fast.evaluate` with one metric, checks and protocol included; the protocol is the one
that changes nothing, so that both sides read the same tokens. Texts are invented.
"""

import contextlib
import importlib
import importlib.util
import io
import random
import shutil
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from benchmarks import measure
from dive_fast.metrics import METRICS
from dive_fast.metrics.protocols import PROTOCOLS

DOCUMENTS = {"smoke": 24, "laptop": 1000}
# Of the bootstrap; and how many of them pycocoevalcap scores again, which takes seconds each.
RESAMPLES = {"smoke": (50, 1), "laptop": (1000, 2)}
TOLERANCE = 1e-6
# Seconds: METEOR's program takes five to start, and five rounds of both give an interval.
JAVA_PATIENCE = 120.0
PLACES = ("left", "right", "bilateral", "basilar", "apical", "retrocardiac", "perihilar")
FINDINGS = ("effusion", "opacity", "atelectasis", "pneumothorax", "consolidation", "edema", "cardiomegaly", "nodule")
FRAMES = (
    "there is a small {place} {finding} .",
    "no {place} {finding} is seen .",
    "the {place} {finding} is unchanged from the prior study .",
    "the heart is normal in size and the lungs are clear .",
    "possible mild {finding} in the {place} zone .",
)


class Case(NamedTuple):
    """A metric and its peer.

    Attributes:
        name: of the metric, or "bootstrap" or "ptb".
        values: what both give: the names of ours.
        peer: (references, predictions) in pycocoevalcap's form -> its values; None where it has nothing alike.
        java: needs it.
    """

    name: str
    values: tuple[str, ...]
    peer: Callable | None
    java: bool = False

    def __str__(self) -> str:
        return self.name

    device = "cpu"


def scorer(module: str, cls: str, *arguments) -> Callable:
    """A class of pycocoevalcap as its user calls it; what it prints goes nowhere."""

    def score(references: dict, predictions: dict) -> list[float]:
        made = getattr(importlib.import_module(f"pycocoevalcap.{module}"), cls)(*arguments)
        with contextlib.redirect_stdout(io.StringIO()):
            value, _ = made.compute_score(references, predictions)
        return list(value) if isinstance(value, list) else [value]

    return score


BLEU = scorer("bleu.bleu", "Bleu", 4)
CASES = (
    Case("bleu", METRICS["bleu"].keys, BLEU),
    Case("rouge_l", ("rouge_l",), scorer("rouge.rouge", "Rouge")),
    Case("cider", ("cider",), scorer("cider.cider", "Cider")),
    Case("meteor", ("meteor",), scorer("meteor.meteor", "Meteor"), java=True),
    Case("decisive", ("decisive_f1",), None),
)


def invented(count: int) -> tuple[list[str], list[str]]:
    """(predictions, references): reports of two to six sentences, each prediction its reference with some replaced."""
    draw = random.Random(0)

    def sentence() -> str:
        return draw.choice(FRAMES).format(place=draw.choice(PLACES), finding=draw.choice(FINDINGS))

    references = [[sentence() for _ in range(draw.randint(2, 6))] for _ in range(count)]
    predictions = [[one if draw.random() < 0.6 else sentence() for one in report] for report in references]
    return [" ".join(report) for report in predictions], [" ".join(report) for report in references]


def coco(texts) -> dict[int, list[str]]:
    return {i: [text] for i, text in enumerate(texts)}


def skip_if_missing(java: bool) -> None:
    if importlib.util.find_spec("pycocoevalcap") is None:
        pytest.skip("pycocoevalcap is not installed (pip install 'dive_fast[eval]')")
    if java and shutil.which("java") is None:
        pytest.skip("no java on PATH, which METEOR and the protocol 'ptb' run")


def evaluate(*arguments, **options):
    # The package's name for it is a function and a module.
    return importlib.import_module("dive_fast.evaluate").evaluate(*arguments, **options)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=str)


@pytest.fixture
def documents(request) -> int:
    if request.config.option.scale not in DOCUMENTS:
        pytest.skip("--scale gpu measures a GPU; --scale laptop measures metrics")
    return DOCUMENTS[request.config.option.scale]


@pytest.mark.benchmark(group="evaluate")
def test_metric(benchmark, case, documents, scale):
    skip_if_missing(case.java)
    if case.java and scale is measure.SCALES["smoke"]:
        pytest.skip("its Java program takes seconds to start, eight times; --scale laptop measures it")
    predictions, references = invented(documents)

    def run():
        return evaluate(predictions, references, (case.name,), "raw", bootstrap=0)

    found, others, error = run(), {}, None
    if case.peer is not None:
        others["pycocoevalcap"] = lambda: case.peer(coco(references), coco(predictions))
        error = difference([found[name] for name in case.values], others["pycocoevalcap"]())
    if case.java:
        scale = scale._replace(patience=JAVA_PATIENCE)
    turns = measure.in_turn(benchmark, run, others, "cpu", scale)
    describe(benchmark, case.name, documents, turns.own, error, turns.ratios())


def difference(ours: list[float], theirs: list[float]) -> float:
    """The largest, which must be none; written so that NaN fails."""
    found = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert found <= TOLERANCE, f"values differ by {found:.2g}"
    return found


def describe(benchmark, name: str, documents: int, times, error: float | None, ratios: dict, **more) -> None:
    if not times:
        return
    benchmark.extra_info |= {
        "implementation": "dive_fast",
        "metric": name,
        "documents": documents,
        "device": "cpu",
        "difference": error,
        "documents_per_second": documents / measure.median(times).median,
        "ratios": {other: ratio._asdict() for other, ratio in ratios.items()},
    } | more


@pytest.mark.benchmark(group="evaluate")
def test_tokenizer(benchmark, documents, scale):
    """The protocol `ptb`; pycocoevalcap's own wrapper of the same Java program."""
    skip_if_missing(java=True)
    predictions, _ = invented(documents)
    module = importlib.import_module("pycocoevalcap.tokenizer.ptbtokenizer")

    def theirs() -> list[str]:
        captions = {i: [{"caption": text}] for i, text in enumerate(predictions)}
        return [words[0] for words in module.PTBTokenizer().tokenize(captions).values()]

    def ours() -> list[str]:
        return PROTOCOLS["ptb"].tokenize(predictions)

    assert ours() == theirs()
    turns = measure.in_turn(benchmark, ours, {"pycocoevalcap": theirs}, "cpu", scale)
    describe(benchmark, "ptb", documents, turns.own, 0.0, turns.ratios())


@pytest.mark.benchmark(group="evaluate")
def test_bootstrap(benchmark, documents, scale, request):
    """Intervals of BLEU-1..4: B resamples from the documents' counts, in turn with scoring some drawn corpora again."""
    skip_if_missing(java=False)
    draws, again = RESAMPLES[request.config.option.scale]
    predictions, references = invented(documents)
    scores = evaluate(predictions, references, ("bleu",), "raw", bootstrap=0)
    drawn = np.random.default_rng(0).integers(documents, size=(again, documents))

    def theirs() -> list[list[float]]:
        return [BLEU(coco(references[i] for i in rows), coco(predictions[i] for i in rows)) for rows in drawn]

    def ours():
        resampled = evaluate(predictions, references, ("bleu",), "raw", bootstrap=draws)
        return resampled.intervals

    # What the bootstrap sums is what scoring the drawn documents gives.
    statistics = scores.statistics["bleu"]
    summed = METRICS["bleu"].combine(np.stack([statistics[rows].sum(axis=0) for rows in drawn]), documents)
    error = max(difference([summed[key][i] for key in summed], values) for i, values in enumerate(theirs()))
    turns = measure.in_turn(benchmark, ours, {"pycocoevalcap": theirs}, "cpu", scale)
    ratios = {
        f"{name}, a resample": measure.Ratio(*(end * again / draws for end in ratio[:3]), ratio.rounds)
        for name, ratio in turns.ratios().items()
    }
    describe(benchmark, "bootstrap", documents, turns.own, error, ratios, resamples=draws, resamples_of_the_peer=again)
