"""The metrics against pycocoevalcap's own scorers and against hand calculations."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from dive_fast.errors import InputError
from dive_fast.evaluate import evaluate, paired_difference
from dive_fast.metrics import METRICS
from dive_fast.metrics.bootstrap import resampled_sums
from dive_fast.metrics.perplexity import corpus_perplexity
from dive_fast.metrics.protocols import PROTOCOLS
from dive_fast.metrics.scores import Scores

N_GRAM = ("bleu", "rouge_l", "cider")
ORGANS = ["lungs", "heart", "left base", "right apex", "mediastinum", "trachea", "osseous structures"]
STATES = ["clear", "normal in size", "mildly enlarged", "hazy, with streaks", "unremarkable", "1.5 cm wide"]
FINDINGS = ["pneumothorax", "pleural effusion", "focal consolidation", "acute fracture", "edema"]


def invented_report(generator: np.random.Generator) -> str:
    sentences = []
    for _ in range(generator.integers(1, 9)):
        kind = generator.integers(4)
        if kind == 0:
            sentences.append(f"The {generator.choice(ORGANS)} is {generator.choice(STATES)}.")
        elif kind == 1:
            sentences.append(f"No {generator.choice(FINDINGS)} or {generator.choice(FINDINGS)}.")
        elif kind == 2:
            sentences.append(
                f"There is a {generator.choice(STATES)} {generator.choice(FINDINGS)} ({generator.choice(ORGANS)})."
            )
        else:
            sentences.append(f'{generator.integers(1, 6)}. Patient\'s {generator.choice(ORGANS)}: "stable".')
    return " ".join(sentences)


def invented_pairs(n: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Predictions that share about half their sentences with the references, an empty one among them."""
    generator = np.random.default_rng(seed)
    references = [invented_report(generator) for _ in range(n)]
    predictions = []
    for reference in references:
        kept = [s for s in reference.split(". ") if generator.random() < 0.6]
        predictions.append(". ".join([*kept, invented_report(generator)]))
    predictions[n // 2] = ""
    return predictions, references


def in_coco_shape(predictions: list[str], references: list[str], protocol: str):
    predictions, references = PROTOCOLS[protocol].apply(predictions, references)
    return {i: [t] for i, t in enumerate(references)}, {i: [t] for i, t in enumerate(predictions)}


@pytest.mark.parametrize(
    "protocol", ["raw", "lower", pytest.param("ptb", marks=pytest.mark.java), "r2gen", "r2gen_mimic"]
)
def test_values_are_those_of_pycocoevalcap(protocol):
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    predictions, references = invented_pairs(300)
    scores = evaluate(predictions, references, N_GRAM, protocol, bootstrap=0)
    gts, res = in_coco_shape(predictions, references, protocol)
    corpus, per_document = Bleu(4).compute_score(gts, res, verbose=0)
    for k in range(4):
        assert scores[f"bleu_{k + 1}"] == pytest.approx(corpus[k], abs=1e-9)
        assert scores.per_document[f"bleu_{k + 1}"] == pytest.approx(per_document[k], abs=1e-9)
    for key, scorer in (("rouge_l", Rouge()), ("cider", Cider())):
        corpus, per_document = scorer.compute_score(gts, res)
        assert scores[key] == pytest.approx(corpus, abs=1e-9)
        assert scores.per_document[key] == pytest.approx(list(per_document), abs=1e-9)
    assert scores.per_document["rouge_l"][150] == 0 and scores.per_document["bleu_1"][150] == 0


@pytest.mark.parametrize("metric", ["bleu", "rouge_l", "cider", "decisive", "length", "termination"])
def test_summed_statistics_give_the_corpus_value_of_any_multiset_of_documents(metric):
    """combine(column sums) is the metric itself: on the full sample, and on documents drawn with repetition."""
    predictions, references = invented_pairs(60)
    reasons = ["eos", "length", "eos"] * 20
    full = evaluate(predictions, references, metric, bootstrap=0, tagger=words, finish_reasons=reasons)
    drawn = np.random.default_rng(1).integers(0, 60, 60)
    again = evaluate([predictions[i] for i in drawn], [references[i] for i in drawn], metric, bootstrap=0, tagger=words,
                     finish_reasons=[reasons[i] for i in drawn])  # fmt: skip
    table = full.statistics[metric]
    for key in METRICS[metric].keys:
        combined = METRICS[metric].combine(table.sum(0, keepdims=True), 60)[key][0]
        assert combined == pytest.approx(full[key], abs=1e-12)
        combined = METRICS[metric].combine(table[drawn].sum(0, keepdims=True), 60)[key][0]
        if metric != "cider":  # its document frequencies are kept, by definition
            assert combined == pytest.approx(again[key], abs=1e-12)


def words(text: str):
    return [(0, 1, word) for word in text.split()]


def test_bleu_statistics_of_empty_predictions_give_zero_without_a_warning():
    scores = evaluate(["", ""], ["no effusion .", "clear lungs ."], ("bleu", "rouge_l"), bootstrap=10)
    assert scores["bleu_1"] == scores["bleu_4"] == scores["rouge_l"] == 0
    assert scores.intervals["bleu_4"] == (0, 0)


def stated_findings(text: str):
    """Finding words after "no" are absent, others present."""
    spans, start, polarity = [], 0, "present"
    for word in text.lower().replace(".", " . ").split():
        polarity = "absent" if word == "no" else "present" if word == "." else polarity
        if word in ("effusion", "edema"):
            spans.append((start, start + len(word), (word.capitalize(), polarity)))
    return spans


def test_decisive_f1_by_hand():
    references = ["No effusion. Edema.", "Effusion. Effusion.", "Normal heart."]
    predictions = ["No effusion or edema.", "Effusion.", "Edema."]
    # sets: {E-, D-} / {E-, D+}; {E+} / {E+}; {D+} / {}: 2 right of 4 predicted and 3 stated
    scores = evaluate(predictions, references, "decisive", tagger=stated_findings)
    assert scores["decisive_precision"] == pytest.approx(2 / 4)
    assert scores["decisive_recall"] == pytest.approx(2 / 3)
    assert scores["decisive_f1"] == pytest.approx(4 / 7)
    assert scores.per_class == {
        "Edema/absent": {"precision": 0, "recall": 0, "f1": 0, "support": 0},
        "Edema/present": {"precision": 0, "recall": 0, "f1": 0, "support": 1},
        "Effusion/absent": {"precision": 1, "recall": 1, "f1": 1, "support": 1},
        "Effusion/present": {"precision": 1, "recall": 1, "f1": 1, "support": 1},
    }
    assert scores.tagger == "stated_findings"


def test_decisive_is_zero_without_classes_and_reads_the_report_as_written():
    seen = []
    scores = evaluate(
        ["A, B."], ["The  Heart,\nnormal. " + "x " * 80], "decisive", tagger=lambda t: seen.append(t) or []
    )
    assert scores["decisive_f1"] == scores["decisive_precision"] == scores["decisive_recall"] == 0
    assert seen == ["A, B.", "The Heart, normal. " + " ".join(["x"] * 80)]


def test_length_error_by_hand():
    scores = evaluate(["a b", "a b c d", ""], ["a b c d", "a b", "a b c"], "length")
    assert scores["length_error"] == pytest.approx((2 / 4 + 2 / 2 + 3 / 3) / 3)
    assert scores["length_ratio"] == pytest.approx(6 / 9)
    assert scores.per_document["length_error"] == [0.5, 1, 1]
    assert scores.per_document["length_ratio"] == [0.5, 2, 0]


def test_eos_rate_by_hand():
    scores = evaluate(["a"] * 4, ["a"] * 4, "termination", finish_reasons=["eos", "length", "eos", "eos"])
    assert dict(scores) == {"eos_rate": 0.75}
    added = evaluate(["a"], ["a"], "length", finish_reasons=["length"])
    assert added["eos_rate"] == 0
    # The model wrote a stop string as it writes EOS; a call that was cancelled ended nothing.
    reasons = ["stop", "cancelled", "eos", "length"]
    assert evaluate(["a"] * 4, ["a"] * 4, "termination", finish_reasons=reasons)["eos_rate"] == 0.5


@pytest.mark.parametrize(
    ("protocol", "text", "expected"),
    [
        ("raw", " The\r\nHeart,\u2028 is \x85NORMAL. ", "The Heart, is NORMAL."),
        ("lower", " The\r\nHeart,\u2028 is NORMAL. ", "the heart, is normal."),
        *(
            pytest.param("ptb", text, expected, marks=pytest.mark.java)
            for text, expected in [
                ('The Heart\u2028(left) is "NORMAL"; 1.5cm.', "the heart -lrb- left -rrb- is normal 1.5 cm"),
                ("", ""),
                ("...", ""),
            ]
        ),
        ("r2gen", "The Heart is NORMAL.", "the heart is normal ."),
        ("r2gen", "Lungs clear... No effusion, edema; (or) fracture", "lungs clear . no effusion edema or fracture ."),
        ("r2gen", "1. Lungs clear. 2. No edema. 3. T-spine: ok/stable.", "lungs clear . no edema . t-spine okstable ."),
        ("r2gen", "Stable 2. Clear", "stable . clear ."),
        ("r2gen", "Patient's ___ \"size\" is 1.5 cm [a].", "patients size is 15 cm a ."),
        ("r2gen", "a. . b", "a . . b ."),
        ("r2gen", "Level T11. Next", "level t1next ."),
        ("r2gen", "the heart is normal . no effusion .", "the heart is normal . no effusion ."),
        ("r2gen", " \n", ""),
        ("r2gen_mimic", "FINDINGS:\r\n Clear.  No\u2028edema.", "findings clear . no edema ."),
    ],
)  # fmt: skip
def test_protocol_outputs_by_hand(protocol, text, expected):
    predictions, references = PROTOCOLS[protocol].apply([text], ["x", text])
    assert predictions == [expected] and references[1] == expected


@pytest.mark.parametrize(("protocol", "limit"), [("r2gen", 60), ("r2gen_mimic", 100)])
def test_r2gen_counts_the_begin_token_into_the_references_limit(protocol, limit):
    text = " ".join(f"w{i}" for i in range(150))
    predictions, references = PROTOCOLS[protocol].apply([text], [text])
    assert predictions[0].split() == text.split()[:limit]
    assert references[0].split() == text.split()[: limit - 1]
    settings = evaluate(["a"], ["a"], "bleu", protocol, bootstrap=0).protocol
    assert settings["max_prediction_tokens"] == limit and settings["max_reference_tokens"] == limit - 1


@pytest.mark.java
def test_ptb_is_pycocoevalcaps_tokenizer():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    predictions, references = invented_pairs(40)
    references[3] = "Naïve 1 1/2 cm “quote” can't — e.g. 50% & <b>…"
    ours = PROTOCOLS["ptb"].apply(predictions, references)[1]
    theirs = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(references)})
    assert ours == [theirs[i][0] for i in range(40)]


