"""What is done to a text before its n-grams are counted. It moves BLEU a lot, so every score carries its protocol.

White space is collapsed to single spaces first, everywhere: a line break inside a report stalls METEOR's line
protocol, and carriage returns or U+2028 shift the lines of the PTB tokenizer.

- `raw`: nothing more; tokens are what white space separates.
- `lower`: lower case.
- `ptb`: lower case, Penn Treebank tokens, punctuation dropped; the custom of image captioning (COCO). Needs Java.
- `r2gen` (IU X-ray) and `r2gen_mimic` (MIMIC-CXR): the custom of report generation, after the public code of R2Gen
  (Chen et al., EMNLP 2020): runs of dots collapsed, item numbers 1 to 5 dropped, lower case, punctuation dropped
  except hyphens, every sentence closed by a token ".". Of a prediction the first 60 (100) tokens count, of a reference
  the first 59 (99), because R2Gen cuts its references with the begin token included. Empty sentences and numbers glued
  to a word ("L1. ") come out as in R2Gen.
  R2Gen also replaces words rarer than a threshold in its training set by <unk>, in references and predictions. That is
  not done here: it would tie the scores to one vocabulary. Scores differ a little from those of its code for that
  reason.
"""

import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dive_fast.errors import InputError
from dive_fast.metrics.peers import java, pycocoevalcap

R2GEN_DROPPED = str.maketrans("", "", ".,?;*!%^&_+():<=>@[]{}\"/\\'")


def collapse_whitespace(text: str) -> str:
    return " ".join(text.split())


def unchanged(texts: Sequence[str]) -> list[str]:
    return list(texts)


def lower(texts: Sequence[str]) -> list[str]:
    return [text.lower() for text in texts]


def r2gen(texts: Sequence[str]) -> list[str]:
    return [_r2gen(text) for text in texts]


def _r2gen(text: str) -> str:
    if not text:
        return ""  # R2Gen would give a lone ".", which scores against the references' full stops
    text = re.sub(r"\.{2,}", ".", text).replace("1. ", "")
    for number in "2345":
        text = text.replace(f". {number}. ", ". ")
    for number in "2345":
        text = text.replace(f" {number}. ", ". ")
    sentences = text.strip().lower().split(". ")
    return collapse_whitespace(" . ".join(sentence.translate(R2GEN_DROPPED) for sentence in sentences) + " .")


def ptb(texts: Sequence[str]) -> list[str]:
    """Stanford's PTBTokenizer, lower-cased, without pycocoevalcap's list of punctuation tokens.

    The list has brackets in capitals only, so "-lrb-" and "-rrb-" stay, as they do there.

    pycocoevalcap's own wrapper writes its input into site-packages; the same program reads it from stdin here.
    """
    module = pycocoevalcap("tokenizer.ptbtokenizer")
    filled = [i for i, text in enumerate(texts) if text]
    command = [
        java("protocol: 'ptb'"),
        "-cp",
        module.STANFORD_CORENLP_3_4_1_JAR,
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
    ]
    done = subprocess.run(
        command,
        input="".join(texts[i] + "\n" for i in filled).encode(),
        cwd=os.path.dirname(os.path.abspath(module.__file__)),
        capture_output=True,
    )
    lines = done.stdout.decode().split("\n")[:-1]
    if done.returncode != 0 or len(lines) != len(filled):
        said = done.stderr.decode(errors="replace").strip()[-400:]
        raise InputError(
            f"protocol: the Java program of 'ptb' gave {len(lines)} lines for {len(filled)} texts (exit code "
            f"{done.returncode}); it said: {said}; check that `java -version` runs, or use protocol='r2gen'"
        )
    tokenized = [""] * len(texts)
    for i, line in zip(filled, lines, strict=True):
        tokenized[i] = " ".join(token for token in line.rstrip().split(" ") if token not in module.PUNCTUATIONS)
    return tokenized


@dataclass(frozen=True)
class Protocol:
    """A row of PROTOCOLS; `tokenize` takes all texts at once, so that Java starts once."""

    name: str
    tokenize: Callable[[Sequence[str]], list[str]]
    lowercase: bool
    tokenizer: str
    max_prediction_tokens: int | None = None
    max_reference_tokens: int | None = None

    def settings(self) -> dict:
        """The name and every setting, in plain types."""
        return {
            "name": self.name,
            "whitespace": "collapsed",
            "lowercase": self.lowercase,
            "tokenizer": self.tokenizer,
            "max_prediction_tokens": self.max_prediction_tokens,
            "max_reference_tokens": self.max_reference_tokens,
        }

    def apply(self, predictions: Sequence[str], references: Sequence[str]) -> tuple[list[str], list[str]]:
        """Both sides as tokens separated by single spaces."""
        tokenized = self.tokenize([collapse_whitespace(text) for text in (*predictions, *references)])
        n = len(predictions)
        return (
            [_first_tokens(text, self.max_prediction_tokens) for text in tokenized[:n]],
            [_first_tokens(text, self.max_reference_tokens) for text in tokenized[n:]],
        )


def _first_tokens(text: str, limit: int | None) -> str:
    return text if limit is None else " ".join(text.split()[:limit])


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("raw", unchanged, lowercase=False, tokenizer="whitespace"),
        Protocol("lower", lower, lowercase=True, tokenizer="whitespace"),
        Protocol("ptb", ptb, lowercase=True, tokenizer="ptb"),
        Protocol("r2gen", r2gen, True, "r2gen_iu_xray", max_prediction_tokens=60, max_reference_tokens=59),
        Protocol("r2gen_mimic", r2gen, True, "r2gen_mimic_cxr", max_prediction_tokens=100, max_reference_tokens=99),
    )
}
