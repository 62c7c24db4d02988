"""All n-gram metrics on a thousand real reports, through pycocoevalcap's own chain from tokenizer to score.

The reports are read where torchxrayvision is installed; nothing of them is kept.
"""

import importlib.util
import random

import pytest

from dive_fast.data import load_open_i
from dive_fast.evaluate import evaluate

KEYS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "meteor", "cider")


def predicted(reports: list[str]) -> list[str]:
    """By thirds: another record's report, the same sentences in another order, and a report cut short."""
    draw = random.Random(0)
    predictions = []
    for index, report in enumerate(reports):
        sentences, words = report.split(". "), report.split()
        others = {
            0: draw.choice(reports),
            1: ". ".join(draw.sample(sentences, len(sentences))),
            2: " ".join(words[: draw.randint(0, len(words))]),
        }
        predictions.append(others[index % 3])
    return predictions


@pytest.mark.java
@pytest.mark.skipif(importlib.util.find_spec("torchxrayvision") is None, reason="torchxrayvision is not installed")
def test_a_thousand_findings_score_as_in_pycocoevalcap():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    references = [record.report for record in load_open_i(None)[:1000]]
    predictions = predicted(references)
    assert len(references) == 1000 and "" in predictions
    scores = evaluate(predictions, references, ("bleu", "rouge_l", "meteor", "cider"), "ptb", bootstrap=0)

    truth, written = (
        PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
        for texts in (references, predictions)
    )
    corpora, documents = Bleu(4).compute_score(truth, written, verbose=0)
    expected = dict(zip(KEYS[:4], zip(corpora, documents, strict=True), strict=True))
    for key, scorer in (("rouge_l", Rouge()), ("meteor", Meteor()), ("cider", Cider())):
        expected[key] = scorer.compute_score(truth, written)
    assert set(expected) == set(scores) == set(KEYS)
    for key, (value, each) in expected.items():
        assert scores[key] == pytest.approx(value, abs=1e-6), key
        assert scores.per_document[key] == pytest.approx(list(each), abs=1e-6), key
    assert 0.1 < scores["bleu_4"] < 0.9 and 0.1 < scores["meteor"] < 0.9  # neither is nothing or all alike