METEOR_TRAPS = [
    "line\nbreak",
    "a\r\u2028b\x85c",
    "|||",
    "a ||| b",
    "",
    "...",
    "\ufeff",
    "é \U0001f600",
    "x" * 5000,
    "$ <b> \x00",
]


def meteor_in_a_child():
    plain = evaluate(*invented_pairs(20), "meteor", "raw")
    predictions, references = [*METEOR_TRAPS, "no edema"], ["ü ||| normal"] * len(METEOR_TRAPS) + ["no edema"]
    trapped = evaluate(predictions, references, "meteor", "raw", bootstrap=0)
    print(json.dumps([plain.to_json(), trapped.to_json()]))


@pytest.fixture(scope="module")
def meteor_scores():
    """Two evaluations in a row under a hostile locale, in a child process so that a stall fails instead of lasting."""
    program = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_metrics as t\n"
    program += "t.meteor_in_a_child()"
    environment = os.environ | {"JAVA_TOOL_OPTIONS": "-Duser.language=de -Duser.country=DE", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return [Scores.from_json(plain) for plain in json.loads(done.stdout)]


@pytest.mark.java
def test_meteor_is_pycocoevalcaps_under_any_locale(meteor_scores):
    from pycocoevalcap.meteor.meteor import Meteor

    corpus, per_document = Meteor().compute_score(*in_coco_shape(*invented_pairs(20), "raw"))
    assert meteor_scores[0]["meteor"] == pytest.approx(corpus, abs=1e-9)
    assert meteor_scores[0].per_document["meteor"] == pytest.approx(per_document, abs=1e-9)


@pytest.mark.java
def test_meteor_survives_awkward_characters(meteor_scores):
    # Every trap shares no word with its reference ("é" is not "ü"), and none shifts the pair after it.
    assert meteor_scores[1].per_document["meteor"] == [0] * len(METEOR_TRAPS) + [1]


@pytest.mark.java
def test_meteor_interval_is_centred_on_the_aggregate(meteor_scores):
    scores = meteor_scores[0]
    low, high = scores.intervals["meteor"]
    assert low < scores["meteor"] < high
    mean = np.mean(scores.per_document["meteor"])
    assert mean != pytest.approx(scores["meteor"], abs=1e-3)
    resampled = resampled_sums(scores.statistics["meteor"], 1000, 0)[:, 0] / 20 - mean + scores["meteor"]
    assert (low, high) == pytest.approx(tuple(np.percentile(resampled, [2.5, 97.5])))
    assert paired_difference(scores, scores, "meteor") == (0, (0, 0))


def fake_java(folder, script: str):
    path = folder / "java"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(folder)


@pytest.mark.parametrize("script", ["echo no memory >&2; exit 1", "read line; echo 1.0; echo broken"])
def test_a_failing_java_program_is_reported_and_ended(tmp_path, monkeypatch, script):
    started = []
    popen = subprocess.Popen

    def recording_popen(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setenv("PATH", fake_java(tmp_path, script) + os.pathsep + os.environ["PATH"])
    monkeypatch.setattr(subprocess, "Popen", recording_popen)
    with pytest.raises(InputError, match="ended early, saying: (no memory|nothing).*java -version"):
        evaluate(["a", "b"], ["a", "b"], "meteor")
    assert len(started) == 1 and started[0].returncode is not None
    with pytest.raises(InputError, match="'ptb' gave [02] lines for 4 texts"):
        evaluate(["a", "b"], ["a", "b"], "bleu", "ptb")


def test_without_java_the_rest_works_and_meteor_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = evaluate(["a b c d e"] * 2, ["a b c d e", "f g"], N_GRAM)
    assert 0 < scores["bleu_4"] < 1
    with pytest.raises(InputError, match="'meteor' runs a Java program.*apt install"):
        evaluate(["a"], ["a"], "meteor")
    with pytest.raises(InputError, match="'ptb' runs a Java program.*apt install"):
        evaluate(["a"], ["a"], "bleu", "ptb")


@pytest.mark.parametrize(("metric", "module"), [("bleu", "bleu.bleu_scorer"), ("rouge_l", "rouge.rouge"),
                                                ("cider", "cider.cider"), ("meteor", "meteor.meteor")])  # fmt: skip
def test_without_pycocoevalcap_the_message_has_the_command(metric, module, monkeypatch):
    monkeypatch.setitem(sys.modules, f"pycocoevalcap.{module}", None)
    with pytest.raises(InputError, match="pip install pycocoevalcap"):
        evaluate(["a", "b"], ["a", "b"], metric)
    assert evaluate(["a"], ["a"], "length")["length_error"] == 0


def test_importing_evaluate_loads_no_optional_package():
    program = (
        "import sys, dive_fast.evaluate\n"
        # torch itself imports triton where it finds it; our kernels stay behind.
        "names = {'pycocoevalcap', 'matplotlib', 'datasets'} & set(sys.modules)\n"
        "print(names | {name for name in sys.modules if name.startswith('dive_fast') and 'triton' in name})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_corpus_perplexity_by_hand():
    assert corpus_perplexity([2.0, 4.0], [2, 1], bootstrap=0) == (pytest.approx(np.exp(2.0)), None)
    value, (low, high) = corpus_perplexity([2.0] * 5, [2] * 5)
    assert value == low == high == pytest.approx(np.e)
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 60, 200)
    nll = tokens * generator.normal(2, 0.3, 200)
    value, (low, high) = corpus_perplexity(nll, tokens)
    assert low < value < high
    # delta method: the standard error of log(ppl) is that of a ratio estimate
    error = np.sqrt(np.sum((nll - np.log(value) * tokens) ** 2)) / tokens.sum()
    assert np.log(high / low) == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert corpus_perplexity(nll, tokens) == (value, (low, high))


@pytest.mark.parametrize(
    ("nll", "tokens", "bootstrap", "message"),
    [
        ([], [], 0, "nll_sums, token_counts"),
        ([1.0], [1, 2], 0, "nll_sums, token_counts"),
        ([1.0, float("nan")], [1, 2], 0, "nll_sums.*entry 1"),
        ([1.0, -2.0], [1, 2], 0, "nll_sums: expected negative log-likelihoods >= 0, entry 1 is -2; negate it"),
        ([1.0, 2.0], [1, 0], 0, "token_counts.*entry 1"),
        ([1.0], [1], -1, "bootstrap"),
    ],
)
def test_corpus_perplexity_refuses_bad_input(nll, tokens, bootstrap, message):
    with pytest.raises(InputError, match=message):
        corpus_perplexity(nll, tokens, bootstrap=bootstrap)
